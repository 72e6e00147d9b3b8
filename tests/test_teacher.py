"""Teachers: what they say of the examples that are asked about; and logits from a file, or one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small import CNN, IMAGES, X, Y, leaves, net, scale, teacher

import kd_jax as kd
from kd_jax import load_logits
from kd_jax.errors import ConfigError, DataError
from kd_jax.teacher import FunctionTeacher, LiveTeacher, as_teacher

LOGITS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def _save(path, logits, name="logits"):
    if path.suffix == ".npy":
        np.save(path, logits)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{name: logits})
    else:
        path.write_bytes(safetensors.numpy.save({name: np.array(logits, order="C")}))
    return path


@pytest.fixture(params=[".npy", ".npz", ".safetensors"])
def path(request, tmp_path):
    return tmp_path / f"logits{request.param}"


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_logits_come_back(path, dtype, order):
    if path.suffix == ".safetensors" and dtype == ">f4":
        pytest.skip("safetensors are little-endian")
    logits = np.asarray(LOGITS.astype(dtype), order=order)
    found = load_logits(_save(path, logits), examples=7, classes=3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, logits.astype(np.float32))


def test_float64_stays_where_jax_computes_in_it(path):
    with jax.enable_x64(True):
        assert load_logits(_save(path, LOGITS.astype(np.float64)), examples=7, classes=3).dtype == np.float64


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (LOGITS.T, r"has the shape \(3, 7\): it must have \(7, 3\)"),
        (LOGITS[:, :, None], r"has the shape \(7, 3, 1\)"),
        (LOGITS[:0], r"has the shape \(0, 3\)"),
        (np.float32(1), r"has the shape \(\)"),
        (LOGITS.astype(np.int32), "int32: it must hold floating-point numbers"),
        (np.where(LOGITS > 0, np.nan, LOGITS), "NaN or infinite"),
        (LOGITS.astype(np.float64) * 1e300, "NaN or infinite"),
    ],
)
def test_other_arrays_are_refused(path, logits, says):
    with pytest.raises(DataError, match=says) as error:
        load_logits(_save(path, logits), examples=7, classes=3)
    assert len(str(error.value).splitlines()) == 1


def test_other_names_are_refused(tmp_path):
    for ending in ("npz", "safetensors"):
        with pytest.raises(DataError, match=r"lacks the array logits \(it has outputs\)"):
            load_logits(_save(tmp_path / f"x.{ending}", LOGITS, "outputs"), examples=7, classes=3)
    with pytest.raises(DataError, match=r"ends in \.npy, \.npz or \.safetensors"):
        load_logits(tmp_path / "logits.csv", examples=7, classes=3)
    with pytest.raises(DataError, match="No such file"):
        load_logits(tmp_path / "logits.npy", examples=7, classes=3)


@pytest.mark.parametrize("pickled", [np.array([["a"]], object), np.array([[("a", 1)]], [("x", "O"), ("y", "f4")])])
def test_objects_are_never_unpickled(tmp_path, pickled):
    np.save(tmp_path / "logits.npy", pickled, allow_pickle=True)
    with pytest.raises(DataError, match="never unpickled"):
        load_logits(tmp_path / "logits.npy", examples=1, classes=1)


def said(known, inputs=X, **more):
    return known.outputs(jnp.asarray(inputs), **more)


def test_whatever_teaches_is_a_teacher():
    model = teacher()
    module = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    assert as_teacher(None) is None
    assert isinstance(as_teacher(model), LiveTeacher)
    np.testing.assert_allclose(said(as_teacher(module))[0].logits, module(X), rtol=1e-5, atol=1e-6)
    assert isinstance(as_teacher(lambda x: x), FunctionTeacher)
    assert as_teacher(X).examples == 24
    known = as_teacher([model, module])
    assert as_teacher(known) is known
    for wrong in (3, "teacher", net()):
        with pytest.raises(ConfigError, match=r"is no model|no variables"):
            as_teacher(wrong)


def test_a_live_teacher_is_in_evaluation_mode():
    """Dropout is off and batch statistics are those that are carried."""
    module = CNN(rngs=nnx.Rngs(0))
    pixels = np.float32(IMAGES) / 255
    module.eval()
    wanted = module(pixels)
    module.train()
    for _ in range(2):
        np.testing.assert_allclose(said(as_teacher(module), pixels)[0].logits, wanted, rtol=1e-5, atol=1e-6)


def test_a_cached_teacher_is_looked_up_by_rows():
    module = CNN(rngs=nnx.Rngs(0))
    live = as_teacher(module)
    known = kd.cached(module, IMAGES, features=("conv",), batch_size=5, prepare=scale)
    assert known.per_example
    assert known.examples == 16
    rows = jnp.array([3, 0, 15])
    found = said(known.take(rows), IMAGES, features=("conv",))[0]
    wanted = said(live, np.float32(IMAGES)[np.asarray(rows)] / 255, features=("conv",))[0]
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.features["conv"], wanted.features["conv"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"the cached teacher has no feature 'norm': cache it with kd\.cached"):
        said(known, features=("norm",))


def test_functions_and_several_teachers_are_cached_too():
    both = [teacher(), lambda x: x[:, :4]]
    for known in (both[1], kd.several(both), kd.several(both, mean="logits")):
        live = said(as_teacher(known))[0].logits
        np.testing.assert_allclose(kd.cached(known, X, batch_size=7).output.logits, live, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="the mean of losses cannot be cached"):
        kd.cached(kd.several(both, mean="losses"), X)
    with pytest.raises(ConfigError, match="only one that answers inputs can be cached"):
        kd.cached(kd.cached(X), X)
    with pytest.raises(ConfigError, match="what the teacher is asked about"):
        kd.cached(teacher())


def test_several_teachers_are_averaged_as_they_say():
    both = [teacher(), teacher(6, 3, 4)]
    each = [np.float64(one(X)) for one in both]
    p = [np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in each]
    (found,) = said(kd.several(both))
    np.testing.assert_allclose(jax.nn.softmax(found.logits), (p[0] + p[1]) / 2, rtol=1e-5)
    (found,) = said(kd.several(both, mean="logits"))
    np.testing.assert_allclose(found.logits, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-6)
    (found,) = said(kd.several([both[0]] * 2))
    np.testing.assert_allclose(found.logits, each[0], rtol=1e-5, atol=1e-6)
    found = said(kd.several(both, mean="losses"))
    for one, wanted in zip(found, each, strict=True):
        np.testing.assert_allclose(one.logits, wanted, rtol=1e-5, atol=1e-6)
    mixed = kd.several([teacher(), kd.cached(both[1], X)])
    assert mixed.examples == 24
    rows = jnp.array([5, 2])
    (found,) = said(mixed.take(rows), X[np.asarray(rows)])
    np.testing.assert_allclose(jax.nn.softmax(found.logits), ((p[0] + p[1]) / 2)[np.asarray(rows)], rtol=1e-5)


@pytest.mark.parametrize(
    ("teachers", "mean", "says"),
    [
        ([], "probabilities", "there is no teacher in the list"),
        ([None], "probabilities", "there is no teacher in the list"),
        ([lambda x: x], "median", "mean is 'median': use probabilities, logits or losses"),
    ],
)
def test_other_lists_of_teachers_are_refused(teachers, mean, says):
    with pytest.raises(ConfigError, match=says):
        kd.several(teachers, mean=mean)


def test_teachers_of_other_classes_have_no_mean():
    with pytest.raises(ConfigError, match=r"shapes \(24, 3\) and \(24, 4\): the mean of their probabilities needs"):
        said(kd.several([teacher(), teacher(6, 3)]))


@pytest.mark.parametrize("rest", ["uniform", "renormalised"])
def test_top_k_probabilities_are_spread(rest):
    p = np.asarray(jax.nn.softmax(teacher()(X)))
    order = np.argsort(-p, axis=-1)[:, :2]
    top = np.take_along_axis(p, order, -1)
    known = kd.from_top_k(order, top, classes=4, rest=rest)
    found = np.exp(said(known)[0].logits)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    at = np.take_along_axis(found, order, -1)
    wanted = top if rest == "uniform" else top / top.sum(-1, keepdims=True)
    np.testing.assert_allclose(at, wanted, rtol=1e-5)
    others = np.sort(np.where(np.isin(np.arange(4)[None], order[:1]), np.nan, found[:1]))[0, :2]
    np.testing.assert_allclose(others, (1 - top[0].sum()) / 2 if rest == "uniform" else 0, rtol=1e-4, atol=1e-7)
    rows = jnp.array([7, 1])
    np.testing.assert_allclose(np.exp(said(known.take(rows))[0].logits), found[np.asarray(rows)], rtol=1e-6)


@pytest.mark.parametrize(
    ("which", "p", "says"),
    [
        (np.zeros((3, 2)), np.full((3, 2), 0.5), "whole numbers and floats"),
        (np.zeros((3, 2), int), np.full((3, 3), 0.3), r"shape \(3, 2\) and the probabilities \(3, 3\)"),
        (np.full((3, 1), 4), np.full((3, 1), 0.5), "a class is 4: it must be 0 to 3"),
        (np.array([[0, 1]]), np.array([[0.9, 0.9]]), "do not sum to at most 1"),
        (np.array([[0, 1]]), np.array([[0.9, -0.9]]), "negative"),
        (np.array([[0, 1]]), np.array([[0.9, np.nan]]), "negative or do not sum"),
        (np.array([[1, 1]]), np.array([[0.5, 0.4]]), "twice"),
        ([["a", "b"]], [["x", "y"]], "the probabilities are <U1: give floats"),
    ],
)
def test_other_top_k_are_refused(which, p, says):
    with pytest.raises(DataError, match=says):
        kd.from_top_k(which, p, classes=4)


def test_the_number_of_classes_is_whole():
    with pytest.raises(ConfigError, match=r"classes is 4\.0"):
        kd.from_top_k(np.array([[0, 1]]), np.array([[0.5, 0.4]]), classes=4.0)


def test_a_teacher_from_a_file(path):
    known = kd.from_file(_save(path, LOGITS))
    assert known.examples == 7
    np.testing.assert_array_equal(known.take(jnp.array([3])).output.logits, LOGITS[3:4])
    with pytest.raises(DataError, match=r"it must be \[examples, 4\]"):
        kd.from_file(path, classes=4)


def test_a_function_has_no_features_of_its_own():
    with pytest.raises(ConfigError, match="the teacher is a function, which has no feature 'a'"):
        said(as_teacher(lambda x: x), features=("a",))
    known = as_teacher(lambda x: kd.Output(x, {"a": 2 * x}))
    np.testing.assert_array_equal(said(known, features=("a",))[0].features["a"], 2 * X)


def test_teachers_are_trees_that_compile_once():
    traces = []

    @jax.jit
    def ask(known, inputs):
        traces.append(1)
        return known.outputs(inputs)[0].logits

    for one in (teacher(), kd.mlp([6, 7, 4]).init(2)):
        np.testing.assert_allclose(ask(as_teacher(one), X), one(X), rtol=1e-5, atol=1e-6)
    assert len(traces) == 1
    assert len(leaves(as_teacher(teacher()))) == 4
    assert Y.shape == (24,)


def test_answers_in_float64_stay_so():
    with jax.enable_x64(True):
        wide = X[:, :4].astype(np.float64) + 1e-9
        for known in (lambda x: x[:, :4] + 1e-9, kd.several([lambda x: x[:, :4] + 1e-9] * 2, mean="logits")):
            (live,), kept = said(as_teacher(known), X.astype(np.float64)), kd.cached(known, X.astype(np.float64))
            for logits in (live.logits, kept.output.logits, kept.outputs(X)[0].logits):
                assert logits.dtype == np.float64
                np.testing.assert_array_equal(logits, wide)


def test_a_function_may_give_arrays_of_numpy():
    wide = np.ones((24, 4))
    for known in (lambda x: wide, kd.several([lambda x: wide, teacher()], mean="logits")):
        assert kd.cached(known, X).output.logits.dtype == np.float32


def test_several_teachers_know_the_same_examples():
    with pytest.raises(ConfigError, match="the teachers know 3 and 5 examples: give each the outputs of the same"):
        kd.several([kd.cached(np.zeros((5, 4), np.float32)), kd.cached(np.zeros((3, 4), np.float32))])


def test_features_of_several_teachers_are_those_of_the_first():
    """The others need not have them."""
    both = kd.several([teacher(), lambda inputs: jnp.ones((len(inputs), 4))])
    (output,) = both.outputs(jnp.asarray(X), features=("hidden.0",))
    assert output.features["hidden.0"].shape == (24, 7)


def test_a_feature_to_be_kept_may_be_named_alone():
    known = kd.cached(teacher(), X, features="hidden.0")
    assert said(known.take(jnp.arange(24)), features=("hidden.0",))[0].features["hidden.0"].shape == (24, 7)


def test_a_name_of_a_file_is_no_teacher() -> None:
    with pytest.raises(
        ConfigError, match=r"'teacher\.safetensors' is no model, but a name: kd\.restore\(model, path\)"
    ):
        as_teacher("teacher.safetensors")
