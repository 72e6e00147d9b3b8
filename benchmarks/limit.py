"""The limit of this machine for a step: its arithmetic over the measured rate, or its traffic over the bandwidth.

    limit = max(operations / rate of the matrix product, bytes / bandwidth of a copy)

Rate and bandwidth are the best that JAX or PyTorch reach in the same run; a copy is counted with both its ends. No
program with these operations can be faster than the first; the second is a bound as long as parameters and Adam's means
do not stay in a cache from one step to the next, so a small network may pass it.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from benchmarks.measure import Contestant

FORMULA = "max(operations / best matrix-product rate, bytes / best copy bandwidth)"
_FLOAT = 4
SQUARE = 2048


def operations(sizes: Sequence[int], batch: int) -> int:
    """Floating-point operations of the matrix products of one training step of a fully connected network.

    Forward 2·batch·inputs·outputs for each layer, as much for the gradient of its weights, and as much for the gradient
    of its inputs, which the first layer does not need. Activations, loss and Adam are left out.
    """
    products = [2 * batch * inputs * outputs for inputs, outputs in pairwise(sizes)]
    return 3 * sum(products) - products[0]


def traffic(sizes: Sequence[int], batch: int) -> int:
    """Bytes that one training step moves at least: everything that is as large as the parameters, once each way.

    Parameters, both means of Adam and the gradient are each read once and written once, in float32, and the batch's
    images are read as bytes. Activations, and a second reading of the parameters in the backward pass, are left out.
    """
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
    return 8 * _FLOAT * parameters + batch * sizes[0]


def probes(batch: int, widest: tuple[int, int]) -> dict[str, Contestant]:
    """Products and copies to time; a unit is one operation, or one byte.

    batch, widest: the step's own largest product, [batch, inputs] · [inputs, outputs].
    """
    found = {
        f"product {SQUARE}³, JAX": _jax_product(SQUARE, SQUARE, SQUARE),
        f"product {batch}×{widest[0]}×{widest[1]}, JAX": _jax_product(batch, *widest),
        "copy, JAX": _jax_copy(),
    }
    if importlib.util.find_spec("torch"):
        found |= {f"product {SQUARE}³, PyTorch": _torch_product(SQUARE), "copy, PyTorch": _torch_copy()}
    return found


def jax_product() -> Contestant:
    """The large product of `probes`, by JAX."""
    return _jax_product(SQUARE, SQUARE, SQUARE)


def torch_product() -> Contestant:
    """The large product of `probes`, by PyTorch."""
    return _torch_product(SQUARE)


def seconds(sizes: Sequence[int], batch: int, product: float, copy: float) -> float:
    """The limit of a step, for a machine that takes `product` seconds an operation and `copy` seconds a byte."""
    return max(operations(sizes, batch) * product, traffic(sizes, batch) * copy)


def best(probed: dict[str, list[float]], kind: str) -> str:
    """The fastest, by its median, of the probes whose names begin with `kind`."""
    return min((name for name in probed if name.startswith(kind)), key=lambda name: statistics.median(probed[name]))


def _jax_product(rows: int, inner: int, columns: int) -> Contestant:
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, inner), (inner, columns)]))
    repeats = _products() * max(1, SQUARE // rows // 4)

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        # Each product needs the one before, so that none is left out.
        return jax.lax.fori_loop(0, repeats, lambda _, left: (a + 1e-9 * left[:, :1]) @ b, jnp.zeros((rows, columns)))

    return Contestant(lambda: product(a, b).block_until_ready(), repeats * 2 * rows * inner * columns)


def _torch_product(size: int) -> Contestant:
    import torch

    from benchmarks import torch_ways

    a, b = torch.randn(2, size, size, device=torch_ways.device())
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(_products()):
            torch.mm(a, b, out=out)

    return Contestant(_waiting(multiply), _products() * 2 * size**3)


def _products() -> int:
    """Products in a turn: on a GPU enough to hide the time of a call."""
    return 1 if jax.default_backend() == "cpu" else 50


def _floats() -> int:
    """Numbers in an array that no cache holds: 128 MiB of them on a CPU, 1 GiB on a GPU."""
    return 2**25 if jax.default_backend() == "cpu" else 2**28


def _jax_copy() -> Contestant:
    source = jnp.ones(_floats(), jnp.float32)
    # The old target's memory is used again: fresh memory would cost more than the copy.
    copy = jax.jit(lambda target, source, factor: source * factor, donate_argnums=0, keep_unused=True)
    target = jnp.zeros_like(source)

    def run() -> None:
        nonlocal target
        target = copy(target, source, 1.5).block_until_ready()

    return Contestant(run, 2 * source.nbytes)


def _torch_copy() -> Contestant:
    import torch

    from benchmarks import torch_ways

    source = torch.ones(_floats(), device=torch_ways.device())
    target = torch.empty_like(source)
    return Contestant(_waiting(lambda: target.copy_(source)), 2 * source.nbytes)


def _waiting(work: Callable[[], object]) -> Callable[[], None]:
    from benchmarks import torch_ways

    def run() -> None:
        work()
        torch_ways.wait()

    return run
