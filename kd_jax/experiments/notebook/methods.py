"""The methods that the notebook's commands know by name, its own mistake among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.methods import KD, CrossEntropy, KDWithoutTSquared, Method, catalogue, standardised
from kd_jax.methods.base import Scalar, Values, as_parts, terms_of
from kd_jax.methods.logits import SoftLoss
from kd_jax.models import Model, Network, Output
from kd_jax.models.compiled import has_hash


@dataclass(frozen=True)
class KDAsWritten(SoftLoss):
    """The reference notebook with its wrong use of `KLDivLoss`, for checking its numbers; without T²."""

    alpha: Scalar = 0.5
    temperature: Scalar = 20.0

    def soft(self, student: Output, teacher: Output, batch: Batch) -> Values:
        """What the notebook computed in place of a KL."""
        return losses.kd_as_written(student.logits, teacher.logits, temperature=self.temperature)


METHODS: dict[str, type[KD | KDWithoutTSquared | KDAsWritten]] = {
    "kd": KD,
    "kd-without-t2": KDWithoutTSquared,
    "kd-as-written": KDAsWritten,
}
"""Those whose numbers are `--alpha` and `--temperature`."""


@cache
def known() -> catalogue.Named:
    """Every method by the name that `--method` takes."""
    others = {name: method for name, method in catalogue.named().items() if method not in METHODS.values()}
    return MappingProxyType({**others, **METHODS})


def listing() -> str:
    """What `--method list` prints."""
    usual = f"--alpha {KDAsWritten.alpha:g} --temperature {KDAsWritten.temperature:g}"
    return catalogue.listing(known(), dict.fromkeys(METHODS, usual)) + (
        "\n\nDefaults are those of --method-option. A method of features is added to the cross entropy: give it its "
        "paths, --method-option student=PATH teacher=PATH, and its weight, weight=1. student= stands for feature, "
        "hint, first or features, and teacher= for teacher_feature, guided, teacher_first or guides, which have the "
        "student's path where they are left out. Several features are joined by commas, student=PATH,PATH. Every "
        "method that needs logits takes standardised=true (Sun et al. 2024, arXiv 2403.01427)."
    )


def make(name: str, alpha: float, temperature: float, options: Sequence[str]) -> Method:
    """The method of a configuration; one of features stands beside the cross entropy. Raises `ConfigError`."""
    asked, options = _is_standardised(name, options)
    method = _plain(name, alpha, temperature, options)
    return standardised(method) if asked else method


def _is_standardised(name: str, options: Sequence[str]) -> tuple[bool, Sequence[str]]:
    """Whether logits are standardised around the method, and its own options."""
    given = [text for text in options if text.partition("=")[0] == "standardised"]
    if not given:
        return False, options
    if len(given) > 1:
        raise ConfigError("--method-option has standardised twice: give it once (python -m kd_jax.sweep takes lists)")
    if given[0] not in ("standardised=true", "standardised=false"):
        raise ConfigError(f"--method-option is {given[0]!r}: standardised must be true or false")
    if "logits" not in catalogue.entry(name, known()[name]).needs:
        raise ConfigError(f"--method-option is {given[0]}: {name} does not compare a teacher's logits, so leave it out")
    return given[0] == "standardised=true", [text for text in options if text not in given]


def _plain(name: str, alpha: float, temperature: float, options: Sequence[str]) -> Method:
    if name in METHODS:
        if options:
            raise ConfigError(f"--method-option is {options[0]}: the numbers of {name} are --alpha and --temperature")
        return METHODS[name](alpha, temperature)
    kind = known()[name]
    of_features = not kind.compares_logits and not kind.needs_labels and catalogue.has_features(kind)
    weights = [text for text in options if of_features and text.startswith("weight=")]
    method = catalogue.make(name, kind, [text for text in options if text not in weights])
    if not of_features:
        return method
    if len(weights) > 1:
        raise ConfigError("--method-option has weight twice: give it once (python -m kd_jax.sweep takes lists)")
    try:
        weight = float(weights[0].partition("=")[2]) if weights else 1.0
    except ValueError:
        raise ConfigError(f"--method-option is {weights[0]!r}: weight must be a number") from None
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"--method-option is {weights[0]!r}: weight must be at least 0, and finite")
    return CrossEntropy() + (method if weight == 1 else weight * method)


def check(
    method: Method, name: str, student: Model, teacher: Model, image_shape: Sequence[int], size: int,
    mixing: str | None = None,
) -> None:  # fmt: skip
    """Raises `ConfigError` where a method cannot train the student on labelled images, in batches of that size.

    mixing: the name of what mixes images and labels, if anything does.
    """
    for are_mixed in (False, True)[: 1 if mixing is None else 2]:
        try:
            if student.variables is None and teacher.variables is None and has_hash(method):
                _traced_once(method, student.network, teacher.network, tuple(image_shape), size, are_mixed)
            else:
                _trace(method, student, teacher, image_shape, size, are_mixed)
        except (ValueError, TypeError) as error:
            if are_mixed:
                raise ConfigError(
                    f"--method is {name}, and --augment {mixing} mixes images (then {str(error).partition(': ')[0]}): "
                    "choose another of them"
                ) from None
            raise ConfigError(f"--method is {name}: {error}") from None


@lru_cache(maxsize=256)
def _traced_once(
    method: Method, student: Network, teacher: Network, image_shape: tuple[int, ...], size: int, are_mixed: bool
) -> None:
    """A sweep asks for each of its settings, more than once."""
    _trace(method, Model(student), Model(teacher), image_shape, size, are_mixed)


def _trace(
    method: Method, student: Model, teacher: Model, image_shape: Sequence[int], size: int, are_mixed: bool
) -> None:
    images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    key = jax.random.key(0)

    def said(model: Model, images: Any, features: tuple[str, ...]) -> Output:
        variables = model.network.init(key) if model.variables is None else model.variables
        return model.network.apply(variables, images, key=key, features=features)[0]

    def loss(images: Any, labels: Any) -> Any:
        both = said(student, images, method.student_features), said(teacher, images, method.teacher_features)
        parts = as_parts(method.init(key, *both), method)
        batch = Batch(images, labels, indices=labels)
        if are_mixed:
            batch = Batch(images, jnp.zeros_like(both[0].logits))
        return terms_of(method, parts, *both, batch, jnp.int32(0))

    jax.eval_shape(loss, images, labels)
