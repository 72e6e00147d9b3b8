"""The command line: a parser whose errors are one sentence, and the types of options."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one sentence on stderr, with exit code 2.

    stray: what to do about a value that belongs to no option.
    """

    stray = "see --help"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # argparse takes -1 for a value, and -1e-3 and -inf for options.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf$|-nan$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        """Prints the message alone, without the usage."""
        fail(message.removeprefix("argument "), code=2)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The parsed arguments; an unknown option is answered with the closest known one."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"{unknown[0]!r} belongs to no option: {self.stray}")
            known = [text for action in self._actions for text in action.option_strings]
            close = _like(name, known)
            self.error(f"unknown option {name!r}: " + (f"did you mean {close[0]}?" if close else "see --help"))
        return parsed


def _like(name: str, known: Sequence[str]) -> list[str]:
    """Options that begin with `name`, else those that hold it, else the nearest, if there are any."""
    word = name.strip("-")
    starting = [one for one in known if one.startswith(name)]
    holding = [one for one in known if len(word) > 2 and word in one]
    words = {one.strip("-"): one for one in known}
    return starting or holding or [words[one] for one in difflib.get_close_matches(word, words, n=1, cutoff=0.7)]


def fail(message: str, *, code: int) -> NoReturn:
    """Ends the program with one sentence on stderr."""
    sentence = " ".join(message.split("\n"))
    print(f"kd_jax: {sentence}", file=sys.stderr)
    sys.exit(code)


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def layers(text: str) -> tuple[int, ...]:
    """Sizes of hidden layers joined by commas, as an option's type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no sizes of layers: give whole numbers joined by commas, such as 20,20"
        ) from None


def epochs(text: str) -> tuple[int, ...]:
    """Numbers of epochs joined by commas, as an option's type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no epochs: give whole numbers joined by commas, such as 150,180,210"
        ) from None


def texts(text: str) -> tuple[str, ...]:
    """Settings `name=value`, several of them joined by commas, as an option's type."""
    return tuple(re.split(r",(?=\w+=)", text))


def whole(text: str) -> int:
    """A whole number, as an option's type."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give one such as 5") from None


def number(text: str) -> float:
    """A number, as an option's type."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give one such as 0.5") from None
