"""The command-line options of a `Config`: one for every field, in three groups."""

import argparse
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from kd_jax.errors import ConfigError, MismatchError
from kd_jax.experiments.notebook import methods
from kd_jax.experiments.notebook.config import (  # fmt: skip
    AUGMENTATIONS,
    LARGEST_SHIFT,
    METHODS,
    OPTIMIZERS,
    PRESETS,
    SCHEDULES,
    Config,
    check_steps,
    make_config,
)
from kd_jax.experiments.shell.options import epochs, layers, number, option, texts, whole
from kd_jax.experiments.shell.resume import shown
from kd_jax.methods import catalogue
from kd_jax.train.checkpoint import Store

_DATASET_HELP = (
    "mnist (packaged, no download), tfds:NAME (any TFDS image classification data set), idx:DIR (idx files, gzipped "
    "or not) or npz:FILE (x_train, y_train, x_test, y_test)"
)
_OWN_HELP = (
    "a network of kd.models by its name (resnet20), or package.module:Net or file.py:Net, a class or function of rngs"
)
_METHOD_HELP = (
    "list shows all others with their papers, needs and numbers. "
    "kd-without-t2 is alpha * cross entropy + (1 - alpha) * KL, kd the same with the KL times the temperature squared "
    "as in Hinton et al. (2015), kd-as-written the notebook's loss with its mistake, for checking its numbers"
)


def add_options(parser: argparse.ArgumentParser, single: Collection[str] | None = None) -> None:
    """An option for every field of `Config`; one that is not given is absent from the parsed arguments.

    single: where it is given, all other options take a list of values. Layers of one network are joined by commas.
    """

    def _add(group: Any, name: str, kind: Any, metavar: str | tuple[str, str], help: str, **more: Any) -> None:
        if single is not None and name not in single:
            more["nargs"] = "+"
        elif name.endswith(("hidden", "milestones")):
            # Of one network, layers may be set apart by blanks, too; so may milestones.
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
    if single is None:
        _add(what, "student", str, "NAME", f"a network in its place: {_OWN_HELP}")
        _add(
            what, "teacher", str, "NAME",
            f"another teacher: {_OWN_HELP}, or file.py:load, a function without arguments, whose network has its "
            "values and is not trained",
        )  # fmt: skip
    how = parser.add_argument_group("how the students are distilled")
    _add(how, "method", str, "NAME", f"the loss, one of {', '.join(METHODS)}. {_METHOD_HELP}")
    _add(
        how, "method_option", texts, "NAME=X",
        "numbers of a method that --method list shows, such as beta=2 temperature=4", nargs="+",
    )  # fmt: skip
    _add(how, "alpha", number, "X", "weight of the hard loss, from 0 to 1; 1 - alpha is the weight of the soft loss")
    _add(how, "temperature", number, "X", "divides the logits of student and teacher in the soft loss, above 0")
    training = parser.add_argument_group("training (of the students, and of the teacher where not said apart)")
    _add(training, "epochs", whole, "N", "epochs of each training")
    _add(training, "batch_size", whole, "N", "images in a step; an incomplete last batch of an epoch is left out")
    _add(training, "learning_rate", number, "X", "learning rate, above 0")
    schedule = (
        f"of the learning rate after the warm-up, if any: one of {', '.join(SCHEDULES)} (cosine to 0, steps at "
        "milestones)"
    )
    _add(training, "schedule", str, "NAME", schedule)
    milestones = "epochs after which --schedule steps multiplies the learning rate; those after the last never come"
    _add(training, "milestones", epochs, "N,N", milestones)
    _add(training, "milestone_factor", number, "X", "by which --schedule steps multiplies it at each, above 0")
    optimizer = f"one of {', '.join(OPTIMIZERS)}"
    _add(training, "optimizer", str, "NAME", optimizer)
    _add(training, "momentum", number, "X", "of --optimizer sgd, from 0 to below 1 (of no use to adam)")
    decay = (
        "of all parameters, from 0 to 1: with sgd its product with a parameter is added to the gradient, with adam the "
        "learning rate times that is taken off it (AdamW)"
    )
    _add(training, "weight_decay", number, "X", decay)
    augment = (
        f"one of {', '.join(AUGMENTATIONS)}: crop-flip puts 4 pixels of 0 around each image, cuts one of its size out "
        "of that and turns half of them left to right, mixup mixes images in pairs (alpha 0.2) and cutmix puts a box "
        "of one into another (alpha 1), with their labels, anew in each step; the networks normalise by the training "
        "images' mean and standard deviation; a teacher answers for what its student sees"
    )
    _add(training, "augment", str, "NAME", augment)
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
        ("shift_share", number, "X"), ("milestones", epochs, "N,N"), ("milestone_factor", number, "X"),
        ("optimizer", str, "NAME"), ("momentum", number, "X"), ("weight_decay", number, "X"), ("augment", str, "NAME"),
    ):  # fmt: skip
        _add(training, f"teacher_{name}", kind, metavar, f"{option(name)} of the teacher")
    _add(training, "seeds", whole, "N", "number of students of each kind, trained together; all learn from one teacher")
    _add(training, "seed", whole, "N", "first seed; the teacher's seed, too")


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given of `Config`, for `make_config`. Raises `ConfigError` for several networks in place of one."""
    values = {name: value for name, value in vars(parsed).items() if name in Config.__dataclass_fields__}
    for name, value in values.items():
        if name.endswith("hidden") and len(value) > 1 and any(len(network) > 1 for network in value):
            several = " ".join(",".join(map(str, network)) for network in value)
            raise ConfigError(
                f"{option(name)} is {several}: give the layers of one network, joined by commas "
                "(python -m kd_jax.sweep takes lists)"
            )
    single: dict[str, Any] = {
        name: sum(value, ()) if isinstance(value, list) else value for name, value in values.items()
    }
    return single | ({"method": method_name(single["method"])} if "method" in single else {})


def config_of(given: Mapping[str, Any]) -> Config:
    """The configuration. Raises `ConfigError`, also for what is given and of no use to it."""
    config = make_config(**given)
    # What is given for the students holds for the teacher, too.
    for prefix, *trainings in (("", config.training, config.teacher_training), ("teacher_", config.teacher_training)):
        check_steps(trainings[0], prefix)
        for name, needed, has in (
            ("milestones", "--schedule steps", any(one.schedule == "steps" for one in trainings)),
            ("milestone_factor", "--schedule steps", any(one.schedule == "steps" for one in trainings)),
            ("momentum", "--optimizer sgd", any(one.optimizer == "sgd" for one in trainings)),
        ):
            if prefix + name in given and not has:
                value = shown(given[prefix + name])
                raise ConfigError(f"{option(prefix + name)} is {value}, and of no use without {needed}: add that")
    return config


def method_name(name: str) -> str:
    """A method's name as `Config` has it. Raises `ConfigError`."""
    return catalogue.find(name, methods.known())


def saved(store: Store, given: Mapping[str, Any], every: int | None) -> tuple[Config, int | None]:
    """The configuration and the checkpoint steps of the run in the folder.

    Raises `MismatchError` where options that are given differ, `CheckpointError` where the folder is damaged.
    """
    kept = store.identity()
    try:
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in kept["config"].items()}
        config = Config(**fields)
        kept_every = kept["checkpoint_steps"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MismatchError(
            f"{store.folder} has a run of another command or version: go on with the one that started it"
        ) from None
    asked = dict(given) | ({} if every is None else {"checkpoint_steps": every})
    known = config.as_dict(whole=True) | {"checkpoint_steps": kept_every}
    for name, value in asked.items():
        if known.get(name) != (list(value) if isinstance(value, tuple) else value):
            raise MismatchError(
                f"{option(name)} is {shown(value)}, and the run in {store.folder} has {shown(known.get(name))}: "
                "leave the option out to go on, or choose another folder"
            )
    return config, kept_every


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


def _add_option(group: Any, name: str, kind: Any, metavar: str | tuple[str, str], help: str, **more: Any) -> None:
    default = getattr(Config(), name)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "none" if default == () else shown
    if default is None:
        shown = "the students'" if name.startswith("teacher_") else "its own" if name == "method_option" else "none"
    group.add_argument(
        option(name), type=kind, metavar=metavar, default=argparse.SUPPRESS, help=f"{help} (default: {shown})", **more
    )
