"""The command line: options as `Config` has them, and errors of one sentence."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from kd_jax.experiments.notebook.config import LARGEST_SHIFT, METHODS, PRESETS, SCHEDULES, Config, ConfigError, option

_DATASET_HELP = (
    "mnist (packaged, no download), tfds:NAME (any TFDS image classification data set), idx:DIR (idx files, gzipped "
    "or not) or npz:FILE (x_train, y_train, x_test, y_test)"
)
_METHOD_HELP = (
    "kd-without-t2 is alpha * cross entropy + (1 - alpha) * KL, kd the same with the KL times the temperature squared "
    "as in Hinton et al. (2015), kd-as-written the notebook's loss with its mistake, for checking its numbers"
)


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


def add_config_options(parser: argparse.ArgumentParser, single: Collection[str] | None = None) -> None:
    """An option for every field of `Config`; one that is not given is absent from the parsed arguments.

    single: where it is given, all other options take a list of values. Layers of one network are joined by commas.
    """

    def _add(group: Any, name: str, kind: Any, metavar: str | tuple[str, str], help: str, **more: Any) -> None:
        if single is not None and name not in single:
            more["nargs"] = "+"
        elif name.endswith("hidden"):
            # Of one network, layers may be set apart by blanks, too.
            more["nargs"], metavar = "+", ("N", "N")
        _add_option(group, name, kind, metavar, help, **more)

    what = parser.add_argument_group("what is trained")
    _add(what, "dataset", str, "SOURCE", _DATASET_HELP)
    _add(what, "preset", str, "NAME", f"defaults of all the other options, one of {', '.join(PRESETS)}")
    _add(what, "teacher_hidden", layers, "N,N", "sizes of the teacher's hidden layers")
    _add(what, "teacher_dropout", number, "X", "rate of the dropout in the teacher's hidden layers, from 0 to below 1")
    _add(what, "teacher_input_dropout", number, "X", "rate of the dropout on the teacher's inputs, from 0 to below 1")
    _add(what, "teacher_max_norm", number, "X", "largest squared norm of a teacher's unit's weights, 0 for none")
    _add(what, "student_hidden", layers, "N,N", "sizes of the students' hidden layers")
    how = parser.add_argument_group("how the students are distilled")
    _add(how, "method", str, "NAME", f"the loss, one of {', '.join(METHODS)}. {_METHOD_HELP}")
    _add(how, "alpha", number, "X", "weight of the hard loss, from 0 to 1; 1 - alpha is the weight of the soft loss")
    _add(how, "temperature", number, "X", "divides the logits of student and teacher in the soft loss, above 0")
    training = parser.add_argument_group(
        "training, with Adam (of the students, and of the teacher where not said apart)"
    )
    _add(training, "epochs", whole, "N", "epochs of each training")
    _add(training, "batch_size", whole, "N", "images in a step; an incomplete last batch of an epoch is left out")
    _add(training, "learning_rate", number, "X", "Adam's learning rate, above 0")
    schedule = f"of the learning rate after the warm-up, if any: one of {', '.join(SCHEDULES)} (to 0)"
    _add(training, "schedule", str, "NAME", schedule)
    warmup = "share of the steps, from 0 to below 1, in which the learning rate first rises in a line from 0"
    _add(training, "warmup", number, "X", warmup)
    shift = (
        f"moves images by up to N pixels, 0 to {LARGEST_SHIFT}, anew in each step; soft targets are of what the "
        "student sees"
    )
    _add(training, "shift", whole, "N", shift)
    share = (
        "share of the images whose place --shift draws anew in a step, above 0 and at most 1; the others stay where "
        "they are (of no use without --shift)"
    )
    _add(training, "shift_share", number, "X", share)
    for name, kind, metavar in (
        ("epochs", whole, "N"), ("batch_size", whole, "N"), ("learning_rate", number, "X"),
        ("schedule", str, "NAME"), ("warmup", number, "X"), ("shift", whole, "N"),
        ("shift_share", number, "X"),
    ):  # fmt: skip
        _add(training, f"teacher_{name}", kind, metavar, f"{option(name)} of the teacher")
    _add(training, "seeds", whole, "N", "number of students of each kind, trained together; all learn from one teacher")
    _add(training, "seed", whole, "N", "first seed; the teacher's seed, too")


def config_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given of `Config`, for `make_config`. Raises `ConfigError` for several networks in place of one."""
    given = {name: value for name, value in vars(parsed).items() if name in Config.__dataclass_fields__}
    for name, value in given.items():
        if isinstance(value, list) and len(value) > 1 and any(len(network) > 1 for network in value):
            several = " ".join(",".join(map(str, network)) for network in value)
            raise ConfigError(
                f"{option(name)} is {several}: give the layers of one network, joined by commas "
                "(python -m kd_jax.sweep takes lists)"
            )
    return {name: sum(value, ()) if isinstance(value, list) else value for name, value in given.items()}


def _add_option(group: Any, name: str, kind: Any, metavar: str | tuple[str, str], help: str, **more: Any) -> None:
    default = getattr(Config(), name)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "the students'" if default is None else shown
    group.add_argument(
        option(name), type=kind, metavar=metavar, default=argparse.SUPPRESS, help=f"{help} (default: {shown})", **more
    )


def presets() -> str:
    """Every preset by the options that it stands for, as lines of a help text."""
    lines = ["presets:"]
    for name, own in PRESETS.items():
        texts = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in own.items()}
        words = " ".join(f"{option(key)} {value}" for key, value in texts.items()) or "the defaults above"
        # An option stays on the line of its value.
        whole_options = words.replace(" ", "\0").replace("\0--", " --")
        indented = textwrap.wrap(whole_options, 94, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {name}", *(f"    {line}".replace("\0", " ") for line in indented)]
    return "\n".join(lines) + "\n"


def layers(text: str) -> tuple[int, ...]:
    """Sizes of hidden layers joined by commas, as an option's type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no sizes of layers: give whole numbers joined by commas, such as 20,20"
        ) from None


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
