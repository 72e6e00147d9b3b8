"""Ways to train many students at once on this machine, milliseconds a step of one: `python -m benchmarks.grids`.

Settings of one seed with batches of their own, or shared; and large networks side by side, or in turn.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kd_jax
from kd_jax.data.batch import epoch_order
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Settings, Setup
from kd_jax.methods import KD

TURNS = 4


def fastest_ms(program: Callable[..., Any], arguments: tuple[Any, ...], steps: int) -> float:
    """Of `TURNS` turns, after one that compiles."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds) / steps


def shared_batches(images: Images, batch_size: int, seeds: int = 5, settings: int = 20, steps: int = 60) -> None:
    """The notebook's student, seeds × settings."""
    setup = Setup(kd_jax.mlp([784, 20, 20, 10]).network, batch_size=batch_size)
    keys = jax.random.split(jax.random.key(1), seeds)
    own = Settings(jnp.full(settings, 1e-3), KD(jnp.full(settings, 0.5), jnp.linspace(1, 20, settings)))
    states = jax.vmap(lambda key: jax.vmap(lambda one: of_images.init(key, one, setup=setup))(own))(keys)
    count = len(images.labels)
    orders = jax.vmap(lambda key: epoch_order(key, 0, examples=count, batch_size=batch_size)[:steps])(keys)

    def one(state: Any, key: Any, order: Any, given: Any) -> Any:
        return of_images.scan_steps(state, key, images, order, given, setup=setup)

    def shared(states: Any) -> Any:
        return jax.vmap(lambda s, k, o: jax.vmap(lambda s, h: one(s, k, o, h))(s, own))(states, keys, orders)

    def apart(states: Any) -> Any:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), states)
        given = jax.tree.map(lambda leaf: jnp.tile(leaf, seeds), own)
        return jax.vmap(one)(flat, jnp.repeat(keys, settings), jnp.repeat(orders, settings, axis=0), given)

    total = steps * seeds * settings
    found = [fastest_ms(jax.jit(way), (states,), total) for way in (apart, shared)]
    print(f"batch {batch_size}, {seeds} seeds x {settings} settings: apart {found[0]:.3f} ms, shared {found[1]:.3f} ms")


def in_turn(images: Images, units: int, seeds: int = 4, batch_size: int = 128, steps: int = 20) -> None:
    """Students of two layers of `units`."""
    setup = Setup(kd_jax.mlp([784, units, units, 10]).network, batch_size=batch_size)
    given = Settings(jnp.float32(1e-3), KD(jnp.float32(0.1), jnp.float32(20)))
    keys = jax.random.split(jax.random.key(1), seeds)
    states = jax.vmap(lambda key: of_images.init(key, given, setup=setup))(keys)
    count = len(images.labels)
    orders = jax.vmap(lambda key: epoch_order(key, 0, examples=count, batch_size=batch_size)[:steps])(keys)

    def one(state: Any, key: Any, order: Any) -> Any:
        return of_images.scan_steps(state, key, images, order, given, setup=setup)

    ways: list[Callable[..., Any]] = [jax.vmap(one), lambda *all_of: jax.lax.map(lambda each: one(*each), all_of)]
    found = [fastest_ms(jax.jit(way), (states, keys, orders), steps * seeds) for way in ways]
    print(f"{units} units, {seeds} seeds: side by side {found[0]:.2f} ms, in turn {found[1]:.2f} ms")


def main() -> None:
    """Measures and prints."""
    jax.config.update("jax_default_matmul_precision", "highest")
    data = kd_jax.load("mnist")
    logits = jax.random.normal(jax.random.key(0), (len(data.train_labels), 10))
    images = Images(jnp.asarray(data.train_images), jnp.asarray(data.train_labels), logits)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, the fastest of {TURNS} turns")
    for batch_size in (128, 32):
        shared_batches(images, batch_size)
    for units in (800, 300, 30):
        in_turn(images, units)


if __name__ == "__main__":
    main()
