"""Command lines: tyro reads the options, and what it refuses is said in one sentence.

tyro draws a frame around what is wrong, its advice and an option's help. It has a hook for errors, but a private one;
what it prints is therefore read here, and a form that is not known is passed on, without its frame.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from m3em_fast.data._extra import needs

__all__ = ["COMMANDS", "Parser", "cli", "menu"]

COMMANDS = {
    "m3em_fast.env": "what a bug report needs, and which backends this machine has",
    "m3em_fast.data.digits": "make the digits benchmark, check it, or show what it looks like",
    "m3em_fast.data.importer": "make a feature store of the challenge's pickles and of folders of maps",
    "m3em_fast.data.store": "show what a feature store holds, and check it",
    "m3em_fast.epic.annotations": "show the challenge's label files, held to the published counts",
    "m3em_fast.epic.generate": "generated features under the challenge's ids and labels, to try everything else",
    "m3em_fast.epic.ensemble": "fuse stored scores with equal, given or searched weights",
    "m3em_fast.epic.scoring": "accuracies of stored scores, counted as the challenge does",
    "m3em_fast.epic.submission": "write the challenge's submission, or check one",
    "m3em_fast.uda.report": "compare finished runs of train.py in a table",
}
"""What ``python -m`` runs -> what it does."""
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None"}


class Parser(argparse.ArgumentParser):
    """For the commands that have to run where tyro may be missing: what is refused is said in one sentence as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}.\n")


def cli(target: Any, arguments: Sequence[str] | None = None, *, prog: str, **options: Any) -> Any:
    """``tyro.cli(target, args=arguments, prog=prog, **options)`` with one sentence for what it refuses.

    Args:
        target: a dataclass or a function.
        arguments: ``sys.argv[1:]`` by default.
        prog: what a user types, such as ``python -m bench``.
        options: more arguments of ``tyro.cli``.

    Raises:
        SystemExit: 2 after that sentence on standard error, 0 after ``--help``.
        ImportError: tyro is missing; the message names the extra.
    """
    tyro = needs("tyro")
    given = list(sys.argv[1:] if arguments is None else arguments)
    said, refused = io.StringIO(), False
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, args=given, prog=prog, **options)
    except SystemExit as stop:
        refused = bool(stop.code)
        if not refused:
            raise
    finally:
        if not refused:
            sys.stderr.write(said.getvalue())
    # Once more, with no line folded. tyro asks standard output whether it may use colours and draw lines.
    columns, frame = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(10**6)
    try:
        plain = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(plain), contextlib.redirect_stderr(frame), contextlib.suppress(SystemExit):
            tyro.cli(target, args=given, prog=prog, **options)
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    print(f"{prog.removeprefix('python -m ')}: {_sentence(frame.getvalue(), given, prog)}", file=sys.stderr)
    raise SystemExit(2)


def menu(package: str, arguments: Sequence[str] | None = None) -> int:
    """What ``python -m package`` says, which runs nothing itself: its commands, those of ``COMMANDS``, for ``--help``.

    Args:
        package: what a user typed after ``python -m``.
        arguments: ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0 after ``--help``, else 2 after one sentence on standard error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {name: what for name, what in COMMANDS.items() if name.startswith(f"{package}.")}
    if given and given[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"{package} has these commands, each with a --help of its own:\n")
        print("\n".join(f"  python -m {name:{width}}  {what}" for name, what in commands.items()))
        return 0
    if not given:
        said = f"no command is given; python -m {package} --help lists them."
    elif (name := f"{package}.{given[0]}") in commands:
        said = f"a dot belongs before {given[0]}: python -m {name}."
    else:
        said = f"{given[0]} is no command; python -m {package} --help lists them."
    print(f"{package}: {said}", file=sys.stderr)
    return 2


def _sentence(frame: str, given: list[str], prog: str) -> str:
    parts = _parts(frame)
    head = " ".join(parts[0].split())
    if found := re.fullmatch(r"Unrecognized options: (.*)", head):
        return _unknown(found[1], parts[1:], prog)
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*?)'\. Expected one of \((.*)\)\.", head):
        choices = re.findall(r"'(.*?)'", found[3])
        return f"{found[2]} must be one of {', '.join(choices)}, got {found[1]}."
    if found := re.fullmatch(r"Missing value for argument '(.*)'\. Expected (\d+) values\.", head):
        if not found[1].startswith("-"):
            return f"{found[1].upper()} is missing; {prog} --help shows what it is."
        number = "a value" if found[2] == "1" else f"{found[2]} values"
        return f"{found[1]} needs {number}; {prog} --help shows which."
    if re.match(r"Missing from .*:", head):
        return f"{parts[0].splitlines()[1].split()[0]} is missing; {prog} --help shows what it is."
    if found := re.fullmatch(r"Error parsing (.*?): (.*)", head):
        message = found[2].rstrip(".")
        kind = re.search(rf"^ *{re.escape(found[1])} +(.*?) *$", "\n".join(parts[1:]), re.MULTILINE)
        if kind is None:
            return f"{message}."  # of a dataclass that refuses what it was given
        return f"{found[1]} must be {_described(kind[1])}, got {_value(found[1], given) or message}."
    return f"{head.rstrip('.')}; {prog} --help shows the options."


def _parts(frame: str) -> list[str]:
    """The text within the frame, cut where it is ruled."""
    lines = [line.strip().removeprefix("│").removesuffix("│").rstrip() for line in frame.strip().splitlines()]
    inner = [line for line in lines if not line.startswith(("╭", "╰"))]
    parts = re.split(r"^ ?─+$", "\n".join(inner), flags=re.MULTILINE)
    return [part.strip("\n") for part in parts]


def _unknown(named: str, advice: list[str], prog: str) -> str:
    # The values that follow an unknown option are listed as well.
    words = named.split(", ")
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return f"{words[0]} belongs to no option; {prog} --help lists them."
    near = re.search(r"^ +(--[\w-]+)", "\n".join(advice), re.MULTILINE) if len(flags) == 1 else None
    meant = f" (did you mean {near[1]}?)" if near else ""
    return f"{flags[0]} is no option{meant}; {prog} --help lists them."


def _described(form: str) -> str:
    """tyro's form of a value, in words: {None}|INT, [INT [INT ...]], FLOAT FLOAT."""
    words = [_KINDS.get(part, part) for part in form.split("|")]
    if len(words) > 1:
        words = sorted(words, key=lambda word: word == "None")
    elif several := re.fullmatch(r"\[?(INT|FLOAT)[ \[].*", form):
        words = [{"INT": "whole numbers", "FLOAT": "numbers"}[several[1]]]
    return " or ".join(words)


def _value(flag: str, given: list[str]) -> str:
    """What was given for an option, the last time that it was."""
    found = ""
    for index, word in enumerate(given):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != flag:
            continue
        found = value
        if not equals:
            rest = given[index + 1 :]
            stop = next((i for i, other in enumerate(rest) if other.startswith("--")), len(rest))
            found = " ".join(rest[:stop])
    return " ".join(found.split())
