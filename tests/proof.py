"""Holds a loss of kd_jax to an oracle in 60 digits: values, and gradients by differences of the oracle's own values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracles

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

        def total(s: jax.Array, t: jax.Array, given: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            values = loss(s, t, *extra, **given)
            return values.sum(), values

        given = {name: jnp.float64(value) for name, value in numbers.items()}
        derived = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, values), by = derived(jnp.asarray(student), jnp.asarray(teacher), given)
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
) -> None:
    """Finite at extremes; float32 from bfloat16; ruled-out classes; both modes; any rank; vmap and scan; a mask."""
    student, teacher = (jnp.asarray(z, jnp.float32) for z in extremes())
    names = (jnp.array([0, 3, 2, 1]),) if labels else ()
    sides = (0, 1) if of_teacher else (0,)
    run = jax.jit(lambda s, t, *y: (loss(s, t, *y), jax.grad(lambda *z: loss(*z, *y).sum(), sides)(s, t)))
    # A class that both rule out is a row of its own kind.
    for add in (0.0, -np.inf, float(jnp.finfo(jnp.float32).min))[: 3 if masks else 1]:
        s, t = (z.at[3, 5].set(add) if add else z for z in (student, teacher))
        values, gradients = run(s, t, *names)
        assert values.dtype == jnp.float32
        assert values.shape == (4,)
        assert jnp.isfinite(values).all(), values
        for gradient_of in gradients:
            assert jnp.isfinite(gradient_of).all(), gradient_of
    s, t = (z.at[3, 5].set(-jnp.inf) if masks else z for z in (student, teacher))
    forward = jax.jit(lambda s, t, *y: jax.jvp(lambda z: loss(z, t, *y), (s,), (jnp.ones_like(s),)))(s, t, *names)
    np.testing.assert_allclose(forward[0], run(s, t, *names)[0], rtol=1e-6)
    slopes = np.where(np.isfinite(s), run(s, t, *names)[1][0], 0).sum(-1)
    scale = np.abs(run(s, t, *names)[1][0]).sum(-1)
    sums = (forward[1].sum(), slopes.sum()) if coupled else (forward[1], slopes)
    np.testing.assert_allclose(*sums, atol=1e-5 * max(1.0, scale.max()), rtol=1e-4)
    narrow = [z[3:].astype(jnp.bfloat16) for z in (student, teacher)]
    if not coupled:
        # Compiled: else each operation is compiled for each of these shapes.
        quick = jax.jit(loss)
        wide = quick(*(z.astype(jnp.float32) for z in narrow), *(y[3:] for y in names))
        np.testing.assert_array_equal(quick(*narrow, *(y[3:] for y in names)), wide)
        assert wide.dtype == jnp.float32
        mild = jnp.asarray(pairs()[0][:8], jnp.float32), jnp.asarray(pairs()[1][:8], jnp.float32)
        whole = (jnp.asarray(LABELS[:8]),) if labels else ()
        flat = quick(*mild, *whole)
        boxed = quick(*(z.reshape(2, 4, -1) for z in mild), *(y.reshape(2, 4) for y in whole))
        np.testing.assert_allclose(boxed, flat.reshape(2, 4), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(jax.jit(jax.vmap(loss))(*mild, *whole), flat, rtol=2e-5, atol=1e-6)
        scan = jax.jit(lambda rows: jax.lax.scan(lambda c, row: (c, loss(*row)), 0, rows)[1])
        np.testing.assert_allclose(scan((*mild, *whole)), flat, rtol=2e-5, atol=1e-6)
