"""The programs that users run: their arithmetic, what they hold in memory, and what counts for nothing."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from losses import linear_oracles as oracle
from losses.linear_cases import arrays, assert_close, derived, whole

from kd_jax import losses

SAMPLED: dict[str, Any] = {"key": jax.random.key(1), "samples": 9, "power": 0.7}


@pytest.mark.parametrize(
    ("divergence", "numbers"), [("kl", {}), ("adaptive_kl", {}), ("top_k_kl", {"k": 7}), ("sampled_kl", SAMPLED)]
)
def test_the_plain_form_is_the_same(divergence: str, numbers: dict[str, Any]) -> None:
    """In float32, also where no column is another's multiple of the block; draws are those of the same key."""
    given = arrays(columns=2100)
    found = derived(partial(losses.linear_divergence, divergence=divergence, temperature=2.0, chunk=3, **numbers))
    plain = whole("kd" if divergence == "kl" else divergence, temperature=2.0, **numbers)
    assert_close(found(*given), derived(plain)(*given))


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_sums_are_in_float32_whatever_the_inputs(kind: Any) -> None:
    """Against the oracle for the same rounded inputs; gradients have the inputs' type and its rounding."""
    given = arrays(kind, 9, 200)
    exact = [np.asarray(x, np.float64) for x in given]

    def loss(hidden: np.ndarray, head: np.ndarray) -> Any:
        q, p = (np.exp(oracle.log_softmax(z)) for z in (hidden @ head, exact[2] @ exact[3]))
        return oracle.jsd(p, q).sum()

    total, gradients = derived(partial(losses.linear_divergence, divergence="jsd", chunk=4))(*given)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, loss(*exact[:2]).real, rtol=2e-6)
    for found, wanted, x in zip(gradients, oracle.gradients(loss, tuple(exact[:2])), given, strict=False):
        assert found.dtype == x.dtype
        error = np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()
        assert error < (4e-6 if kind == jnp.float32 else 1e-2), error


def test_a_token_of_weight_0_counts_for_nothing_whatever_it_holds() -> None:
    h, w, ht, wt = arrays()
    labels, weights = jnp.arange(10, dtype=jnp.int32), jnp.ones(10).at[4].set(0)

    def loss(h: jax.Array, w: jax.Array, ht: jax.Array, labels: jax.Array) -> Any:
        given = {"labels": labels, "alpha": 0.5, "weights": weights, "chunk": 4}
        total, weight, values = losses.linear_divergence(h, w, ht, wt, **given)
        return total / weight, values

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    one = both(h, w, ht, labels)
    for bad in (jnp.nan, jnp.inf, 1e30):
        other = both(h.at[4].set(bad), w, ht.at[4].set(bad), labels.at[4].set(-100))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    assert one[0][1][4] == 0
    assert not one[1][0][4].any()
    # A label outside the vocabulary that counts is told.
    assert jnp.isnan(both(h, w, ht, labels.at[3].set(-100))[0][0])


def shapes_of(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Of every array of a program."""
    for equation in jaxpr.eqns:
        yield from (atom.aval.shape for atom in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_no_array_has_tokens_and_vocabulary_and_the_memory_is_that_of_a_chunk() -> None:
    tokens, columns = 1024, 4096
    given = arrays(tokens=tokens, columns=columns)
    fused = derived(partial(losses.linear_divergence, divergence="kl"))
    largest = max(int(np.prod(shape)) for shape in shapes_of(jax.make_jaxpr(fused)(*given).jaxpr))
    assert largest <= tokens * columns // 8

    def temporary(loss: Callable[..., Any]) -> int:
        return loss.lower(*given).compile().memory_analysis().temp_size_in_bytes  # type: ignore[attr-defined]

    logits = 4 * tokens * columns
    assert temporary(derived(whole("kl_divergence"))) >= 2 * logits
    assert temporary(fused) <= 5 / 8 * logits


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_a_language_models_loss_takes_a_tenth_of_the_memory_of_all_logits(divergence: str) -> None:
    """2,048 tokens and 32,768 classes; nothing is computed."""
    tokens, columns = 2048, 32_768
    kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for width in (256, 320) for shape in
             ((tokens, width), (width, columns))]  # fmt: skip

    def temporary(loss: Callable[..., Any]) -> int:
        return loss.lower(*kinds).compile().memory_analysis().temp_size_in_bytes  # type: ignore[attr-defined]

    fused = temporary(derived(partial(losses.linear_divergence, divergence=divergence)))
    assert fused <= temporary(derived(whole({"kl": "kl_divergence"}.get(divergence, divergence)))) / 10


def test_a_class_that_is_ruled_out_stays_so_at_any_temperature() -> None:
    """The divergence of two exponents of 0 sees the logarithms themselves."""
    given, bias = arrays(), jnp.zeros(40).at[7].set(-jnp.inf)
    both = {"student_bias": bias, "teacher_bias": bias}
    found = losses.linear_divergence(*given, divergence="alpha_beta", exponents=(0.0, 0.0), temperature=3.0, **both)
    h, w, ht, wt = given
    plain = losses.alpha_beta(h @ w + bias[None], ht @ wt + bias[None], alpha=0.0, beta=0.0, temperature=3.0)
    np.testing.assert_allclose(found[0], plain.sum(), rtol=1e-5)


def test_small_weights_do_not_vanish_in_float16() -> None:
    given = arrays(jnp.float16, 9, 200)
    loss = partial(losses.linear_divergence, chunk=4)
    wide = derived(loss)(*(x.astype(jnp.float32) for x in given))[1]

    def weighted(h: jax.Array, w: jax.Array, *more: jax.Array) -> tuple[jax.Array]:
        return (8192.0**2 * loss(h, w, *more, weights=jnp.full(9, 8192.0**-2))[0],)

    for found, wanted in zip(derived(weighted)(*given)[1], wide, strict=True):
        assert found.dtype == jnp.float16
        assert jnp.abs(found.astype(jnp.float32) - wanted).max() < 4e-3 * jnp.abs(wanted).max()


def test_padded_columns_may_hold_anything() -> None:
    h, w, ht, wt = arrays()
    bad, both = w.at[:, 30:].set(jnp.nan), {"vocabulary": 30}
    total, (by_hidden, by_head) = derived(partial(losses.linear_divergence, **both))(h, bad, ht, wt)
    wanted, (hidden, head) = derived(losses.linear_divergence)(h, w[:, :30], ht, wt[:, :30])
    assert_close((total, by_hidden, by_head[:, :30]), (wanted, hidden, head))
    assert not jnp.any(by_head[:, 30:])


def test_a_bias_rules_a_column_out_below_a_cap_too() -> None:
    h, w, ht, wt = arrays()
    bias, keep = jnp.zeros(40).at[7].set(-jnp.inf), jnp.arange(40) != 7
    both = {"student_bias": bias, "teacher_bias": bias, "soft_cap": 3.0}
    found = derived(partial(losses.linear_divergence, **both))(h, w, ht, wt)
    wanted = derived(partial(losses.linear_divergence, soft_cap=3.0))(h, w[:, keep], ht, wt[:, keep])
    assert_close((found[0], found[1][0], found[1][1][:, keep]), (wanted[0], *wanted[1]))
    assert not jnp.any(found[1][1][:, 7])


def test_a_label_outside_the_vocabulary_has_no_gradient() -> None:
    h, w, ht, wt = arrays()
    labels = jnp.full(10, -100)
    total, gradients = derived(partial(losses.linear_divergence, labels=labels, alpha=1.0))(h, w, ht, wt)
    assert jnp.isnan(total)
    assert not any(jnp.any(one) for one in gradients)
