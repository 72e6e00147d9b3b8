"""On-policy distillation: which rows the student writes, from where on, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax.errors import ConfigError, MethodError
from kd_jax.methods import is_on_policy, resampled
from kd_jax.models.zoo.transformer import transformer

pytestmark = pytest.mark.usefixtures("quick_compiling")
SGD = optax.sgd(0.1)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 9, (6, 8)).astype(np.int32)
SEGMENTS = np.ones((6, 8), np.int32)
SEGMENTS[2, 5:] = 0
SEGMENTS[4, 3:] = 2
PROMPT = np.arange(8)[None] < np.array([[2], [4], [1], [7], [2], [8]])
DATA = kd.token_batch(TOKENS, segments=SEGMENTS, prompt=PROMPT)


def of_size(layers):
    return kd.from_nnx(lambda rngs: transformer(9, layers=layers, width=8, heads=2, rngs=rngs))


@pytest.fixture(scope="module")
def student():
    return of_size(1).init(0)


@pytest.fixture(scope="module")
def teacher():
    return of_size(1).init(1)


@pytest.fixture(scope="module")
def rewrite(student):
    """`resampled`, compiled once for all shares."""

    def run(method, key):
        return resampled(method, key, student.network, student.variables, DATA, jnp.int32(3))

    return jax.jit(run)


@pytest.mark.slow
def test_the_student_goes_on_from_each_prompt(rewrite, student):
    method = kd.on_policy(kd.JSD(alpha=0), share=1.0, temperature=0.0)
    found = rewrite(method, jax.random.key(0))
    ours = np.asarray(found.inputs["tokens"])
    # The fifth is packed, and the last is all prompt.
    np.testing.assert_array_equal(ours[4:], TOKENS[4:])
    np.testing.assert_array_equal(found.weights[4:], DATA.weights[4:])
    for row, begin in enumerate([2, 4, 1, 7]):
        np.testing.assert_array_equal(ours[row, :begin], TOKENS[row, :begin])
        written = kd.generate(student, TOKENS[row : row + 1, :begin], steps=8 - begin, temperature=0)
        np.testing.assert_array_equal(ours[row], written.tokens[0])
        np.testing.assert_array_equal(found.weights[row], (np.arange(8) >= begin - 1) & (np.arange(8) < 7))
        np.testing.assert_array_equal(found.labels[row, :-1], ours[row, 1:])
    np.testing.assert_array_equal(found.inputs["segments"][2], np.ones(8))
    assert (ours[:4] != TOKENS[:4]).any()


def test_a_share_of_the_rows_is_written_and_each_step_draws_anew(rewrite):
    def changed(share, key):
        found = rewrite(kd.on_policy(kd.JSD(alpha=0), share=share), jax.random.key(key))
        return np.asarray((found.inputs["tokens"] != TOKENS).any(axis=1))[:4]

    assert not changed(0.0, 0).any()
    rate = np.mean([changed(0.5, key) for key in range(40)])
    whole = np.mean([changed(1.0, key) for key in range(40)])
    # Some of what is written is what was there.
    assert whole > 0.8
    assert 0.3 < rate / whole < 0.7


def test_a_sequence_that_ends_has_no_weight_behind_its_end(student):
    method = kd.on_policy(kd.JSD(alpha=0), share=1.0, end=5, temperature=3.0)
    run = jax.jit(lambda key: resampled(method, key, student.network, student.variables, DATA, jnp.int32(0)))
    for key in range(4):
        found = run(jax.random.key(key))
        for row, begin in enumerate([2, 4, 1, 7]):
            tokens = np.asarray(found.inputs["tokens"][row]).tolist()
            length = tokens.index(5, begin) + 1 if 5 in tokens[begin:] else 8
            np.testing.assert_array_equal(found.weights[row], (np.arange(8) >= begin - 1) & (np.arange(8) < length - 1))
            np.testing.assert_array_equal(found.inputs["segments"][row], np.arange(8) < length)


def test_training_on_its_own_sequences_is_that_on_them_as_data(student, teacher):
    """With the likeliest tokens, a step is that of the batch which the student had written before."""
    plain = kd.SkewKL(alpha=0)
    how = {"optimizer": SGD, "epochs": 1, "batch_size": 6, "key": 3}
    found = kd.distill(student, teacher, DATA, method=kd.on_policy(plain, share=1.0, temperature=0.0), **how)
    method = kd.on_policy(plain, share=1.0, temperature=0.0)
    written = jax.jit(
        lambda: resampled(method, jax.random.key(0), student.network, student.variables, DATA, jnp.int32(0))
    )()
    wanted = kd.distill(student, teacher, written, method=plain, **how)
    np.testing.assert_allclose(found.history["loss"], wanted.history["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found.model.variables), jax.tree.leaves(wanted.model.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert "accuracy" not in found.history


def test_a_row_of_its_own_weighs_what_the_row_weighed(student):
    scale = np.array([[3.0], [0.5], [1.0], [2.0], [1.0], [1.0]], np.float32)
    weights = np.asarray(DATA.weights) * scale
    weights[1, 3:7] = [0.5, 0.0, 1.5, 1.0]
    data = DATA._replace(weights=weights)
    method = kd.on_policy(kd.JSD(alpha=0), share=1.0, temperature=0.0)
    run = jax.jit(
        lambda data: (
            resampled(method, jax.random.key(0), student.network, student.variables, data, jnp.int32(0)).weights
        )
    )
    found = run(data)
    for row, (begin, mean) in enumerate([(2, 3.0), (4, 1.0), (1, 1.0), (7, 2.0)]):
        np.testing.assert_allclose(found[row], mean * ((np.arange(8) >= begin - 1) & (np.arange(8) < 7)))
    np.testing.assert_array_equal(found[4:], weights[4:])
    whole = run(data._replace(weights=np.asarray(DATA.weights).astype(np.int32) * np.int32([[1, 1, 1, 1, 1, 1, 1, 2]])))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[:4] > 0, found[:4] > 0)


def test_rows_that_cannot_be_written_on_are_told(student, teacher):
    how = {"method": kd.on_policy(kd.JSD(alpha=0)), "optimizer": SGD, "batch_size": 2}
    left = kd.token_batch(TOKENS, segments=(np.arange(8) >= np.array([[0], [0], [3], [0], [1], [0]])).astype(np.int32))
    packed = kd.token_batch(TOKENS, segments=np.tile(1 + np.arange(8, dtype=np.int32) // 4, (6, 1)))
    for data, said in ((left, "row 2 begins with padding"), (packed, "each of the 6 rows is packed")):
        with pytest.raises(MethodError, match=said):
            kd.distill(student, teacher, data, **how)
    first = jax.tree.map(lambda leaf: leaf[2:4], left)
    with pytest.raises(MethodError, match="row 0 begins with padding"):
        kd.distill(student, teacher, [first], method=how["method"], optimizer=SGD)
    for wrong, said in (({"end": "</s>"}, "end is '</s>'"), ({"top_k": 0}, "top_k is 0"), ({"end": -1}, "end is -1")):
        with pytest.raises(ConfigError, match=said):
            kd.on_policy(kd.JSD(alpha=0), **wrong)
    with pytest.raises(ConfigError, match="end is 9, and the model writes 0 to 8"):
        kd.distill(student, teacher, DATA, **{**how, "method": kd.on_policy(kd.JSD(alpha=0), end=9)})


def test_a_schedule_moves_the_share(student):
    method = kd.on_policy(kd.JSD(alpha=0), temperature=0.0)
    method = kd.scheduled(method, share=lambda step: jnp.where(step < 2, 0.0, 1.0))
    run = jax.jit(
        lambda step: resampled(method, jax.random.key(0), student.network, student.variables, DATA, step).inputs
    )
    assert (run(jnp.int32(1))["tokens"] == TOKENS).all()
    assert (run(jnp.int32(2))["tokens"] != TOKENS).any()


def test_a_translator_and_a_model_without_a_cache_write_too(teacher):
    translator = kd.from_nnx(lambda rngs: kd.models.gru_seq2seq(9, 9, width=4, hidden=6, rngs=rngs))
    inputs = {"source": TOKENS, "tokens": TOKENS}
    weights = (np.arange(8) < 7).astype(np.float32)[None] * np.ones((6, 1), np.float32)
    data = kd.Batch(inputs, TOKENS, weights)
    known = translator.init(0)
    method = kd.on_policy(kd.ReverseKL(alpha=0), share=1.0)
    found = resampled(method, jax.random.key(0), known.network, known.variables, data, jnp.int32(0))
    np.testing.assert_array_equal(found.inputs["source"], TOKENS)
    np.testing.assert_array_equal(found.inputs["tokens"][:, 0], TOKENS[:, 0])
    assert (found.inputs["tokens"] != TOKENS).any()
    table = kd.from_function(lambda params, tokens: params[tokens], jnp.asarray(RNG.normal(size=(9, 9)), jnp.float32))
    rows = kd.Batch(TOKENS, None, None)
    bare = resampled(method, jax.random.key(0), table.network, table.variables, rows, jnp.int32(0))
    np.testing.assert_array_equal(bare.inputs[:, 0], TOKENS[:, 0])
    assert (bare.inputs != TOKENS).any()
    assert bare.labels is None


@pytest.mark.slow
def test_a_comparison_records_no_accuracy_against_its_own_sequences(teacher):
    methods = {"own": kd.on_policy(kd.JSD(alpha=0))}
    fresh = of_size(1)
    found = kd.compare(fresh, teacher, DATA, DATA, methods=methods, optimizer=SGD, epochs=1, batch_size=6, seeds=1)
    assert "loss" in found.history["own"]
    assert "accuracy" not in found.history["own"]
    assert np.isfinite(found.values["own"]["accuracy"]).all()


def test_what_cannot_be_is_one_sentence(student, teacher):
    how = {"optimizer": SGD, "batch_size": 2}
    method = kd.on_policy(kd.JSD(alpha=0))
    assert is_on_policy(2.0 * method)
    with pytest.raises(MethodError, match="KD learns labels"):
        kd.on_policy(kd.KD(alpha=0.1))
    with pytest.raises(MethodError, match="put it around the whole"):
        kd.distill(student, teacher, DATA, method=kd.CrossEntropy() + method, **how)
    with pytest.raises(ConfigError, match="kept for each example as it is: give the teacher itself"):
        kd.distill(student, kd.cached(teacher, DATA), DATA, method=method, **how)
    with pytest.raises(MethodError, match="writes tokens, and the batch has none"):
        kd.distill(kd.mlp([6, 4]), kd.mlp([6, 4]).init(0), kd.Batch(np.ones((4, 6), np.float32)), method=method, **how)
    with pytest.raises(MethodError, match="the share of OnPolicy is 2: it must be 0 to 1"):
        kd.distill(student, teacher, DATA, method=kd.on_policy(kd.JSD(alpha=0), share=2.0), **how)
    with pytest.raises(MethodError, match="the first that is not 0 tells where the prompt ends"):
        kd.distill(student, teacher, DATA._replace(weights=np.ones(6, np.float32)), method=method, **how)


def test_two_vocabularies_need_a_method_that_says_so(student):
    other = kd.from_nnx(lambda rngs: transformer(12, layers=1, width=8, heads=2, rngs=rngs)).init(0)
    with pytest.raises(ConfigError, match=r"12 classes and the student 9: .* two vocabularies .*kd.ULD"):
        kd.distill(student, other, DATA, method=kd.KD(alpha=0), optimizer=SGD, batch_size=2)
    result = kd.distill(student, other, DATA, method=kd.ULD(), optimizer=SGD, batch_size=6)
    assert np.isfinite(result.history["loss"]).all()
