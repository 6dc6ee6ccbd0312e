"""argparse whose complaints are `UserError`s: one line with the closest option."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from seer.errors import UserError, closest


def positive(text: str) -> int:
    """A count for `add_argument(type=...)`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def whole(text: str) -> int:
    """A number to count from 0 for `add_argument(type=...)`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0 for `add_argument(type=...)`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number greater than 0")
    return number


def path(text: str) -> Path:
    """A path for `add_argument(type=...)`; ~ is the home folder (shells leave it alone in quotes and after `=`)."""
    return Path(os.path.expanduser(text))


def png(text: str) -> Path:
    """The path of a picture for `add_argument(type=...)`."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a PNG: it ends in .png")
    return path(text)


class Arguments(argparse.ArgumentParser):
    """A parser of one verb; its help is the examples, then the options.

    Args:
        command: the words that call it, "seer export".
        examples: the text above the options, beginning with commands that can be run.
    """

    def __init__(self, command: str, examples: str) -> None:
        super().__init__(prog=command, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
        self._examples = examples
        self.add_argument("-h", "--help", action="help", help="show this")

    def format_help(self) -> str:
        return f"{self._examples.rstrip()}\n\n{super().format_help().lstrip()}"

    def error(self, message: str) -> NoReturn:
        what, _, rule = message.partition(": ")
        raise UserError(f"{self.prog}: {what}", rule or "the command is not whole", f"see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options as a namespace; a misspelt one is refused with the closest name, before any other complaint."""
        found, unexpected = self.parse_among_words(argv)
        if unexpected:
            raise UserError(
                f"{self.prog} ... {unexpected[0]}",
                "this word belongs to no option (the shell makes several words of a pattern outside of quotes)",
                f"see {self.prog} --help",
            )
        return found

    def parse_among_words(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """As `parse`, and the words that belong to no option, which may stand before, between and after them."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise UserError(f"{self.prog} {name}", "there is no such option", closest(name, known))
        return self.parse_known_args(argv)
