"""Mixup and CutMix of `prepare=`, against NumPy by the papers' formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small import CNN, DATA, HOW, PICTURES, assert_same, net, teacher

import kd_jax as kd
from kd_jax.data import mixing
from kd_jax.errors import ConfigError, MethodError, ShapeError
from kd_jax.train.step import fit_labels

pytestmark = pytest.mark.usefixtures("quick_compiling")
KEY = jax.random.key(5)
EXAMPLES, CLASSES = 8, 4
LABELS = np.arange(EXAMPLES) % CLASSES
ONE_HOT = np.eye(CLASSES)[LABELS]
prepared = jax.jit(mixing.prepared, static_argnums=0)


def soft_labels(batch: kd.Batch) -> np.ndarray:
    return np.asarray(fit_labels(batch, jnp.zeros((EXAMPLES, CLASSES))).labels)


def revealed(batch: kd.Batch) -> tuple[np.ndarray, np.ndarray]:
    """Partners, and the shares of the examples' own: from inputs that were rows of the unit matrix."""
    rows = np.asarray(batch.inputs, np.float64)
    own = rows.diagonal().copy()
    others = rows - np.diag(own)
    return np.where(others.any(axis=1), others.argmax(axis=1), np.arange(len(rows))), own


@pytest.mark.parametrize("seed", range(4))
def test_mixup_of_inputs_and_labels_is_the_formula(seed: int) -> None:
    batch = kd.Batch(jnp.eye(EXAMPLES), LABELS)
    found = prepared(kd.augment.mixup(1.0), batch, jax.random.key(seed))
    partners, own = revealed(found)
    share = own[partners != np.arange(EXAMPLES)][0]
    assert sorted(partners) == list(range(EXAMPLES))
    assert 0 < share < 1
    np.testing.assert_allclose(found.inputs, share * np.eye(EXAMPLES) + (1 - share) * np.eye(EXAMPLES)[partners], 1e-6)
    np.testing.assert_allclose(soft_labels(found), share * ONE_HOT + (1 - share) * ONE_HOT[partners], 1e-6)
    assert found.weights is None


@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    batch = kd.Batch(jnp.zeros((2, 1)), np.arange(2))
    keys = jax.random.split(jax.random.key(0), 3000)
    share = jax.jit(jax.vmap(lambda key: mixing.prepared(kd.augment.mixup(alpha), batch, key).labels.share[0]))(keys)
    assert scipy.stats.kstest(np.asarray(share), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def box_of_the_paper(rng: np.random.Generator, alpha: float, height: int, width: int) -> np.ndarray:
    """Algorithm A1 of Yun et al. (2019)."""
    share = rng.beta(alpha, alpha)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    w, h = width * np.sqrt(1 - share), height * np.sqrt(1 - share)
    x1, x2 = np.round(np.clip([x - w / 2, x + w / 2], 0, width)).astype(int)
    y1, y2 = np.round(np.clip([y - h / 2, y + h / 2], 0, height)).astype(int)
    box = np.zeros((height, width), bool)
    box[y1:y2, x1:x2] = True
    return box


@pytest.fixture(scope="module")
def boxes() -> np.ndarray:
    """Those of 4,000 steps, 6 pixels high and 9 wide."""
    images = jnp.broadcast_to(jnp.arange(2, dtype=jnp.uint8)[:, None, None, None], (2, 6, 9, 1))
    keys = jax.random.split(jax.random.key(1), 8000)
    found = jax.jit(jax.vmap(lambda key: mixing.prepared(kd.augment.cutmix(), kd.Batch(images), key).inputs))(keys)
    changed = np.asarray(found[:, 0, ..., 0]) != 0
    # With two images half of the partners are the image itself.
    paired = np.asarray(jax.vmap(lambda key: jax.random.permutation(jax.random.split(key, 4)[1], 2)[0])(keys)) == 1
    return changed[paired][:3800]


def test_boxes_are_those_of_the_paper(boxes: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    wanted = np.stack([box_of_the_paper(rng, 1.0, 6, 9) for _ in range(len(boxes))])
    for box in boxes[:200]:
        rows, columns = box.any(axis=1), box.any(axis=0)
        assert (box == rows[:, None] & columns).all()
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2
    # Each pixel's frequency of 4.5 standard deviations of a difference of two.
    assert np.abs(boxes.mean(axis=0) - wanted.mean(axis=0)).max() < 4.5 * np.sqrt(0.5 / len(boxes))
    for measure in (lambda box: box.mean(axis=(1, 2)), lambda box: box.any(axis=1).sum(axis=1)):
        assert scipy.stats.ks_2samp(measure(boxes), measure(wanted)).pvalue > 0.01


def test_the_share_of_labels_is_the_area_that_stays() -> None:
    images = np.random.default_rng(0).integers(1, 256, (EXAMPLES, 6, 9, 2)).astype(np.uint8)
    for seed in range(4):
        found = prepared(kd.augment.cutmix(), kd.Batch(images, LABELS), jax.random.key(seed))
        mixed = np.asarray(found.inputs)
        assert mixed.dtype == np.uint8
        boxed = (mixed != images).any(axis=(0, 3))
        share = 1 - boxed.mean()
        partners = [
            next(j for j in range(EXAMPLES) if (images[j][boxed] == mixed[i][boxed]).all()) for i in range(EXAMPLES)
        ]
        np.testing.assert_array_equal(mixed, np.where(boxed[..., None], images[partners], images))
        np.testing.assert_allclose(soft_labels(found), share * ONE_HOT + (1 - share) * ONE_HOT[partners], 1e-5, 1e-6)


def test_a_probability_leaves_steps_as_they_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8, 1)).astype(np.uint8)
    keys = jax.random.split(KEY, 400)

    boxed = kd.augment.cutmix(probability=0.5)
    found = jax.jit(jax.vmap(lambda key: mixing.prepared(boxed, kd.Batch(images, LABELS), key)))(keys)
    alike = (np.asarray(found.inputs) == images).all(axis=(1, 2, 3, 4))
    assert (np.asarray(found.labels.share)[alike] == 1).all()
    # A few boxes are smaller than a pixel.
    assert 0.4 < alike.mean() < 0.65


def mixed_loss(weights: Any, inputs: np.ndarray) -> tuple[Any, Any]:
    """A training's first loss, and the parameters after a step, with λ near the middle."""
    batch = kd.Batch(inputs, DATA.labels[:EXAMPLES], weights)
    prepare = kd.augment.mixup(50.0)
    state, history = kd.fit(
        3, batch, net(), method=kd.CrossEntropy(), prepare=prepare, **(HOW | {"batch_size": EXAMPLES})
    )
    return float(history["loss"][0]), state.variables


def test_the_loss_of_weighted_examples_is_that_of_both_labels() -> None:
    weights = np.linspace(0.5, 2, EXAMPLES).astype(np.float32)
    inputs = np.asarray(DATA.inputs[:EXAMPLES], np.float64)
    found = prepared(kd.augment.mixup(1.0), kd.Batch(jnp.eye(EXAMPLES), LABELS, weights), KEY)
    partners, own = revealed(found)
    share = own[partners != np.arange(EXAMPLES)][0]
    np.testing.assert_allclose(found.weights, share * weights + (1 - share) * weights[partners], 1e-6)
    logits = inputs[:, :CLASSES]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(EXAMPLES)
    wanted = -share * weights * logs[rows, LABELS] - (1 - share) * weights[partners] * logs[rows, LABELS[partners]]
    each = kd.losses.cross_entropy(jnp.asarray(logits, jnp.float32), soft_labels(found).astype(np.float32))
    np.testing.assert_allclose(found.weights * each, wanted, 1e-5)


def test_what_has_no_weight_is_mixed_with_nothing() -> None:
    weights = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
    inputs = np.array(DATA.inputs[:EXAMPLES])
    spoilt = np.where(weights[:, None] == 0, np.nan, inputs).astype(np.float32)
    found = prepared(kd.augment.mixup(1.0), kd.Batch(spoilt, np.where(weights == 0, -7, LABELS), weights), KEY)
    np.testing.assert_array_equal(found.weights, weights)
    assert np.isfinite(np.asarray(found.inputs)[weights == 1]).all()
    assert np.isfinite(soft_labels(found)[weights == 1]).all()
    loss, variables = mixed_loss(weights, spoilt)
    again, same = mixed_loss(weights, inputs)
    assert loss == again
    assert_same(variables, same)


def test_labels_of_another_kind_are_mixed_as_they_are() -> None:
    targets = np.random.default_rng(0).normal(size=(EXAMPLES, 3)).astype(np.float32)
    found = prepared(kd.augment.mixup(1.0), kd.Batch(jnp.eye(EXAMPLES), targets), KEY)
    partners, own = revealed(found)
    fitted = fit_labels(found, jnp.zeros((EXAMPLES, 3))).labels
    share = own[partners != np.arange(EXAMPLES)][0]
    np.testing.assert_allclose(fitted, share * targets + (1 - share) * targets[partners], 1e-5, 1e-6)
    # One output: whole numbers are its targets.
    found = prepared(kd.augment.mixup(1.0), kd.Batch(jnp.eye(EXAMPLES), LABELS % 2), KEY)
    one = fit_labels(found, jnp.zeros((EXAMPLES, 1))).labels
    np.testing.assert_allclose(one[:, 0], share * (LABELS % 2) + (1 - share) * (LABELS % 2)[partners], 1e-5, 1e-6)
    outside = fit_labels(prepared(kd.augment.mixup(), kd.Batch(jnp.eye(EXAMPLES), LABELS + 9), KEY), jnp.zeros((8, 4)))
    assert np.isnan(outside.labels).all()


def test_a_mix_of_mixes_has_labels_that_sum_to_1() -> None:
    both = kd.augment.chain(kd.augment.cutmix(), kd.augment.mixup(1.0))
    images = np.random.default_rng(0).normal(size=(EXAMPLES, 6, 6, 1)).astype(np.float32)
    labels = soft_labels(prepared(both, kd.Batch(images, LABELS), KEY))
    np.testing.assert_allclose(labels.sum(axis=1), 1, 1e-6)
    assert ((labels > 0).sum(axis=1) > 2).any()


def test_student_and_teacher_see_the_same_mix_and_a_resumed_training_draws_the_same(tmp_path: Any) -> None:
    """A teacher that is a copy of the student has nothing to teach: on no labels, with another view it would have."""
    student = teacher(6, 5, 4)
    copy = kd.Model(student.network, jax.tree.map(jnp.array, student.variables))
    how: dict[str, Any] = HOW | {"prepare": kd.augment.mixup(1.0), "key": 4}
    same = kd.distill(student, copy, kd.Batch(DATA.inputs), method=kd.KD(alpha=0), **how)
    assert same.history["loss"].max() < 1e-10

    how |= {"epochs": 3}
    whole = kd.distill(net(), teacher(), DATA, **how)
    with pytest.raises(ZeroDivisionError):
        kd.distill(
            net(),
            teacher(),
            DATA,
            **how,
            callbacks=lambda epoch: 1 // (2 - epoch.number),
            checkpoint=tmp_path / "stopped",
        )
    resumed = kd.distill(net(), teacher(), DATA, **how, checkpoint=tmp_path / "stopped", resume=True)
    assert_same(resumed.state, whole.state)
    assert len(set(whole.history["accuracy"])) == 3


def test_evaluation_mixes_nothing() -> None:
    model = teacher()
    for prepare in (kd.augment.mixup(), kd.augment.chain(kd.augment.mixup())):
        assert kd.evaluate(model, DATA, prepare=prepare) == kd.evaluate(model, DATA)
    assert kd.augment.mixup() == kd.augment.mixup()
    assert hash(kd.augment.cutmix()) != hash(kd.augment.mixup(1.0))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda: kd.augment.mixup(0), ConfigError, "alpha is 0: it must be a number above 0"),
        (lambda: kd.augment.cutmix(probability=2), ConfigError, "probability is 2: it must be a number from 0 to 1"),
        (lambda: kd.augment.mixup()(KEY, DATA.inputs, True), ConfigError, "mixup changes labels, too.*chain"),
        (lambda: run(prepare=kd.augment.mixup(), data=PICTURES), ConfigError, "type uint8 cannot be mixed.*normalise"),
        (
            lambda: run(prepare=kd.augment.cutmix()),
            ShapeError,
            r"inputs are of the shape \(8, 6\): cutmix takes images",
        ),
        (lambda: run(method=kd.DKD()), MethodError, "DKD takes whole numbers as labels, and those of mixed .* soft"),
        (
            lambda: run(method=kd.KD(), teacher=kd.cached(teacher(), DATA)),
            ConfigError,
            "kept for each example as it is",
        ),
        (lambda: run(data=DATA._replace(indices=np.arange(24))), ConfigError, "has indices, and a mixed example is no"),
        (lambda: run(data=DATA._replace(weights=np.ones((24, 2)))), ShapeError, "mixed examples have one for each"),
        (lambda: run(data=DATA._replace(labels={"y": DATA.labels})), ConfigError, "labels are a dict: mixup mixes"),
        (
            lambda: run(prepare=kd.augment.cutmix(), data=PICTURES._replace(labels=np.zeros((16, 8), int))),
            ShapeError,
            "give cutmix one label for each image",
        ),
    ],
)
def test_what_cannot_be_mixed_is_told_in_one_sentence(wrong: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def run(**given: Any) -> None:
    data = given.pop("data", DATA)
    student = net() if data is DATA or data.inputs.ndim == 2 else kd.from_nnx(lambda rngs: CNN(rngs=rngs))
    how = HOW | {"prepare": kd.augment.mixup()} | given
    kd.distill(student, how.pop("teacher", teacher() if "method" in how else None), data, **how)
