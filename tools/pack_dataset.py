"""Pack an image folder into shards, tar files in WebDataset's format with an index.

``python -m tools.pack_dataset --data-path FOLDER --output OUT`` packs FOLDER/train and FOLDER/val
into ``OUT/train-000000.tar``, ... and ``OUT/val-000000.tar``, ..., in random order, so that every
shard has images of all classes. ``--index PATTERN`` writes the index of shards that were made
elsewhere.

A split is written in ``OUT/.SPLIT.partial`` and moved once it is complete, the index last. After
an interruption, the same command resumes after the last complete shard.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset import TarWriter

from pipeline.images import CorruptImageError, DataError
from pipeline.sources import shard_index
from pipeline.sources.base import Encoded, Files, Strings
from pipeline.sources.class_names import read_class_names
from pipeline.sources.download import PIPE, REMOTE, Cache, default_folder, locked
from pipeline.sources.labels import open_images
from pipeline.sources.listing import suffix_of
from pipeline.sources.shards import scan_shards
from pipeline.sources.split import FLAGS, HoldOut
from pipeline.sources.summary import lines_of, orientation_lines, record_of
from pipeline.workers import worker_init_fn
from tools import cli
from tools.files import folder_for
from training.files import OutputError, write_atomically
from training.parser import Parser, usable_cpus
from training.progress import shown
from utils import log


class PackedSample(NamedTuple):
    """An image as it is packed; if it is corrupt, ``data`` is None and ``suffix`` the reason."""

    data: bytes | None
    suffix: str


class Encoder(Dataset):
    """Images as they are packed: valid, and with a short side of at most ``short_side`` pixels.

    Larger ones are resized as in evaluation, bicubic with antialiasing and torchvision's
    rounding, so that evaluation at that size does not resize again. All others keep their bytes.
    """

    def __init__(self, images: Encoded, short_side: int | None, quality: int):
        self.images, self.short_side, self.quality = images, short_side, quality

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PackedSample:
        try:
            data = self.images.read(index)
            image = self.images.decode(data, index)
        except CorruptImageError as error:
            return PackedSample(None, str(error))
        if self.short_side is None or min(image.size) <= self.short_side:
            return PackedSample(data, suffix_of(self.images.name(index), data)[1:])
        short = min(image.size)
        size = [self.short_side * side // short for side in image.size]
        file = io.BytesIO()
        image.resize(size, resample=3).save(file, "JPEG", quality=self.quality)
        return PackedSample(file.getvalue(), "jpg")


def make_keys(images: Files) -> list[str]:
    """Return a unique key for each image: its path in the split, without dots, which end a key."""
    keys, seen = [], set()
    for name in images.names():
        path = str(Path(name).with_suffix(""))
        stem = re.sub(r"^__", "x__", path.replace(".", "_"))  # __NAME__ is passed over
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        key = next(key for key in itertools.chain([stem], numbered) if key not in seen)
        seen.add(key)
        keys.append(key)
    return keys


class Split:
    """One split of an image folder, ``train`` or ``val``, to be packed."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        held_out = HoldOut.of(vars(args))
        images = open_images(args.data_path, name == "train", held_out, args.labels)
        self.images = images.decoded_as(args.exif)
        for line in lines_of(name, self.images) + orientation_lines(self.images):
            log(line)
        self.keys = make_keys(self.images)
        self.order = np.random.default_rng(args.seed).permutation(len(self.keys)).tolist()
        self.output, self.partial = args.output, args.output / f".{name}.partial"
        listing = json.dumps([self.images.classes, self.keys, self.images.targets.tolist()])
        self.plan = {
            "images": len(self.keys),
            "listing": hashlib.sha256(listing.encode()).hexdigest(),
            "seed": args.seed,
            "short_side": args.short_side,
            "quality": args.quality if args.short_side else None,
            "shard_size": args.shard_size,
            "shard_images": args.shard_images,
        } | ({"exif": True} if args.exif else {})  # older indices do not have it

    def pack(self) -> None:
        """Write the missing shards and the index."""
        if self._is_packed():
            print(f"{self.output / self.name}.json is complete: nothing to do")
        else:
            self.partial.mkdir(parents=True, exist_ok=True)
            with locked(self.partial / "lock"):
                if not self._is_packed():  # by another process, meanwhile
                    records = self._records()
                    self._write_shards(records)
                    self._publish(records)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _is_packed(self) -> bool:
        index = self.output / f"{self.name}.json"
        if not index.exists():
            return False
        if read_json(index).get("plan") == self.plan:
            return True
        raise OutputError(
            f"{index} lists shards of other images or other flags: remove it and its shards, or"
            f" choose another --output"
        )

    def _records(self) -> list[dict[str, Any]]:
        """Return the records of an earlier run with the same plan; remove all of another plan."""
        plan = self.partial / "plan.json"
        same = plan.exists() and read_json(plan) == self.plan
        found = [read_json(path) for path in sorted(self.partial.glob(f"{self.name}-*.json"))]
        if not same and found:
            print(f"{self.partial} has shards of other images or flags: restarting")
            for record in found:  # shards that were moved already
                (self.output / record["shard"]["name"]).unlink(missing_ok=True)
        for path in self.partial.iterdir():
            if path.name != "lock" and (not same or path.suffix == ".tmp"):
                path.unlink()
        known = {record["shard"]["name"] for record in found}
        others = {path.name for path in self.output.glob(f"{self.name}-*.tar")} - known
        if others:
            raise OutputError(
                f"{self.output} has shards without an index, as {min(others)}: remove them, or"
                f" choose another --output"
            )
        write(plan, self.plan)
        return found if same else []

    def _write_shards(self, records: list[dict[str, Any]]) -> None:
        """Write the missing shards and append their records."""
        position = sum(record["taken"] for record in records)
        if records and position < len(self.order):
            print(f"{self.name}: resuming after {len(records)} shards")
        encoder = Encoder(self.images, self.args.short_side, self.args.quality)
        loader = DataLoader(
            encoder,
            batch_size=None,
            sampler=self.order[position:],
            num_workers=self.args.num_workers,
            worker_init_fn=worker_init_fn,
        )
        samples = shown(
            zip(self.order[position:], loader, strict=True),
            *(f"{self.name}, images packed", len(self.order), position),
        )
        while position < len(self.order):
            record, members = self._write_shard(len(records), samples)
            name = self.partial / record["shard"]["name"]
            write(name.with_suffix(".npz"), members.to_bytes())
            write(name.with_suffix(".json"), record)
            records.append(record)
            position += record["taken"]
            tqdm.write("{name}: {images:,} images, {size:,} bytes".format(**record["shard"]))

    def _write_shard(
        self, number: int, samples: Iterator[tuple[int, PackedSample]]
    ) -> tuple[dict[str, Any], shard_index.Members]:
        """Write a shard; return its record and its members as read back from the disk."""
        path = self.partial / f"{self.name}-{number:06d}.tar"
        record: dict[str, Any] = {"taken": 0, "left_out": []}
        written: list[tuple[str, int, int]] = []
        verified: list[shard_index.Members] = []

        def fill(file: BinaryIO) -> None:
            size, limit = 0, self.args.shard_images
            # PAX has names of any length
            with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
                for index, sample in samples:
                    record["taken"] += 1
                    if sample.data is None:
                        if self.args.on_corrupt == "error":
                            raise DataError(
                                f"{sample.suffix} (--on-corrupt skip omits such images)"
                            )
                        tqdm.write(f"omitted: {sample.suffix}", file=sys.stderr)
                        record["left_out"].append(sample.suffix)
                        continue
                    key, target = self.keys[index], int(self.images.targets[index])
                    parts = {sample.suffix: sample.data, "cls": str(target).encode()}
                    writer.write({"__key__": key, **parts})
                    written.append((f"{key}.{sample.suffix}", target, zlib.crc32(sample.data)))
                    size += len(sample.data)
                    is_full = size >= self.args.shard_size * 1e6
                    is_full |= 2 * len(written) >= shard_index.MAX_MEMBERS
                    if len(written) == limit or (limit is None and is_full):
                        break

        def verify(temporary: Path) -> None:
            with temporary.open("rb") as file:
                members = shard_index.scan_shard(file, str(temporary), with_checksums=True)
                digest = shard_index.sha256_of(file)
            names = Strings(members.names, members.name_sizes)
            if [*zip(names, members.targets, members.checksums, strict=True)] != written:
                raise OSError("the disk does not have what was written")
            verified.append(members)
            size = temporary.stat().st_size
            record["shard"] = asdict(shard_index.Shard(path.name, size, digest, len(written)))

        write_atomically(path, fill, verify)
        return record, verified[0]

    def _publish(self, records: list[dict[str, Any]]) -> None:
        """Move the shards to their folder, the index last."""
        parts, shards = [], [shard_index.Shard(**record["shard"]) for record in records]
        for shard in shards:
            path = (self.partial / shard.name).with_suffix(".npz")
            data = path.read_bytes()
            parts.append(shard_index.Members.from_bytes(data, str(path), shard.images))
            if (self.partial / shard.name).exists():  # else it was moved before
                os.replace(self.partial / shard.name, self.output / shard.name)
        members = shard_index.Members.joined(parts)
        index = shard_index.Index(list(self.images.classes), shards, members)
        left_out = [reason for record in records for reason in record["left_out"]]
        passed_over = record_of(self.images)["left_out"]
        notes = {"plan": self.plan, "left_out": left_out, "passed_over": passed_over}
        write_index(index, self.partial / self.name, **notes)
        for name in (f"{self.name}.npz", f"{self.name}.json"):
            os.replace(self.partial / name, self.output / name)
        count = f"{sum(shard.images for shard in shards):,} images in {len(shards)} shards"
        print(f"{self.name}: {count}, {len(left_out)} corrupt ones omitted")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of this tool."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def write(path: Path, data: bytes | dict[str, Any]) -> None:
    """Write bytes, or JSON, atomically."""
    if isinstance(data, dict):
        data = json.dumps(data).encode()
    write_atomically(path, lambda file: file.write(data))


def write_index(index: shard_index.Index, stem: Path, **notes: Any) -> None:
    """Write an index as ``STEM.npz`` and then ``STEM.json``."""
    data = index.members.to_bytes()
    part = shard_index.Part(f"{stem.name}.npz", len(data), hashlib.sha256(data).hexdigest())
    write(stem.with_name(part.name), data)
    write(stem.with_name(f"{stem.name}.json"), index.to_json(part, **notes).encode())


def index_shards(args: argparse.Namespace) -> None:
    """Write the index of the shards ``args.index``."""
    paths = shard_index.expand_pattern(args.index)
    folders = {shard_index.split_path(path)[0] for path in paths}
    if len(folders) > 1 or args.index.startswith(PIPE):
        raise DataError(f"{args.index}: an index needs all shards in one folder, next to it")
    remote = args.index.startswith(REMOTE)
    if remote and args.output is None:
        raise DataError(f"{args.index} is remote: name a folder for its index (--output)")
    classes = read_class_names(args.classes) if args.classes else None
    cache = Cache(args.shard_cache or default_folder(args.index)) if remote else None
    stem = Path(args.output or folders.pop()) / shard_index.index_name(args.index)
    with folder_for("--output" if args.output else "--index", stem.parent):
        index = scan_shards(paths, cache, classes, with_checksums=True)
        write_index(index, stem)
    print(
        f"{stem}.json: {len(index.members.sizes):,} images of {len(index.classes):,} classes in"
        f" {len(paths)} shards"
    )


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``; pack or index."""
    parser = Parser("python -m tools.pack_dataset", description=__doc__.splitlines()[0])
    add = parser.add_argument
    folder = "folder of train/CLASS/* and val/CLASS/*, or with --val-split, --k-folds or --labels"
    add("--data-path", type=Path, metavar="FOLDER", help=folder)
    add("--output", type=Path, metavar="FOLDER", help="folder for shards and index")
    splits = ["train", "val"]
    add("--splits", nargs="+", choices=splits, default=splits, help="splits to pack")
    short = "resize images whose short side is longer to S pixels; default: no resizing"
    add("--short-side", type=int, metavar="S", help=short)
    quality = "JPEG quality of resized images, from 1 to 100"
    add("--quality", type=int, default=90, metavar="Q", help=quality)
    turned = "turn resized images by their EXIF orientation; the others keep their bytes and tags"
    add("--exif", action=argparse.BooleanOptionalAction, default=False, help=turned)
    size = parser.add_mutually_exclusive_group().add_argument
    size("--shard-size", type=float, default=256, metavar="MB", help="size of a shard, 10^6 bytes")
    size("--shard-images", type=int, metavar="N", help="images per shard, instead of --shard-size")
    names, workers = ("--num_workers", "--num-workers"), "processes that decode images"
    add(*names, type=int, default=usable_cpus(), metavar="N", help=workers)
    corrupt = "error: stop at an unreadable image; skip: leave it out and list it in the index"
    add("--on-corrupt", choices=["error", "skip"], default="error", help=corrupt)
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of the images")
    index = "only write the index of these shards, such as 'train-{000000..000146}.tar'"
    add("--index", metavar="PATTERN", help=index)
    classes = "with --index: class names, one per line"
    add("--classes", type=Path, metavar="FILE", help=classes)
    cache = "with --index: cache of remote shards; default: a folder among the temporary files"
    add("--shard-cache", type=Path, metavar="FOLDER", help=cache)
    cli.add_flags(parser, [*FLAGS, "labels"])
    args = parser.parse_args(argv)
    HoldOut.of(vars(args))  # raises an error
    if args.index is None and (args.data_path is None or args.output is None):
        parser.error("give --data-path and --output, or --index")
    if min(args.shard_size, args.shard_images or 1, args.short_side or 1) <= 0:
        parser.error("--shard-size, --shard-images and --short-side must be positive")
    if not 1 <= args.quality <= 100:
        parser.error(f"--quality {args.quality} must be within 1..100")
    try:
        if args.index is not None:
            index_shards(args)
        else:
            with folder_for("--output", args.output):
                for split in [Split(name, args) for name in args.splits]:
                    split.pack()
    except OSError as error:
        raise OutputError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
