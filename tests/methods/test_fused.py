"""Losses from hidden states and heads: those of all logits, in much less memory; refused where there is no head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, MethodError
from kd_jax.methods import is_fused
from kd_jax.models.heads import BIAS, HIDDEN, KERNEL
from kd_jax.models.zoo.transformer import transformer
from kd_jax.train import fit, step
from kd_jax.train.checks import make_training

pytestmark = pytest.mark.usefixtures("quick_compiling")
SGD = optax.sgd(0.5)
VOCABULARY = 11
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 6)).astype(np.int32)
# Padded, packed, and one that has no weight at all.
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [2] * 3, [0] * 6] * 2, np.int32)
DATA = kd.token_batch(TOKENS, segments=SEGMENTS)
HOW = {"optimizer": SGD, "epochs": 2, "batch_size": 8}


def of_width(width, *, tied=True, dtype=jnp.float32, vocabulary=VOCABULARY):
    return kd.from_nnx(
        lambda rngs: transformer(vocabulary, layers=1, width=width, heads=2, tied=tied, param_dtype=dtype, rngs=rngs)
    )


@pytest.fixture(scope="module")
def pair():
    return of_width(4).init(0), of_width(8, tied=False).init(1)


def outputs(student, teacher):
    names = (HIDDEN, KERNEL)
    asked = (model(DATA.inputs, features=names) for model in (student, teacher))
    return tuple(
        one._replace(features={name: value for name, value in one.features.items() if name in (*names, BIAS)})
        for one in asked
    )


METHODS = {
    "ce": kd.CrossEntropy(), "kd": kd.KD(alpha=0.3, temperature=2.0),
    "soft": kd.KD(alpha=0.0), "hard": kd.KD(alpha=1.0),
    "reverse": kd.ReverseKL(), "symmetric": kd.SymmetricKL(skew=0.3), "skew": kd.SkewKL(temperature=2.0),
    "skew reverse": kd.SkewReverseKL(detached=True), "jsd": kd.JSD(beta=0.3, convention="continuous"),
    "adaptive": kd.AdaptiveKL(), "tv": kd.TotalVariation(), "top-k": kd.TopKKL(k=3),
    "alpha-beta": kd.AlphaBeta(hard=0.7),
    "alpha-beta, no labels": kd.AlphaBeta(alpha=0.4),
    "sampled": kd.SampledKL(samples=7, power=0.8, temperature=2.0), "sampled, hard": kd.SampledKL(samples=7, hard=0.3),
    "scheduled": kd.scheduled(kd.KD(), temperature=optax.linear_schedule(1.0, 5.0, 4)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weights"), [*((name, "positions") for name in METHODS), ("kd", "examples"), ("kd", "none")]
)
def test_losses_and_gradients_are_those_of_all_logits(name, weights, pair):
    method = METHODS[name]
    with jax.enable_x64(True):
        # Of untrained networks all probabilities are about the same.
        student, teacher = jax.tree.map(lambda leaf: 5 * jnp.asarray(leaf, jnp.float64), outputs(*pair))
        kernel, hidden = student.features[KERNEL], student.features[HIDDEN]
        weight = {"positions": DATA.weights, "examples": np.arange(8.0), "none": None}[weights]
        batch = kd.Batch(DATA.inputs, jnp.asarray(DATA.labels), weight)

        def loss(method, hidden, kernel):
            ours = student._replace(logits=hidden @ kernel, features={HIDDEN: hidden, KERNEL: kernel})
            theirs = teacher._replace(logits=teacher.features[HIDDEN] @ teacher.features[KERNEL])
            terms = method.loss(method.init(jax.random.key(3), ours, theirs), ours, theirs, batch, jnp.int32(2))
            terms = terms[0] if isinstance(terms, tuple) else terms
            return step.weighted_sum(terms, batch.weights)

        run = jax.jit(jax.value_and_grad(loss, (1, 2)))
        found, wanted = run(kd.fused_linear(method, chunk=5), hidden, kernel), run(method, hidden, kernel)
        assert float(wanted[0]) > 0.01
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("soft_cap", [None, 3.0, (2.0, None)])
@pytest.mark.parametrize("method", [kd.KD(alpha=0.3, temperature=2.0), kd.ReverseKL()])
def test_logits_may_be_capped_and_heads_padded_differently(soft_cap, method, pair):
    """The same as of the first columns' logits, each capped."""
    with jax.enable_x64(True):
        student, teacher = jax.tree.map(lambda leaf: 5 * jnp.asarray(leaf, jnp.float64), outputs(*pair))
        batch, real = kd.Batch(DATA.inputs, jnp.asarray(DATA.labels), DATA.weights), VOCABULARY
        caps = soft_cap if isinstance(soft_cap, tuple) else (soft_cap, soft_cap)

        def with_head(output, columns, cap):
            kernel = jnp.pad(output.features[KERNEL], ((0, 0), (0, columns)), constant_values=7.0)
            logits = (output.features[HIDDEN] @ kernel)[..., :real]
            logits = logits if cap is None else cap * jnp.tanh(logits / cap)
            return output._replace(logits=logits, features={HIDDEN: output.features[HIDDEN], KERNEL: kernel})

        ours, theirs = with_head(student, 3, caps[0]), with_head(teacher, 5, caps[1])
        fused = kd.fused_linear(method, soft_cap=soft_cap, vocabulary=real)
        found, wanted = (
            step.weighted_sum(one.loss(kd.Parts(), ours, theirs, batch, jnp.int32(0)), batch.weights)
            for one in (fused, method)
        )
        assert float(wanted) > 0.01
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_heads_of_other_widths_train_and_labels_beyond_what_is_real_are_told():
    """A token that both heads have as padding would have no loss."""
    student, teacher = of_width(4, vocabulary=12), of_width(8, tied=False, vocabulary=14).init(1)
    method = kd.fused_linear(kd.KD(alpha=0.5), vocabulary=VOCABULARY)
    assert np.isfinite(kd.distill(student, teacher, DATA, method=method, **HOW).history["loss"]).all()
    with pytest.raises(ConfigError, match="the teacher has 14 classes and the student 12"):
        kd.distill(student, teacher, DATA, method=kd.fused_linear(kd.KD(alpha=0.5)), **HOW)
    beyond = kd.token_batch(np.where(TOKENS == 3, VOCABULARY, TOKENS).astype(np.int32))
    for data, named in ((beyond, HOW), ([beyond], {"optimizer": SGD, "epochs": 2})):
        with pytest.raises(DataError, match=f"the label {VOCABULARY} is outside the {VOCABULARY} classes"):
            kd.distill(student, teacher, data, method=method, **named)


def trained(method, student, teacher, data=DATA):
    result = kd.distill(student, teacher, data, method=method, **HOW)
    return result.history["loss"], jax.tree.leaves(result.model.variables)


def assert_same_training(found, wanted, tolerance):
    assert np.ptp(wanted[0]) > 1e-4
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_a_training_is_that_of_all_logits_padded_and_packed(pair):
    """Of tied and untied heads, and of a teacher that is live or kept as hidden states."""
    method = kd.KD(alpha=0.3, temperature=2.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        student, teacher = (
            kd.Model(of_width(width, tied=tied, dtype=jnp.float64).network, jax.tree.map(jnp.float64, one.variables))
            for (width, tied), one in zip(((4, True), (8, False)), pair, strict=True)
        )
        wanted = trained(method, student, teacher)
        assert_same_training(trained(kd.fused_linear(method), student, teacher), wanted, 1e-9)
        head = teacher.variables["params"]["lm_head"]["kernel"]
        kept = kd.cached(teacher, DATA, keep="hidden", hidden="norm", head=head)
        assert_same_training(trained(kd.fused_linear(method), student, kept), wanted, 1e-9)


@pytest.mark.slow
def test_in_float32_in_a_sum_and_weighted(pair):
    scheduled = kd.scheduled(kd.SampledKL(samples=5), hard=optax.linear_schedule(0.0, 1.0, 2))
    for method in (kd.JSD(), kd.SampledKL(samples=5), scheduled):
        plain, fused = (0.5 * one + kd.HiddenStates("norm") for one in (method, kd.fused_linear(method)))
        assert_same_training(trained(fused, *pair), trained(plain, *pair), 2e-5)


def test_the_student_writes_itself(pair):
    data = kd.token_batch(TOKENS, prompt=np.arange(6)[None] < np.full((8, 1), 2))
    found, wanted = (
        trained(kd.on_policy(one, share=1.0, temperature=0.0), *pair, data)
        for one in (kd.fused_linear(kd.ReverseKL(alpha=0)), kd.ReverseKL(alpha=0))
    )
    assert_same_training(found, wanted, 2e-5)


def test_a_grid_of_numbers_is_a_vmap(pair):
    student, teacher = outputs(*pair)

    def loss(method):
        return method.loss(kd.Parts(), student, teacher, DATA, jnp.int32(0))["fused"]

    grid = kd.KD(alpha=jnp.array([0.0, 0.5]), temperature=jnp.array([1.0, 3.0]))
    for found, alpha, temperature in zip(jax.vmap(loss)(kd.fused_linear(grid)), (0.0, 0.5), (1.0, 3.0), strict=True):
        np.testing.assert_allclose(found, loss(kd.fused_linear(kd.KD(alpha=alpha, temperature=temperature))), rtol=1e-6)


def test_no_measure_asks_for_all_logits(pair, monkeypatch):
    result = kd.distill(*pair, DATA, method=kd.fused_linear(kd.KD()), **HOW)
    assert set(result.history) == {"loss", "fused", "seconds"}
    # Of a comparison, too: its measures of training are what this calls.
    monkeypatch.delattr("kd_jax.seeds.accuracy")
    kd.compare(of_width(4), pair[1], DATA, DATA, methods={"fused": kd.fused_linear(kd.KD())}, seeds=1, **HOW)


def memory(method, pair, data):
    """Temporaries of a compiled step."""
    student, teacher = pair
    training = make_training(student, SGD)
    key, known = jax.random.key(0), kd.teacher.as_teacher(teacher)
    state = jax.eval_shape(lambda: step.init(key, training, method, data, known))
    order = jax.ShapeDtypeStruct((2, len(data.labels)), jnp.int32)
    scanned = jax.jit(partial(fit.scan_steps, training=training))
    return scanned.lower(state, key, data, known, order, method).compile().memory_analysis().temp_size_in_bytes


def test_a_step_never_holds_all_logits():
    """By XLA's own analysis, of 512 tokens and 8,192 columns."""
    vocabulary, rows, positions = 8192, 16, 32
    student, teacher = (
        kd.from_nnx(lambda rngs, width=width: transformer(vocabulary, layers=1, width=width, heads=2, rngs=rngs)).init(
            0
        )
        for width in (8, 16)
    )
    data = kd.token_batch(jnp.zeros((rows, positions), jnp.int32))
    logits = 4 * rows * positions * vocabulary
    fused = memory(kd.fused_linear(kd.KD(), chunk=8), (student, teacher), data)
    assert fused < logits / 4
    assert memory(kd.KD(), (student, teacher), data) > 2 * logits


class Ended(nnx.Module):
    """Logits of a linear layer, or something else of them."""

    def __init__(self, rngs, *, end=lambda logits: logits):
        self.embed, self.head, self.end = nnx.Embed(VOCABULARY, 8, rngs=rngs), nnx.Linear(8, VOCABULARY, rngs=rngs), end

    def __call__(self, tokens):
        return self.end(self.head(self.embed(tokens)))


def test_a_bias_and_a_head_of_the_users_own(pair):
    """The kernel has as many rows as a batch has examples, and is masked by none."""
    plain = kd.Batch(TOKENS, DATA.labels, DATA.weights)
    student, teacher = (kd.from_nnx(Ended).init(seed) for seed in (0, 1))

    def told(params, tokens):
        hidden = params["embed"]["embedding"][tokens]
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None, None]
        return kd.Output(logits, {HIDDEN: hidden, KERNEL: params["head"]["kernel"], BIAS: params["head"]["bias"]})

    models = {"nnx": student, "function": kd.from_function(told, student.variables["params"])}
    wanted = kd.distill(student, teacher, plain, method=kd.JSD(), **HOW)
    for model in models.values():
        found = kd.distill(model, teacher, plain, method=kd.fused_linear(kd.JSD()), **HOW)
        np.testing.assert_allclose(found.history["loss"], wanted.history["loss"], rtol=2e-5)
        for one, other in zip(*(jax.tree.leaves(r.model.variables) for r in (found, wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_what_has_no_head_is_refused_in_a_sentence(pair):
    plain = kd.Batch(TOKENS, DATA.labels, DATA.weights)
    method, teacher = kd.fused_linear(kd.KD()), kd.from_nnx(Ended).init(1)
    capped = kd.from_nnx(lambda rngs: Ended(rngs, end=lambda logits: 5 * jnp.tanh(logits / 5))).init(0)
    with pytest.raises(MethodError, match=r"FusedLinear needs a student that has a linear layer last"):
        kd.distill(capped, teacher, plain, method=method, **HOW)
    logits = np.zeros((*TOKENS.shape, VOCABULARY), np.float32)
    for wrong in (capped, kd.cached(logits), lambda tokens: jnp.zeros((*tokens.shape, VOCABULARY))):
        with pytest.raises(MethodError, match=r"FusedLinear needs a teacher .* kept with kd\.cached"):
            kd.distill(kd.from_nnx(Ended), wrong, plain, method=method, **HOW)
    with pytest.raises(ConfigError, match=r'give kd\.several\(teachers, mean="losses"\)'):
        kd.distill(kd.from_nnx(Ended), [teacher, teacher], plain, method=method, **HOW)
    several = kd.several([teacher, kd.from_nnx(Ended).init(2)], mean="losses")
    found, wanted = (
        kd.distill(kd.from_nnx(Ended), several, plain, method=one, **HOW).history["loss"] for one in (method, kd.KD())
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_other_methods_labels_and_chunks_are_refused(pair):
    with pytest.raises(MethodError, match="DKD cannot be computed from hidden states and heads: give one of"):
        kd.fused_linear(kd.DKD())
    with pytest.raises(ConfigError, match="chunk is 0"):
        kd.fused_linear(kd.KD(), chunk=0)
    with pytest.raises(ConfigError, match=r"vocabulary is 0: it must be a whole number of at least 1"):
        kd.fused_linear(kd.KD(), vocabulary=0)
    for cap in (-1, 0, float("inf"), True, (1.0, 2.0, 3.0), "30"):
        with pytest.raises(ConfigError, match="it must be above 0 and finite, or None, or a pair of such"):
            kd.fused_linear(kd.KD(), soft_cap=cap)
    soft = DATA._replace(labels=jax.nn.one_hot(DATA.labels, VOCABULARY))
    with pytest.raises(MethodError, match=r"kd\.fused_linear takes whole numbers"):
        kd.distill(*pair, soft, method=kd.fused_linear(kd.KD()), **HOW)
    assert is_fused(2.0 * kd.fused_linear(kd.KD()) + kd.KD())
    assert not is_fused(kd.KD())
