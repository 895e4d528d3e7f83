"""What stands for numpy's functions while :mod:`m3em_fast.data._unpickle` reads a pickle; it checks all it is given."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

SHORT = 512  # bytes; longer strings stay in the file until something needs them
_CHUNK = 2**20
_MAX_DIMENSIONS, _MAX_ITEM = 32, 2**16
_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_ELEMENTS = (str, bytes, int, float, bool, type(None))


class Refused(ValueError):
    """The pickle asks for something that is not read; the message is what, as the end of a sentence."""


class Blob:
    """A long string of bytes or text, still in the file.

    Args:
        data: its bytes there.
        coding: "bytes", or how they make a text.
    """

    def __init__(self, data: memoryview, coding: str) -> None:
        self.data, self.coding = data, coding
        self._plain: str | bytes | None = None
        self._latin1: Blob | None = None

    def plain(self) -> str | bytes:
        """As an object of Python, made once."""
        if self._plain is None:
            self._plain = bytes(self.data) if self.coding == "bytes" else str(self.data, self.coding, self._errors())
        return self._plain

    def latin1(self, release: Callable[[], None]) -> Blob:
        """The bytes that the characters of the text stand for, made once and piece by piece."""
        if self._latin1 is None:
            if self.coding == "utf-8":
                decoder, made = codecs.getincrementaldecoder("utf-8")(), bytearray()
                for start in range(0, len(self.data), _CHUNK):
                    made += decoder.decode(self.data[start : start + _CHUNK]).encode("latin-1")
                    if start % (16 * _CHUNK) == 0:
                        release()
                made += decoder.decode(b"", final=True).encode("latin-1")
                self._latin1 = Blob(memoryview(made), "bytes")
            elif self.coding == "raw-unicode-escape":
                text = str(self.data, self.coding)
                release()
                self._latin1 = Blob(memoryview(text.encode("latin-1")), "bytes")
            else:
                raise Refused("a call of codecs.encode with what is no text")
        return self._latin1

    def _errors(self) -> str:
        return "surrogatepass" if self.coding == "utf-8" else "strict"


class Global:
    """A name that a pickled array needs, and what stands for it here."""

    def __init__(self, name: str, call: Callable[[Any], Any] | None = None) -> None:
        self.name, self.call = name, call


class Arguments(tuple[Any, ...]):
    """A tuple with something in it that no result may hold, and what a result holds instead, made once."""

    settled: tuple[Any, ...] | None = None


class NewArray:
    """An array before its state is there.

    Attributes:
        kept: its numbers in the memo.
    """

    def __init__(self) -> None:
        self.kept: list[int] = []


class NewDType:
    """A dtype before its byte order is there.

    Attributes:
        code: as numpy writes it: a letter and a number of bytes, or of characters for U.
        kept: its numbers in the memo.
    """

    def __init__(self, code: str) -> None:
        self.code = code
        self.kept: list[int] = []


def new_dtype(arguments: tuple[Any, ...]) -> NewDType:
    """``numpy.dtype(code, align, copy)``."""
    # No argument is compared or shown before its type is known: tuples of tuples may take for ever.
    code = arguments[0] if len(arguments) == 3 else None
    if not isinstance(code, str) or not all(isinstance(flag, int) for flag in arguments[1:]):
        raise Refused("a dtype with fields or metadata")
    strings = re.fullmatch(r"[SU][1-9]\d{0,5}", code)
    if code not in (*_CODES, "O8") and (strings is None or _item_size(code) > _MAX_ITEM):
        raise Refused(f"an array of dtype {ascii(code)[1:-1]:.80}")
    return NewDType(code)


def _item_size(code: str) -> int:
    return int(code[1:]) * (4 if code[0] == "U" else 1)


def build_dtype(new: NewDType, state: Any) -> np.dtype[Any]:
    """``numpy.dtype.__setstate__``: (version, byte order, None, None, None, size, alignment, flags)."""
    if not isinstance(state, tuple) or len(state) not in (8, 9) or type(state[1]) is not str or state[1] not in "<>|":
        raise ValueError("the state of a dtype is none")
    if any(part is not None for part in (*state[2:5], *state[8:])):
        raise Refused("a dtype with fields or metadata")
    if new.code[0] in "SU" and state[5] != _item_size(new.code):
        raise ValueError(f"dtype {new.code} with items of another size")
    return np.dtype(object) if new.code == "O8" else np.dtype(state[1] + new.code)


def new_array(arguments: tuple[Any, ...]) -> NewArray:
    """``_reconstruct(ndarray, (0,), b"b")``: shape and dtype do not last. The caller checks the class."""
    if len(arguments) != 3 or type(arguments[2]) not in (str, bytes):
        raise ValueError("an array that does not begin empty")
    return NewArray()


def build_array(state: Any) -> tuple[np.ndarray, int]:
    """``numpy.ndarray.__setstate__``: (version, shape, dtype, Fortran order, bytes or list). The array, and how many
    references to objects it holds."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("the state of an array is none")
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, np.dtype):
        raise ValueError("an array without a dtype")
    if dtype.hasobject:
        return _objects(shape, data, bool(fortran)), len(data)
    return _array(data, dtype, shape, "F" if fortran else "C"), 0


def _size(shape: Any) -> int:
    whole = isinstance(shape, tuple) and all(type(extent) is int and 0 <= extent < 2**48 for extent in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("the shape of an array is none")
    return math.prod(shape)


def _objects(shape: Any, items: Any, fortran: bool) -> np.ndarray:
    if type(items) is not list or _size(shape) != len(items):
        raise ValueError(f"an array of objects has another number of them than {shape!s:.80}")
    for item in items:
        if type(item) not in _ELEMENTS:
            raise Refused(f"an array that holds objects of type {type(item).__name__}")
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape, order="F" if fortran else "C")


def _array(data: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> np.ndarray:
    raw = _raw(data)
    if _size(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of {shape!s:.80} and {dtype} has {len(raw)} bytes")
    if not len(raw):
        return np.empty(shape, dtype)
    array = np.ndarray(shape, dtype, raw, order=order)
    if dtype.kind == "U" and int(np.ndarray(len(raw) // 4, dtype.byteorder + "u4", raw).max()) > 0x10FFFF:
        raise ValueError("an array of text holds what is no character")
    return array


def _raw(data: Any) -> memoryview | bytes:
    if isinstance(data, Blob):
        if data.coding in ("bytes", "latin-1"):
            return data.data
    elif type(data) is bytes:
        return data
    elif type(data) is str:
        return data.encode("latin-1")
    raise Refused(f"an array of bytes that are a {type(data).__name__}")


def from_buffer(arguments: tuple[Any, ...]) -> np.ndarray:
    """``_frombuffer(buffer, dtype, shape, order, axes)`` of protocol 5."""
    if len(arguments) not in (4, 5) or not isinstance(arguments[1], np.dtype) or arguments[1].hasobject:
        raise ValueError("the arguments of an array are none")
    data, dtype, shape, order, *rest = arguments
    if order not in ("C", "F", "K"):
        raise ValueError("an array in no order")
    array = _array(data, dtype, shape, "F" if order == "F" else "C")
    axes = rest[0] if rest else None
    if axes is None or order != "K":
        return array
    if type(axes) is not tuple or not all(type(axis) is int for axis in axes) or sorted(axes) != [*range(array.ndim)]:
        raise ValueError("the axes of an array are none")
    return array.transpose(axes)


def scalar(arguments: tuple[Any, ...]) -> Any:
    """``scalar(dtype, bytes)``, as a number or string of Python."""
    if len(arguments) != 2 or not isinstance(arguments[0], np.dtype) or arguments[0].hasobject:
        raise ValueError("the arguments of a scalar are none")
    if arguments[0].itemsize > SHORT:
        raise ValueError(f"a scalar of {arguments[0].itemsize} bytes")
    return _array(arguments[1], arguments[0], (), "C").item()


def no_bytes(arguments: tuple[Any, ...]) -> bytes:
    """``bytes()``, which is how Python 3 writes no bytes for Python 2."""
    if arguments:
        raise Refused("a call of bytes with arguments")
    return b""
