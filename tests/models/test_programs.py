"""What computes the same is compiled once, and what does not is never taken for it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import CNN, DATA, PICTURES, X, Y, net, scale, teacher

import kd_jax as kd
from kd_jax.models import programs

pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.fixture
def compiled() -> Iterator[list[float]]:
    """Grows by one for each program that XLA compiles, from the persistent cache or not."""
    found: list[float] = []

    def listen(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    programs.forget()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def counted(compiled: list[float], call: Callable[[], Any]) -> int:
    before = len(compiled)
    call()
    return len(compiled) - before


HOW = {"epochs": 2, "batch_size": 8}


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_distill_compiles_once(compiled: list[float], kind: str) -> None:
    """With a new and equal optimizer and a new and equal module, too; and other numbers of the method."""

    def again(alpha: float = 0.1, width: int = 5, rate: float = 0.1) -> Any:
        named = HOW if kind == "memory" else {"epochs": 2}
        data = DATA if kind == "memory" else [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))
        student, taught = rows_net(width), teacher()
        return kd.distill(student, taught, data, method=kd.KD(alpha=alpha), optimizer=optimizer, **named)

    assert counted(compiled, again) > 0
    assert counted(compiled, again) == 0
    assert counted(compiled, lambda: again(alpha=0.7)) == 0
    assert counted(compiled, lambda: again(width=6)) > 0


def rows_net(width: int) -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(6, width, rngs=rngs), nnx.relu, nnx.Linear(width, 4, rngs=rngs))


def test_fit_compiles_once(compiled: list[float]) -> None:
    def again(key: int = 0, rate: float = 0.1) -> Any:
        return kd.fit(key, DATA, net(), method=kd.KD(), teacher=teacher(), optimizer=optax.sgd(rate), **HOW)

    assert counted(compiled, again) > 0
    assert counted(compiled, again) == 0
    assert counted(compiled, lambda: again(key=1)) == 0
    assert counted(compiled, lambda: again(rate=0.2)) > 0


def test_another_rate_is_another_training() -> None:
    def loss(rate: float) -> Any:
        return np.asarray(kd.fit(0, DATA, net(), method=kd.CrossEntropy(), optimizer=optax.sgd(rate), **HOW)[1]["loss"])

    assert (loss(0.1) != loss(0.3)).any()


@pytest.mark.parametrize("size", [3, 5000])
def test_functions_with_other_constants_are_not_the_same(size: int) -> None:
    """Constants that a function closes over are in the text of its program, also where they are large."""
    rng = np.random.default_rng(0)
    x = jnp.ones(size)
    for constant in (rng.normal(size=size).astype(np.float32), rng.normal(size=size).astype(np.float32)):
        for held in (constant, jnp.asarray(constant)):
            found = programs.call(lambda x, held=held: jnp.sum(x * held), x)
            np.testing.assert_allclose(found, np.sum(constant), rtol=1e-4, atol=1e-3)


def test_what_a_program_depends_on_is_told_apart() -> None:
    double = programs.call(lambda x: 2 * x, jnp.ones(3), same=("double",))
    np.testing.assert_array_equal(double, 2)
    np.testing.assert_array_equal(programs.call(lambda x: 2 * x, jnp.ones(4), same=("double",)), np.full(4, 2))
    with jax.enable_x64(True):
        assert programs.call(lambda x: 2 * x, jnp.ones(3, jnp.float64), same=("double",)).dtype == np.float64
    assert programs.call(lambda x: 3 * x, jnp.ones(3), same=("triple",))[0] == 3
    # What cannot be hashed is compiled by its text.
    assert programs.call(lambda x: 4 * x, jnp.ones(3), same=(["list"],))[0] == 4


def test_results_come_back_in_their_structure() -> None:
    out = programs.call(
        lambda tree, n: {"a": tree[0] + n, "b": (tree[1]["x"], n)}, (jnp.ones(2), {"x": jnp.zeros(1)}), 2.0
    )
    assert out.keys() == {"a", "b"}
    np.testing.assert_array_equal(out["a"], [3, 3])
    assert out["b"][1] == 2


def test_traced_arguments_are_left_to_the_caller() -> None:
    found = jax.vmap(lambda x: programs.call(lambda y: y + 1, x, same=("one more",)))(jnp.arange(3.0))
    np.testing.assert_array_equal(found, [1, 2, 3])
    assert jax.grad(lambda x: programs.call(lambda y: y**2, x, same=("square",)))(3.0) == 6


def test_memory_is_given_up_where_that_is_asked_for() -> None:
    state, other = jnp.ones(1000), jnp.ones(1000)
    run = programs.compiled(lambda state, other: state + other, state, other, donate=True)
    np.testing.assert_array_equal(run(state, other), np.full(1000, 2))
    assert state.is_deleted()
    assert not other.is_deleted()


DEVICES = """
import jax, jax.numpy as jnp
from kd_jax.models import programs
first, second = jax.devices()
for device in (first, second, first):
    x = jax.device_put(jnp.ones(3), device)
    found = programs.call(lambda x: x + 1, x, same=("more",))
    assert found.devices() == {device}, found.devices()
"""


def test_a_program_of_one_device_is_not_that_of_another() -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r})\n{DEVICES}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_an_equal_cnn_compiles_once(compiled: list[float]) -> None:
    """With dropout, batch statistics and a function `prepare` of the user's."""

    def again() -> Any:
        return kd.distill(CNN(rngs=nnx.Rngs(0)), None, PICTURES, optimizer=optax.sgd(0.1), prepare=scale, **HOW)

    assert counted(compiled, again) > 0
    assert counted(compiled, again) == 0


def test_functions_of_python_are_not_taken_for_one_another() -> None:
    """The text of a program does not say which of them it calls."""

    def times(factor: int) -> Any:
        def on_host(x: Any) -> Any:
            return np.float32(factor) * np.asarray(x)

        return lambda x: jax.pure_callback(on_host, jax.ShapeDtypeStruct((3,), jnp.float32), x)

    for factor in (2, 3):
        np.testing.assert_array_equal(programs.call(times(factor), jnp.ones(3)), np.full(3, factor))


def test_without_compilation_the_function_itself_is_called() -> None:
    with jax.disable_jit():
        found = kd.distill(kd.mlp([6, 4]), None, DATA, optimizer=optax.sgd(0.1), batch_size=12)
    wanted = kd.distill(kd.mlp([6, 4]), None, DATA, optimizer=optax.sgd(0.1), batch_size=12)
    np.testing.assert_allclose(found.history["loss"], wanted.history["loss"], rtol=1e-5)
