"""Whether an experiment fits its data and the memory, before anything is trained."""

from kd_jax import errors
from kd_jax.data.dataset import Dataset
from kd_jax.data.mixing import mixes
from kd_jax.data.shifts import view_count
from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook import methods, views
from kd_jax.experiments.notebook.config import Config, Training
from kd_jax.experiments.notebook.recipes import given_teacher, layer_sizes, networks, places
from kd_jax.experiments.trials import trainings_at_once
from kd_jax.models import Model, Network
from kd_jax.train import memory
from kd_jax.train.memory import gib, teacher_outputs


def check(config: Config, dataset: Dataset) -> None:
    """Raises `ConfigError` where `config` does not fit `dataset`, or the networks do not fit into memory."""
    config.check_against(len(dataset.train_labels))
    _check_shifts(config, dataset)
    checked = places(config, dataset)
    teaching, learning = map(Model, networks(config, dataset))
    teaching = given_teacher(config, dataset) or teaching
    method, shape = config.make_method(), tuple(dataset.image_shape)
    mixing = config.augment if mixes(views.prepare(config.training)) else None
    methods.check(method, config.method, learning, teaching, shape, config.batch_size, mixing)
    free = memory.available()
    if free is None:
        return
    taught = teacher_outputs(len(dataset.train_labels), dataset.classes, config.shift)
    if config.shift and taught > free:
        raise ConfigError(
            f"--shift is {config.shift}: the teacher's outputs for all {view_count(config.shift)} views need "
            f"{gib(taught)}, and {gib(free)} are free: choose a smaller one, or 0"
        )
    for role, room, layers, training, network, seeds in zip(
        ("teacher", "student"),
        (free, free - taught),
        checked,
        (config.teacher_training, config.training),
        networks(config, dataset),
        (1, config.seeds),
        strict=True,
    ):
        examples, tests = len(dataset.train_labels), len(dataset.test_labels)
        if role == "teacher" and given_teacher(config, dataset) is not None:
            continue
        one = memory.needed(network, layers, examples=examples, test_examples=tests)
        needs, batch = f"that needs {{}}, and {gib(max(0, room))} are free:", training.batch_size
        if one.fixed > room:
            own = getattr(config, role)
            shown = f"--{role} is {own}" if own else f"--{role}-hidden is {' '.join(map(str, layers[1:-1]))}"
            raise ConfigError(f"{shown}: {needs.format(gib(one.fixed))} choose smaller sizes")
        if one.total(batch) > room:
            most = (room - one.fixed) // one.per_image
            own = role == "teacher" and config.teacher_batch_size is not None
            raise ConfigError(
                f"--{'teacher-' * own}batch-size is {batch}: {needs.format(gib(one.total(batch)))} "
                f"it must be at most {most:,}"
            )
        if seeds * one.total(batch) > room:
            most = room // one.total(batch)
            raise ConfigError(
                f"--seeds is {seeds}: {needs.format(gib(seeds * one.total(batch)))} it must be at most {most:,}"
            )


def check_kept(network: Network, trainings: int, whose: str, *, seeds: int, remedy: str) -> None:
    """Raises `ConfigError` where the parameters of so many trainings, kept until all are measured, do not fit.

    whose: the parameters, in words.
    """
    needed, room = memory.kept_parameters(network, trainings), memory.host()
    if room is not None and needed > room:
        raise ConfigError(
            f"--seeds is {seeds}: the parameters of {whose} need {gib(needed)}, and {gib(room)} are free: {remedy}"
        )


def at_once(
    network: Network,
    hidden: tuple[int, ...],
    training: Training,
    dataset: Dataset,
    *,
    examples: int,
    taught: bool = True,
    remedy: str = errors.SMALLER,
) -> int:
    """How many trainings on so many examples fit into memory side by side.

    taught: whether a teacher's outputs are beside them. Raises `ConfigError` where not even one training fits.
    """
    layers, tests = layer_sizes(hidden, dataset), len(dataset.test_labels)
    one = memory.needed(network, layers, examples=examples, test_examples=tests)
    beside = teacher_outputs(examples, dataset.classes, training.shift) if taught else 0
    return trainings_at_once(one, training.batch_size, beside=beside, remedy=remedy)


def _check_shifts(config: Config, dataset: Dataset) -> None:
    smallest = min(dataset.image_shape[:2])
    for name, shift in (("--shift", config.shift), ("--teacher-shift", config.teacher_training.shift)):
        if shift >= smallest:
            raise ConfigError(
                f"{name} is {shift}: it must be below the {smallest} pixels of the images' shorter side, or 0"
            )
