"""Features beside logits in a cache: their types, their positions, and answers that may be anything."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.teachers import writing

TOKENS = np.arange(12, dtype=np.int32).reshape(4, 3)
EMBEDDING = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
HEAD = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)


def teacher(tokens: Any) -> kd.Output:
    hidden = jnp.asarray(EMBEDDING)[tokens]
    features = {"ids": tokens + 1001, "mean": hidden.mean(axis=1), "turned": jax.lax.complex(hidden, hidden)}
    return kd.Output(hidden @ jnp.asarray(HEAD), features)


def cached(teacher: Any, inputs: Any, **how: Any) -> Any:
    return kd.cached(teacher, inputs, **how)


def test_whole_numbers_are_not_rounded_and_complex_ones_are_refused() -> None:
    known = cached(teacher, TOKENS, features=("ids",), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(known.output.features["ids"], TOKENS + 1001)
    assert known.output.logits.dtype == jnp.bfloat16
    with pytest.raises(DataError, match=r"features\.turned are complex64, of which nothing is kept"):
        cached(teacher, TOKENS, features=("turned",), dtype=jnp.float32)
    assert cached(teacher, TOKENS, features=("turned",)).output.features["turned"].dtype == jnp.complex64


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_feature_without_positions_has_none_to_look_up(on_disk: bool, tmp_path: Path) -> None:
    where: dict[str, Any] = {"path": tmp_path} if on_disk else {}
    known = cached(teacher, TOKENS, features=("ids", "mean"), **where)
    with pytest.raises(DataError, match=r"mean are \[5\] for each example, without positions") as error:
        known.at(np.array([[1, 2]]), np.array([[0, 2]]))
    assert "\n" not in str(error.value)


def test_positions_are_of_answers_that_have_them() -> None:
    known = cached(teacher, TOKENS, features=("ids",))
    found = known.at(np.array([[1, 2]]), np.array([[0, 2]]))
    np.testing.assert_array_equal(found.output.features["ids"], [[1004, 1009]])
    with pytest.raises(DataError, match="without positions"):
        cached(lambda x: jnp.zeros((len(x), 4)), TOKENS).at(np.array([[1]]), np.array([[0]]))


def test_an_answer_that_is_nan_in_both_does_not_differ(tmp_path: Path) -> None:
    def called(tokens: Any) -> Any:
        answers = np.asarray(EMBEDDING)[np.asarray(tokens)]
        return np.where(np.asarray(tokens)[..., None] == 0, np.float32(np.nan), answers)

    def calling(tokens: jax.Array) -> jax.Array:
        return jax.pure_callback(called, jax.ShapeDtypeStruct((*tokens.shape, 5), np.float32), tokens)

    batch = kd.Batch(TOKENS, weights=(TOKENS != 0).astype(np.float32))
    cached(calling, batch, path=tmp_path)
    assert cached(calling, batch, path=tmp_path).examples == 4


def test_a_head_is_compared_where_its_logits_are_finite() -> None:
    bias = np.zeros(6, np.float32)
    bias[2] = -np.inf

    def masked(tokens: Any) -> kd.Output:
        hidden = jnp.where((tokens == 0)[..., None], jnp.nan, jnp.asarray(EMBEDDING)[tokens])
        return kd.Output(hidden @ jnp.asarray(HEAD) + bias[None, None], {"hidden": hidden})

    how: dict[str, Any] = {"keep": "hidden", "hidden": "hidden"}
    counted = (TOKENS != 0).astype(np.float32)
    for weights in (counted, counted.min(axis=1)):
        known = cached(masked, kd.Batch(TOKENS, weights=weights), head=(HEAD, bias), **how)
        assert known.examples == 4
    for wrong in (np.zeros(6, np.float32), bias + 1):
        with pytest.raises(ConfigError, match="the head makes logits of 'hidden' that differ"):
            cached(masked, kd.Batch(TOKENS, weights=counted), head=(HEAD, wrong), **how)


def test_a_shard_may_be_smaller_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD", 2 * 3 * 6 * 4)
    known = cached(teacher, TOKENS, path=tmp_path, batch_size=4)
    assert known.folder.rows == 2
    np.testing.assert_allclose(known.in_memory().output.logits, EMBEDDING[TOKENS] @ HEAD, rtol=1e-5, atol=1e-6)
