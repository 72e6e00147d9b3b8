"""A teacher's logits from a file: what was saved, or one sentence."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from kd_jax import DataError, load_logits

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
