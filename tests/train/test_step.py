"""One update, against the same one written out; what weighs nothing; and what the losses of several teachers are."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import DATA, SGD, X, Y, assert_close, assert_same, leaves, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, MethodError, ShapeError
from kd_jax.losses.softmax import is_training
from kd_jax.optimizers import adam, max_norm
from kd_jax.teacher import CachedTeacher, as_teacher
from kd_jax.train.absent import masked_feature
from kd_jax.train.step import Training, TrainState, fit_labels, init, is_finite, weighted_mean, weighted_sum
from kd_jax.train.step import step as one_step

KEY = jax.random.key(7)
step = jax.jit(one_step, static_argnames="training")
pytestmark = pytest.mark.usefixtures("quick_compiling")
BATCH = jax.tree.map(jnp.asarray, kd.Batch(X[:8], Y[:8]))
TRAINING = Training(net().network, SGD)


def once(
    batch: kd.Batch = BATCH, method: kd.Method | None = None, taught: Any = None, training: Training = TRAINING
) -> tuple[TrainState, Any]:
    own = kd.CrossEntropy() if method is None else method
    known = as_teacher(taught)
    state = init(KEY, training, own, batch, known)
    return step(state, batch, known, KEY, own, training=training)


def params(state: TrainState) -> Any:
    return TRAINING.network.split(state.variables)[0]


def test_one_step_is_one_update_of_the_mean_loss() -> None:
    """Against the same step, written out with plain SGD."""
    found, metrics = once(method=kd.KD(0.5, 3.0), taught=teacher())
    first = init(KEY, TRAINING, kd.KD(), BATCH, as_teacher(teacher()))
    network = TRAINING.network

    def loss(own: Any) -> jax.Array:
        z = network.apply(network.merge(own, network.split(first.variables)[1]), BATCH.inputs, train=True, key=KEY)[
            0
        ].logits
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(z, BATCH.labels)
        t = jax.nn.log_softmax(teacher()(BATCH.inputs) / 3)
        soft = jnp.sum(jnp.exp(t) * (t - jax.nn.log_softmax(z / 3)), axis=-1)
        return jnp.mean(0.5 * hard + 0.5 * 9 * soft)

    value, gradient = jax.value_and_grad(loss)(params(first))
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params(first), gradient)
    assert_close(params(found), expected)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(metrics["hard"] + metrics["soft"]), rel=1e-5)
    assert found.step == 1


def test_a_loss_and_the_students_forward_pass_know_that_they_are_part_of_a_step() -> None:
    """By that they take the forms of a training step: few passes over many classes, a tied head's own product."""
    seen = []

    def asked(params: Any, x: jax.Array) -> jax.Array:
        seen.append(("student", is_training()))
        return x @ params

    @dataclass(frozen=True)
    class Asks(kd.CrossEntropy):
        def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
            seen.append(("loss", is_training()))
            return super().loss(parts, student, teacher, batch, step)

    network = kd.from_function(asked, init=lambda key: jnp.zeros((X.shape[1], 3))).network
    once(method=Asks(), training=Training(network, SGD))
    assert {("student", True), ("loss", True)} <= {*seen}
    assert ("loss", False) not in seen
    assert not is_training()


def test_pairs_start_from_the_same_parameters_whatever_their_method() -> None:
    alone = init(KEY, TRAINING, kd.CrossEntropy(), BATCH)
    for method in (kd.KD(), kd.KD() + Projected()):
        assert_same(init(KEY, TRAINING, method, BATCH, as_teacher(teacher())).variables, alone.variables)


@dataclass(frozen=True)
class Projected(kd.Method):
    """Learns a number towards 2, and counts its steps."""

    compares_logits: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def init(self, key: Any, student: kd.Output, teacher: Any) -> kd.Parts:
        assert isinstance(student.logits, jax.ShapeDtypeStruct)
        return kd.Parts(jnp.zeros(()), jnp.int32(0))

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        assert step.dtype == jnp.int32
        return {"distance": (parts.learned - 2) ** 2 * jnp.ones(student.logits.shape[0])}, parts.carried + 1


def test_learned_parts_are_trained_and_carried_ones_handed_on() -> None:
    state, _ = once(method=Projected())
    assert state.learned == pytest.approx(0.4)
    assert state.carried == 1
    again, metrics = step(state, BATCH, None, KEY, Projected(), training=TRAINING)
    assert again.carried == 2
    assert metrics["distance"] == pytest.approx(1.6**2)


def test_a_method_that_needs_shapes_sees_those_behind_prepare() -> None:
    """Bytes in a row of 12 become six floats, and the hint of five units is compared with one of seven."""

    def prepare(key: Any, given: jax.Array, train: bool) -> jax.Array:
        return given[:, :6].astype(jnp.float32) / 255

    rows = kd.Batch(jnp.ones((8, 12), jnp.uint8), BATCH.labels)
    training = TRAINING._replace(prepare=prepare)
    state, _ = once(rows, kd.FitNet("hidden.0", "hidden.0"), teacher(), training)
    assert state.learned["kernel"].shape == (5, 7)


def test_the_dropout_mask_differs_from_step_to_step() -> None:
    """A learning rate of 0, so that nothing else differs."""
    network = kd.mlp([6, 50, 4], dropout=0.5).network
    training = Training(network, optax.sgd(0.0))
    state = init(KEY, training, kd.CrossEntropy(), BATCH)
    losses = []
    for _ in range(3):
        state, metrics = step(state, BATCH, None, KEY, kd.CrossEntropy(), training=training)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    other = step(
        init(KEY, training, kd.CrossEntropy(), BATCH),
        BATCH,
        None,
        jax.random.key(8),
        kd.CrossEntropy(),
        training=training,
    )
    assert float(other[1]["loss"]) != losses[0]


def test_prepare_is_drawn_anew_in_each_step_and_shared_with_the_teacher() -> None:
    def noise(key: Any, given: jax.Array, train: bool) -> jax.Array:
        return given + jax.random.normal(key, given.shape)

    view = kd.from_function(lambda scale, given: given * scale, jnp.float32(1))
    method = kd.KD(alpha=0.0) + Seen()
    training = Training(view.network, optax.sgd(0.0), noise)
    known = as_teacher(lambda given: given)
    state = init(KEY, training, method, BATCH, known, variables=view.variables)
    seen = []
    for _ in range(2):
        state, metrics = step(state, BATCH, known, KEY, method, training=training)
        assert metrics["soft"] == pytest.approx(0, abs=1e-6)
        seen.append(float(metrics["seen"]))
    assert seen[0] != seen[1]


class Seen(kd.Method):
    """What the student sees."""

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        return {"seen": jnp.mean(student.logits, axis=-1)}


BAD_ROWS = {
    "NaN inputs": (np.nan, 0),
    "infinite inputs": (np.inf, 0),
    "labels of -1": (0.0, -1),
    "labels of 99": (0.0, 99),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("labels", ["whole", "soft"])
def test_what_weighs_nothing_does_not_matter(bad: str, labels: str) -> None:
    """Rows 2 and 5: gradients are those of the other six, whatever stands there; of a live and of a cached teacher."""
    value, label = BAD_ROWS[bad]
    absent = np.isin(np.arange(8), [2, 5])
    inputs = np.where(absent[:, None], value, X[:8]).astype(np.float32)
    weights = (~absent).astype(np.float32)
    if labels == "whole":
        given, kept = np.where(absent, label, Y[:8]).astype(np.int32), Y[:8][~absent]
    else:
        hot = np.eye(4, dtype=np.float32)[Y[:8]]
        given, kept = np.where(absent[:, None], np.nan, hot), hot[~absent]
        pytest.importorskip("kd_jax.losses.labels", reason="cross entropy takes soft labels there")
    batch = jax.tree.map(jnp.asarray, kd.Batch(inputs, given, weights))
    without = jax.tree.map(jnp.asarray, kd.Batch(X[:8][~absent], kept))
    logits = np.asarray(teacher()(X[:8]))
    broken = CachedTeacher(kd.Output(jnp.asarray(np.where(absent[:, None], np.nan, logits))))
    pairs = [(teacher(), teacher()), (broken, logits[~absent])]
    for one, other in pairs:
        found, metrics = once(batch, kd.KD(0.5, 2.0), one)
        wanted, expected = once(without, kd.KD(0.5, 2.0), other)
        assert_close(params(found), params(wanted), rtol=1e-5, atol=1e-7)
        assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_features_that_weigh_nothing_do_not_matter() -> None:
    """Of a cached teacher whose features of an absent example are NaN."""
    weights = jnp.ones(8).at[3].set(0)
    found = []
    for broken in (np.nan, 0.0):
        output = teacher()(BATCH.inputs, features=("hidden.0",))
        features = {"hidden.0": output.features["hidden.0"].at[3].set(broken)}
        known = CachedTeacher(kd.Output(output.logits, features))
        state, _ = once(BATCH._replace(weights=weights), kd.FitNet("hidden.0", "hidden.0"), known)
        found.append(state)
    assert_same(found[0], found[1])
    assert all(np.isfinite(leaf).all() for leaf in leaves(found[0]))


def test_a_token_out_of_the_vocabulary_that_weighs_nothing_does_not_matter() -> None:
    embed = kd.from_function(
        lambda table, tokens: jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan),
        jax.random.normal(KEY, (5, 4)),
    )
    training = Training(embed.network, SGD)
    batch = kd.Batch(jnp.array([1, 99]), jnp.array([0, 0]), jnp.array([1.0, 0.0]))
    state = init(KEY, training, kd.CrossEntropy(), batch, variables=embed.variables)
    after, metrics = step(state, batch, None, KEY, kd.CrossEntropy(), training=training)
    assert np.isfinite(after.variables).all()
    assert np.isfinite(metrics["loss"])


def test_a_batch_of_nothing_changes_nothing() -> None:
    batch = BATCH._replace(inputs=BATCH.inputs * jnp.nan, weights=jnp.zeros(8))
    state, metrics = once(batch)
    assert_same(params(state), params(init(KEY, TRAINING, kd.CrossEntropy(), BATCH)))
    assert metrics["loss"] == 0


def test_weighted_means() -> None:
    values, rows = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32), np.array([1.0, 3.0], np.float32)
    each = np.array([[1.0, 0.0], [2.0, 1.0]], np.float32)
    assert weighted_mean(jnp.asarray(values), None) == pytest.approx(2.75)
    assert weighted_mean(jnp.asarray(values), rows) == pytest.approx(np.average(values, weights=[[1, 1], [3, 3]]))
    assert weighted_mean(jnp.asarray(values), each) == pytest.approx(np.average(values, weights=each))
    # An example counts as often as its positions do.
    assert weighted_mean(jnp.asarray(values[:, 0]), each) == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert weighted_mean(jnp.float32(7), rows) == 7
    broken = jnp.asarray([[1.0, np.nan], [3.0, 5.0]], jnp.float32)
    assert weighted_mean(broken, each) == pytest.approx(np.average(values, weights=each))
    assert weighted_mean(broken, np.zeros(2, np.float32)) == 0
    terms = {"a": jnp.asarray(values), "b": jnp.asarray(values[:, 0]), "c": jnp.asarray(values)}
    assert weighted_sum(terms, rows) == pytest.approx(float(sum(weighted_mean(v, rows) for v in terms.values())))
    with pytest.raises(ShapeError, match=r"weights have the shape \(3,\)"):
        weighted_mean(jnp.asarray(values), np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("labels", "logits", "wanted"),
    [
        (np.zeros((8, 1), np.int32), (8, 4), (8,)),
        (np.zeros(8, np.int32), (8, 4), (8,)),
        (np.zeros((8, 3), np.uint8), (8, 3, 4), (8, 3)),
        (np.zeros((8, 3, 1), np.int32), (8, 3, 4), (8, 3)),
        (np.zeros(8, np.float32), (8, 1), (8, 1)),
        (np.zeros((8, 1), np.float32), (8, 1), (8, 1)),
        (np.zeros((8, 1), np.int32), (8, 1), (8,)),
        (np.zeros((8, 4), np.float32), (8, 4), (8, 4)),
    ],
)
def test_labels_are_fitted_to_the_logits(labels: Any, logits: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert fit_labels(kd.Batch(None, labels), jnp.zeros(logits)).labels.shape == wanted


@pytest.mark.parametrize(
    ("labels", "logits"),
    [((8, 4), (8, 4)), ((7,), (8, 4)), ((8,), (8, 3, 4)), ((8, 3), (8, 4)), ((8, 4, 1), (8, 3, 4))],
)
def test_labels_that_do_not_fit_are_refused(labels: tuple[int, ...], logits: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="labels of whole numbers must have the shape"):
        fit_labels(kd.Batch(None, np.zeros(labels, np.int32)), jnp.zeros(logits))


def test_labels_in_a_column_train_as_those_in_a_row() -> None:
    column, _ = once(BATCH._replace(labels=BATCH.labels[:, None]))
    assert_same(column, once()[0])


def test_the_losses_by_several_teachers_are_averaged() -> None:
    both = [teacher(), teacher(6, 3, 4)]
    _, metrics = once(method=kd.KD(0.5, 2.0), taught=kd.several(both, mean="losses"))
    alone = [once(method=kd.KD(0.5, 2.0), taught=one)[1] for one in both]
    for name in ("loss", "hard", "soft"):
        assert metrics[name] == pytest.approx(float(alone[0][name] + alone[1][name]) / 2, rel=1e-5)
    with pytest.raises(ConfigError, match="carries values from step to step"):
        once(method=Projected(), taught=kd.several(both, mean="losses"))


def test_nothing_reaches_the_teacher() -> None:
    """No gradient: the student's update does not know that the teacher has the same parameters."""
    shared = net().init(3)
    network = shared.network

    def loss(values: Any) -> Any:
        known = as_teacher(kd.Model(network, values))
        state = init(KEY, TRAINING, kd.KD(0.0), BATCH, known)
        return step(state, BATCH, known, KEY, kd.KD(0.0), training=TRAINING)[1]["loss"]

    assert all((leaf == 0).all() for leaf in leaves(jax.grad(loss)(shared.variables)))


def test_the_loss_is_the_whole_whatever_a_term_is_called() -> None:
    class Odd(kd.Method):
        needs_teacher: ClassVar[bool] = False

        def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
            return {"loss": student.logits[:, 0], "other": jnp.ones(8)}

    _, metrics = once(method=Odd())
    _, alone = once(method=kd.CrossEntropy() + Odd())
    assert metrics["loss"] == pytest.approx(float(alone["loss_2"]) + 1, rel=1e-5)
    assert alone["loss"] == pytest.approx(float(alone["hard"] + alone["loss_2"] + alone["other"]), rel=1e-5)


def test_values_that_are_of_no_example_are_refused() -> None:
    class Pairs(kd.Method):
        def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
            return {"pairs": student.logits @ teacher.logits.T}

    with pytest.raises(ShapeError, match=r"the term pairs of Pairs has the shape \(8, 8\) .*: give one value for each"):
        once(method=Pairs(), taught=teacher())


def test_a_method_without_its_teacher_says_so() -> None:
    with pytest.raises(MethodError, match="needs a teacher"):
        once(method=kd.KD())


def test_an_optimizer_is_told_the_loss(standard_promotion: None) -> None:
    """`reduce_on_plateau` halves the rate where it does not fall."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    training = Training(net().network, optax.chain(optax.sgd(0.0), plateau))
    state = init(KEY, training, kd.CrossEntropy(), BATCH)
    for _ in range(4):
        state, _ = step(state, BATCH, None, KEY, kd.CrossEntropy(), training=training)
    assert state.optimizer_state[-1].scale < 1


def test_what_is_finite() -> None:
    state = init(KEY, Training(net().network, adam(1e-3)), kd.CrossEntropy(), BATCH)
    network = net().network
    assert is_finite(state, network)
    assert is_finite(state._replace(carried=jnp.float32(np.inf)), network), "a carried best value may be infinite"
    assert not is_finite(state._replace(carried=jnp.float32(np.nan)), network)
    for value in (np.nan, np.inf):
        broken = jax.tree.map(lambda leaf, v=value: leaf * v, state.variables)
        assert not is_finite(state._replace(variables=broken), network)
    assert not is_finite(state._replace(learned=jnp.float32(np.inf)), network)


def test_bfloat16_keeps_parameters_and_statistics_wide() -> None:
    training = TRAINING._replace(dtype=jnp.bfloat16)
    state, metrics = once(method=kd.KD(), taught=teacher(), training=training)
    wide, expected = once(method=kd.KD(), taught=teacher())
    assert all(leaf.dtype == np.float32 for leaf in leaves(state.variables))
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=0.02)
    assert metrics["loss"] != expected["loss"]
    assert_close(params(state), params(wide), rtol=0.05, atol=0.01)
    assert DATA.inputs.dtype == np.float32


def test_features_at_positions_of_weight_0_do_not_matter() -> None:
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    feature = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 5)), jnp.float32)
    other = jnp.where(weights[..., None] == 0, jnp.float32(77), feature)
    found = [masked_feature(one, weights) for one in (feature, other)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(
        np.asarray(found[0])[np.asarray(weights) != 0], np.asarray(feature)[np.asarray(weights) != 0]
    )


def test_as_many_channels_as_positions_stay_whole() -> None:
    pooled = jnp.arange(1.0, 13.0).reshape(2, 6)
    weights = jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 6])
    np.testing.assert_array_equal(masked_feature(pooled, weights), pooled)


@pytest.mark.parametrize("queries", [4, 3])
def test_heads_are_no_positions(queries: int) -> None:
    """Scores of as many heads as there are positions stay whole."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, queries, 4)), jnp.float32)
    weights = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(masked_feature(scores, weights), scores)


@pytest.mark.parametrize("optimizer", [SGD, adam(0.1), optax.chain(SGD, max_norm(0.01))])
def test_complex_parameters_go_downhill_as_their_two_parts_do(optimizer: Any, standard_promotion: None) -> None:
    """The logits read one part alone, which moves as a real matrix of the same values."""
    parts = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32) / 30
    imaginary = kd.from_function(lambda p, x: jnp.imag(x.astype(jnp.complex64) @ p), jnp.asarray(1j * parts[0]))
    own = kd.from_function(lambda p, x: x @ p, jnp.asarray(parts[0]))
    found = []
    for model in (imaginary, own):
        training = Training(model.network, optimizer)
        state = init(KEY, training, kd.CrossEntropy(), variables=model.variables)
        losses = []
        for _ in range(4):
            state, metrics = step(state, BATCH, None, KEY, kd.CrossEntropy(), training=training)
            losses.append(float(metrics["loss"]))
        assert losses == sorted(losses, reverse=True)
        found.append(np.asarray(state.variables))
    np.testing.assert_allclose(found[0], 1j * found[1], rtol=1e-4, atol=1e-6)
    assert not is_finite(state._replace(variables=jnp.full((6, 4), np.nan + 1j * np.nan)), imaginary.network)


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.head = nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x))


def test_what_is_absent_is_in_no_batch_statistics() -> None:
    """Copies of the present examples, each as often, stand in their places."""
    training = Training(kd.from_nnx(Normed).network, adam(0.1))
    few = kd.Batch(BATCH.inputs[:4], BATCH.labels[:4])
    padding = jnp.where(jnp.arange(12)[:, None] % 2 == 0, jnp.float32(np.nan), jnp.float32(1e6)) * jnp.ones((1, 6))
    inputs = jnp.concatenate([few.inputs[:1], padding, few.inputs[1:]])
    labels = jnp.concatenate([few.labels[:1], jnp.full(12, 99, few.labels.dtype), few.labels[1:]])
    weights = jnp.concatenate([jnp.ones(1), jnp.zeros(12), jnp.ones(3)])
    state, metrics = once(few, training=training)
    padded, of_padded = once(kd.Batch(inputs, labels, weights), training=training)
    assert_close(padded.variables, state.variables)
    assert of_padded["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_a_batch_of_nothing_leaves_the_state_of_everything(standard_promotion: None) -> None:
    """Neither statistics, moments, decayed weights nor what a method learns and carries; the step is counted."""
    training = Training(kd.from_nnx(Normed).network, optax.adamw(0.1))
    before, _ = once(method=Projected(), training=training)
    nothing = BATCH._replace(weights=jnp.zeros(8))
    after, metrics = step(before, nothing, None, KEY, Projected(), training=training)
    assert_same(after._replace(step=before.step), before)
    assert after.step == before.step + 1
    assert metrics["watched.weight"] == 0
