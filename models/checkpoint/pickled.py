"""What a pickle would make ``torch.load(weights_only=True)`` do, found out beforehand.

That unpickler calls no foreign code, but it believes what it reads: it takes more bytes from a
storage than the file has, fills memory through functions that it allows, and hashes or prints
structures whose parts repeat each other until the end of time. :func:`follow` goes through the
opcodes first, with stand-ins for the values, and lets through what torch.save writes for dense
tensors and plain values. The opcodes are described in the standard library's ``pickletools``.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch

MAX_OPCODES = 1 << 21  # some 30 make a tensor and its place in a dict
MAX_PARTS = 1 << 18  # half a KB of memory each, or more; eight make a tensor
MAX_DEPTH = 100
MAX_DIMS = 64
MAX_LINE = 256
MAX_KEY = 64  # weight
FREE_WEIGHT = 1 << 20
DAMAGED = "is not a checkpoint, or damaged"
UNUSUAL = "is refused: it calls {} as torch.save never does"

BYTE, WORD, LONG = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I")
CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
NUMBERS = {b"J": struct.Struct("<i"), b"K": BYTE, b"M": WORD, b"G": struct.Struct(">d")}
TEXTS = {b"X": LONG, b"U": BYTE, b"\x8a": BYTE}  # str, bytes, int, by their length
PUTS, GETS = {b"q": BYTE, b"r": LONG}, {b"h": BYTE, b"j": LONG}
EMPTY = {b"}": "dict", b"]": "list", b")": "tuple", b"\x8f": "set"}
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
STORAGES = {"torch.storage.UntypedStorage": 1} | {
    f"torch.{name}Storage": size
    for size, names in (
        (1, ("Byte", "Char", "Bool")),
        (2, ("Half", "BFloat16", "Short")),
        (4, ("Float", "Int")),
        (8, ("Double", "Long", "ComplexFloat")),
        (16, ("ComplexDouble",)),
    )
    for name in names
}


class UnsafeFileError(ValueError):
    """A file is damaged, or asks for what it may not; the message continues the file's name."""


class _Part:
    """Stands for a value that is no constant.

    Attributes:
        kind: The type, where more can be put in or taken out, or what else it is good for.
        name: Of a global; of what was called to make it; of a storage its bytes and itemsize.
        items: Of a tuple or a list what is in it, of a dict its keys.
        weight: Constants within, those of shared parts counted every time they are met.
        depth: Levels of parts within.
        used: It is within another part.
    """

    __slots__ = ("depth", "items", "kind", "name", "used", "weight")

    def __init__(self, kind: str, name: Any):
        self.kind, self.name, self.items = kind, name, ()
        self.weight, self.depth, self.used = 1, 0, False


def is_part(value: Any, kind: str, name: str | None = None) -> bool:
    """Whether a value is a stand-in of this kind, and made by what has this name."""
    return isinstance(value, _Part) and value.kind == kind and value.name == name


def follow(
    file: BinaryIO, size: int, max_bytes: int, storage: Callable[[str, int], None]
) -> _Part | Any:
    """Follow one pickle to its end.

    Args:
        file: Stands where the pickle begins.
        size: Bytes that the pickle may have.
        max_bytes: Bytes that all tensors may have, in their full shapes.
        storage: Called with the key and the bytes of storages that the pickle refers to.

    Returns:
        A stand-in of its value; constants as they are.

    Raises:
        UnsafeFileError: It is not to be given to torch.load.
    """
    machine = _Machine(file, size, max_bytes, storage)
    try:
        for _ in range(MAX_OPCODES):
            op = machine.read(1)
            if op == b".":
                return machine.stack.pop()
            machine.step(op)
    except UnsafeFileError:
        raise
    except (LookupError, ValueError) as error:  # of the stack, of texts, of unpacked arguments
        raise UnsafeFileError(DAMAGED) from error
    raise UnsafeFileError(f"is refused: its pickle has more than {MAX_OPCODES} opcodes")


class _Machine:
    """The state of a pickle's reader; see :func:`follow`."""

    def __init__(
        self, file: BinaryIO, size: int, max_bytes: int, storage: Callable[[str, int], None]
    ):
        self.file, self.size, self.bytes_left, self.storage = file, size, max_bytes, storage
        self.max_weight = FREE_WEIGHT + 8 * size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.parts = 0
        allowed = torch.serialization.get_safe_globals()  # by the caller, to be called as may be
        self.trusted = {
            f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}" for f in allowed
        } - CALLS.keys()

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, all of them."""
        data = self.file.read(count) if count <= self.size else b""
        if len(data) < count:
            raise UnsafeFileError("is damaged or cut short (its pickle ends early)")
        return data

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.read(form.size))[0]

    def part(self, kind: str, items: Sequence[Any] = (), name: Any = None) -> _Part:
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise UnsafeFileError(f"is refused: it has more than {MAX_PARTS} parts")
        part = _Part(kind, name)
        if kind == "tuple":
            part.items = tuple(items)
        elif kind in ("list", "dict"):
            part.items = []
        self.put(items, part)
        return part

    def put(self, items: Sequence[Any], part: _Part) -> None:
        """Count ``items`` into a part that is within no other yet: so none contains itself."""
        for item in items:
            if isinstance(item, _Part):
                item.used = True
                part.weight += item.weight
                part.depth = max(part.depth, item.depth + 1)
            else:
                part.weight += 1 + (len(item) >> 4 if isinstance(item, str | bytes) else 0)
        if part.used:
            raise UnsafeFileError(
                "is refused: a part of it contains itself, or changes after its use"
            )
        if part.depth > MAX_DEPTH:
            raise UnsafeFileError(f"is refused: it is nested more than {MAX_DEPTH} deep")
        if part.weight > self.max_weight:
            raise UnsafeFileError("is refused: its parts repeat each other beyond any measure")

    def top(self, kind: str) -> _Part:
        """The part that an opcode adds to."""
        part = self.stack[-1]
        if not isinstance(part, _Part) or part.kind != kind:
            raise UnsafeFileError(DAMAGED)
        return part

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def step(self, op: bytes) -> None:
        """Follow one opcode, those that torch's unpickler knows."""
        if op in PUTS:
            self.memo[self.number(PUTS[op])] = self.stack[-1]
        elif op in GETS:
            self.stack.append(self.memo[self.number(GETS[op])])
        elif op in NUMBERS:
            self.stack.append(self.number(NUMBERS[op]))
        elif op in TEXTS:
            data = self.read(self.number(TEXTS[op]))
            if op == b"X":
                data = str(data, "utf-8", "surrogatepass")
            self.stack.append(
                int.from_bytes(data, "little", signed=True) if op == b"\x8a" else data
            )
        elif op == b"(":
            self.marks.append(self.stack)
            self.stack = []
            if len(self.marks) > MAX_DEPTH:
                raise UnsafeFileError(f"is refused: it is nested more than {MAX_DEPTH} deep")
        elif op == b"t" or op in TUPLES:
            items = self.pop_mark() if op == b"t" else self.pop(TUPLES[op])
            self.stack.append(self.part("tuple", items))
        elif op in EMPTY:
            self.stack.append(self.part(EMPTY[op]))
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op == b"c":
            self.stack.append(self.find())
        elif op in (b"R", b"\x81"):
            self.stack.append(self.call(*self.pop(2), new=op == b"\x81"))
        elif op == b"Q":
            self.stack.append(self.refer(self.stack.pop()))
        elif op in (b"u", b"s"):
            items = self.pop_mark() if op == b"u" else self.pop(2)
            check_keys(items[::2])
            self.put(items, self.top("dict"))
            self.stack[-1].items += items[::2]  # values kept would slow Python's collector
        elif op in (b"e", b"a"):
            items = self.pop_mark() if op == b"e" else self.pop(1)
            self.put(items, self.top("list"))
            self.stack[-1].items += items
        elif op == b"b":
            self.build(*self.stack[-2:])
            self.stack.pop()
        elif op != b"\x80" or self.read(1) != b"\2":
            raise UnsafeFileError(f"{DAMAGED} (its pickle is not as torch.save writes it)")

    def find(self) -> _Part:
        """A function, type or dtype by its name."""
        lines = [self.file.readline(MAX_LINE) for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise UnsafeFileError(DAMAGED)
        module, name = (line[:-1].decode() for line in lines)
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not (name in CALLS or name in STORAGES or name in self.trusted or _dtype(name)):
            raise UnsafeFileError(
                f"is refused: it asks for {name}, and a checkpoint may hold tensors and plain "
                f"values only"
            )
        return self.part("global", name=name)

    def call(self, called: Any, arguments: Any, new: bool) -> _Part:
        """What a call returns; ``new`` where a type makes an object without its ``__init__``."""
        name = getattr(called, "name", None)
        if not isinstance(arguments, _Part) or arguments.kind != "tuple":
            raise UnsafeFileError(DAMAGED)
        if is_part(called, "global", name) and name in self.trusted:
            return self.part("object", [arguments], "trusted")
        if not is_part(called, "global", name) or name not in CALLS:
            raise UnsafeFileError("is refused: it calls what is no function")
        if new != (name == "argparse.Namespace"):
            raise UnsafeFileError(UNUSUAL.format(name))
        kind, check = CALLS[name]
        if not check(arguments.items, self):
            raise UnsafeFileError(UNUSUAL.format(name))
        return self.part(kind, [arguments], name)

    def refer(self, reference: Any) -> _Part:
        """A storage, which is in the file outside of the pickle."""
        items = reference.items if isinstance(reference, _Part) else ()
        if len(items) == 6 and items[5] is None:
            items = items[:5]  # the legacy format adds a view, which torch.save leaves None
        if len(items) != 5 or items[0] not in ("storage", b"storage"):
            raise UnsafeFileError(DAMAGED)
        kind, key, place, count = items[1:]
        itemsize = STORAGES.get(kind.name) if isinstance(kind, _Part) else None
        if not (itemsize and isinstance(key, str) and isinstance(place, str) and is_size(count)):
            raise UnsafeFileError(DAMAGED)
        self.storage(key, count * itemsize)
        return self.part("storage", name=(count * itemsize, itemsize))

    def build(self, made: Any, state: Any) -> None:
        """Give an object its attributes."""
        name = made.name if isinstance(made, _Part) else None
        if name in ("argparse.Namespace", "collections.OrderedDict"):
            names = state.items if is_part(state, "dict") else [None]
            # __class__ and its like are no values
            if not all(isinstance(name, str) and not name.startswith("__") for name in names):
                raise UnsafeFileError("is refused: it sets what is no attribute of plain values")
        elif name != "trusted":
            raise UnsafeFileError("is refused: it changes what is no plain value")
        self.put([state], made)


def _dtype(name: str) -> torch.dtype | None:
    owner, _, last = name.rpartition(".")
    found = getattr(torch, last, None) if owner == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def is_size(value: Any) -> bool:
    """Whether a value can be a length, an offset or a stride."""
    return type(value) is int and 0 <= value < 1 << 62


def check_keys(keys: Sequence[Any]) -> bool:
    """Refuse keys that take long to hash: a tuple is walked anew each time, at any depth."""
    for key in keys:
        if isinstance(key, _Part) and (key.kind != "tuple" or key.weight > MAX_KEY):
            raise UnsafeFileError("is refused: a key of a dict or a set is no plain value")
    return True


def _tensor(items: Sequence[Any], machine: _Machine, dtype: torch.dtype | None = None) -> bool:
    """Storage, offset, size, strides: whether they fit each other."""
    storage, offset, size, strides = items
    shape = [part.items for part in (size, strides) if is_part(part, "tuple")]
    if len(shape) != 2 or not isinstance(storage, _Part) or storage.kind != "storage":
        return False
    size, strides = shape
    if len(size) != len(strides) or len(size) > MAX_DIMS:
        return False
    if not all(map(is_size, (offset, *size, *strides))):
        return False
    room, itemsize = storage.name
    itemsize = dtype.itemsize if dtype else itemsize
    end, count = offset + 1, 1
    for length, stride in zip(size, strides, strict=True):
        end += (length - 1) * stride
        count *= max(length, 1)  # torch multiplies these, too
    if 0 not in size and end * itemsize > room:
        raise UnsafeFileError(
            f"is damaged or cut short (a tensor of shape {tuple(size)} exceeds its {room} bytes)"
        )
    machine.bytes_left -= count * itemsize
    if machine.bytes_left < 0:
        raise UnsafeFileError(
            f"is refused: it is far too small for a tensor of shape {tuple(size)}"
        )
    return True


def _tensor_v2(items: Sequence[Any], machine: _Machine, dtype: torch.dtype | None = None) -> bool:
    """Also whether it needs a gradient, and its hooks, none."""
    *tensor, grad, hooks = items
    return _no_hooks(grad, hooks) and len(tensor) == 4 and _tensor(tensor, machine, dtype)


def _tensor_v3(items: Sequence[Any], machine: _Machine) -> bool:
    """Also the type, of those that have no storage type of their own."""
    *tensor, dtype = items
    dtype = _dtype(str(dtype.name)) if isinstance(dtype, _Part) else None
    return dtype is not None and len(tensor) == 6 and _tensor_v2(tensor, machine, dtype)


def _parameter(items: Sequence[Any], machine: _Machine) -> bool:
    data, grad, hooks = items
    return isinstance(data, _Part) and data.kind == "tensor" and _no_hooks(grad, hooks)


def _no_hooks(grad: Any, hooks: Any) -> bool:
    empty = is_part(hooks, "dict", "collections.OrderedDict") and hooks.weight == 2
    return isinstance(grad, bool) and empty


def _pairs(items: Sequence[Any], machine: _Machine) -> bool:
    """Nothing, or as Python 2 wrote it a list of lists of key and value."""
    pairs = items[0].items if len(items) == 1 and is_part(items[0], "list") else items
    fit = all(is_part(pair, "list") and len(pair.items) == 2 for pair in pairs)
    return fit and check_keys([pair.items[0] for pair in pairs])


def _members(items: Sequence[Any], machine: _Machine) -> bool:
    return len(items) == 1 and is_part(items[0], "list") and check_keys(items[0].items)


def _counts(items: Sequence[Any], machine: _Machine) -> bool:
    return not items or (len(items) == 1 and is_part(items[0], "dict"))


def _latin(items: Sequence[Any], machine: _Machine) -> bool:
    """Bytes as a string; other codecs import modules, or make more bytes than there were."""
    return len(items) == 2 and isinstance(items[0], str) and items[1] in ("latin1", "latin-1")


def _numbers(items: Sequence[Any], machine: _Machine) -> bool:
    return len(items) <= 2 and all(isinstance(item, int | float) for item in items)


def _sizes(items: Sequence[Any], machine: _Machine) -> bool:
    return len(items) == 1 and is_part(items[0], "tuple") and all(map(is_size, items[0].items))


def _device(items: Sequence[Any], machine: _Machine) -> bool:
    return len(items) == 1 and isinstance(items[0], str)


def _nothing(items: Sequence[Any], machine: _Machine) -> bool:
    return not items


# what may be called: kind of the outcome, and whether the arguments are as torch.save writes them
CALLS: dict[str, tuple[str, Callable[[Sequence[Any], _Machine], bool]]] = {
    "argparse.Namespace": ("object", _nothing),
    "collections.OrderedDict": ("dict", _pairs),
    "collections.Counter": ("dict", _counts),
    "builtins.set": ("set", _members),
    "builtins.complex": ("object", _numbers),
    "_codecs.encode": ("object", _latin),
    "torch.Size": ("object", _sizes),
    "torch.device": ("object", _device),
    "torch._utils._rebuild_tensor": ("tensor", _tensor),
    "torch._utils._rebuild_tensor_v2": ("tensor", _tensor_v2),
    "torch._utils._rebuild_tensor_v3": ("tensor", _tensor_v3),
    "torch._utils._rebuild_parameter": ("tensor", _parameter),
}
