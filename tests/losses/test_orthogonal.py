from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import assert_close

from kd_jax.losses.orthogonal import orthogonal_cayley, orthogonal_exponential

projectors = pytest.mark.parametrize("projector", [orthogonal_cayley, orthogonal_exponential])
shapes = pytest.mark.parametrize("shape", [(4, 4), (5, 2), (2, 5), (1, 3)])


def exact(parameters: np.ndarray, exponential: bool) -> np.ndarray:
    """From the definition, with 40 digits."""
    tall = parameters if parameters.shape[0] >= parameters.shape[1] else parameters.T
    n = len(tall)
    skew = mp.zeros(n)
    for i in range(n):
        for j in range(min(i, tall.shape[1])):
            skew[i, j], skew[j, i] = mp.mpf(float(tall[i, j])), -mp.mpf(float(tall[i, j]))
    with mp.workdps(40):
        square = mp.expm(skew) if exponential else (mp.eye(n) - skew / 2) ** -1 * (mp.eye(n) + skew / 2)
    square = np.array(square.tolist(), dtype=float)[:, : tall.shape[1]]
    return square if tall is parameters else square.T


@projectors
@shapes
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_it_is_orthogonal_and_exact(projector: Callable[..., jax.Array], shape: tuple[int, int], size: float) -> None:
    parameters = np.random.default_rng(0).normal(0, size, shape)
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(projector)(jnp.asarray(parameters)))
    assert_close(found, exact(parameters, projector is orthogonal_exponential), rtol=1e-12)
    small = found @ found.T if shape[0] <= shape[1] else found.T @ found
    np.testing.assert_allclose(small, np.eye(min(shape)), atol=1e-13)
    narrow = projector(jnp.asarray(parameters, jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    small = narrow @ narrow.T if shape[0] <= shape[1] else narrow.T @ narrow
    np.testing.assert_allclose(small, np.eye(min(shape)), atol=1e-5)


@projectors
def test_zeros_are_the_identity(projector: Callable[..., jax.Array]) -> None:
    np.testing.assert_array_equal(projector(jnp.zeros((3, 5))), np.eye(3, 5))


@projectors
@pytest.mark.parametrize("shape", [(3, 3), (2, 3)])
def test_gradients(projector: Callable[..., jax.Array], shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    parameters, mix = rng.normal(size=(2, *shape))
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(lambda p: jnp.sum(projector(p) * mix)))(jnp.asarray(parameters))

    def value(p: np.ndarray) -> float:
        return float(np.sum(exact(p, projector is orthogonal_exponential) * mix))

    assert_close(found, oracles.numeric_gradient(value, [parameters], 0), rtol=1e-9)


@projectors
def test_another_rank_is_refused(projector: Callable[..., jax.Array]) -> None:
    with pytest.raises(ValueError, match=r"a projector's parameters \[3\] need \[inputs, outputs\]: reshape them"):
        projector.__wrapped__(jnp.zeros(3))
