import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from small import DATA, HOW, X, Y, net, scale, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, ShapeError
from kd_jax.evaluate import calibration_error, evaluate_logits


def oracle_ece(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. (2017), equation 3, bin by bin."""
    p = np.float64(special.softmax(logits, axis=-1))
    confidence, right = p.max(-1), p.argmax(-1) == labels
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / len(labels)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 80, 1000]))
def test_measures_equal_their_definitions(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(0, 3, (2, n, 5)).astype(np.float32)
    labels = rng.integers(0, 5, n)
    found = evaluate_logits(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(teacher))
    answers = logits.argmax(-1)
    assert found.correct == (answers == labels).sum()
    assert found.correct + found.errors == n
    log_p, log_t = (special.log_softmax(np.float64(z), axis=-1) for z in (logits, teacher))
    np.testing.assert_allclose(found.nll, -log_p[np.arange(n), labels].mean(), rtol=1e-5)
    # The nearest float32, as people who divide the counts find.
    assert found.accuracy == np.float32((answers == labels).mean())
    assert found.teacher_agreement == np.float32((answers == teacher.argmax(-1)).mean())
    np.testing.assert_allclose(found.kl_to_teacher, (np.exp(log_t) * (log_t - log_p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.ece, oracle_ece(logits, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [60, 1000, 10_000])
@pytest.mark.parametrize("taught", [True, False])
def test_fractions_are_the_nearest_float32_of_one_network_and_of_many(count: int, taught: bool) -> None:
    """Of the counts that a multiplication by the inverse would round otherwise."""
    all_counts = np.arange(count + 1, dtype=np.float32)
    exact = all_counts / np.float32(count)
    (right,) = np.nonzero(all_counts * (np.float32(1) / np.float32(count)) != exact)
    right = right[:: -(-len(right) // 20)]
    assert len(right)
    logits = jnp.asarray(np.stack([np.arange(count) < one for one in right])[..., None] * np.float32([0, 1]))
    teacher = jnp.zeros((count, 2)).at[:, 1].set(1) if taught else None
    together = jax.vmap(evaluate_logits, in_axes=(0, None, None))(logits, jnp.ones(count, jnp.int32), teacher)
    alone = [evaluate_logits(one, jnp.ones(count, jnp.int32), teacher) for one in logits]
    np.testing.assert_array_equal(together.accuracy, exact[right])
    np.testing.assert_array_equal([one.accuracy for one in alone], exact[right])
    if taught:
        np.testing.assert_array_equal(together.teacher_agreement, exact[right])
        np.testing.assert_array_equal([one.teacher_agreement for one in alone], exact[right])


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    logits = jnp.eye(3) * 100
    assert calibration_error(logits, jnp.arange(3)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(logits, (jnp.arange(3) + 1) % 3) == pytest.approx(1, abs=1e-6)


def test_a_bin_of_the_calibration_error_holds_its_upper_edge_and_not_its_lower() -> None:
    certain, nearly = [100.0, 0.0], [3.0, 0.0]
    confidence = float(special.expit(3.0))
    assert confidence > 14 / 15
    found = calibration_error(jnp.array([certain, nearly]), jnp.array([1, 0]))
    assert found == pytest.approx(((1 - 0) - (1 - confidence)) / 2)
    # Of two bins, a confidence of exactly 1/2 lies in the first, 3/4 in the second.
    even, sure = [0.0, 0.0], [float(np.log(3)), 0.0]
    found = calibration_error(jnp.array([even, sure]), jnp.array([1, 0]), bins=2)
    assert found == pytest.approx((0.5 + 0.25) / 2)


def test_without_a_teacher_there_is_no_agreement() -> None:
    found = evaluate_logits(jnp.eye(3), jnp.arange(3))
    assert found.teacher_agreement is None
    assert found.kl_to_teacher is None


IDENTITY = kd.from_function(lambda params, x: x + 0 * params, jnp.float32(0))
RNG = np.random.default_rng(0)
LOGITS, TAUGHT = RNG.normal(0, 3, (2, 50, 5)).astype(np.float32)
LABELS = RNG.integers(0, 5, 50)


def known(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, taught: np.ndarray) -> dict[str, float]:
    """Every measure by its definition, in float64."""
    log_p, log_t = (special.log_softmax(np.float64(z), axis=-1) for z in (logits, taught))
    kl = (np.exp(log_t) * (log_t - log_p)).sum(-1)
    right = logits.argmax(-1) == labels
    return {
        "accuracy": np.average(right, weights=weights),
        "nll": np.average(-log_p[np.arange(len(labels)), labels], weights=weights),
        "agreement": np.average(logits.argmax(-1) == taught.argmax(-1), weights=weights),
        "kl_to_teacher": np.average(kl, weights=weights),
        "correct": right[weights > 0].sum(),
        "errors": (~right)[weights > 0].sum(),
    }


@pytest.mark.parametrize("batched", [True, False])
def test_evaluate_equals_its_definitions(batched: bool) -> None:
    """Of weights, too: what has none does not count, whatever its label is."""
    weights = RNG.uniform(0, 2, 50).astype(np.float32)
    weights[::5] = 0
    labels = np.where(weights == 0, -1, LABELS)
    data: object = kd.Batch(LOGITS, labels, weights)
    teach: object = kd.from_function(lambda params, x: x * params, jnp.float32(0.5))
    if batched:
        data = [kd.Batch(LOGITS[:20], labels[:20], weights[:20]), (LOGITS[20:], labels[20:], weights[20:])]
    found = kd.evaluate(IDENTITY, data, teacher=teach, batch_size=16)
    wanted = known(LOGITS, LABELS, weights, LOGITS * 0.5)
    assert found.keys() == {*wanted, "ece"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert all(isinstance(value, int | float) for value in found.values())
    kept = weights > 0
    even = kd.evaluate(IDENTITY, kd.Batch(LOGITS, labels, kept.astype(np.float32)))
    assert even["ece"] == pytest.approx(oracle_ece(LOGITS[kept], LABELS[kept]), rel=1e-4)


@pytest.mark.slow
def test_positions_count_by_their_weights() -> None:
    logits, labels = LOGITS.reshape(10, 5, 5), LABELS.reshape(10, 5)
    weights = (RNG.uniform(size=(10, 5)) < 0.6).astype(np.float32)
    masked = np.where(weights == 0, -100, labels)
    found = kd.evaluate(IDENTITY, kd.Batch(logits, masked, weights), teacher=IDENTITY)
    wanted = known(LOGITS, LABELS, weights.ravel(), LOGITS)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    by_sequence = np.array([1.0, 0.0] * 5, np.float32)
    found = kd.evaluate(IDENTITY, kd.Batch(logits, labels, by_sequence))
    assert found["nll"] == pytest.approx(known(LOGITS, LABELS, np.repeat(by_sequence, 5), LOGITS)["nll"], rel=1e-5)


def test_labels_in_a_column_and_of_bytes_are_labels() -> None:
    plain = kd.evaluate(IDENTITY, kd.Batch(LOGITS, LABELS))
    for labels in (LABELS[:, None], LABELS.astype(np.uint8)):
        assert kd.evaluate(IDENTITY, kd.Batch(LOGITS, labels)) == plain


@pytest.mark.parametrize("column", [True, False])
def test_a_regression_has_a_mean_squared_error(column: bool) -> None:
    outputs, targets = LOGITS[:, :1], TAUGHT[:, :1]
    found = kd.evaluate(IDENTITY, kd.Batch(outputs, targets if column else targets[:, 0]))
    assert found == {"mse": pytest.approx(float(np.mean((outputs - targets) ** 2)), rel=1e-5)}


def test_without_labels_there_is_the_teacher_alone() -> None:
    assert kd.evaluate(IDENTITY, kd.Batch(LOGITS), teacher=IDENTITY).keys() == {"agreement", "kl_to_teacher"}
    assert kd.evaluate(IDENTITY, kd.Batch(LOGITS)) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_told(bad: float) -> None:
    broken = LOGITS.copy()
    broken[7, 2] = broken[9, 0] = bad
    with pytest.warns(
        UserWarning, match=r"the logits of example 7 are NaN or infinite \(2 such examples of 50\)"
    ) as told:
        kd.evaluate(IDENTITY, kd.Batch(broken, LABELS))
    assert told[0].filename == __file__
    weights = np.ones(50, np.float32)
    weights[[7, 9]] = 0
    assert np.isfinite(kd.evaluate(IDENTITY, kd.Batch(broken, LABELS, weights))["nll"])


def test_logits_that_are_not_finite_are_told_in_every_place_where_they_spoil_a_measure() -> None:
    """A measure that refuses them, a teacher's, a row in which no class can be, a prediction."""
    broken = LOGITS.copy()
    broken[7, 2] = np.nan

    def refusing(logits: Any, labels: Any) -> float:
        assert np.isfinite(logits).all()
        return 1.0

    refused = pytest.raises(kd.ConfigError, match="refusing")
    with pytest.warns(UserWarning, match="the logits of example 7"), refused:
        kd.evaluate(IDENTITY, kd.Batch(broken, LABELS), measures={"refusing": refusing})
    with pytest.warns(UserWarning, match=r"the teacher's logits of example 7 .* \(1 such examples of 50\)"):
        kd.evaluate(IDENTITY, kd.Batch(LOGITS, LABELS), teacher=kd.from_function(lambda p, x: p, jnp.asarray(broken)))
    nothing = LOGITS.copy()
    nothing[3] = -np.inf
    with pytest.warns(UserWarning, match="the logits of example 3 "):
        kd.evaluate(IDENTITY, kd.Batch(nothing, LABELS))
    with pytest.warns(UserWarning, match="the logits of example 2 "):
        kd.evaluate(IDENTITY, kd.Batch(np.float32([[1], [2], [-np.inf]]), np.zeros((3, 1), np.float32)))
    assert kd.evaluate(kd.from_function(lambda p, x: x[:, 0], {}), kd.Batch(LOGITS)) == {}


def test_a_class_that_cannot_be_is_no_mistake() -> None:
    """Its logit is minus infinity."""
    masked = np.concatenate([LOGITS, np.full((50, 1), -np.inf, np.float32)], axis=1)
    plain = kd.evaluate(IDENTITY, kd.Batch(LOGITS, LABELS))
    assert kd.evaluate(IDENTITY, kd.Batch(masked, LABELS))["nll"] == pytest.approx(plain["nll"], rel=1e-6)


def test_measures_of_a_users_own() -> None:
    """Values for each example are averaged with the weights, one number is itself; one may look at the teacher."""
    weights = np.float32([0, 1, 3] * 10 + [1] * 20)
    broken = np.where(weights[:, None] == 0, np.nan, LOGITS).astype(np.float32)
    found = kd.evaluate(
        IDENTITY, kd.Batch(broken, LABELS, weights), teacher=IDENTITY,
        measures={
            "first": lambda logits, labels: logits[:, 0],
            "gap": lambda logits, labels, taught: jnp.abs(logits - taught)[:, 0],
            "count": lambda logits, labels: len(labels),
        },
    )  # fmt: skip
    assert found["first"] == pytest.approx(
        float(np.average(np.where(weights == 0, 0, LOGITS[:, 0]), weights=weights)), rel=1e-5
    )
    assert found["gap"] == 0
    assert found["count"] == 50
    with pytest.raises(ShapeError, match=r"the measure odd has the shape \(3,\): it must be one number"):
        kd.evaluate(IDENTITY, kd.Batch(LOGITS), measures={"odd": lambda logits, labels: np.zeros(3)})
    with pytest.raises(ConfigError, match=r"the measure top cannot .* labels of float32\[50, 5\] \(ValueError: "):
        kd.evaluate(
            IDENTITY, kd.Batch(LOGITS, np.eye(5, dtype=np.float32)[LABELS]),
            measures={"top": lambda logits, labels: logits[:, :2] == labels[:, None]},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (kd.Batch(LOGITS, LABELS + 1), DataError, "the label 5 is outside the 5 classes"),
        (
            kd.Batch(LOGITS, np.eye(5, dtype=np.int32)[LABELS]),
            ShapeError,
            r"labels of whole numbers must have the shape \(50,\), so give labels.argmax\(-1\)",
        ),
        (kd.Batch(LOGITS, LABELS.astype(np.float32)), ShapeError, r"float labels .*give labels.astype\(int\)$"),
        (kd.Batch(LOGITS, LABELS[:, None] > 1), ShapeError, r"are bool .*give labels\[..., 0\].astype\(int\)$"),
        (kd.Batch(LOGITS, LABELS, np.ones((50, 5))), ShapeError, r"the weights have the shape \(50, 5\)"),
        ([], ConfigError, "there is no batch to evaluate on"),
        (kd.Batch(LOGITS[:0], LABELS[:0]), ConfigError, "there is no example to evaluate on"),
        (kd.Batch(LOGITS, LABELS, np.zeros(50, np.float32)), DataError, "the weights sum to 0"),
        ([(LOGITS, LABELS), kd.Batch(LOGITS)], ConfigError, "some batches have labels and some have none"),
    ],
)
def test_what_does_not_fit_is_told(data: object, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as error:
        kd.evaluate(IDENTITY, data)
    assert "\n" not in str(error.value)


def test_a_teacher_that_does_not_fit_is_told() -> None:
    with pytest.raises(ShapeError, match="both need the same classes"):
        kd.evaluate(IDENTITY, kd.Batch(LOGITS), teacher=lambda x: x[:, :4])
    with pytest.raises(ConfigError, match="the cached teacher knows 49 examples and the batch has 50"):
        kd.evaluate(IDENTITY, kd.Batch(LOGITS), teacher=LOGITS[:49])
    with pytest.raises(ConfigError, match="the model has no variables yet"):
        kd.evaluate(net(), DATA)


@pytest.mark.slow
def test_the_mean_of_losses_is_evaluated_by_the_mean_of_probabilities() -> None:
    both = [teacher(), teacher(6, 3, 4)]
    by = [kd.evaluate(net().init(0), DATA, teacher=kd.several(both, mean=m)) for m in ("losses", "probabilities")]
    assert by[0]["kl_to_teacher"] == pytest.approx(by[1]["kl_to_teacher"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 24, 1000])
def test_predictions_do_not_depend_on_the_batch(batch_size: int) -> None:
    model = kd.mlp([6, 8, 3], dropout=0.5).init(0)
    found = kd.predict(model, X, batch_size=batch_size)
    assert found.shape == (24, 3)
    np.testing.assert_allclose(found, model(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kd.predict(model, kd.Batch(X, Y), batch_size=batch_size), found, rtol=1e-6)


def test_predictions_of_positions_keep_their_shape() -> None:
    assert kd.predict(IDENTITY, LOGITS.reshape(10, 5, 5), batch_size=3).shape == (10, 5, 5)
    assert kd.predict(IDENTITY, np.zeros((0, 5, 5), np.float32)).shape == (0, 5, 5)


def test_prepare_is_that_of_evaluation() -> None:
    def prepare(key: object, x: jax.Array, train: bool) -> jax.Array:
        assert not train
        return 2 * x

    np.testing.assert_array_equal(kd.predict(IDENTITY, LOGITS, prepare=prepare), 2 * LOGITS)
    found = kd.evaluate(IDENTITY, kd.Batch(LOGITS), teacher=lambda x: x, prepare=prepare)
    assert found["kl_to_teacher"] == pytest.approx(0, abs=1e-6)


class Tokens(nnx.Module):
    def __init__(self, classes=3):
        self.table = nnx.Embed(7, classes, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.table(tokens)


def test_batches_of_sequences_may_have_different_lengths():
    rng = np.random.default_rng(5)
    parts = [kd.Batch(rng.integers(0, 7, (4, n)), rng.integers(0, 3, (4, n))) for n in (5, 8)]
    parts.append(parts[0]._replace(weights=np.float32([1, 0, 2, 1])))
    found = kd.evaluate(Tokens(), parts, teacher=Tokens(), measures={"length": lambda logits, labels: labels * 0 + 1.0})
    flat = []
    for part in parts:
        weights = np.ones(4) if part.weights is None else part.weights
        flat.append((part.inputs.ravel(), part.labels.ravel(), np.repeat(weights, part.inputs.shape[1])))
    inputs, labels, weights = (np.concatenate(arrays) for arrays in zip(*flat, strict=True))
    wanted = kd.evaluate(Tokens(), kd.Batch(inputs, labels, weights.astype(np.float32)), teacher=Tokens())
    assert found.pop("length") == 1
    assert found.pop("perplexity") == pytest.approx(np.exp(wanted["nll"]), rel=1e-5)
    assert found.pop("bits_per_token") == pytest.approx(wanted["nll"] / np.log(2), rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_labels_may_be_a_dict_and_one_output_is_a_number():
    inputs, labels = np.arange(6), np.int32([0, 1, 2, 0, 1, 2])
    batch = kd.Batch(inputs, {"class": labels, "other": labels})
    right = lambda logits, labels: logits.argmax(-1) == labels["class"]  # noqa: E731
    found = kd.evaluate(Tokens(), [batch, batch], measures={"right": right})
    assert found == {"right": pytest.approx(kd.evaluate(Tokens(), kd.Batch(inputs, labels))["accuracy"])}
    one = kd.evaluate(Tokens(1), kd.Batch(inputs, labels % 2))
    assert one == {"mse": pytest.approx(float(np.mean((np.asarray(Tokens(1)(inputs))[:, 0] - labels % 2) ** 2)))}


def test_teachers_that_are_cached_and_that_are_not_see_prepared_inputs():
    x = np.random.default_rng(0).integers(0, 256, (10, 6)).astype(np.uint8)
    live, other = kd.mlp([6, 4]).init(1), kd.mlp([6, 4]).init(2)
    both = kd.several([kd.cached(other, x, prepare=scale), live])
    found = kd.evaluate(kd.mlp([6, 4]).init(3), kd.Batch(x), teacher=both, prepare=scale, batch_size=4)
    floats = scale(None, x, False)
    wanted = kd.evaluate(kd.mlp([6, 4]).init(3), kd.Batch(floats), teacher=kd.several([other, live]))
    assert found == pytest.approx(wanted, rel=1e-5)


WIDE = np.zeros((24, 7), np.float32)
# Without the run-time types of the tests, which users do not have.
EVALUATE, PREDICT = inspect.unwrap(kd.evaluate), inspect.unwrap(kd.predict)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        (r"the model cannot be called with inputs of float32\[24, 7\]", lambda: kd.predict(teacher(), WIDE)),
        (r"the model cannot be called with inputs of float32\[24, 7\]", lambda: kd.evaluate(teacher(), (WIDE, Y))),
        (r"the model cannot be called with inputs of float32\[24, 7\]", lambda: kd.cached(teacher(), WIDE)),
        (
            r"the teacher cannot be called with inputs of float32\[24, 7\]",
            lambda: kd.cached(lambda x: x @ jnp.ones((6, 4)), WIDE),
        ),
        ("prepare cannot be called .*mend prepare", lambda: kd.predict(teacher(), X, prepare=lambda key, x: x)),
        ("batch_size is 0", lambda: EVALUATE(teacher(), DATA, batch_size=0)),
        ("batch_size is 2.5", lambda: PREDICT(teacher(), X, batch_size=2.5)),
        ("measures has 3: give functions", lambda: EVALUATE(teacher(), DATA, measures={"t": 3})),
        (
            r"the measure m cannot be computed .*TypeError: it gives a NoneType and no real numbers",
            lambda: EVALUATE(teacher(), DATA, measures={"m": lambda logits, labels: None}),
        ),
        (
            "it gives a str and no real numbers",
            lambda: EVALUATE(teacher(), DATA, measures={"m": lambda logits, labels: "good"}),
        ),
        (
            r"it gives a complex64\[24\] and no real numbers",
            lambda: EVALUATE(
                teacher(), DATA, measures={"m": lambda logits, labels: np.asarray(logits[:, 0]) * np.complex64(1)}
            ),
        ),
        ("a weight is -1", lambda: kd.evaluate(teacher(), kd.Batch(X, None, -np.ones(24)), teacher=teacher())),
        ("the weights sum to 0", lambda: kd.evaluate(teacher(), kd.Batch(X, np.eye(4)[Y], np.zeros(24)))),
        ("a weight is NaN", lambda: kd.evaluate(teacher(), kd.Batch(X, np.eye(4)[Y], np.full(24, np.nan)))),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(says: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ConfigError, DataError), match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_floats_always_have_an_mse() -> None:
    """Whether rows happen to sum to 1 adds the likelihood, and takes nothing."""
    soft, several = np.eye(4, dtype=np.float32)[Y], np.ones((24, 4), np.float32)
    assert kd.evaluate(teacher(), (X, soft)).keys() == {"mse", "nll"}
    assert kd.evaluate(teacher(), (X, several)).keys() == {"mse"}
    assert kd.evaluate(teacher(), (X, 1.5 * soft)).keys() == {"mse"}
    assert kd.evaluate(teacher(6, 1), (X, np.ones((24, 1), np.float32))).keys() == {"mse"}


def test_a_list_of_two_arrays_is_a_pair() -> None:
    assert kd.evaluate(teacher(), [X, Y]) == kd.evaluate(teacher(), DATA)


def apart(known: Any, taught: Any) -> tuple[Any, Any]:
    """The KL divergence to a teacher, by `evaluate`, and by its own logits."""
    p, q = (special.log_softmax(np.float64(z), axis=-1) for z in (taught, kd.predict(known, X)))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def test_a_teacher_function_is_what_it_is_when_it_is_given() -> None:
    """What it reads changes between two calls."""
    module, student = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), net().init(0)

    def teach(x: jax.Array) -> jax.Array:
        return module(x)

    for _ in range(2):
        wanted = apart(student, np.asarray(module(X)))
        assert kd.evaluate(student, DATA, teacher=teach)["kl_to_teacher"] == pytest.approx(wanted, rel=1e-4)
        np.testing.assert_allclose(kd.cached(teach, X).output.logits, module(X), rtol=1e-5, atol=1e-6)
        module = nnx.Linear(6, 4, rngs=nnx.Rngs(1))


@dataclass
class Times:
    """A callable object without a hash. As `prepare`, or as a teacher."""

    by: Any

    def __call__(self, *given: Any) -> Any:
        return (given[1] if len(given) > 1 else given[0])[:, : len(self.by)] * self.by[None]


class Alike(Times):
    """Equal to every other of its kind, whatever it holds."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize("kind", [Times, Alike])
def test_objects_teach_what_each_says(kind: type) -> None:
    student = net().init(0)
    for by in (1.0, 3.0):
        one = kind(jnp.full(4, by))
        wanted = apart(student, by * X[:, :4])
        assert kd.evaluate(student, DATA, teacher=one)["kl_to_teacher"] == pytest.approx(wanted, rel=1e-4)
        np.testing.assert_allclose(kd.cached(one, X).output.logits, by * X[:, :4])


def test_prepare_may_be_an_object_without_a_hash() -> None:
    student = net().init(0)
    for by in (1.0, 3.0):
        one = Times(jnp.full(6, by))
        np.testing.assert_allclose(kd.predict(student, X, prepare=one), student(by * X), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            kd.cached(student, X, prepare=one, keep="top-k", k=4).outputs(X)[0].logits,
            jax.nn.log_softmax(student(by * X)), rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert kd.evaluate(student, DATA, prepare=one, teacher=student)["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
        found = kd.distill(net(), teacher(), DATA, prepare=one, validation=DATA, **HOW)
        assert np.isfinite(found.history["validation_nll"]).all()


def test_measures_of_classes_are_left_out_where_there_are_none() -> None:
    """Several labels, one output and a regression have neither agreement nor a KL to the teacher."""
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    student, teacher = kd.mlp([5, 3]).init(0), kd.mlp([5, 3]).init(1)
    tags = (x[:, :3] > 0).astype(np.float32)
    tags[0] = 1
    assert set(kd.evaluate(student, kd.Batch(x, tags), teacher=teacher)) == {"mse"}
    one, other = kd.mlp([5, 1]).init(0), kd.mlp([5, 1]).init(1)
    assert set(kd.evaluate(one, kd.Batch(x, x[:, 0]), teacher=other)) == {"mse"}
    soft = np.full((6, 3), 1 / 3, np.float32)
    for labels in (soft, np.zeros(6, np.int32), None):
        assert {"agreement", "kl_to_teacher"} <= set(kd.evaluate(student, kd.Batch(x, labels), teacher=teacher))


@pytest.mark.parametrize(
    ("outputs", "labels", "shape"),
    [(1, np.zeros(6, np.float32), (6, 1)), (3, np.zeros((6, 1), np.int32), (6,)), (3, np.zeros(6, np.int32), (6,))],
)
def test_measures_of_ones_own_get_labels_as_methods_do(outputs: int, labels: Any, shape: tuple[int, ...]) -> None:
    seen = []
    x = np.zeros((6, 5), np.float32)

    def measure(logits: Any, labels: Any) -> Any:
        seen.append(labels.shape)
        return logits.sum(-1)

    kd.evaluate(kd.mlp([5, outputs]).init(0), kd.Batch(x, labels), measures={"own": measure})
    assert seen == [shape]


def test_the_best_epoch_of_a_language_model_may_be_chosen_by_its_perplexity() -> None:
    tokens = np.random.default_rng(0).integers(0, 7, (12, 5)).astype(np.int32)
    data = kd.token_batch(tokens)
    model = kd.from_nnx(lambda rngs: kd.models.transformer(layers=1, width=8, heads=2, vocabulary=7, rngs=rngs))
    how = {"epochs": 3, "batch_size": 4, "optimizer": optax.sgd(0.1)}
    result = kd.distill(model, None, data, validation=data, best="validation_perplexity", **how)
    found = kd.evaluate(result.student, data)
    assert found["perplexity"] == pytest.approx(min(result.history["validation_perplexity"]), rel=1e-4)
    np.testing.assert_allclose(
        result.history["validation_bits_per_token"], np.log2(result.history["validation_perplexity"]), rtol=1e-5
    )
