"""Every loss of two features with its oracle, and how the tests compare them."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from losses import feature_oracles as oracles

from kd_jax.losses import features, maps, relations, summaries, transformers

CHANNELS = 3
VARIANCE, MARGIN = np.array([-1.0, 0.5, 5.0]), np.array([-0.7, -0.1, -2.0])


class Case(NamedTuple):
    loss: Callable[..., Any]  # (student, teacher) -> [batch]
    oracle: Callable[..., Any]
    student: tuple[int, ...] = (2, 2, CHANNELS)  # Shapes of an example.
    teacher: tuple[int, ...] = (2, 2, CHANNELS)
    at_equal: float | None = 0.0  # The value where student and teacher are equal; None: no such number.
    couples: bool = False  # Takes weights, and its values depend on the other examples.


def flows(loss: Callable[..., Any], *, oracle: bool) -> Callable[..., Any]:
    """FSP of a map and a smaller one made of it, so that it takes two arguments as the others do."""

    def of_two(student: Any, teacher: Any) -> Any:
        if not oracle:
            student, teacher = maps.as_pair(student, teacher)
        pooled = (
            oracles.by_example(lambda x: oracles.pool(x, (2, 1)))
            if oracle
            else partial(maps.average_pool, space=(2, 1))
        )
        return loss(student, pooled(student), teacher, pooled(teacher))

    return of_two


VECTORS = {"student": (5,), "teacher": (5,)}
UNEQUAL = {"student": (5,), "teacher": (2, 3), "couples": True}
CASES = {
    "fitnet": Case(features.fitnet, oracles.mean_square),
    "vid": Case(lambda s, t: features.vid(s, t, VARIANCE), lambda s, t: oracles.vid(s, t, VARIANCE), at_equal=None),
    "ab": Case(features.ab, oracles.ab, at_equal=None),
    "ofd": Case(lambda s, t: features.ofd(s, t, MARGIN), lambda s, t: oracles.ofd(s, t, MARGIN), at_equal=None),
    "simkd": Case(features.simkd, oracles.simkd, teacher=(3, 4, CHANNELS)),
    "mgd": Case(features.mgd, oracles.sum_square),
    "vkd": Case(features.vkd, oracles.vkd, student=(4,), teacher=(4,), at_equal=None),
    "at": Case(summaries.at, oracles.at, student=(3, 2, 2), teacher=(2, 3, CHANNELS)),
    "nst": Case(summaries.nst, oracles.nst, student=(3, 2, 2), teacher=(2, 3, CHANNELS)),
    "fsp": Case(
        flows(summaries.fsp, oracle=False), flows(oracles.fsp, oracle=True), student=(3, 2, 2), teacher=(2, 2, 2)
    ),
    "ft": Case(summaries.ft, oracles.ft),
    "ickd": Case(summaries.ickd, oracles.ickd, student=(3, 2, CHANNELS)),
    "cat_kd": Case(summaries.cat_kd, oracles.cat_kd, student=(3, 2, 2), teacher=(2, 4, 2)),
    "wkd_f": Case(summaries.wkd_f, oracles.wkd_f, student=(3, 2, CHANNELS)),
    "reviewkd": Case(summaries.reviewkd, oracles.reviewkd, student=(3, 2, 2), teacher=(3, 2, 2)),
    "sp": Case(relations.sp, oracles.sp, **UNEQUAL),
    "rkd_distance": Case(relations.rkd_distance, oracles.rkd_distance, **UNEQUAL),
    "rkd_angle": Case(relations.rkd_angle, oracles.rkd_angle, **UNEQUAL),
    "pkt": Case(relations.pkt, oracles.pkt, **UNEQUAL),
    "cc": Case(relations.cc, oracles.cc, **VECTORS, couples=True),
    "cc_gaussian": Case(relations.cc_gaussian, oracles.cc_gaussian, **UNEQUAL),
    "srd": Case(relations.srd, oracles.srd, **VECTORS, at_equal=float(np.log(1e-5)), couples=True),
    "hidden_states": Case(transformers.hidden_states, oracles.hidden_states, student=(2, 4), teacher=(2, 4)),
    "cosine": Case(transformers.cosine, oracles.cosine, student=(2, 4), teacher=(2, 4)),
    "attention_maps": Case(
        transformers.attention_maps,
        lambda s, t: oracles.attention_maps(s, t, np.ones((len(s), s.shape[-1]))),
        student=(2, 2, 2),
        teacher=(2, 2, 2),
    ),
    "minilm_relations": Case(
        partial(transformers.minilm_relations, heads=2),
        lambda s, t: oracles.minilm(np.stack([s, s]), np.stack([t, t]), np.ones(s.shape[:2]), 2),
        student=(3, 4),
        teacher=(3, 2),
    ),
}
COUPLING = [name for name, case in CASES.items() if case.couples]


def draw(name: str, batch: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A student's and a teacher's features in float64."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(0, 1.5, (batch, *shape)) for shape in (CASES[name].student, CASES[name].teacher))


_DIRECTIONS = 6


@cache
def compiled(name: str) -> Callable[..., Any]:
    """The loss as users run it, compiled once for each shape that the tests of a module give it."""
    return jax.jit(CASES[name].loss)


@cache
def slopes(name: str) -> Callable[..., Any]:
    """The sum of the values, and its gradients by student and teacher."""
    return jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(CASES[name].loss(s, t)), (0, 1)))


def floats(name: str, batch: int = 4, seed: int = 0) -> list[jax.Array]:
    """`draw` in float32."""
    return [jnp.asarray(array, jnp.float32) for array in draw(name, batch, seed)]


def assert_close(found: Any, expected: Any, *, rtol: float) -> None:
    """To `rtol` of the largest element: one whose terms cancel has no accuracy of its own."""
    expected = np.asarray(expected, dtype=np.float64)
    scale = float(np.abs(expected).max())
    scale = scale if scale > 1e-20 else 1.0
    np.testing.assert_allclose(np.float64(found), expected, rtol=0, atol=rtol * scale)


def assert_is_oracle(
    loss: Callable[..., Any],
    oracle: Callable[..., Any],
    *arrays: np.ndarray,
    values: float = 1e-13,
    gradients: float = 1e-11,
) -> None:
    """Values, and the gradients of a random sum of them by each of the arrays, in float64."""
    with jax.enable_x64(True):
        expected = np.asarray(oracle(*oracles.long(*arrays)))
        mix = np.random.default_rng(9).uniform(0.5, 1.5, expected.shape)

        def mixed(*args: Any) -> tuple[Any, Any]:
            found = loss(*args)
            return jnp.sum(found * mix), found

        slots = tuple(range(len(arrays)))
        (_, found), slopes = jax.jit(jax.value_and_grad(mixed, slots, has_aux=True))(*map(jnp.asarray, arrays))
    assert_close(found, expected, rtol=values)
    for which, slope in enumerate(slopes):
        # Random directions meet every element: what is wrong in one of them is wrong along each.
        directions = np.random.default_rng(which).normal(size=(_DIRECTIONS, *np.shape(slope)))
        directions /= np.sqrt(np.sum(directions**2, axis=tuple(range(1, directions.ndim)), keepdims=True))
        numeric = oracles.numeric_slopes(lambda *args: np.sum(mix * oracle(*args)), list(arrays), which, directions)
        along = np.sum(directions * np.asarray(slope)[None], axis=tuple(range(1, directions.ndim)))
        size = float(np.sqrt(np.sum(np.square(slope)))) or 1.0
        np.testing.assert_allclose(along, np.float64(numeric), rtol=0, atol=gradients * size)
