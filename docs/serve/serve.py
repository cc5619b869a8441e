"""Classify the images that are posted: ``python serve.py pixels.onnx 8000``."""

import io
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy
import onnxruntime
from PIL import Image, ImageOps

LIMIT = 20 * 2**20  # bytes of a request
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
Image.MAX_IMAGE_PIXELS = 2**25  # Pillow refuses images of more than twice as many

session = onnxruntime.InferenceSession(sys.argv[1])
about = session.get_modelmeta().custom_metadata_map
keys = ("input_size", "classes", "short_side", "mean", "crop_pct")
size, classes, short, mean, crop_pct = (json.loads(about[key]) for key in keys)
mode, resample = about["crop_mode"], Image.Resampling[about["interpolation"].upper()]
whole = [int(side / crop_pct) for side in reversed(size)]  # width, height
shape = (1, *size, len(mean))
turns = threading.Semaphore(os.cpu_count())  # images that are decoded at once


def place(image, sides, fill=(0, 0, 0)):
    """Crop an image around its centre, or pad it."""
    pairs = zip(image.size, sides, strict=True)
    corner = ((to - of) // 2 if to > of else -round((of - to) / 2) for of, to in pairs)
    canvas = Image.new(image.mode, tuple(sides), fill[: len(mean)])
    canvas.paste(image, tuple(corner))
    return canvas


def read_pixels(data):
    """Return an encoded image as the model expects it, ``1 H W C``."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))
    image = image.convert("RGB" if len(mean) == 3 else "L")
    if mode == "center":  # at most 8:1
        image = place(image, [min(side, 8 * min(image.size)) for side in image.size])
    ratios = [of / to for of, to in zip(image.size, whole, strict=True)]
    ratio = max(ratios) if mode == "border" else min(ratios)
    sides = whole if mode == "squash" else [round(side / ratio) for side in image.size]
    sides = [side * short // min(image.size) for side in image.size] if short else sides
    fill = tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0)
    return numpy.array(place(image.resize(sides, resample), size[::-1], fill)).reshape(shape)


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds without a byte

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self.answer(411, {"error": "Content-Length is missing"})
        if len(length) > 9 or int(length) > LIMIT:
            self.answer(413, {"error": f"more than {LIMIT} bytes"})
            return self.rfile.read(LIMIT)  # who is still sending would not see the answer
        data = self.rfile.read(int(length))
        try:
            with turns:
                pixels = read_pixels(data)
        except Exception as error:  # decoders raise any
            return self.answer(400, {"error": f"cannot read the image: {error}"})
        logits = session.run(None, {"pixels": pixels})[0][0]
        odds = numpy.exp(logits - logits.max())
        names = dict(enumerate(classes)) or {i: str(i) for i in range(len(odds))}
        self.answer(200, {names[i]: float(odds[i] / odds.sum()) for i in logits.argsort()[:-6:-1]})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler) as server:
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
