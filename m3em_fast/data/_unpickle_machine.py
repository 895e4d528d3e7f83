"""The opcodes of a pickle, one method each; see :mod:`m3em_fast.data._unpickle`."""

from __future__ import annotations

import codecs
import mmap
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ._unpickle_numpy import (
    SHORT,
    Arguments,
    Blob,
    Global,
    NewArray,
    NewDType,
    Refused,
    build_array,
    build_dtype,
    from_buffer,
    new_array,
    new_dtype,
    no_bytes,
    scalar,
)

MAX_OPCODES = 2**21  # 26 115 clips take 60 000 to 300 000
_MAX_MARKS = 1000
_MAX_LINE, _MAX_LONG = 400, 128  # characters of a number or name, bytes of a number

_FIXED = {
    **dict.fromkeys(("BININT1", "BINGET", "BINPUT", "PROTO"), "<B"),
    **dict.fromkeys(("LONG_BINGET", "LONG_BINPUT"), "<I"),
    "BININT": "<i",
    "BININT2": "<H",
    "BINFLOAT": ">d",
    "FRAME": "<Q",
}
_COUNTED = {
    **dict.fromkeys(("SHORT_BINBYTES", "SHORT_BINUNICODE", "SHORT_BINSTRING", "LONG1"), "<B"),
    **dict.fromkeys(("BINBYTES", "BINUNICODE"), "<I"),
    **dict.fromkeys(("BINBYTES8", "BINUNICODE8", "BYTEARRAY8"), "<Q"),
    **dict.fromkeys(("BINSTRING", "LONG4"), "<i"),
}
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_ASKS = {
    **dict.fromkeys(("PERSID", "BINPERSID"), "a persistent object"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "an object of the extension registry"),
    **dict.fromkeys(("OBJ", "NEWOBJ", "NEWOBJ_EX"), "an instance of a class"),
    **dict.fromkeys(("EMPTY_SET", "ADDITEMS", "FROZENSET"), "a set"),
    "NEXT_BUFFER": "a buffer outside the file",
}


_PLAIN = (str, bytes, int, float, bool, type(None), list, dict, tuple, np.ndarray)
_KEYS = (str, bytes, int, bool, type(None))


class Machine:
    """Runs one pickle.

    Args:
        data: the file.
        release: called now and then while much of the file is copied, to give its pages back.
    """

    def __init__(self, data: mmap.mmap, release: Callable[[], None]) -> None:
        self.data, self.view, self.release = data, memoryview(data), release
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.encoded: dict[str, bytes] = {}
        self.elements = 0
        self.names = self._names()

    def _names(self) -> dict[str, Global]:
        calls: dict[str, Callable[[Any], Any] | None] = {
            "numpy.ndarray": None,
            "numpy.dtype": new_dtype,
            "_codecs.encode": self._encode,
            "builtins.bytes": no_bytes,
            "__builtin__.bytes": no_bytes,
        }
        for core in ("numpy.core", "numpy._core"):
            calls[f"{core}.multiarray._reconstruct"] = self._reconstruct
            calls[f"{core}.multiarray.scalar"] = scalar
            calls[f"{core}.numeric._frombuffer"] = from_buffer
        return {name: Global(name, call) for name, call in calls.items()}

    # Reading.

    def _take(self, size: int) -> memoryview:
        if not 0 <= size <= len(self.view) - self.position:
            raise ValueError(f"{size} bytes are announced, {len(self.view) - self.position} are there")
        self.position += size
        return self.view[self.position - size : self.position]

    def _line(self, limit: int | None = _MAX_LINE) -> memoryview:
        end = self.data.find(b"\n", self.position)
        if end < 0 or (limit is not None and end - self.position > limit):
            raise ValueError("a line does not end")
        return self._take(end - self.position + 1)[:-1]

    def _word(self) -> str:
        return str(self._line(), "utf-8")

    def run(self) -> Any:
        names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        for _ in range(MAX_OPCODES):
            code = self._take(1)[0]
            name = names.get(code)
            if name is None:
                raise ValueError(f"byte {code:#04x} at {self.position - 1} is no opcode")
            if name == "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise ValueError("it ends in the middle of an object")
                return self._settled(self.stack[0])
            if name in _ASKS:
                raise Refused(_ASKS[name])
            argument: Any = None
            if name in _NEW:
                self.stack.append(_NEW[name]())
                continue
            if name in _FIXED:
                (argument,) = struct.unpack(_FIXED[name], self._take(struct.calcsize(_FIXED[name])))
            elif name in _COUNTED:
                (size,) = struct.unpack(_COUNTED[name], self._take(struct.calcsize(_COUNTED[name])))
                argument = self._take(size)
            getattr(self, f"_{name.lower()}")(argument)
        raise ValueError(f"it has more than {MAX_OPCODES} opcodes")

    # The stack. Nothing is taken from below the last mark.

    def _top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an object is missing on the stack")
        return self.stack[-1]

    def _pop_one(self) -> Any:
        self._top()
        return self.stack.pop()

    def _pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _settled(self, value: Any) -> Any:
        """The value as a result may hold it."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Blob):
            return value.plain()
        if isinstance(value, Arguments):
            if value.settled is None:
                value.settled = tuple([self._settled(item) for item in value])
            return value.settled
        if isinstance(value, Global | np.dtype):
            raise Refused(f"{value.name if isinstance(value, Global) else 'a dtype'} itself")
        raise Refused("an array or dtype without its state")

    def _key(self, value: Any) -> Any:
        value = self._settled(value)
        # Whatever else can be hashed may take for ever: tuples of tuples, numbers chosen for one hash.
        if type(value) not in _KEYS or (type(value) is int and abs(value) >= 2**60):
            raise Refused(f"a dict with a key of type {type(value).__name__}")
        return value

    def _tuple_of(self, items: list[Any]) -> None:
        items = [self._settled(item) if isinstance(item, Arguments) else item for item in items]
        plain = all(type(item) in _PLAIN for item in items)
        self.stack.append(tuple(items) if plain else Arguments(items))

    def _mark(self, _: None) -> None:
        if len(self.marks) >= _MAX_MARKS:
            raise ValueError(f"it is nested more than {_MAX_MARKS} deep")
        self.marks.append(len(self.stack))

    def _pop(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self._pop_one()

    def _pop_mark(self, _: None) -> None:
        self._pop_marked()

    def _dup(self, _: None) -> None:
        self.stack.append(self._top())

    # Plain values.

    def _proto(self, number: int) -> None:
        if number > 5:
            raise ValueError(f"protocol {number} is not known")

    def _frame(self, _: int) -> None:
        pass

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    _binint = _binint1 = _binint2 = _binfloat = _push

    def _int(self, _: None) -> None:
        word = self._word()
        self.stack.append({"00": False, "01": True}[word] if word in ("00", "01") else int(word))

    def _long(self, _: None) -> None:
        self.stack.append(int(self._word().removesuffix("L")))

    def _float(self, _: None) -> None:
        self.stack.append(float(self._word()))

    def _long1(self, digits: memoryview) -> None:
        if len(digits) > _MAX_LONG:
            raise ValueError(f"a number has {len(digits)} bytes")
        self.stack.append(int.from_bytes(digits, "little", signed=True))

    _long4 = _long1

    def _bytes(self, data: memoryview) -> None:
        self.stack.append(Blob(data, "bytes") if len(data) > SHORT else bytes(data))

    _short_binbytes = _binbytes = _binbytes8 = _bytearray8 = _bytes

    def _readonly_buffer(self, _: None) -> None:
        self._top()

    def _text(self, data: memoryview) -> None:
        blob = Blob(data, "utf-8")
        self.stack.append(blob if len(data) > SHORT else blob.plain())

    _short_binunicode = _binunicode = _binunicode8 = _text

    def _unicode(self, _: None) -> None:
        blob = Blob(self._line(None), "raw-unicode-escape")
        self.stack.append(blob if len(blob.data) > SHORT else blob.plain())

    def _old_string(self, data: memoryview) -> None:
        # Python 2's str: text or bytes, which one is not said. One character a byte loses nothing.
        self.stack.append(Blob(data, "latin-1") if len(data) > SHORT else str(data, "latin-1"))

    _short_binstring = _binstring = _old_string

    def _string(self, _: None) -> None:
        line = bytes(self._line(None)).strip()
        if len(line) < 2 or line[:1] not in (b'"', b"'") or line[-1] != line[0]:
            raise ValueError("a string without quotes")
        self._old_string(memoryview(codecs.escape_decode(line[1:-1])[0]))

    # Containers.

    def _list(self, _: None) -> None:
        self.stack.append([self._settled(item) for item in self._pop_marked()])

    def _dict(self, _: None) -> None:
        self.stack.append(self._pairs(self._pop_marked()))

    def _tuple(self, _: None) -> None:
        self._tuple_of(self._pop_marked())

    def _tuple1(self, _: None) -> None:
        self._tuple_of([self._pop_one()])

    def _tuple2(self, _: None) -> None:
        self._tuple_of([self._pop_one() for _ in range(2)][::-1])

    def _tuple3(self, _: None) -> None:
        self._tuple_of([self._pop_one() for _ in range(3)][::-1])

    def _pairs(self, items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise ValueError("a key without a value")
        return {self._key(key): self._settled(value) for key, value in zip(items[::2], items[1::2], strict=True)}

    def _into(self, kind: type) -> Any:
        if type(self._top()) is not kind:
            raise Refused(f"items in an object of type {type(self._top()).__name__}")
        return self.stack[-1]

    def _append(self, _: None) -> None:
        item = self._settled(self._pop_one())
        self._into(list).append(item)

    def _appends(self, _: None) -> None:
        items = [self._settled(item) for item in self._pop_marked()]
        self._into(list).extend(items)

    def _setitem(self, _: None) -> None:
        pair = [self._pop_one(), self._pop_one()][::-1]
        self._into(dict).update(self._pairs(pair))

    def _setitems(self, _: None) -> None:
        pairs = self._pairs(self._pop_marked())
        self._into(dict).update(pairs)

    # The memo. What BUILD finishes is known by the numbers that it was kept under.

    def _keep(self, number: int) -> None:
        value = self.memo[number] = self._top()
        if isinstance(value, NewArray | NewDType):
            value.kept.append(number)

    _binput = _long_binput = _keep

    def _put(self, _: None) -> None:
        number = int(self._word())
        if not 0 <= number < 2**32:
            raise ValueError(f"{number} is no place in the memo")
        self._keep(number)

    def _memoize(self, _: None) -> None:
        self._keep(len(self.memo))

    def _recall(self, number: int) -> None:
        if number not in self.memo:
            raise ValueError(f"nothing was kept under {number}")
        self.stack.append(self.memo[number])

    _binget = _long_binget = _recall

    def _get(self, _: None) -> None:
        self._recall(int(self._word()))

    # Names and calls.

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no string")
        full = f"{module}.{name}"
        if full not in self.names:
            raise Refused(ascii(full)[1:-1][:100])
        self.stack.append(self.names[full])

    def _global(self, _: None) -> None:
        self._find(self._word(), self._word())

    def _stack_global(self, _: None) -> None:
        name = self._pop_one()
        self._find(self._pop_one(), name)

    def _inst(self, _: None) -> None:
        raise Refused(f"an instance of {ascii(f'{self._word()}.{self._word()}')[1:-1][:100]}")

    def _reduce(self, _: None) -> None:
        arguments, call = self._pop_one(), self._pop_one()
        if not isinstance(call, Global) or call.call is None:
            raise Refused(f"a call of {call.name if isinstance(call, Global) else type(call).__name__}")
        if not isinstance(arguments, tuple):
            raise ValueError("a call without a tuple of arguments")
        self.stack.append(call.call(arguments))

    def _build(self, _: None) -> None:
        state, new = self._pop_one(), self._pop_one()
        if not isinstance(new, NewArray | NewDType):
            raise Refused(f"a state for an object of type {type(new).__name__}")
        if isinstance(new, NewDType):
            made: Any = build_dtype(new, state)
        else:
            made, elements = build_array(state)
            self.elements += elements
            if self.elements > MAX_OPCODES:
                raise ValueError(f"its arrays of objects have more than {MAX_OPCODES} elements")
        for number in new.kept:
            if self.memo[number] is new:
                self.memo[number] = made
        self.stack.append(made)

    def _reconstruct(self, arguments: tuple[Any, ...]) -> NewArray:
        if not arguments or arguments[0] is not self.names["numpy.ndarray"]:
            raise Refused("an array of another class than numpy.ndarray")
        return new_array(arguments)

    def _encode(self, arguments: tuple[Any, ...]) -> Any:
        """How Python 3 writes bytes for Python 2: as the latin-1 text of them."""
        text, coding = arguments if len(arguments) == 2 else (None, None)
        if type(coding) is not str or coding not in ("latin1", "latin-1"):
            raise Refused("a call of codecs.encode for another code than latin-1")
        if isinstance(text, Blob):
            return text.latin1(self.release)
        if type(text) is not str:
            raise Refused(f"a call of codecs.encode with an object of type {type(text).__name__}")
        # Kept: a call takes a few bytes of the file, and the text may be recalled again and again.
        if text not in self.encoded:
            self.encoded[text] = text.encode("latin-1")
        return self.encoded[text]
