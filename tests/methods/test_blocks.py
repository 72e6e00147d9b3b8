"""Learned blocks beside plain loops in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.methods import blocks

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(3)
KEY = jax.random.key(0)


def convolved(maps: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """With zeros beyond the border, position by position."""
    space, sizes = maps.shape[1:-1], kernel.shape[:-2]
    found = np.zeros((*maps.shape[:-1], kernel.shape[-1]))
    for at in itertools.product(*map(range, space)):
        for offset in itertools.product(*map(range, sizes)):
            there = tuple(a + o - s // 2 for a, o, s in zip(at, offset, sizes, strict=True))
            if all(0 <= t < n for t, n in zip(there, space, strict=True)):
                found[(slice(None), *at)] += maps[(slice(None), *there)] @ kernel[offset]
    return found + bias


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("space", [(), (5,), (4, 3), (3, 2, 3)])
def test_convolutions_have_any_number_of_axes(space: tuple[int, ...], size: int) -> None:
    parts = blocks.convolution(KEY, 2, 3, size=size, space=len(space))
    assert parts["kernel"].shape == (*(size,) * len(space), 2, 3)
    assert np.abs(parts["kernel"]).max() <= 1 / np.sqrt(2 * size ** len(space))
    parts["bias"] = jnp.asarray([0.5, -1.0, 2.0], jnp.float32)
    maps = RNG.normal(size=(2, *space, 2))
    wanted = convolved(maps, np.float64(parts["kernel"]), np.float64(parts["bias"]))
    np.testing.assert_allclose(blocks.convolve(parts, jnp.asarray(maps, jnp.float32)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.5, 0.0, 2.0])])
def test_normalisation_is_by_the_examples_that_count(weights: np.ndarray | None) -> None:
    maps = RNG.normal(size=(4, 3, 2))
    parts = {"scale": jnp.asarray([2.0, 3.0], jnp.float32), "offset": jnp.asarray([0.5, -1.0], jnp.float32)}
    share = np.ones(4) if weights is None else weights
    mean = np.average(maps, axis=0, weights=share).mean(0)
    variance = np.average((maps - mean) ** 2, axis=0, weights=share).mean(0)
    wanted = (maps - mean) / np.sqrt(variance + 1e-5) * np.array([2.0, 3.0]) + np.array([0.5, -1.0])
    given = jnp.asarray(maps, jnp.float32)
    if weights is not None:
        given = given.at[2].set(jnp.nan)
        wanted[2] = np.nan
    found = blocks.normalise(parts, given, None if weights is None else jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_example_of_one_position_is_finite() -> None:
    found = blocks.normalise(blocks.normalisation(2), jnp.ones((1, 2)), jnp.zeros(1))
    np.testing.assert_array_equal(np.isfinite(found), True)


def test_a_network_is_its_connectors_in_a_row() -> None:
    parts = blocks.network(KEY, (2, 3, 4), (1, 3), space=1)
    maps = jnp.asarray(RNG.normal(size=(3, 5, 2)), jnp.float32)

    @jax.jit
    def both(parts: Any, maps: Any) -> Any:
        wanted = maps
        for one in parts:
            wanted = jnp.maximum(blocks.normalise(one["norm"], blocks.convolve(one["convolution"], wanted)), 0)
        return blocks.through(parts, maps), wanted

    found, wanted = both(parts, maps)
    np.testing.assert_array_equal(found, wanted)
    assert found.shape == (3, 5, 4)


def test_a_stored_key_gives_another_key_in_each_step() -> None:
    stored = blocks.stored_key(KEY)
    first, again, second = (jax.random.bits(blocks.step_key(stored, jnp.int32(n))) for n in (0, 0, 1))
    assert first == again
    assert first != second
    assert stored.dtype == jnp.uint32
