"""Training language models: packed rows and prompts, accumulated gradients, remat, and parameters in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import kd_jax as kd
from kd_jax.models.zoo.transformer import transformer
from kd_jax.train.step import Training, student_output

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(0)
ROTATION = (2, 2)  # the unit matrix that RoPE's cosines are multiplied with: half of a head's width
ROWS = kd.token_batch(RNG.integers(0, 11, (8, 6)).astype(np.int32))


def model(seed=0, **more):
    numbers = {"layers": 1, "width": 8, "heads": 2, **more}
    return kd.from_nnx(lambda rngs: transformer(11, **numbers, rngs=rngs)).init(seed)


def test_a_packed_batch_trains_by_the_tokens_that_are_learned_alone():
    sequences = [RNG.integers(0, 11, length).astype(np.int32) for length in (3, 5, 4, 2, 6)]
    tokens, segments = kd.pack(sequences, 8)
    prompt = np.zeros_like(tokens, bool)
    prompt[0, :2] = True
    data = kd.token_batch(tokens, segments=segments, prompt=prompt)
    student, teacher = model(), model(1)
    method = kd.KD(alpha=0.3, temperature=2.0)
    found = kd.distill(student, teacher, data, method=method, optimizer=optax.sgd(0.0), batch_size=len(tokens))
    ours, theirs = (np.asarray(one(data.inputs), np.float64) for one in (student, teacher))

    def logs(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    hard = -np.take_along_axis(logs(ours), np.asarray(data.labels)[..., None], -1)[..., 0]
    p = np.exp(logs(theirs / 2))
    soft = 4 * (p * (logs(theirs / 2) - logs(ours / 2))).sum(-1)
    learned = np.asarray(data.weights) == 1
    assert 0 < learned.sum() < learned.size / 2 + 3
    wanted = (0.3 * hard + 0.7 * soft)[learned].mean()
    np.testing.assert_allclose(found.history["loss"], wanted, rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    how = {"method": kd.KD(alpha=0.5), "epochs": 1, "key": 1}
    teacher = model(1)
    whole = kd.distill(model(), teacher, ROWS, optimizer=optax.sgd(0.1), batch_size=8, **how)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):
        parts = kd.distill(model(remat=True), teacher, ROWS, optimizer=optimizer, batch_size=4, **how)
    moved = 0.0
    start = model().variables
    every = (parts.model.variables, whole.model.variables, start)
    for one, other, before in zip(*map(jax.tree.leaves, every), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        moved = max(moved, float(jnp.abs(other - before).max()))
    assert moved > 1e-3


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_in_bfloat16_have_moments_in_float32():
    optimizer = kd.optimizers.in_float32(kd.optimizers.adam(1e-2))
    result = kd.distill(model(param_dtype=jnp.bfloat16), model(1), ROWS, optimizer=optimizer, batch_size=4, epochs=2)
    assert np.isfinite(result.history["loss"]).all()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result.model.variables)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result.state.optimizer_state)} == {"float32", "int32"}
    wide = result.state.optimizer_state.parameters
    for one, other in zip(jax.tree.leaves(result.model.variables), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))


def products(jaxpr):
    """The types of what is multiplied, of all products of matrices but RoPE's with the unit matrix."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape != ROTATION:
            yield from (str(one.aval.dtype) for one in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("kind", ["tied", "own head", "gru"])
def test_training_in_bfloat16_multiplies_bfloat16(kind):
    inputs = {name: ROWS.inputs[name] for name in ("tokens", "segments", "positions")}
    if kind == "gru":
        known = kd.from_nnx(lambda rngs: kd.models.gru_seq2seq(11, 11, width=4, hidden=6, rngs=rngs)).init(0)
        inputs = {"source": inputs["tokens"], "tokens": inputs["tokens"]}
    else:
        known = model(tied=kind == "tied", qk_norm=True, qkv_bias=True)
    training = Training(known.network, optax.sgd(0.1), dtype=jnp.bfloat16)

    def logits(variables):
        return student_output(training, kd.CrossEntropy(), variables, inputs, jax.random.key(0))[0].logits

    found = list(products(jax.make_jaxpr(logits)(known.variables).jaxpr))
    assert len(found) >= 2 * (5 if kind == "gru" else 10)
    assert set(found) == {"bfloat16"}
    wide = known(inputs)
    np.testing.assert_allclose(jax.jit(logits)(known.variables), wide, atol=0.02 * float(jnp.abs(wide).max()))


def test_a_gru_is_trained_in_bfloat16():
    tokens = ROWS.inputs["tokens"]
    data = ROWS._replace(inputs={"source": tokens, "tokens": tokens})
    student = kd.from_nnx(lambda rngs: kd.models.gru_seq2seq(11, 11, width=4, hidden=6, rngs=rngs))
    result = kd.distill(
        student, None, data, optimizer=optax.sgd(0.5), epochs=5, batch_size=8, dtype=jnp.bfloat16
    )  # fmt: skip
    assert result.history["loss"][-1] < result.history["loss"][0] - 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(result.model.variables)} == {jnp.dtype("float32")}
