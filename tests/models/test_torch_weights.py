"""Weights to PyTorch and back: the same logits, the same bytes, and one sentence for what cannot be used."""

import json
import struct
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_jax.errors import DataError
from kd_jax.models import Model, mlp, torch_weights

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed: pip install 'kd-jax[parity]'")

NAMES = ["fc1", "fc2", "fc3"]
SIZES = {"Teacher": (784, 1200, 1200, 10), "Student": (784, 20, 20, 10)}
KEY = jax.random.key(0)


def _logits(params, images):
    return np.asarray(Model(mlp(torch_weights.layer_sizes(params)).network, {"params": params, "state": {}})(images))


def _params(sizes, key=KEY, **named):
    return mlp(sizes, **named).init(key).variables["params"]


def _images(count=64):
    return np.random.default_rng(0).random((count, 28, 28, 1), np.float32)


def _student():
    return torch_weights.to_state_dict(_params(SIZES["Student"]))


@needs_torch
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("suffix", ["mapping", ".safetensors", ".pt", ".pth"])
def test_a_pytorch_model_gives_the_same_logits_here(kind, suffix, tmp_path):
    from safetensors.torch import save_file

    from benchmarks import torch_reference

    model = getattr(torch_reference, kind)().eval()
    source = model.state_dict()
    if suffix != "mapping":
        path = tmp_path / f"weights{suffix}"
        save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
        source = path
    params = torch_weights.from_state_dict(source)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, _params(SIZES[kind]))
    with torch.no_grad():
        expected = model(torch.tensor(_images())).numpy()
    np.testing.assert_allclose(_logits(params, _images()), expected, rtol=0, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("kind", SIZES)
def test_a_model_from_here_gives_the_same_logits_in_pytorch(kind, tmp_path):
    from safetensors.torch import load_file

    from benchmarks import torch_reference

    params = _params(SIZES[kind], dropout=0.5)
    torch_weights.save(params, tmp_path / "weights.safetensors", NAMES)
    model = getattr(torch_reference, kind)().eval()
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        logits = model(torch.tensor(_images())).numpy()
    np.testing.assert_allclose(logits, _logits(params, _images()), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=14), seed=st.integers(0, 99))
def test_there_and_back_changes_no_bit(sizes, seed, tmp_path_factory):
    params = _params(sizes, jax.random.key(seed))
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    torch_weights.save(params, path)
    for source in (torch_weights.to_state_dict(params), path, str(path)):
        back = torch_weights.from_state_dict(source)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    assert torch_weights.layer_sizes(params) == tuple(sizes)


@pytest.mark.parametrize("names", [("net.0", "net.2", "net.4"), ("zeta", "alpha", "beta"), ("a.in", "a.mid", "b")])
def test_layers_of_a_mapping_are_in_its_order_whatever_their_names(names):
    params = _params((5, 4, 4, 3))
    back = torch_weights.from_state_dict(torch_weights.to_state_dict(params, names))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_file_of_layers_without_numbers_needs_their_names(tmp_path):
    params = _params((5, 4, 4, 3))
    names, path = ["first", "between", "last"], tmp_path / "weights.safetensors"
    torch_weights.save(params, path, names)
    with pytest.raises(DataError, match="names="):
        torch_weights.from_state_dict(path)
    jax.tree.map(np.testing.assert_array_equal, torch_weights.from_state_dict(path, names), params)


@needs_torch
def test_a_bare_layer_one_without_bias_and_half_precision():
    bare = torch_weights.from_state_dict(torch.nn.Linear(4, 3).state_dict())
    assert torch_weights.layer_sizes(bare) == (4, 3)
    layer = torch.nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    params = torch_weights.from_state_dict(layer.state_dict())
    assert params["output"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(params["output"]["bias"], np.zeros(3))
    np.testing.assert_array_equal(params["output"]["kernel"].T, layer.weight.detach().float().numpy())


def test_float64_stays_where_jax_computes_in_it():
    state_dict = {name: array.astype(np.float64) for name, array in _student().items()}
    assert torch_weights.from_state_dict(state_dict)["output"]["kernel"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert torch_weights.from_state_dict(state_dict)["output"]["kernel"].dtype == jnp.float64


def _with(**changes):
    return {**_student(), **{name.replace("_", "."): array for name, array in changes.items()}}


@pytest.mark.parametrize(
    ("state_dict", "says"),
    [
        ({}, "is empty: at least one linear layer"),
        (_with(fc2_weight=np.zeros((20, 21), np.float32)), "20 outputs of fc1 and 21 inputs of fc2"),
        (_with(fc2_weight=np.zeros((20, 20, 3, 3), np.float32)), r"\(20, 20, 3, 3\)"),
        (_with(fc2_weight=np.zeros((0, 20), np.float32)), r"\(0, 20\)"),
        (_with(fc2_bias=np.zeros(19, np.float32)), r"must be \(20,\)"),
        (_with(fc2_bias=np.full(20, np.nan, np.float32)), "fc2.bias of the state_dict has NaN or infinite"),
        (_with(fc2_bias=np.full(20, 1e300)), "has NaN or infinite"),
        (_with(fc2_bias=np.zeros(20, np.int64)), "int64: it must hold floating-point"),
        (_with(fc2_bias={"a": 1}), "of type object"),
        (_with(fc2_bias=[[1.0], [1.0, 2.0]]), "cannot be read as an array"),
        (_with(norm_running_mean=np.zeros(20, np.float32)), "norm.running.mean, which is no weight or bias"),
        (_with(norm_bias=np.zeros(20, np.float32)), "lacks norm.weight"),
        (_with(norm_weight=np.zeros(20, np.float32)), r"norm.weight of the state_dict has the shape \(20,\)"),
    ],
)
def test_what_is_no_stack_of_linear_layers_is_refused_in_one_sentence(state_dict, says):
    with pytest.raises(DataError, match=says) as error:
        torch_weights.from_state_dict(state_dict)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["fc1", "fc2"], "also has fc3.weight"),
        (["fc1", "fc2", "fc2", "fc3"], "repeat a name"),
        (["fc1", "fc2", "fc3", "fc4"], "lacks fc4.weight"),
        (["fc2", "fc1", "fc3"], "20 outputs of fc2 and 784 inputs of fc1"),
        ([], "is empty"),
    ],
)
def test_names_that_do_not_fit(names, says):
    with pytest.raises(DataError, match=says):
        torch_weights.from_state_dict(_student(), names)


@pytest.mark.parametrize("names", [["fc1"], ["a", "a", "b"]])
def test_as_many_names_as_layers_are_needed_to_write(names):
    with pytest.raises(DataError, match="cannot be given to 3 layers"):
        torch_weights.to_state_dict(_params((4, 3, 3, 2)), names)


def test_files_that_are_not_there_or_cannot_be_written(tmp_path):
    params = _params((4, 2))
    with pytest.raises(DataError, match="No such file"):
        torch_weights.from_state_dict(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match=r"ends in \.safetensors, \.pt, \.pth"):
        torch_weights.from_state_dict(tmp_path / "weights.h5")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(DataError, match="name an existing file"):
        torch_weights.from_state_dict(tmp_path / "folder.pt")
    with pytest.raises(DataError, match="in a folder that exists"):
        torch_weights.save(params, tmp_path / "no" / "weights.safetensors")
    with pytest.raises(DataError, match=r"ends in \.safetensors"):
        torch_weights.save(params, tmp_path / "weights.pt")


def _damages(whole: bytes) -> list[bytes]:
    rng = np.random.default_rng(0)
    flipped = bytearray(whole)
    for place in rng.integers(0, min(len(whole), 300), 20):
        flipped[place] ^= 0xFF
    return [b"", whole[:5], whole[: len(whole) // 2], whole[:-1], bytes(flipped), rng.bytes(1000)]


@pytest.mark.parametrize("damage", range(6))
def test_damaged_safetensors(damage, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(_damages(safetensors.numpy.save(_student()))[damage])
    with pytest.raises(DataError, match=r"weights\.safetensors") as error:
        torch_weights.from_state_dict(path)
    assert "\n" not in str(error.value)


def test_a_safetensors_type_that_numpy_lacks(tmp_path):
    header = json.dumps({"fc1.weight": {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(DataError, match="save it again as float32"):
        torch_weights.from_state_dict(path)


@needs_torch
@pytest.mark.parametrize("damage", range(6))
def test_damaged_torch_files(damage, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({name: torch.tensor(array) for name, array in _student().items()}, path)
    path.write_bytes(_damages(path.read_bytes())[damage])
    with pytest.raises(DataError, match=r"weights\.pt") as error:
        torch_weights.from_state_dict(path)
    assert "\n" not in str(error.value)


class Trap:
    """An object whose unpickling would leave a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@needs_torch
def test_nothing_but_tensors_is_unpickled(tmp_path):
    from benchmarks import torch_reference

    for name, content in (("trap", {"fc1.weight": Trap(tmp_path / "mark")}), ("model", torch_reference.Student())):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(DataError, match="holds more than tensors"):
            torch_weights.from_state_dict(tmp_path / f"{name}.pt")
    assert not (tmp_path / "mark").exists()
    torch.save([torch.zeros(2, 2)], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list, no state_dict"):
        torch_weights.from_state_dict(tmp_path / "list.pt")


@needs_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_torch_file_is_read_without_torch(dtype, tmp_path, monkeypatch):
    linear = torch.nn.Linear(4, 3).to(getattr(torch, dtype))
    both = torch.stack([linear.weight.detach(), linear.weight.detach() + 1])
    transposed = both.permute(2, 1, 0)[:, :, 1].T  # a part of a storage, with strides
    path = tmp_path / "weights.pt"
    torch.save({"fc.bias": linear.bias, "fc.weight": transposed}, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    params = torch_weights.from_state_dict(path)
    np.testing.assert_array_equal(params["output"]["kernel"].T, transposed.float().numpy())
    np.testing.assert_array_equal(params["output"]["bias"], linear.bias.detach().float().numpy())


@needs_torch
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: {"epoch": 3, "weights": {}}, "holds more than tensors .a int named epoch"),
        (lambda: {1: torch.zeros(2, 2)}, "holds more than tensors"),
        (lambda: {"a.weight": torch.zeros(1).expand(10**6, 10**6)}, "clone"),
        (lambda: {"a.weight": torch.zeros(2, 2, dtype=torch.int64)}, "int64: it must hold floating-point"),
        (lambda: {"a.weight": torch.zeros(2, 2).to_sparse()}, "holds more than tensors"),
        (lambda: {"a.weight": torch.zeros(2, 2, device="meta")}, "holds more than tensors"),
    ],
)
def test_torch_files_of_other_things_are_refused(content, says, tmp_path):
    torch.save(content(), tmp_path / "weights.pt")
    with pytest.raises(DataError, match=says) as error:
        torch_weights.from_state_dict(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)


@needs_torch
def test_the_old_torch_format_says_what_to_do(tmp_path):
    torch.save({"a.weight": torch.zeros(2, 2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"PyTorch 1\.6 or newer"):
        torch_weights.from_state_dict(tmp_path / "old.pth")


@needs_torch
def test_big_endian_torch_files(tmp_path):
    layer = torch.nn.Linear(4, 3)
    torch.save(layer.state_dict(), tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for name in little.namelist():
            content = little.read(name)
            if "/data/" in name:
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            big.writestr(name, b"big" if name.endswith("byteorder") else content)
    params = [torch_weights.from_state_dict(tmp_path / f"{order}.pt") for order in ("little", "big")]
    jax.tree.map(np.testing.assert_array_equal, *params)


@needs_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path, pickle_protocol=protocol)
    params = torch_weights.from_state_dict(path)
    np.testing.assert_array_equal(params["output"]["kernel"].T, model[1].weight.detach().numpy())
    np.testing.assert_array_equal(params["hidden"][0]["bias"], model[0].bias.detach().numpy())


@needs_torch
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_any_protocol_is_never_run(protocol, tmp_path):
    torch.save({"fc1.weight": Trap(tmp_path / "mark")}, tmp_path / "trap.pt", pickle_protocol=protocol)
    with pytest.raises(DataError, match=r"holds more than tensors \(pathlib"):
        torch_weights.from_state_dict(tmp_path / "trap.pt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("source", [None, 3, [("fc.weight", np.ones((2, 2)))]])
def test_what_is_no_state_dict_is_refused(source):
    with pytest.raises(DataError, match=r"is no state_dict: give the mapping, or the name of a file"):
        torch_weights.from_state_dict(source)


@needs_torch
def test_a_module_in_place_of_its_state_dict_says_what_to_give():
    with pytest.raises(DataError, match=r"a Linear is no state_dict: give module\.state_dict\(\)"):
        torch_weights.from_state_dict(torch.nn.Linear(2, 2))


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    torch_weights.save(_params((3, 2)), path)
    before, original = path.read_bytes(), Path.write_bytes

    def full(self, content):
        original(self, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device"):
        torch_weights.save(_params((4, 2)), path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
