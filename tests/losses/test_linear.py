import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.linear_cases import arrays, assert_close, derived, whole

from kd_jax import losses
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses.linear import _rows

pytestmark = pytest.mark.usefixtures("quick_compiling")


def test_values_are_of_any_rank_and_detached() -> None:
    h, w, ht, wt = arrays(tokens=12)
    flat = losses.linear_divergence(h, w, ht, wt)
    boxed = losses.linear_divergence(h.reshape(3, 4, -1), w, ht.reshape(3, 4, -1), wt)
    np.testing.assert_array_equal(boxed[2], flat[2].reshape(3, 4))
    np.testing.assert_allclose(flat[0], flat[2].sum(), rtol=1e-6)
    assert flat[1] == 12
    by_values = jax.grad(lambda h: losses.linear_divergence(h, w, ht, wt)[2].sum())(h)
    np.testing.assert_array_equal(by_values, 0)
    nothing = losses.linear_divergence(h[:0], w, ht[:0], wt)
    assert (float(nothing[0]), float(nothing[1]), nothing[2].shape) == (0, 0, (0,))


def test_a_scaled_sum_a_batch_of_temperatures_and_weights_that_are_learned() -> None:
    h, w, ht, wt = arrays()
    weights = jnp.linspace(0.5, 1, 10)

    def loss(h: jax.Array, w: jax.Array, weights: jax.Array, temperature: jax.Array) -> jax.Array:
        total, weight, _ = losses.linear_divergence(h, w, ht, wt, weights=weights, temperature=temperature, chunk=4)
        return 7 * total / weight

    def plain(h: jax.Array, w: jax.Array, weights: jax.Array, temperature: jax.Array) -> jax.Array:
        return 7 * jnp.average(losses.kd(h @ w, ht @ wt, temperature=temperature), weights=weights)

    found, wanted = (
        jax.jit(jax.vmap(jax.value_and_grad(form, (0, 1, 2)), (None, None, None, 0)))(
            h, w, weights, jnp.array([1.0, 2.0, 4.0])
        )
        for form in (loss, plain)
    )
    assert_close(found, wanted, 2e-5)


def test_no_gradient_by_the_teacher_and_none_by_numbers() -> None:
    h, w, ht, wt = arrays()
    by_teacher = jax.grad(lambda ht, wt: losses.linear_divergence(h, w, ht, wt, chunk=4)[0], (0, 1))(ht, wt)
    for gradient in by_teacher:
        np.testing.assert_array_equal(gradient, 0)
    with pytest.raises(ConfigError, match="no derivative by temperature"):
        jax.grad(lambda t: losses.linear_divergence(h, w, ht, wt, temperature=t)[0])(2.0)
    with pytest.raises(ConfigError, match="no derivative by skew"):
        jax.grad(lambda s: losses.linear_divergence(h, w, ht, wt, divergence="skew_kl", skew=s)[0])(0.1)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda h: losses.linear_divergence(h, w, ht, wt)[0], (h,), (h,))


def test_second_derivatives_are_right() -> None:
    """Forward and reverse, over reverse."""
    given = arrays(tokens=5)
    direction = jax.tree.map(lambda x: jnp.cos(3 * x), tuple(given[:2]))

    def products(loss: Callable[..., Any]) -> Any:
        gradient = jax.grad(lambda h, w: loss(h, w, *given[2:])[0], (0, 1))

        def along(h: jax.Array, w: jax.Array) -> jax.Array:
            return sum(jnp.vdot(a, b) for a, b in zip(gradient(h, w), direction, strict=True))

        return jax.jvp(gradient, tuple(given[:2]), direction)[1], jax.grad(along, (0, 1))(*given[:2])

    found = jax.jit(lambda: products(partial(losses.linear_divergence, divergence="jsd", chunk=2)))()
    assert_close(found, jax.jit(lambda: products(whole("jsd")))(), 1e-4)


def test_extremes_stay_finite_and_equal_networks_differ_by_nothing() -> None:
    (_, w, _, _) = arrays(tokens=4)
    rng = np.random.default_rng(1)
    h, ht = (jnp.asarray(rng.uniform(-3e3, 3e3, (4, 5)), jnp.float32) for _ in range(2))
    for name in ("kl", "jsd", "alpha_beta", "adaptive_kl", "top_k_kl"):
        numbers = {"k": 3} if name == "top_k_kl" else {}
        form = partial(losses.linear_divergence, divergence=name, **numbers)
        found = derived(lambda h, w, ht, form=form: form(h, w, ht, w))
        for leaf in jax.tree.leaves(found(h, w, ht)):
            assert jnp.isfinite(leaf).all(), name
        total, gradients = found(ht / 3e3, w, ht / 3e3)
        assert abs(total) <= 1e-6, name
        assert max(jnp.abs(x).max() for x in gradients) <= 1e-5, name


def test_columns_that_are_ruled_out() -> None:
    h, w, ht, wt = arrays()
    bias = jnp.zeros(40).at[7].set(-jnp.inf)
    both = {"student_bias": bias, "teacher_bias": bias}
    keep = jnp.arange(40) != 7
    for name in ("kl", "alpha_beta"):
        without = losses.linear_divergence(h, w[:, keep], ht, wt[:, keep], divergence=name)
        assert_close(losses.linear_divergence(h, w, ht, wt, divergence=name, **both), without)
    assert jnp.isinf(losses.linear_divergence(h, w, ht, wt, student_bias=bias)[0])
    assert jnp.isfinite(losses.linear_divergence(h, w, ht, wt, teacher_bias=bias)[0])
    assert jnp.isfinite(losses.linear_divergence(h, w, ht, wt, divergence="jsd", student_bias=bias)[0])


def test_labels_alone_need_no_teacher_and_alpha_0_no_labels() -> None:
    h, w, ht, wt = arrays()
    labels = jnp.arange(10, dtype=jnp.int8)
    alone = losses.linear_divergence(h, w, jnp.full_like(ht, jnp.nan), wt, labels=labels, alpha=1.0)[2]
    np.testing.assert_allclose(alone, losses.cross_entropy(h @ w, labels), rtol=1e-5)
    without = losses.linear_divergence(h, w, ht, wt, labels=jnp.full(10, -1), alpha=0.0)
    assert_close(without, losses.linear_divergence(h, w, ht, wt))


def test_chunks_are_about_equal() -> None:
    assert _rows(None, 2048, 256) == 128
    assert _rows(None, 8192, 2048) == 1024
    assert _rows(None, 1000, 64) == 125
    assert _rows(None, 5, 64) == 5
    assert _rows(300, 200, 64) == 200


def test_what_does_not_fit_is_refused() -> None:
    h, w, ht, wt = arrays()
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ShapeError, "same tokens", (h, w, ht[:3], wt), {}),
        (ShapeError, "do not fit", (h, w.T, ht, wt), {}),
        (ShapeError, "vocabulary=", (h, w, ht, wt[:, :30]), {}),
        (ShapeError, "one for each token", (h, w, ht, wt), {"weights": jnp.ones(3)}),
        (ShapeError, "one whole number", (h, w, ht, wt), {"labels": jnp.ones(10), "alpha": 0.5}),
        (ShapeError, "one number for each column", (h, w, ht, wt), {"student_bias": jnp.ones(3)}),
        (ShapeError, "must be floats", (jnp.ones((10, 5), jnp.int32), w, ht, wt), {}),
        (ShapeError, "must be one number", (h, w, ht, wt), {"divergence": "adaptive_kl", "mu": jnp.ones(2)}),
        (ConfigError, "give labels", (h, w, ht, wt), {"alpha": 0.5}),
        (ConfigError, "from 1 to the 40", (h, w, ht, wt), {"vocabulary": 41}),
        (ConfigError, "at least 1 token", (h, w, ht, wt), {"chunk": 0}),
        (ConfigError, "above 0", (h, w, ht, wt), {"soft_cap": -1.0}),
        (ConfigError, "a pair of such", (h, w, ht, wt), {"soft_cap": [3.0, 3.0, 3.0]}),
        (ConfigError, "chunk is 2.0", (h, w, ht, wt), {"chunk": 2.0}),
        (ConfigError, "vocabulary is 9.0", (h, w, ht, wt), {"vocabulary": 9.0}),
        (ConfigError, "k is 2.0", (h, w, ht, wt), {"divergence": "top_k_kl", "k": 2.0}),
        (ConfigError, "samples is 0", (h, w, ht, wt), {"divergence": "sampled_kl", "samples": 0}),
        (ConfigError, "temperature is -1.0", (h, w, ht, wt), {"temperature": -1.0}),
        (ConfigError, "skew is -1.0", (h, w, ht, wt), {"divergence": "skew_kl", "skew": -1.0}),
        (ConfigError, "alpha is 2.0", (h, w, ht, wt), {"alpha": 2.0}),
        (ConfigError, "a weight is -1.0", (h, w, ht, wt), {"weights": -np.ones(10)}),
        (ConfigError, "is unknown: use one of kl", (h, w, ht, wt), {"divergence": "kld"}),
        (ConfigError, "has no number beta: it takes skew", (h, w, ht, wt), {"divergence": "skew_kl", "beta": 0.5}),
        (ConfigError, "give key=", (h, w, ht, wt), {"divergence": "sampled_kl"}),
        (ValueError, "from 1 to 40, the number of columns", (h, w, ht, wt), {"divergence": "top_k_kl", "k": 41}),
        (ConfigError, "tail", (h, w, ht, wt), {"divergence": "top_k_kl", "k": 3, "rest": "bucket"}),
        (ConfigError, "continuous", (h, w, ht, wt), {"divergence": "jsd", "convention": "gkd"}),
    ]
    for kind, words, given, options in refused:
        with pytest.raises(kind, match=words):
            losses.linear_divergence(*given, **options)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from kd_jax import losses
rng = np.random.default_rng(0)
h, w, b, ht, wt = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 5), (5, 12), (12,), (8, 3), (3, 12)))
labels, weights = jnp.asarray(rng.integers(0, 10, 8), jnp.int32), jnp.asarray(rng.uniform(0.5, 1, 8), jnp.float32)
specs = P("data"), P(None, "model"), P("model"), P("data"), P("data")
for name, numbers in CASES:
    # Where tokens are sharded, each shard draws its own.
    shape = (1, 4) if name == "sampled_kl" else (2, 2)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
    def loss(h, w, b, labels, weights, ht, wt, axis):
        given = dict(labels=labels, weights=weights, alpha=0.3, temperature=2.0, student_bias=b, vocabulary=10, chunk=3)
        return losses.linear_divergence(h, w, ht, wt, divergence=name, axis_name=axis, **given, **numbers)[:2]
    def one(h, w, b, weights):
        total, weight = loss(h, w, b, labels, weights, ht, wt, None)
        return total / weight
    def within(*arrays):
        total, weight = jax.lax.psum(loss(*arrays, "model"), "data")
        return total / weight
    def many(h, w, b, weights):
        inside = jax.shard_map(within, mesh=mesh, in_specs=(*specs, P("data"), P(None, "model")), out_specs=P())
        return inside(h, w, b, labels, weights, ht, wt)
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(h, w, b, weights) for f in (many, one))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=name)
hidden = lambda h, w, ht, wt: jax.grad(
    lambda h: losses.linear_divergence(h, w, ht, wt, axis_name="model")[0])(h)
whole = P(), P(None, "model"), P(), P(None, "model")
text = str(jax.make_jaxpr(jax.shard_map(hidden, mesh=mesh, in_specs=whole, out_specs=P()))(h, w, ht, wt))
print(text.count(" pmax"), text.count(" psum"), text.count("all_gather"))
try:
    losses.linear_divergence(h, w, ht, wt, axis_name="model")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_sharded_vocabulary_is_seen_whole() -> None:
    """Over 4 devices, with sharded tokens, padded columns, a bias and labels, and one message for each sum."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("kl", {}), ("reverse_kl", {}), ("symmetric_kl", {}), ("skew_kl", {}), ("skew_reverse_kl", {"detached": True}),
        ("jsd", {"beta": 0.3}), ("alpha_beta", {}), ("total_variation", {}), ("adaptive_kl", {}),
        ("top_k_kl", {"k": 4}),
    ]  # fmt: skip
    sampled = "('sampled_kl', {'key': jax.random.key(0), 'samples': 5})"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    program = PROGRAM.replace("CASES", repr(cases)[:-1] + f", {sampled}]")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # The largest, the masses, terms and u, and the gradient of the hidden states.
    assert done.stdout.splitlines()[0] == "1 3 0"
    assert "the heads do not vary along the axis 'model'" in done.stdout
