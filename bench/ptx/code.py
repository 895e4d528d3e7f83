"""PTX, what NVRTC makes of a kernel before it knows the card, as instructions that bench/ptx/machine.py runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Address", "Instruction", "Kernel", "Module", "Operand", "Unknown", "names", "parse"]

# What no instruction is: comments, and the places in the source, which end with their lines.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file)\s[^\n]*", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"\.(global|const|shared)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*([^;]*))?;"
)
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_NAMED = re.compile(r"[%$A-Za-z_][\w$.%]*")


class Unknown(Exception):
    """PTX that cannot be run here. The message is one sentence that names the instruction."""


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, a symbol, or nothing."""

    base: str
    offset: int


# A register or a symbol by its name, a number, an address, or several of them: {a, b} and a|b.
Operand = str | int | float | Address | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    op: str  # the name without what follows the first dot
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str  # the predicate that it depends on, or nothing
    negated: bool
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    @property
    def registers(self) -> set[str]:
        """Those that it reads or writes, among them the one that it depends on."""
        found = set().union(*(names(operand) for operand in self.operands))
        return found | {self.guard} if self.guard else found

    @property
    def far_load(self) -> bool:
        """Whether it may read global memory."""
        return self.op == "ld" and not {"shared", "param"} & set(self.modifiers)


def names(operand: Operand) -> set[str]:
    """Registers and symbols of an operand."""
    if isinstance(operand, tuple):
        return set().union(*(names(each) for each in operand))
    if isinstance(operand, Address):
        return {operand.base}
    return {operand.lstrip("!")} if isinstance(operand, str) else set()


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  # by name: where it begins, and its bytes
    threads: int  # the launch bound, 0 where there is none
    registers: dict[str, str] = field(default_factory=dict)  # their types
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows

    @property
    def parameter_bytes(self) -> int:
        return max((start + size for start, size in self.parameters.values()), default=0)


@dataclass
class Module:
    kernels: dict[str, Kernel]
    shared: dict[str, int]  # where a variable of shared memory begins
    static: int  # bytes of shared memory that are declared
    constants: dict[str, bytes]  # variables of global and constant memory, and what they hold


def size_of(type: str) -> int:
    """Bytes."""
    return int(re.sub(r"\D", "", type)) // 8


def parse(text: str) -> Module:
    """Raises :class:`Unknown`."""
    text = _COMMENT.sub(" ", text)
    module = Module({}, {}, 0, {})
    outside, end = [], 0
    for found in _ENTRY.finditer(text):
        outside.append(text[end : found.start()])
        end = _closing(text, found.end())
        module.kernels[found[1]] = _kernel(found[1], found[2], found[3], text[found.end() : end - 1])
    outside.append(text[end:])
    for space, align, type, name, count, values in _VARIABLE.findall("".join(outside)):
        _variable(module, space, int(align or 1), type, name, count, values)
    if stray := re.search(r"\.func\b", "".join(outside)):
        raise Unknown(f"PTX with a function of its own ({stray[0]}) cannot be run.")
    return module


def _closing(text: str, start: int) -> int:
    """Behind the brace that closes the one before `start`."""
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return start + found.end()
    raise Unknown("The PTX ends within a kernel.")


def _variable(module: Module, space: str, align: int, type: str, name: str, count: str, values: str) -> None:
    size = size_of(type) * int(count or 1)
    if space == "shared":
        start = -(-module.static // align) * align
        module.shared[name] = start
        if count != "":  # without a number it is what the launch asks for, behind the rest
            module.static = start + size
        return
    numbers = [int(word, 0) for word in re.findall(r"-?\w+", values)]
    unit = size_of(type)
    data = b"".join((number % (1 << 8 * unit)).to_bytes(unit, "little") for number in numbers)
    module.constants[name] = data.ljust(size, b"\0")


def _kernel(name: str, given: str, directives: str, body: str) -> Kernel:
    parameters, end = {}, 0
    for align, type, word, count in _PARAMETER.findall(given):
        size = size_of(type) * int(count or 1)
        start = -(-end // int(align or size_of(type))) * int(align or size_of(type))
        parameters[word], end = (start, size), start + size
    bound = re.search(r"\.(?:max|req)ntid\s+(\d+)", directives)
    kernel = Kernel(name, parameters, int(bound[1]) if bound else 0)
    scopes: list[dict[str, str]] = [{}]
    for word in _statements(body):
        if word == "{":
            scopes.append({})
        elif word == "}":
            scopes.pop()
        elif word.endswith(":"):
            kernel.labels[_renamed(word[:-1], scopes)] = len(kernel.instructions)
        elif declared := _DECLARED.match(word):
            _declare(kernel, declared[1], declared[2], scopes)
        elif word.startswith("."):
            if not word.startswith(".pragma "):
                raise Unknown(f"{name} has {word!r}, which cannot be run.")
        else:
            kernel.instructions.append(_instruction(word, scopes))
    return kernel


def _statements(body: str) -> Iterator[str]:
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at]
            at += 1
        elif found := _LABEL.match(body, at):
            yield found[1] + ":"
            at = found.end()
        else:
            end = body.find(";", at)
            yield " ".join(body[at:end].split())
            at = end + 1


def _declare(kernel: Kernel, type: str, names: str, scopes: list[dict[str, str]]) -> None:
    for word in names.split(","):
        name, _, count = word.strip().partition("<")
        if count:
            kernel.registers |= {f"{name}{i}": type for i in range(int(count.rstrip("> ")))}
            continue
        # A name that is declared within braces, by inline assembly, is another one in every pair of them.
        own = f"{name}@{len(kernel.registers)}" if len(scopes) > 1 else name
        scopes[-1][name] = own
        kernel.registers[own] = type


def _renamed(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _instruction(text: str, scopes: list[dict[str, str]]) -> Instruction:
    guard, negated, rest = "", False, text
    if text.startswith("@"):
        guard, _, rest = text[1:].partition(" ")
        negated, guard = guard.startswith("!"), _renamed(guard.lstrip("!"), scopes)
    word, _, operands = rest.partition(" ")
    op, *modifiers = word.split(".")
    return Instruction(op, tuple(modifiers), _operands(operands, scopes), guard, negated, text)


def _operands(text: str, scopes: list[dict[str, str]]) -> tuple[Operand, ...]:
    found: list[Operand] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        if part[0] == "{":
            found.append(_operands(part[1:-1], scopes))
        elif part[0] == "[":
            found.append(_address(part[1:-1], scopes))
        elif "|" in part:
            found.append(tuple(_operand(word, scopes) for word in part.split("|")))
        else:
            found.append(_operand(part, scopes))
    return tuple(found)


def _address(text: str, scopes: list[dict[str, str]]) -> Address:
    base, _, offset = text.replace(" ", "").partition("+")
    if _NAMED.fullmatch(base):
        return Address(_renamed(base, scopes), int(offset or "0", 0))
    return Address("", int(base, 0))


def _operand(word: str, scopes: list[dict[str, str]]) -> Operand:
    if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", word):
        form = "<f" if found[1] in "fF" else "<d"
        return float(struct.unpack(form, int(found[2], 16).to_bytes(struct.calcsize(form), "little"))[0])
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", word):
        return int(word.rstrip("U"), 0)
    if word.startswith("!"):
        return "!" + _renamed(word[1:], scopes)
    if _NAMED.fullmatch(word):
        return _renamed(word, scopes)
    raise Unknown(f"The operand {word!r} of PTX cannot be read.")
