"""`distill`: what it gives back, warns of, and leaves alone."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import DATA, HOW, SGD, X, Y, assert_close, assert_same, leaves, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, RunError
from kd_jax.train import progress
from kd_jax.train.callbacks import says_stop

pytestmark = pytest.mark.usefixtures("quick_compiling")


class Linear(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x)


def module(seed: int = 0) -> Linear:
    return Linear(rngs=nnx.Rngs(seed))


def test_what_goes_in_comes_out() -> None:
    """A module gives a module, a class gives one, a model gives a model."""
    for given in (module(), Linear, lambda rngs: Linear(rngs=rngs)):
        result = kd.distill(given, None, DATA, **HOW)
        assert isinstance(result.student, Linear)
        np.testing.assert_allclose(result.student(X), result.model(X), rtol=1e-6)
    for given in (net(), kd.from_nnx(module())):
        result = kd.distill(given, None, DATA, **HOW)
        assert isinstance(result.student, kd.Model)
        assert_same(result.student.variables, result.model.variables)


def test_the_module_that_was_given_is_not_changed() -> None:
    student, taught = module(), module(1)
    before = [np.array(student.head.kernel[...]), np.array(taught.head.kernel[...])]
    result = kd.distill(student, taught, DATA, **(HOW | {"epochs": 2}))
    np.testing.assert_array_equal(student.head.kernel[...], before[0])
    np.testing.assert_array_equal(taught.head.kernel[...], before[1])
    assert (np.asarray(result.student.head.kernel[...]) != before[0]).any()


def test_a_model_that_was_given_can_be_used_again() -> None:
    """Its arrays are not those whose memory the steps use again."""
    model = net().init(0)
    first = kd.distill(model, teacher(), DATA, **HOW)
    assert_same(kd.distill(model, teacher(), DATA, **HOW).student.variables, first.student.variables)


def test_a_module_that_is_changed_while_it_trains_is_told() -> None:
    student = module()

    def meddle(epoch: Any) -> None:
        student.head.kernel[...] = student.head.kernel[...] + 1

    with pytest.warns(UserWarning, match="the student module was changed while it was trained"):
        kd.distill(student, None, DATA, callbacks=meddle, **HOW)


def test_probabilities_in_place_of_logits_are_told() -> None:
    class Probabilities(Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.nn.softmax(self.head(x))

    with pytest.warns(UserWarning, match="the student's outputs look like probabilities"):
        kd.distill(Probabilities(rngs=nnx.Rngs(0)), None, DATA, **HOW)
    with pytest.warns(UserWarning, match="the teacher's outputs look like probabilities"):
        kd.distill(module(), lambda x: jax.nn.softmax(x[:, :4]), DATA, **HOW)


def test_a_teacher_far_less_right_than_sure_is_told() -> None:
    with pytest.warns(UserWarning, match=r"the teacher is right on 0\.0% of the training examples, and its own confid"):
        kd.distill(module(), 10 * np.eye(4, dtype=np.float32)[(Y + 1) % 4], DATA, **HOW)


def test_unlabelled_examples_and_a_right_teacher_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = kd.distill(module(), teacher(), kd.Batch(X, np.full(24, -1)), method=kd.KD(0.0), **HOW)
        assert "accuracy" not in result.history
        kd.distill(module(), 10 * np.eye(4, dtype=np.float32)[Y], DATA, **HOW)


def test_history_has_the_names_of_a_users_terms() -> None:
    class Named(kd.Method):
        needs_teacher: ClassVar[bool] = False

        def loss(self, parts: Any, student: Any, teacher: Any, batch: Any, step: Any) -> Any:
            return {"teacher_distance": student.logits[:, 0], "student_norm": student.logits[:, 1] ** 2}

    result = kd.distill(module(), None, DATA, method=Named(), **HOW)
    assert result.history.keys() == {"loss", "teacher_distance", "student_norm", "accuracy", "seconds"}


def test_the_best_epoch_is_given_back() -> None:
    """Rates that first improve and then ruin it: the best is neither the last nor a later change of the same memory."""
    constant = optax.schedules.constant_schedule
    schedule = optax.schedules.join_schedules([constant(0.3), constant(-0.6)], [9])
    seen: list[Any] = []
    result = kd.distill(
        net(), None, DATA, **(HOW | {"epochs": 6, "optimizer": optax.sgd(schedule)}), validation=DATA, best="nll",
        callbacks=lambda epoch: seen.append(leaves(epoch.model().variables)),
    )  # fmt: skip
    nll = result.history["validation_nll"]
    assert result.best_epoch == nll.argmin() + 1 < 6
    for found, wanted in zip(leaves(result.student.variables), seen[nll.argmin()], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert kd.evaluate(result.student, DATA)["nll"] == pytest.approx(nll.min(), rel=1e-5)


def test_own_measures_are_part_of_the_validation() -> None:
    result = kd.distill(
        net(), teacher(), DATA, **HOW, validation=[(X[:10], Y[:10]), (X[10:], Y[10:])], best="margin", higher=True,
        measures={"margin": lambda logits, labels: logits[:, 0] - logits[:, 1]},
    )  # fmt: skip
    logits = np.asarray(result.student(X))
    np.testing.assert_allclose(result.history["validation_margin"], [np.mean(logits[:, 0] - logits[:, 1])], rtol=1e-4)
    assert {"validation_agreement", "validation_kl_to_teacher"} <= result.history.keys()
    with pytest.raises(ConfigError, match="measures are given without data"):
        kd.distill(net(), None, DATA, measures={"a": lambda logits, labels: logits[:, 0]}, **HOW)


def test_a_cached_teacher_teaches_as_a_live_one_does() -> None:
    """Two epochs are cached by `distill` itself, one is not; the same parameters to rounding."""
    live = kd.distill(net(), lambda x: x[:, :4], DATA, **(HOW | {"epochs": 2}))
    kept = kd.distill(net(), kd.cached(lambda x: x[:, :4], X), DATA, **(HOW | {"epochs": 2}))
    array = kd.distill(net(), X[:, :4], DATA, **(HOW | {"epochs": 2}))
    assert_close(live.model.variables, kept.model.variables)
    assert_close(array.model.variables, kept.model.variables)


def test_a_key_is_all_that_is_random() -> None:
    one, same, other = (kd.distill(net(), None, DATA, key=key, **HOW) for key in (3, jax.random.key(3), 4))
    assert_same(one.model.variables, same.model.variables)
    assert any((a != b).any() for a, b in zip(leaves(one.model.variables), leaves(other.model.variables), strict=True))


def test_without_a_method_there_is_kd_or_labels_alone(standard_promotion: None) -> None:
    assert "soft" in kd.distill(net(), teacher(), DATA, batch_size=8).history
    assert "soft" not in kd.distill(net(), None, DATA, batch_size=8).history


def test_inputs_may_be_a_dict() -> None:
    model = kd.from_function(lambda params, given: given["a"] @ params + given["b"], jnp.zeros((6, 4)))
    result = kd.distill(model, None, kd.Batch({"a": X, "b": X[:, :4]}, Y), **HOW)
    assert np.isfinite(result.history["loss"]).all()


def test_a_bar_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    kd.distill(net(), None, DATA, **(HOW | {"epochs": 2}), validation=DATA, progress=True)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert "6/6" in shown
    assert "validation accuracy" in shown
    kd.distill(net(), None, DATA, optimizer=SGD, batch_size=8, progress=False)
    assert capsys.readouterr().err == ""


def test_a_bar_is_on_the_standard_output_of_a_notebook_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in (None, object()):
        shell = SimpleNamespace(kernel=kernel)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
        assert progress.is_watched() == (kernel is not None)
        progress.make_bar(total=3, unit="thing").close()
        shown = capsys.readouterr()
        assert ("thing" in shown.out, "thing" in shown.err) == (kernel is not None, kernel is None)


def test_a_batch_counts_by_its_weights() -> None:
    """In the means of an epoch, as in `evaluate`: in memory, from an iterator, and in `fit`."""
    student = net().init(0)
    labels = np.asarray(kd.predict(student, X)).argmax(-1).astype(np.int32)
    labels[1::2] = (labels[1::2] + 1) % 4
    weights = np.zeros(24, np.float32)
    weights[[0, 1, 2, 9]] = 1, 2, 3, 4
    batch = kd.Batch(X, labels, weights)
    still = {"method": kd.CrossEntropy(), "optimizer": optax.sgd(1e-7), "epochs": 1}
    wanted = kd.evaluate(student, batch)
    for data, size in ((batch, {"batch_size": 4}), (list(kd.batches(batch, key=0, batch_size=4, epochs=1)), {})):
        history = kd.distill(student, None, data, **still, **size).history
        np.testing.assert_allclose(history["accuracy"], wanted["accuracy"], rtol=1e-5)
        np.testing.assert_allclose(history["loss"], wanted["nll"], rtol=1e-5)
        assert not [name for name in history if "weight" in name]
    _, history = kd.fit(0, batch, student, batch_size=4, **still)
    np.testing.assert_allclose(history["loss"], wanted["nll"], rtol=1e-5)


class Again:
    """Batches, anew each time."""

    def __iter__(self) -> Iterator[kd.Batch]:
        return iter([DATA, DATA])


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_measure_that_numbers_and_several_labels_have_not_is_refused_at_once(outputs: int) -> None:
    data = kd.Batch(X, np.zeros((len(X), outputs), np.float32))
    student = kd.mlp([X.shape[-1], outputs])
    for name in ("nll", "agreement", "accuracy"):
        with pytest.raises(ConfigError, match=r"best is .*(use one of loss, (.*, )?mse$|labels are float32)") as error:
            kd.distill(student, student.init(1), data, method=mean_square, validation=data, best=name, **HOW)
        assert "agreement," not in str(error.value)
        assert "nll" not in str(error.value).replace(f"'{name}'", "")


def mean_square(student: Any, taught: Any, labels: Any) -> Any:
    return jnp.mean((student - taught) ** 2 + (student - labels) ** 2, -1)


def test_validation_without_an_end_is_told() -> None:
    class Endless(Again):
        def cardinality(self) -> int:
            return -1

    with pytest.raises(ConfigError, match="validation has no end"):
        kd.distill(net(), None, DATA, validation=Endless(), **HOW)


def test_validation_with_teachers_that_have_no_common_answer() -> None:
    """The mean of losses, and a teacher of other classes, which has no agreement."""
    losses = kd.several([teacher(), teacher(6, 3, 4)], mean="losses")
    assert "validation_agreement" in kd.distill(net(), losses, DATA, validation=DATA, **HOW).history
    method = kd.CrossEntropy() + kd.FitNet("hidden.0")
    other = kd.distill(net(), teacher(6, 5, 9), DATA, method=method, validation=DATA, **HOW).history
    assert "validation_accuracy" in other
    assert "validation_agreement" not in other
    for given in ([DATA, DATA], Again()):
        other = kd.distill(net(), teacher(6, 5, 9), DATA, method=method, validation=given, **HOW).history
        assert "validation_accuracy" in other
        assert "validation_agreement" not in other


@pytest.mark.parametrize("method", [kd.AlphaBeta(), kd.DIST(hard=0.0)])
def test_a_hard_loss_of_weight_0_needs_no_labels(method: kd.Method) -> None:
    assert np.isfinite(kd.distill(net(), teacher(), kd.Batch(X), method=method, **HOW).history["loss"]).all()


def test_a_mask_may_be_a_tree_of_the_parameters(standard_promotion: None) -> None:
    params = {"w": np.ones((6, 4), np.float32), "b": np.ones(4, np.float32)}
    model = kd.from_function(lambda p, x: x @ p["w"] + p["b"][None], params)
    decay = optax.adamw(1e-2, weight_decay=50.0, mask={"w": True, "b": False})
    trained = kd.distill(model, None, DATA, **HOW | {"optimizer": decay}).student.variables
    assert np.abs(trained["w"]).max() < 0.6
    assert np.abs(trained["b"] - 1).max() < 0.1


@pytest.mark.parametrize("answer", [True, np.True_, jnp.bool_(True), np.array(True)])
def test_whatever_is_true_ends_the_training(answer: Any) -> None:
    assert says_stop(answer)
    assert not any(map(says_stop, (False, np.False_, jnp.bool_(False), None, 1, 1.0, np.ones(2, bool))))


def test_a_student_that_is_asked_for_too_late_is_told() -> None:
    """The memory of its state is that of the next."""
    kept: list[Any] = []
    kd.distill(net(), None, DATA, callbacks=kept.append, **(HOW | {"epochs": 2}))
    with pytest.raises(RunError, match="the student of epoch 1 is asked for after later steps"):
        kept[0].model()
    assert_same(kept[1].model().variables, kept[1].model().variables)


def test_validation_may_be_a_list_of_two_arrays() -> None:
    pair, batch = (kd.distill(net(), None, DATA, validation=data, callbacks=None, **HOW) for data in ([X, Y], DATA))
    assert pair.history["validation_nll"] == batch.history["validation_nll"]


def test_what_a_training_gave_back_is_a_model_and_prints_in_a_line(tmp_path: Path) -> None:
    result = kd.distill(net(), None, DATA, **HOW)
    assert kd.evaluate(result, DATA) == kd.evaluate(result.student, DATA)
    again = kd.distill(net(), result, DATA, **HOW)
    wanted = kd.distill(net(), result.student, DATA, **HOW)
    assert_same(again.state.variables, wanted.state.variables)
    kd.save(result, tmp_path / "student.safetensors")
    assert "loss" in repr(result)
    assert len(repr(result)) < 300


def test_unlabelled_examples_count_in_no_accuracy() -> None:
    """Wherever they turn up: in memory, later in an iterator, with weights, beside other students."""
    labels = np.where(np.arange(24) < 14, Y, -1).astype(np.int32)
    batches = [kd.Batch(X[i : i + 8], labels[i : i + 8], np.full(8, 1 + i, np.float32)) for i in (0, 8, 16)]
    how: dict[str, Any] = {"method": kd.KD(alpha=0.0), "optimizer": optax.sgd(0.0), "epochs": 1}
    student = net().init(0)
    right = np.asarray(kd.predict(student, X)).argmax(-1) == Y
    weights = np.repeat([1, 9, 17], 8)
    plain, weighted = right[:14].mean(), np.average(right[:14], weights=weights[:14])
    memory = kd.distill(student, teacher(), kd.Batch(X, labels), **how, batch_size=8).history
    np.testing.assert_allclose(memory["accuracy"], [plain], rtol=1e-6)
    stream = kd.distill(student, teacher(), batches, **how).history
    np.testing.assert_allclose(stream["accuracy"], [weighted], rtol=1e-6)
    reordered = kd.distill(student, teacher(), batches[::-1], **how).history
    np.testing.assert_allclose(reordered["accuracy"], [weighted], rtol=1e-6)
    nothing_later = kd.distill(student, teacher(), iter(batches), **how | {"epochs": 3}, steps=1).history["accuracy"]
    assert np.isfinite(nothing_later).tolist() == [True, True, False]
    assert not [name for name in (*memory, *stream) if name.startswith("watched")]
    for some in (labels, np.full(24, -1, np.int32)):
        table = kd.compare(
            net(), teacher(), kd.Batch(X, some), DATA, methods={"kd": kd.KD(alpha=0.0)}, optimizer=optax.sgd(0.0),
            epochs=1, batch_size=24, seeds=1,
        )  # fmt: skip
        assert ("accuracy" in table.history["kd"]) == (some >= 0).any()
        if (some >= 0).any():
            found = table.history["kd"]["accuracy"][0, 0] * 14
            np.testing.assert_allclose(found, round(found), atol=1e-5)


@pytest.mark.parametrize("parameters", ["an array", "nothing"])
def test_parameters_may_be_one_array_or_none_where_there_is_validation(parameters: str) -> None:
    one = kd.from_function(lambda p, x: x @ p, jnp.zeros((6, 4)))
    none = kd.from_function(lambda p, x: x[:, :4], {})
    result = kd.distill(one if parameters == "an array" else none, None, DATA, validation=DATA, **HOW)
    assert np.isfinite(result.history["validation_nll"]).all()


def test_labels_in_some_batches_alone_are_told() -> None:
    data = [kd.Batch(X[:8], Y[:8]), kd.Batch(X[8:16])]
    with pytest.raises(DataError, match="a batch has no labels, and one before it has: give labels in all batches"):
        kd.distill(net(), teacher(), data, method=kd.KD(alpha=0), **(HOW | {"batch_size": None}))


def test_a_best_that_is_nan_is_told() -> None:
    held = DATA._replace(inputs=np.full_like(DATA.inputs, np.nan))
    best = pytest.warns(UserWarning, match="nll is NaN after epoch 1, which so cannot be the best: look for NaN in the")
    with pytest.warns(UserWarning, match="the logits of example 0 are NaN"), best:
        result = kd.distill(net(), None, DATA, validation=held, best="nll", **{**HOW, "epochs": 1})
    assert result.best_epoch is None
