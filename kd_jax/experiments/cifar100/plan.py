"""What the table has: pairs of networks, methods with the papers' numbers, and what was published."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook.config import PRESETS, Config, make_config
from kd_jax.methods import CTKD, DIST, DKD, KD, NKD, CrossEntropy, Method, standardised

SEEDS, QUICK_SEEDS, SEED = 5, 3, 42
QUICK = 10
"""The quick version has this part of the epochs."""

ALONE, TEACHER = "alone", "teacher"

PAIRS: dict[str, tuple[str, str]] = {
    f"{teacher}-{student}": (teacher, student)
    for teacher, student in (
        ("resnet32x4", "resnet8x4"),
        ("vgg13", "vgg8"),
        ("wrn_40_2", "wrn_40_1"),
        ("wrn_40_2", "wrn_16_2"),
        ("resnet56", "resnet20"),
        ("resnet110", "resnet32"),
        ("resnet110", "resnet20"),
        ("resnet32x4", "shufflenet_v2"),
        ("resnet32x4", "wrn_16_2"),
        ("resnet32x4", "wrn_40_2"),
        ("wrn_40_2", "resnet8x4"),
        ("wrn_40_2", "mobilenet_v2"),
        ("vgg13", "mobilenet_v2"),
        ("resnet32x4", "shufflenet_v1"),
    )
}
"""Teacher and student by the name of the pair, in the order of the papers."""

METHODS: dict[str, Callable[[int], Method]] = {
    "kd": lambda epoch: KD(alpha=0.1, temperature=4.0),
    "ctkd": lambda epoch: CTKD(alpha=0.1, warmup=10 * epoch),
    "dkd": lambda epoch: DKD(alpha=1.0, beta=8.0, temperature=4.0, warmup=20 * epoch),
    "dist": lambda epoch: DIST(beta=1.0, gamma=1.0, temperature=4.0),
    "nkd": lambda epoch: NKD(gamma=1.5, temperature=1.0),
    "kd-standardised": lambda epoch: 0.1 * CrossEntropy() + standardised(9 * KD(alpha=0.0, temperature=2.0)),
}
"""Of the steps of an epoch, of which there are 240. Papers tune some of the numbers by pair; these are of all pairs."""

_COLUMNS: dict[str, str] = {
    "kd": "73.33 72.98 73.54 74.92 70.66 73.08 70.67 74.45 74.90 77.70 73.97 68.36 67.37 74.07",
    "ctkd": "73.39 73.52 73.93 75.45 71.19 73.52 70.99 - - - - - - -",
    "dkd": "76.32 74.68 74.81 76.24 71.97 74.11 71.06 77.07 75.70 78.46 75.56 69.28 69.71 76.45",
    "dist": "76.31 - 74.43 - 71.75 - - - - - - - - -",
    "nkd": "76.35 74.86 - 75.43 71.18 - 71.26 - - - - - - 76.31",
    "kd-standardised": "76.62 74.36 74.37 76.11 71.43 74.17 71.48 75.56 75.26 77.92 77.11 69.23 68.61 -",
}
PUBLISHED: dict[tuple[str, str], float] = {
    (pair, method): float(number)
    for method, line in _COLUMNS.items()
    for pair, number in zip(PAIRS, line.split(), strict=True)
    if number != "-"
}
"""Per cent of the test images, by pair and method, in the tables of Sun et al. (2024, logit standardisation), Huang et
al. (2022, dist) and LDRLD (2025, nkd). Those of mdistiller are of the best test epoch; ours are of the last.
"""

# Of these students the papers' learning rate is 0.01.
SLOWER = ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")


class Plan(NamedTuple):
    """What is trained: all pairs with all methods, and with none."""

    pairs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    seed: int
    quick: bool
    dataset: str

    def config(self, pair: str) -> Config:
        """The preset `cifar100` with the networks of a pair."""
        teacher, student = PAIRS[pair]
        given: dict[str, Any] = {"teacher": teacher, "student": student, "dataset": self.dataset}
        given |= {"seeds": self.seeds, "seed": self.seed}
        if student in SLOWER:
            given |= {"learning_rate": 0.01, "teacher_learning_rate": PRESETS["cifar100"]["learning_rate"]}
        whole = make_config("cifar100", **given)
        if not self.quick:
            return whole
        shorter = {"milestones": tuple(epoch // QUICK for epoch in whole.milestones), "epochs": whole.epochs // QUICK}
        return make_config("cifar100", **given, **shorter)

    def method(self, name: str, steps: int) -> Method:
        """One by its name. steps: of all its epochs."""
        return METHODS[name](steps // 240)


def chosen(names: Sequence[str] | None, known: Sequence[str], option: str) -> tuple[str, ...]:
    """Those of the known that are asked for, in their order; all where nothing is. Raises `ConfigError`."""
    if names is None:
        return tuple(known)
    split = [name for given in names for name in given.split(",") if name]
    for name in split:
        if name not in known:
            raise ConfigError(f"{option} has {name!r}, which the table has not: use some of {', '.join(known)}")
    if not split:
        raise ConfigError(f"{option} is given without a name: use some of {', '.join(known)}")
    return tuple(name for name in known if name in split)
