// What an ONNX file of tools.export says of its images, and images made so: resized as Pillow
// does, which a canvas does not. Where Pillow resizes the height first, as since version 13 for
// some sizes, a byte may be off by 2.

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    at(x) {
      x = Math.abs(x);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    },
  },
  lanczos: { support: 3, at: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};
const BITS = 22; // of Pillow's fixed-point weights

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

// Metadata of an ONNX file (Uint8Array): the field metadata_props, number 14 of ModelProto.
export function metadata(bytes) {
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const parts = Object.fromEntries(fields(entry));
    const text = (part) => new TextDecoder().decode(part);
    found[text(parts[1])] = text(parts[2] ?? new Uint8Array());
  }
  return found;
}

// Yields number and content of the length-delimited fields of a message of Protocol Buffers.
function* fields(bytes) {
  let at = 0;
  const number = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = number();
    const kind = key % 8;
    if (kind === 0) number();
    else if (kind === 2) {
      const length = number();
      yield [(key - kind) / 8, bytes.subarray(at, at + length)];
      at += length;
    } else at += kind === 1 ? 8 : 4;
  }
}

// The model's input, H W C of bytes, of an image of RGBA as a canvas gives it.
export function modelInput(rgba, width, height, about) {
  const [rows, columns] = JSON.parse(about.input_size);
  const mean = JSON.parse(about.mean);
  const filter = FILTERS[about.interpolation];
  if (!filter) throw new Error(`unknown interpolation ${about.interpolation}`);
  const whole = [columns, rows].map((side) => Math.trunc(side / about.crop_pct));
  const short = Number(about.short_side);
  const fill = mean.map((value) => (about.crop_mode === "border" ? round(255 * value) : 0));
  let image = channels(rgba, width, height, mean.length);
  if (about.crop_mode === "center") {
    const most = 8 * Math.min(width, height);
    image = place(image, Math.min(width, most), Math.min(height, most), fill);
  }
  const sides = [image.width, image.height];
  const ratios = sides.map((side, i) => side / whole[i]);
  const ratio = about.crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  let target = about.crop_mode === "squash" ? whole : sides.map((side) => round(side / ratio));
  if (short) target = sides.map((side) => Math.floor((side * short) / Math.min(...sides)));
  image = transpose(resizeWidth(image, target[0], filter));
  image = transpose(resizeWidth(image, target[1], filter));
  return place(image, columns, rows, fill).data;
}

// Rounds halves to even, as Python does.
function round(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

// RGB or, of one channel, Pillow's luma.
function channels(rgba, width, height, count) {
  const data = new Uint8Array(width * height * count);
  for (let from = 0, to = 0; to < data.length; from += 4, to += count) {
    const [r, g, b] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    if (count === 1) data[to] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
    else data.set([r, g, b], to);
  }
  return { data, width, height, count };
}

// Crops around the centre, or pads.
function place(image, width, height, fill) {
  const { count } = image;
  const corner = (of, to) => (to > of ? Math.floor((to - of) / 2) : -round((of - to) / 2));
  const [left, top] = [corner(image.width, width), corner(image.height, height)];
  const data = new Uint8Array(width * height * count);
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < count; c++, at++) {
        const [fromX, fromY] = [x - left, y - top];
        const inside = fromX >= 0 && fromX < image.width && fromY >= 0 && fromY < image.height;
        data[at] = inside ? image.data[(fromY * image.width + fromX) * count + c] : fill[c];
      }
  return { data, width, height, count };
}

function transpose(image) {
  const { width, height, count } = image;
  const data = new Uint8Array(image.data.length);
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < count; c++) data[(x * height + y) * count + c] = image.data[at++];
  return { data, width: height, height: width, count };
}

// Resizes along x; widened by the scale, the filter averages as many pixels as become one.
function resizeWidth(image, width, filter) {
  if (width === image.width) return image;
  const { height, count } = image;
  const data = new Uint8ClampedArray(width * height * count);
  const scale = image.width / width;
  const stretch = Math.max(scale, 1);
  for (let x = 0; x < width; x++) {
    const center = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - filter.support * stretch + 0.5));
    const end = Math.min(image.width, Math.trunc(center + filter.support * stretch + 0.5));
    const weights = [];
    for (let i = first; i < end; i++) weights.push(filter.at((i - center + 0.5) * (1 / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    weights.forEach((weight, i) => {
      const fixed = (weight / sum) * 2 ** BITS;
      weights[i] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
    for (let y = 0; y < height; y++)
      for (let c = 0; c < count; c++) {
        let total = 2 ** (BITS - 1);
        let at = (y * image.width + first) * count + c;
        for (const weight of weights) {
          total += weight * image.data[at];
          at += count;
        }
        data[(y * width + x) * count + c] = total >> BITS;
      }
  }
  return { data, width, height, count };
}
