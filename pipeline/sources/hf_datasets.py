"""Datasets of the Hugging Face Hub, or of its library's formats: ``--data-set hfds/NAME``.

That library is called ``datasets``, like a module of this project. So another process, in which
ours cannot be found, lets the library download and prepare the dataset, and prints the paths of
the prepared Arrow files. These are read here by pyarrow: this process and its loaders never import
the library, and ``datasets`` is always our module.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..images import CorruptImageError, DataError, read_file
from .base import Encoded, file_size

if TYPE_CHECKING:
    import pyarrow as pa

PROJECT = os.path.realpath(Path(__file__).parents[2])  # the folder of our datasets.py
EVALUATION_SPLITS = ("validation", "val", "test")


class HubImages(Encoded):
    """Images in memory-mapped Arrow files.

    A pickled copy, such as a spawned loader's, opens the files again.

    Args:
        title: Name of the split for messages.
        files: Arrow files of the split, in order.
        column: Column of the images: encoded, as paths, or as both.
        targets: Class of each image.
        classes: Names of the classes.

    Raises:
        DataError: A file cannot be read, or the column does not have images.
    """

    def __init__(
        self,
        title: str,
        files: Sequence[str],
        column: str,
        targets: Sequence[int],
        classes: Sequence[str],
    ):
        self.targets, self.classes = np.asarray(targets, np.int64), list(classes)
        self._title, self._files, self._column = title, list(files), column
        chunks = _column(_read_arrow(files), column, title).chunks
        self._parts = [_contents_and_paths(chunk, column, title) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def __reduce__(self) -> tuple:
        state = self._title, self._files, self._column, self.targets, self.classes
        return HubImages, state, {"is_upright": self.is_upright, "is_grey": self.is_grey}

    def name(self, index: int) -> str:
        name, path = f"{self._title}[{index}]", self._get(index, "path")
        return f"{name} ({path})" if path else name

    def read(self, index: int) -> bytes:
        content = self._get(index, "bytes")
        if content is not None:
            return content
        path = self._get(index, "path")
        if not path:
            raise CorruptImageError(f"cannot decode image {self.name(index)}: no bytes, no path")
        return read_file(path)

    def listing(self) -> Iterator[str]:
        import pyarrow.compute as pc

        for part in self._parts:
            count = len(next(iter(part.values())))
            unknown = [None] * count
            paths = part["path"].to_pylist() if "path" in part else unknown
            sizes = pc.binary_length(part["bytes"]).to_pylist() if "bytes" in part else unknown
            for path, size in zip(paths, sizes, strict=True):
                size = file_size(path) if size is None and path else size
                yield f"{os.path.basename(path or '')}, {size} bytes"

    def _get(self, index: int, part: str) -> Any:
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        values = self._parts[chunk].get(part)
        start = self._ends[chunk - 1] if chunk else 0
        return None if values is None else values[int(index - start)].as_py()


def open_hub(
    name: str,
    root: Path | None,
    is_train: bool,
    download: bool,
    image_key: str = "image",
    label_key: str = "label",
) -> HubImages:
    """Open a dataset of the Hub, or a local folder of Parquet, Arrow or image files.

    As in timm's reader, ``hfds/NAME`` has its images in the column ``image`` and its classes in
    ``label``. The first time, what is not in Arrow's format yet is converted, which takes the disk
    space of the images again; image files stay where they are.

    Args:
        name: First argument of ``datasets.load_dataset``.
        root: Cache folder of the library; by default its own.
        is_train: Open the split ``train``, else the first of ``EVALUATION_SPLITS`` that exists.
        download: Let the library use the network, unless its environment variables forbid it.
        image_key: Column of the images.
        label_key: Column of the classes: integers, with or without names.

    Raises:
        DataError: The library or the dataset is missing, or the dataset has other columns.
    """
    found = _ask_library(name, root, download)
    wanted = ("train",) if is_train else EVALUATION_SPLITS
    split = next((split for split in wanted if split in found["splits"]), None)
    if split is None:
        raise DataError(
            f"hfds/{name} has no split {', '.join(wanted)}; it has {', '.join(found['splits'])}"
        )
    title, files = f"hfds/{name} {split}", found["splits"][split]
    targets = _targets(_read_arrow(files), label_key, title)
    classes = found["names"].get(label_key) or _count_classes(found["splits"].values(), label_key)
    if targets.max() >= len(classes):
        raise DataError(f"{title} has class {targets.max()}, but {len(classes)} class names")
    return HubImages(title, files, image_key, targets, classes)


def _ask_library(name: str, root: Path | None, download: bool) -> dict[str, Any]:
    """Return ``splits``, with the Arrow files of each, and ``names``, with those of each column.

    Raises:
        DataError: The library is not installed, or cannot load the dataset.
    """
    program = f"{inspect.getsource(_answer)}\n_answer()"
    request = {"name": name, "cache": root and str(root), "hidden": PROJECT}
    offline = {} if download else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(request)],
        env=os.environ | offline,
        stdin=subprocess.DEVNULL,  # nobody can answer questions
        stdout=subprocess.PIPE,  # progress goes to the other stream
        text=True,
    )
    if done.returncode:
        raise DataError(f"loading hfds/{name} ended with status {done.returncode}, see above")
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("missing"):
        raise DataError(f"hfds/{name} needs Hugging Face's library: pip install datasets")
    if "error" in found:
        hint = "" if download or os.path.exists(name) else "; --download fetches it"
        raise DataError(f"cannot load hfds/{name}: {found['error']}{hint}")
    return found


def _answer() -> None:
    """Load a dataset by the library and print the result of :func:`_ask_library`.

    This is the whole program of another process, so it cannot use anything else of this file.
    """
    import contextlib
    import importlib.util
    import json
    import os
    import sys

    asked = json.loads(sys.argv[1])
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != asked["hidden"]]
    library = "datasets"  # Hugging Face's, since our folder is hidden
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:  # missing, or a folder of data
        print(json.dumps({"missing": True}))
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):
            loaded = importlib.import_module(library).load_dataset(
                asked["name"], cache_dir=asked["cache"], keep_in_memory=False
            )
            files = {
                split: [file["filename"] for file in part.cache_files]
                for split, part in loaded.items()
            }
            features = next(iter(loaded.values())).features
            names = {key: getattr(feature, "names", None) for key, feature in features.items()}
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    else:
        print(json.dumps({"splits": files, "names": names}))


def _read_arrow(files: Sequence[str]) -> "pa.Table":
    """Return the rows of memory-mapped Arrow files."""
    import pyarrow as pa  # optional: comes with the library

    try:
        return pa.concat_tables(
            [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {', '.join(map(str, files[:3]))}: {error}") from error


def _column(table: "pa.Table", key: str, title: str) -> "pa.ChunkedArray":
    if key not in table.column_names:
        raise DataError(f"{title} has no column {key}; it has {_describe(table)}")
    return table[key]


def _describe(table: "pa.Table") -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def _targets(table: "pa.Table", key: str, title: str) -> np.ndarray:
    """Return the class of each image, ``N`` of int64."""
    import pyarrow.types as kind

    column = _column(table, key, title)
    if not kind.is_integer(column.type):
        raise DataError(
            f"column {key} of {title} has type {column.type} instead of class numbers: images"
            f" have one class each; the columns are {_describe(table)}"
        )
    if not len(column):
        raise DataError(f"{title} has no images")
    targets = column.fill_null(-1).to_numpy().astype(np.int64)
    if targets.min() < 0:
        raise DataError(f"{title} has images without a class: row {targets.argmin()}")
    return targets


def _count_classes(splits: Iterable[Sequence[str]], key: str) -> list[str]:
    """Return the numbers up to the highest of any split, as names."""
    import pyarrow.compute as pc

    highest = [pc.max(_read_arrow(files)[key]).as_py() for files in splits]
    return [str(number) for number in range(1 + max(top for top in highest if top is not None))]


def _contents_and_paths(chunk: "pa.Array", key: str, title: str) -> Mapping[str, "pa.Array"]:
    """Return the encoded images as ``bytes``, their paths as ``path``, or both, ``N`` each."""
    import pyarrow.types as kind

    if kind.is_struct(chunk.type) and {"bytes", "path"} <= {field.name for field in chunk.type}:
        return {"bytes": chunk.field("bytes"), "path": chunk.field("path")}
    if kind.is_binary(chunk.type) or kind.is_large_binary(chunk.type):
        return {"bytes": chunk}
    if kind.is_string(chunk.type) or kind.is_large_string(chunk.type):
        return {"path": chunk}
    raise DataError(f"column {key} of {title} has type {chunk.type} instead of images")
