"""Holds a loss of kd_jax to an oracle in 60 digits: values, and gradients by differences of the oracle's own values."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles
from programs import with_gradients

CLASSES = 6
LABELS = np.array([0, 3, 1, 5, 2, 4, 0, 5, 1])


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Rows of a student's and a teacher's logits, `[9, CLASSES]`, each of another kind."""
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(0, 3, (2, 9, CLASSES))
    one_hot = np.eye(CLASSES)[LABELS]
    student[1] = teacher[1] + rng.normal(0, 1e-3, CLASSES)
    student[2] = teacher[2] + rng.normal(0, 1e-6, CLASSES)
    student[3], teacher[3] = student[3] + 1e3, teacher[3] - 1e3
    teacher[4] = 40 * one_hot[4] + teacher[4] / 10
    student[5] = 40 * one_hot[5] + student[5] / 10
    student[6], teacher[6] = 30 * one_hot[6] + student[6] / 10, 28 * one_hot[6] + teacher[6] / 10
    student[7], teacher[7] = 10 * student[7], 10 * teacher[7]
    student[8] = teacher[8] + rng.uniform(-1, 1, CLASSES)
    return student, teacher


def extremes() -> tuple[np.ndarray, np.ndarray]:
    """Rows that must stay finite, `[4, CLASSES]`: up to ±1e4, one-hot teachers, one-hot students, equal."""
    rng = np.random.default_rng(8)
    student, teacher = rng.uniform(-1e4, 1e4, (2, 4, CLASSES))
    teacher[1], student[2] = 1e4 * np.eye(CLASSES)[3], 1e4 * np.eye(CLASSES)[2]
    student[3] = teacher[3] = rng.normal(0, 1, CLASSES)
    return student, teacher


def gradient(oracle: Callable[[list[mp.mpf]], mp.mpf], row: Sequence[mp.mpf]) -> list[mp.mpf]:
    """By central differences, whose error is far below double precision."""
    step = mp.mpf(10) ** -18
    found = []
    for k in range(len(row)):
        above, below = list(row), list(row)
        above[k] += step
        below[k] -= step
        found.append((oracle(above) - oracle(below)) / (2 * step))
    return found


def assert_proven(
    loss: Callable[..., jax.Array],
    oracle: Callable[..., mp.mpf],
    *,
    labels: bool = False,
    of_teacher: bool = True,
    rtol: float = 1e-10,
    scale: float = 0.0,
    **numbers: float,
) -> None:
    """Values and gradients in float64, each to `rtol` of its row's largest or of `scale`; the numbers are traced.

    `loss(student, teacher, [labels,] **numbers)`; `oracle` likewise, of one row in exact numbers.
    """
    student, teacher = pairs()
    with jax.enable_x64(True):
        extra = (jnp.asarray(LABELS),) if labels else ()
        given = {name: jnp.float64(value) for name, value in numbers.items()}
        values, by = with_gradients(loss, (0, 1))(jnp.asarray(student), jnp.asarray(teacher), *extra, **given)
    exact = {name: mp.mpf(value) for name, value in numbers.items()}
    for i, (s, t) in enumerate(zip(oracles.rows(student), oracles.rows(teacher), strict=True)):
        more = (int(LABELS[i]),) if labels else ()
        expected = oracle(s, t, *more, **exact)
        assert_near(values[i], [expected], rtol, i)
        assert_near(by[0][i], gradient(lambda z, t=t, more=more: oracle(z, t, *more, **exact), s), rtol, i, scale)
        if of_teacher:
            assert_near(by[1][i], gradient(lambda z, s=s, more=more: oracle(s, z, *more, **exact), t), rtol, i, scale)


def assert_near(found: Any, expected: Sequence[mp.mpf], rtol: float, row: Any = "", scale: float = 0.0) -> None:
    """To `rtol` of the largest, or of `scale`; and to 1e-38, which is what differences of 60 digits have."""
    wanted = np.array([float(x) for x in expected])
    error = np.abs(np.atleast_1d(np.float64(found)) - wanted).max()
    assert error <= rtol * max(np.abs(wanted).max(), scale) + 1e-38, (row, found, wanted)


def assert_sound(
    loss: Callable[..., jax.Array],
    *,
    labels: bool = False,
    of_teacher: bool = True,
    coupled: bool = False,
    masks: bool = True,
    **numbers: float,
) -> None:
    """Finite at extremes; float32 from bfloat16; ruled-out classes; both modes; any rank; vmap and scan; a mask.

    The numbers are traced, so that losses which differ in them alone share their programs.
    """
    student, teacher = extremes()
    names = (jnp.array([0, 3, 2, 1]),) if labels else ()
    sides = (0, 1) if of_teacher else (0,)
    run = partial(with_gradients(loss, sides), **numbers)
    # A class that both rule out is a row of its own kind.
    for add in (0.0, -np.inf, float(np.finfo(np.float32).min))[: 3 if masks else 1]:
        if add:
            student[3, 5] = teacher[3, 5] = add
        values, gradients = run(*_float32(student, teacher), *names)
        assert values.dtype == jnp.float32
        assert values.shape == (4,)
        assert np.isfinite(values).all(), values
        for gradient_of in gradients:
            assert np.isfinite(gradient_of).all(), gradient_of
    if masks:
        student[3, 5] = teacher[3, 5] = -np.inf
    s, t = _float32(student, teacher)
    mild = _float32(*(z[:8] for z in pairs()))
    whole = (jnp.asarray(LABELS[:8]),) if labels else ()
    forward, others = _other_ways(loss, coupled)((s, t, *names), (*mild, *whole), numbers)
    values, gradients = run(s, t, *names)
    np.testing.assert_allclose(forward[0], values, rtol=1e-6)
    slopes = np.where(np.isfinite(s), gradients[0], 0).sum(-1)
    scale = np.abs(gradients[0]).sum(-1)
    sums = (np.sum(forward[1]), slopes.sum()) if coupled else (forward[1], slopes)
    np.testing.assert_allclose(*sums, atol=1e-5 * max(1.0, scale.max()), rtol=1e-4)
    if not coupled:
        np.testing.assert_array_equal(others["bfloat16"], others["widened"])
        assert others["widened"].dtype == jnp.float32
        flat = np.asarray(others["flat"])
        for way in ("boxed", "vmap", "scan"):
            np.testing.assert_allclose(np.ravel(others[way]), flat, rtol=2e-5, atol=1e-6)
        assert others["boxed"].shape == (2, 4)


def _float32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@cache
def _other_ways(loss: Callable[..., jax.Array], coupled: bool) -> Callable[..., Any]:
    """What a loss is asked besides, in one program: forward mode of extremes; narrow types, ranks, vmap and scan."""

    def program(extreme: Sequence[jax.Array], mild: Sequence[jax.Array], numbers: dict[str, jax.Array]) -> Any:
        of = partial(loss, **numbers)
        s, *rest = extreme
        forward = jax.jvp(lambda z: of(z, *rest), (s,), (jnp.ones_like(s),))
        if coupled:
            return forward, {}
        narrow = [z[3:].astype(jnp.bfloat16) for z in extreme[:2]]
        boxed = [array.reshape(2, 4, *array.shape[1:]) for array in mild]
        return forward, {
            "bfloat16": of(*narrow, *(y[3:] for y in extreme[2:])),
            "widened": of(*(z.astype(jnp.float32) for z in narrow), *(y[3:] for y in extreme[2:])),
            "flat": of(*mild),
            "boxed": of(*boxed),
            "vmap": jax.vmap(of)(*mild),
            "scan": jax.lax.scan(lambda c, row: (c, of(*row)), 0, mild)[1],
        }

    return jax.jit(program)
