"""What a new user brings: each works in a few lines."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import (
    CNN,
    DATA,
    HOW,
    IMAGES,
    PICTURES,
    SGD,
    Residual,
    X,
    Y,
    assert_close,
    assert_same,
    leaves,
    net,
    of_module,
    scale,
    teacher,
)

import kd_jax as kd

pytestmark = pytest.mark.usefixtures("quick_compiling")


def module(seed: int = 0, channels: int = 4) -> CNN:
    return CNN(channels, rngs=nnx.Rngs(seed))


def test_an_nnx_cnn_with_validation_early_stopping_and_an_optax_chain(standard_promotion: None) -> None:
    """And the best module back; the one that was given is as it was."""
    student, taught = module(0), module(1, channels=6)
    before = jax.tree.map(np.array, of_module(student))
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 40)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    result = kd.distill(
        student, taught, PICTURES, method=kd.KD(alpha=0.1, temperature=4.0), optimizer=optimizer, epochs=20,
        batch_size=8, key=0, prepare=scale, validation=PICTURES, best="nll", progress=True,
        callbacks=kd.callbacks.early_stopping("nll", patience=2),
    )  # fmt: skip
    nll = result.history["validation_nll"]
    assert result.best_epoch == nll.argmin() + 1
    assert len(nll) == 20 or len(nll) == result.best_epoch + 2
    found = kd.evaluate(result.student, PICTURES, teacher=taught, prepare=scale)
    assert found["nll"] == pytest.approx(nll.min(), rel=1e-4)
    assert {"accuracy", "errors", "ece", "agreement", "kl_to_teacher"} <= found.keys()
    assert isinstance(result.student, CNN)
    assert result.student is not student
    assert_same(of_module(student), before)
    pixels = IMAGES[:4].astype(np.float32) / 255
    np.testing.assert_allclose(result.student(pixels), result.model(pixels), rtol=1e-5, atol=1e-6)


def test_a_linen_net_with_keyword_only_train_and_batch_statistics() -> None:
    student = kd.from_linen(Residual(), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    first = student.init(0)
    result = kd.distill(first, module(1), PICTURES, method=kd.KD(alpha=0.5), prepare=scale, **HOW)
    after = result.student.variables
    assert after.keys() == {"params", "batch_stats"}
    for name in after:
        assert any((a != b).any() for a, b in zip(leaves(after[name]), leaves(first.variables[name]), strict=True))
    pixels = IMAGES[:4].astype(np.float32) / 255
    wanted = Residual().apply(after, pixels, train=False)
    np.testing.assert_allclose(result.student(pixels), wanted, rtol=1e-5, atol=1e-6)


def test_a_plain_function() -> None:
    result = kd.distill(
        kd.from_function(lambda params, x: x @ params["w"], {"w": jnp.zeros((6, 4))}), teacher(), DATA, **HOW
    )
    np.testing.assert_allclose(result.student(X), X @ np.asarray(result.student.variables["w"]), rtol=1e-5, atol=1e-6)
    assert (np.asarray(result.student.variables["w"]) != 0).any()


def test_fitnet_by_name() -> None:
    """100 times, and its projector from 4 to 6 channels is trained, too."""
    method = kd.KD() + 100 * kd.FitNet("conv", "conv")
    result = kd.distill(
        module(0),
        module(1, channels=6),
        PICTURES,
        method=method,
        prepare=scale,
        **(HOW | {"optimizer": optax.sgd(1e-3)}),
    )
    assert result.history.keys() >= {"loss", "hard", "soft", "fitnet"}
    (kernel,) = (leaf for leaf in leaves(result.state.learned) if leaf.ndim == 2)
    assert kernel.shape == (4, 6)
    assert kd.feature_names(module(0), np.zeros((1, 8, 8, 3), np.float32))["conv"].shape == (1, 8, 8, 4)


@dataclass(frozen=True)
class AttentionTransfer(kd.Method):
    """Zagoruyko and Komodakis (2017): maps of mean squared channels, normalised."""

    student_path: str
    teacher_path: str
    compares_logits: ClassVar[bool] = False

    @property
    def student_features(self) -> tuple[str, ...]:
        return (self.student_path,)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return (self.teacher_path,)

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        def attention(maps: jax.Array) -> jax.Array:
            flat = jnp.mean(maps**2, axis=-1).reshape(maps.shape[0], -1)
            return flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)

        ours, theirs = student.features[self.student_path], teacher.features[self.teacher_path]
        return {"attention": jnp.sum((attention(ours) - attention(theirs)) ** 2, axis=-1)}


@dataclass(frozen=True)
class DKD(kd.Method):
    """Zhao et al. (2022), from the target's probability and those of the others."""

    alpha: float = 1.0
    beta: float = 8.0
    needs_labels: ClassVar[bool] = True

    def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
        target = jax.nn.one_hot(batch.labels, student.logits.shape[-1], dtype=jnp.bool_)

        def both(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            p = jnp.sum(jnp.where(target, jax.nn.softmax(logits), 0), axis=-1)
            others = jax.nn.log_softmax(jnp.where(target, -1e9, logits))
            return jnp.stack([p, 1 - p], axis=-1), others

        (b, o), (bt, ot) = both(student.logits), both(teacher.logits)
        tckd = jnp.sum(bt * (jnp.log(bt) - jnp.log(b)), axis=-1)
        return {"target": self.alpha * tckd, "others": self.beta * jnp.sum(jnp.exp(ot) * (ot - o), axis=-1)}


def test_attention_transfer_and_dkd_as_methods_of_ones_own() -> None:
    method = kd.CrossEntropy() + 1000 * AttentionTransfer("conv", "conv") + DKD(beta=2.0)
    result = kd.distill(
        module(0),
        module(1, channels=6),
        PICTURES,
        method=method,
        prepare=scale,
        **(HOW | {"optimizer": optax.sgd(1e-3)}),
    )
    terms = [result.history[name] for name in ("hard", "attention", "target", "others")]
    np.testing.assert_allclose(result.history["loss"], np.sum(terms, axis=0), rtol=1e-5)


@pytest.mark.parametrize("mean", ["probabilities", "losses"])
def test_two_teachers(mean: str) -> None:
    """The mean of their probabilities or of the losses by each, against the losses themselves."""
    student, both = net().init(0), [teacher(), teacher(6, 3, 4)]
    temperature = 2.0
    result = kd.distill(
        student, both if mean == "probabilities" else kd.several(both, mean=mean), DATA,
        method=kd.KD(alpha=0.0, temperature=temperature), **(HOW | {"batch_size": 24}),
    )  # fmt: skip
    p = [np.asarray(jax.nn.softmax(one(X))) for one in both]
    if mean == "probabilities":
        wanted = kd.losses.kd(student(X), jnp.log((p[0] + p[1]) / 2), temperature=temperature).mean()
    else:
        wanted = np.mean([kd.losses.kd(student(X), one(X), temperature=temperature).mean() for one in both])
    np.testing.assert_allclose(result.history["loss"][0], wanted, rtol=1e-4)


class Tokens(nnx.Module):
    """An attention layer over tokens, which looks at what the mask allows."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.head(x + self.attention(x, mask=mask[:, None, None, :]))


def test_a_token_transformer_with_padding(standard_promotion: None) -> None:
    """One update equals that by the unpadded sequences, whatever stands in the padding, labels of −100 too."""
    rng = np.random.default_rng(3)
    lengths, width = (3, 6, 5), 6
    student, taught = Tokens(rngs=nnx.Rngs(0)), Tokens(rngs=nnx.Rngs(1))
    tokens = rng.integers(0, 7, (3, width)).astype(np.int32)
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    labels = np.where(mask, rng.integers(0, 5, (3, width)), -100).astype(np.int32)
    temperature, alpha, rate = 2.0, 0.3, 0.1
    result = kd.distill(
        student, taught, kd.Batch((tokens, mask), labels, mask), method=kd.KD(alpha=alpha, temperature=temperature),
        optimizer=optax.sgd(rate), batch_size=3,
    )  # fmt: skip
    model, of_teacher = kd.from_nnx(student), kd.from_nnx(taught)
    params, state = model.network.split(model.variables)

    def loss(params: Any) -> jax.Array:
        total = jnp.float32(0)
        for row, n in enumerate(lengths):
            inputs = tokens[row : row + 1, :n], mask[row : row + 1, :n]
            logits = model.network.apply(model.network.merge(params, state), inputs)[0].logits
            log_p = jax.nn.log_softmax(logits / temperature)
            log_t = jax.nn.log_softmax(of_teacher(inputs) / temperature)
            soft = jnp.sum(jnp.exp(log_t) * (log_t - log_p)) * temperature**2
            hard = -jnp.sum(jax.nn.log_softmax(logits)[0, np.arange(n), labels[row, :n]])
            total = total + alpha * hard + (1 - alpha) * soft
        return total / sum(lengths)

    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(result.history["loss"][0], value, rtol=1e-5)
    wanted = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    assert_close(result.model.network.split(result.model.variables)[0], wanted, rtol=1e-4, atol=1e-6)
    other = np.where(mask, tokens, 6 - tokens)
    again = kd.distill(
        student, taught, kd.Batch((other, mask), labels, mask), method=kd.KD(alpha=alpha, temperature=temperature),
        optimizer=optax.sgd(rate), batch_size=3,
    )  # fmt: skip
    assert_close(again.model.variables["params"], result.model.variables["params"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("column", [True, False])
def test_regression(column: bool) -> None:
    """Targets in a column or not; never `[N, 1] - [N]`."""
    targets = X[:, :1] * 2 - 1
    student = net(6, 8, 1)
    data = kd.Batch(X, targets if column else targets[:, 0])
    result = kd.distill(
        student, None, data, method=lambda s, t, y: (s - y) ** 2, **(HOW | {"epochs": 60, "optimizer": optax.sgd(0.05)})
    )
    found = kd.evaluate(result.student, data)
    assert found.keys() == {"mse"}
    assert found["mse"] == pytest.approx(float(np.mean((result.student(X) - targets) ** 2)), rel=1e-4)
    assert found["mse"] < 0.1
    assert "accuracy" not in result.history


def test_several_labels() -> None:
    labels = (X[:, :3] > 0).astype(np.float32)
    result = kd.distill(
        net(6, 8, 3), teacher(6, 3), kd.Batch(X, labels),
        method=lambda s, t, y: optax.sigmoid_binary_cross_entropy(s, y) + (s - t) ** 2, **HOW,
    )  # fmt: skip
    assert np.isfinite(result.history["loss"]).all()


def test_soft_labels_are_taken_as_they_are() -> None:
    """One-hot floats train as the whole numbers do."""
    hot = np.eye(4, dtype=np.float32)[Y]
    soft, hard = (kd.distill(net(), None, kd.Batch(X, labels), **HOW) for labels in (hot, Y))
    assert_close(soft.model.variables, hard.model.variables)
    assert kd.evaluate(soft.student, kd.Batch(X, hot))["nll"] == pytest.approx(
        kd.evaluate(hard.student, DATA)["nll"], rel=1e-5
    )


def test_no_labels_at_all() -> None:
    alone = kd.distill(net(), teacher(), kd.Batch(X), method=kd.KD(alpha=0), **HOW)
    labelled = kd.distill(net(), teacher(), DATA, method=kd.KD(alpha=0.0), **HOW)
    assert_close(alone.model.variables, labelled.model.variables)
    assert alone.history.keys() == {"loss", "soft", "seconds"}


def test_labels_of_minus_1_with_alpha_0_train_as_any_others() -> None:
    unlabelled = kd.distill(net(), teacher(), kd.Batch(X, np.full_like(Y, -1)), method=kd.KD(alpha=0.0), **HOW)
    labelled = kd.distill(net(), teacher(), DATA, method=kd.KD(alpha=0.0), **HOW)
    assert_same(unlabelled.model.variables, labelled.model.variables)


def test_class_weights() -> None:
    """sum(weights × loss) / sum(weights)."""
    weights = np.array([1.0, 2.0, 0.5, 3.0], np.float32)[Y]
    student = net().init(0)
    result = kd.distill(student, None, kd.Batch(X, Y, weights), **(HOW | {"batch_size": 24}))
    losses = -np.asarray(jax.nn.log_softmax(student(X)))[np.arange(24), Y]
    np.testing.assert_allclose(result.history["loss"][0], np.average(losses, weights=weights), rtol=1e-5)


def crop_and_flip(key: jax.Array, images: jax.Array, train: bool) -> jax.Array:
    """Random crop of 4 by 4 and flip in training, the middle otherwise."""
    x = scale(key, images, train)
    if not train:
        return x[:, 2:6, 2:6]
    corner, flip = jax.random.split(key)
    keys = jax.random.split(corner, x.shape[0])
    starts = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 5))(keys)
    crops = jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, (at[0], at[1], 0), (4, 4, 3)))(x, starts)
    return jnp.where(jax.random.bernoulli(flip, 0.5, (x.shape[0], 1, 1, 1)), crops[:, :, ::-1], crops)


def halves() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield IMAGES[:8], np.asarray(PICTURES.labels)[:8]
        yield IMAGES[8:], np.asarray(PICTURES.labels)[8:]


def by_generator() -> Any:
    return halves()


def by_tensorflow() -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices({"image": IMAGES, "label": np.asarray(PICTURES.labels)}).repeat().batch(8)


def by_grain() -> Any:
    grain = pytest.importorskip("grain")
    source = [{"image": image, "label": label} for image, label in zip(IMAGES, PICTURES.labels, strict=True)]
    return grain.MapDataset.source(source).repeat().batch(8).to_iter_dataset()


@pytest.mark.parametrize("source", [by_generator, by_tensorflow, by_grain])
def test_iterators_with_augmentation_and_the_teacher_on_the_same_view(source: Any) -> None:
    """Student and teacher are one and the same function of the view: the KL is 0 only where both see the same."""

    def pixels(params: Any, x: jax.Array) -> jax.Array:
        return jnp.reshape(x, (x.shape[0], -1))[:, :12] * params

    student = kd.from_function(pixels, jnp.float32(1))
    result = kd.distill(
        student, lambda x: jnp.reshape(x, (x.shape[0], -1))[:, :12], source(), method=kd.KD(alpha=0.0), epochs=2,
        steps=3, optimizer=SGD, prepare=crop_and_flip,
    )  # fmt: skip
    assert len(result.history["loss"]) == 2
    np.testing.assert_allclose(result.history["loss"], 0, atol=1e-6)


def test_the_views_of_steps_differ() -> None:
    seen = kd.from_function(lambda params, x: jnp.reshape(x, (x.shape[0], -1))[:, :12] + 0 * params, jnp.float32(1))
    _, history = kd.fit(
        0, PICTURES._replace(inputs=np.broadcast_to(IMAGES[:1], IMAGES.shape)), seen,
        method=lambda s, t: jnp.mean(s, axis=-1), optimizer=SGD, epochs=3, batch_size=16, prepare=crop_and_flip,
    )  # fmt: skip
    assert len(np.unique(np.asarray(history["loss"]))) == 3


def test_a_pytorch_cnn_as_teacher() -> None:
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        taught = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 4),
        )
    teacher = kd.from_torch(taught, call=lambda network, images, train: network(images.permute(0, 3, 1, 2)))
    result = kd.distill(module(0), teacher, PICTURES, method=kd.KD(alpha=0.0), prepare=scale, **HOW)
    with torch.no_grad():
        images = torch.tensor(np.asarray(scale(jax.random.key(0), jnp.asarray(PICTURES.inputs), False)))
        logits = taught(images.permute(0, 3, 1, 2)).numpy()
    cached = kd.distill(module(0), logits, PICTURES, method=kd.KD(alpha=0.0), prepare=scale, **HOW)
    assert_close(result.model.variables, cached.model.variables, rtol=1e-4, atol=1e-5)


def test_a_teacher_known_by_its_top_k_probabilities() -> None:
    p = np.asarray(jax.nn.softmax(teacher()(X)))
    order = np.argsort(-p, axis=-1)
    both = []
    for k in (2, 4):
        top = order[:, :k]
        known = kd.from_top_k(top, np.take_along_axis(p, top, -1), classes=4)
        both.append(kd.distill(net(), known, kd.Batch(X), method=kd.KD(alpha=0.0, temperature=1.0), **HOW))
    live = kd.distill(net(), teacher(), kd.Batch(X), method=kd.KD(alpha=0.0, temperature=1.0), **HOW)
    assert_close(both[1].model.variables, live.model.variables, rtol=1e-4, atol=1e-5)
    assert any(
        (a != b).any() for a, b in zip(leaves(both[0].model.variables), leaves(live.model.variables), strict=True)
    )


def test_bfloat16(standard_promotion: None) -> None:
    """It computes in it and keeps float32: near the training in float32, and not equal."""
    narrow, wide = (
        kd.distill(module(0), module(1), PICTURES, prepare=scale, dtype=d, **HOW) for d in (jnp.bfloat16, None)
    )
    assert all(leaf.dtype == np.float32 for leaf in leaves(narrow.model.variables))
    np.testing.assert_allclose(narrow.history["loss"], wide.history["loss"], rtol=0.05)
    assert (narrow.history["loss"] != wide.history["loss"]).all()


def test_a_callback_that_logs() -> None:
    lines: list[tuple[int, float, Any]] = []
    result = kd.distill(
        net(), teacher(), DATA, **(HOW | {"epochs": 3}),
        callbacks=lambda epoch: lines.append((epoch.number, epoch.metrics["loss"], epoch.model()(X[:1]))),
    )  # fmt: skip
    assert [line[0] for line in lines] == [1, 2, 3]
    np.testing.assert_array_equal([line[1] for line in lines], result.history["loss"])
    np.testing.assert_allclose(lines[-1][2], result.student(X[:1]), rtol=1e-5, atol=1e-6)


def test_a_callback_ends_the_training_by_true_alone() -> None:
    result = kd.distill(
        net(), None, DATA, **(HOW | {"epochs": 5}), callbacks=[lambda epoch: 1, lambda epoch: epoch.number == 2]
    )
    assert len(result.history["loss"]) == 2


def test_a_student_that_starts_from_given_weights() -> None:
    """A learning rate of 0 leaves them."""
    first = net().init(5)
    still = kd.distill(first, teacher(), DATA, **(HOW | {"optimizer": optax.sgd(0.0)}))
    assert_same(still.student.variables, first.variables)
    state, _ = kd.fit(
        0, DATA, net(), method=kd.CrossEntropy(), start=first.variables, **(HOW | {"optimizer": optax.sgd(0.0)})
    )
    assert_same(state.variables, first.variables)


def test_the_five_lines(standard_promotion: None) -> None:
    student, x_test, y_test = module(0), IMAGES.astype(np.float32) / 255, np.asarray(PICTURES.labels)
    result = kd.distill(student, module(1), kd.Batch(x_test, y_test), method=kd.KD(alpha=0.1, temperature=4.0),
                        optimizer=optax.adamw(1e-3), epochs=2, batch_size=8, key=0)  # fmt: skip
    found = kd.evaluate(result.student, kd.Batch(x_test, y_test), teacher=module(1))
    assert all(math.isfinite(value) for value in found.values())
    assert found["correct"] + found["errors"] == 16


@pytest.mark.slow
def test_metrics_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with warnings.catch_warnings():
        # What tensorboardX itself is warned of.
        warnings.simplefilter("ignore")
        log = kd.callbacks.tensorboard(tmp_path)
        kd.distill(net(), None, kd.Batch(X, Y), callbacks=[log], **HOW)
    written = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"loss" in written
    assert b"accuracy" in written
