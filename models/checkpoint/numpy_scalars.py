"""NumPy's scalars in pickles, such as timm's ``metric``, read as Python numbers.

NumPy itself is not called: its dtypes may hold objects or fill memory.
"""

import struct
from typing import Any

from ..errors import UnsafeFileError

DTYPE = "numpy.dtype"
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of NumPy 1 and 2
NAMES = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16"
FORMATS = dict(zip(NAMES.split(), "? b h i q B H I Q e f d ff dd".split(), strict=True))  # noqa: SIM905


class NumberType:
    """Dtype of a boolean or number, in place of NumPy's."""

    def __init__(self, name: Any, align: Any, copy: Any) -> None:
        if not isinstance(name, str) or name not in FORMATS:
            shown = name[:20] if isinstance(name, str) else type(name).__name__
            raise UnsafeFileError(f"is refused: its {DTYPE} {shown} is not a number's")
        self.name, self.layout = name, FORMATS[name]

    def __setstate__(self, state: Any) -> None:
        # order of bytes, after a version; the rest is of structured types and subarrays
        order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        if order not in ("<", ">", "|"):
            raise UnsafeFileError(f"is refused: its {DTYPE} {self.name} is not a number's")
        self.layout = order.replace("|", "=") + FORMATS[self.name]


def scalar(kind: Any = None, data: Any = None) -> complex:
    """Return the number of type ``kind`` with the bytes ``data``."""
    if not isinstance(kind, NumberType) or not isinstance(data, bytes):
        raise UnsafeFileError(f"is refused: it calls {SCALARS[1]} without a {DTYPE} or bytes")
    if len(data) != struct.calcsize(kind.layout):
        raise UnsafeFileError(f"is refused: its {kind.name} of NumPy has {len(data)} bytes")
    numbers = struct.unpack(kind.layout, data)
    return complex(*numbers) if len(numbers) == 2 else numbers[0]


NUMBER_GLOBALS = [(NumberType, DTYPE), *((scalar, name) for name in SCALARS)]
