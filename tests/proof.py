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
    both_modes, other_ways = _programs(loss, (0, 1) if of_teacher else (0,))
    # A class that both rule out is a row of its own kind.
    for add in (float(np.finfo(np.float32).min), -np.inf, 0.0)[0 if masks else 2 :]:
        s, t = np.array(student), np.array(teacher)
        if add:
            s[3, 5] = t[3, 5] = add
        (values, gradients), forward = both_modes(*_float32(s, t), *names, **numbers)
        assert values.dtype == jnp.float32
        assert values.shape == (4,)
        assert np.isfinite(values).all(), values
        for gradient_of in gradients:
            assert np.isfinite(gradient_of).all(), gradient_of
        if add > -np.inf and masks:
            continue
        np.testing.assert_allclose(forward[0], values, rtol=1e-6)
        slopes = np.where(np.isfinite(s), gradients[0], 0).sum(-1)
        scale = np.abs(gradients[0]).sum(-1)
        sums = (np.asarray(forward[1]).sum(), slopes.sum()) if coupled else (forward[1], slopes)
        np.testing.assert_allclose(*sums, atol=1e-5 * max(1.0, scale.max()), rtol=1e-4)
    if coupled:
        return
    mild = _float32(*(z[:8].reshape(2, 4, -1) for z in pairs()))
    whole = (jnp.asarray(LABELS[:8].reshape(2, 4)),) if labels else ()
    halves = [both_modes(*(array[i] for array in (*mild, *whole)), **numbers)[0][0] for i in (0, 1)]
    found = other_ways(_float32(student[3:], teacher[3:]), [y[3:] for y in names], (*mild, *whole), numbers)
    np.testing.assert_array_equal(found["bfloat16"], found["widened"])
    assert found["widened"].dtype == found["bfloat16"].dtype == jnp.float32
    for way in ("boxed", "vmap of scan"):
        np.testing.assert_allclose(found[way], halves, rtol=2e-5, atol=1e-6)


def _float32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@cache
def _programs(loss: Callable[..., jax.Array], sides: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Values with gradients, and forward mode; and what is asked besides: of narrow types, another rank, rows alone."""

    def both_modes(s: jax.Array, *rest: jax.Array, **numbers: jax.Array) -> Any:
        forward = jax.jvp(lambda z: loss(z, *rest, **numbers), (s,), (jnp.ones_like(s),))
        return with_gradients(loss, sides)(s, *rest, **numbers), forward

    def other_ways(pair: Any, names: Any, boxed: Any, numbers: Any) -> dict[str, jax.Array]:
        of = partial(loss, **numbers)
        narrow = [z.astype(jnp.bfloat16) for z in pair]
        return {
            "bfloat16": of(*narrow, *names),
            "widened": of(*(z.astype(jnp.float32) for z in narrow), *names),
            "boxed": of(*boxed),
            "vmap of scan": jax.vmap(lambda *rows: jax.lax.scan(lambda c, row: (c, of(*row)), 0, rows)[1])(*boxed),
        }

    return jax.jit(both_modes), jax.jit(other_ways)
