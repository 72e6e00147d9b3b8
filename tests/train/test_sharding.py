"""A training on a mesh is that of one device, to rounding; `tests/devices.py` has the trainings, on 8 devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from small import DATA, HOW, SGD, X, assert_same, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError
from kd_jax.models import programs
from kd_jax.models.partitioning import partitioning
from kd_jax.train.sharding import as_mesh, layout_of, variable_shardings
from kd_jax.train.step import TrainState

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = Path(__file__).parents[2]

# Of parameters and moments in float64, after 200 steps: the largest that was measured is 1e-14.
ROUNDING = 1e-12


# Of `tests/devices.py`, those that take long.
SLOW = (
    "coupled", "coupled_maps", "a_module_that_names_axes", "one_program", "models_of_another_library",
    "convolutions_and_attention",
)  # fmt: skip


def found_by(*names: str) -> dict[str, Any]:
    """What functions of `tests/devices.py` found."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    own = {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "devices.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def found(quick_compiling: None) -> dict[str, Any]:
    return found_by("but", *SLOW)


@pytest.fixture(scope="module")
def found_slowly(quick_compiling: None) -> dict[str, Any]:
    return found_by(*SLOW)


def of(found: dict[str, Any], name: str) -> Any:
    """What one function found, and no exception."""
    assert not (isinstance(found[name], str) and "Traceback" in found[name]), found[name]
    return found[name]


def test_200_steps_are_those_of_one_device(found: dict[str, Any]) -> None:
    """With dropout, random views, batch statistics, weights, and a loss that couples the examples of a batch.

    On 1, 2, 4 and 8 devices; and on 4 x 2 with student and teacher over `model`, and moments over `data`.
    """
    apart = of(found, "the_same_parameters")
    assert apart.pop("moved") > 0.1
    assert set(apart) == {"1", "2", "4", "8", "4x2"}
    assert all(value < ROUNDING for value in apart.values()), apart


@pytest.mark.slow
def test_200_steps_of_a_residual_network_and_a_decoder_are_those_of_one_device(found_slowly: dict[str, Any]) -> None:
    """Of all parameters as one vector. In float64 4e-16 was measured; in float32 2e-7 of the decoder.

    In float32 a ReLU of the residual network may be on for one and off for the other, as its input is within rounding
    of 0: 1e-7 to 8e-3 was measured.
    """
    apart = of(found_slowly, "convolutions_and_attention")
    bounds = {"resnet8, float64": 1e-12, "decoder, float64": 1e-12, "resnet8, float32": 3e-2, "decoder, float32": 3e-6}
    assert {*apart} == {*bounds}
    for name, bound in bounds.items():
        assert {*apart[name]} == {"1", "2", "8"} | ({"4x2"} if "decoder" in name else set())
        assert all(value < bound for value in apart[name].values()), (name, apart[name])


@pytest.mark.slow
def test_losses_that_couple_a_batch_see_the_whole_of_it(found_slowly: dict[str, Any]) -> None:
    """SP, RKD, PKT, DIST, CC, SRD, MLKD and CRD, of which each term is that of one device; and mixed batches."""
    apart = of(found_slowly, "coupled")
    assert {"sp", "distance", "angle", "pkt", "cc", "srd", "crd"} <= set(apart)
    assert apart.pop("float64") < ROUNDING
    assert apart.pop("mixed") < ROUNDING
    # What CC, SRD and CRD learn is in float32, and so are the means of an epoch.
    assert all(value < 1e-3 for value in apart.values()), apart


@pytest.mark.slow
def test_losses_of_maps_that_couple_a_batch_see_the_whole_of_it(found_slowly: dict[str, Any]) -> None:
    """ICKD, and those whose learned blocks normalise by the batch; in float32."""
    apart = of(found_slowly, "coupled_maps")
    assert {"ickd", "ab", "ofd", "wkdf", "semckd"} <= set(apart)
    assert all(value < 1e-4 for value in apart.values()), apart


def test_a_batch_lies_divided(found: dict[str, Any]) -> None:
    """Of 8 examples a device of 4 x 2 has 2, in the compiled step itself."""
    assert of(found, "divided") == {"memory": ["(2, 6)"], "iterator": ["(2, 6)"]}


def test_iterators_and_fit_are_the_same_training(found: dict[str, Any]) -> None:
    apart = of(found, "other_sources")
    assert apart["iterator"] < ROUNDING
    assert apart["fit"] < ROUNDING


def test_a_mesh_may_have_axes_of_either_kind(found: dict[str, Any]) -> None:
    """Explicit, as `jax.make_mesh` has them, or for XLA to partition; in a context of the user's, too."""
    apart = of(found, "other_sources")
    assert apart["automatic axes"] == apart["below a mesh"] == 0


def test_arrays_lie_as_their_module_says(found: dict[str, Any]) -> None:
    """What one of 2 x 4 devices has: of a width of 8 and 16 a quarter, and of moments half of that."""
    seen = of(found, "where_it_lies")
    assert seen["teacher"]["first.kernel"] == [6, 4]
    assert seen["teacher"]["head.kernel"] == [4, 4]
    assert seen["student"] == {
        "first.kernel": [6, 2], "first.bias": [2], "head.kernel": [2, 4], "head.bias": [4], "norm.bias": [8],
        "norm.scale": [8],
    }  # fmt: skip
    assert seen["module"] == ["Net", seen["student"]]
    assert seen["optimizer"] == {
        "first.kernel": [3, 2], "first.bias": [2], "head.kernel": [2, 2], "head.bias": [2], "norm.bias": [4],
        "norm.scale": [4],
    }  # fmt: skip
    assert 0 <= seen["accuracy"] <= 1


def test_a_rule_says_how_arrays_lie(found: dict[str, Any]) -> None:
    assert of(found, "where_it_lies")["by a rule"]["first.kernel"] == [6, 4]


@pytest.mark.slow
def test_a_model_of_another_library_says_the_same_on_every_device(found_slowly: dict[str, Any]) -> None:
    """Its logits are in float32, and so are the means of an epoch."""
    apart = of(found_slowly, "models_of_another_library")
    assert len(apart) == 8
    assert all(value < 1e-5 for value in apart.values()), apart


@pytest.mark.slow
def test_a_module_may_name_axes_in_its_call(found_slowly: dict[str, Any]) -> None:
    assert of(found_slowly, "a_module_that_names_axes") < ROUNDING


def test_a_training_goes_on_on_another_mesh(found: dict[str, Any]) -> None:
    """On the same one to the same bits; on 8 devices after 4 x 2, and without a mesh, to rounding."""
    apart = of(found, "goes_on")
    assert apart["same"] == 0
    assert apart["other"] < ROUNDING
    assert apart["none"] < ROUNDING


def test_seeds_have_the_same_bits_on_any_number_of_devices(found: dict[str, Any]) -> None:
    values = of(found, "seeds")
    assert values["2"] == values["1"]
    assert values["8"] == [values["1"][0][1:2], values["1"][1][1:2]]
    assert values["read"][0] == values["1"][0]
    np.testing.assert_allclose(values["data"][0], values["1"][0][1:2], rtol=1e-12)
    assert values["inside"] == values["outside"] == values["8"]


def test_a_student_goes_from_one_mesh_to_another(found: dict[str, Any]) -> None:
    assert of(found, "moves") == 0


@pytest.mark.slow
def test_a_comparison_and_a_training_share_a_mesh(found_slowly: dict[str, Any]) -> None:
    """In one program, in turn, to the same bits; with a student of the mesh as the teacher, too."""
    apart = of(found_slowly, "one_program")
    assert apart["compare after"] == apart["compare below"] == apart["distill after"] == 0
    assert apart["distill"] < ROUNDING
    # The means of an epoch are in float32.
    assert apart["taught"] < 1e-6


@pytest.mark.parametrize(
    ("place", "words"),
    list(enumerate([
        ("batch_size is 12", "8 devices along data", "a multiple of 8"),
        ("a batch of the iterator has 6 examples", "4 devices", "a last one that is incomplete"),
        ("of the student is to lie along 'embed'", "the axis data"),
        ("first.bias of the teacher has the shape (16,)", "one name for each axis"),
        ("first.kernel of the student has the shape (6, 8)", "6 is to lie along data on 8 devices"),
        ("the axes data, seed", "one training", "kd.compare"),
        ("the axes data, seed", "the axis seed alone"),
        ("batch_size is 6", "a multiple of 4"),
    ])),
)  # fmt: skip
def test_what_does_not_divide_is_one_sentence(place: int, words: tuple[str, ...], found: dict[str, Any]) -> None:
    said = of(found, "refusals")[place]
    assert all(word in said for word in words), said
    assert "\n" not in said


def test_the_page_runs_and_prints_what_it_says(found: dict[str, Any]) -> None:
    said = of(found, "the_page")
    assert said[::2] == said[1::2]
    assert any(said)


TWICE = PartitionSpec(("data", "data"))


def one_device(*names: str) -> Mesh:
    return jax.make_mesh((1,) * len(names), names)


@pytest.mark.slow
def test_one_device_has_the_bits_of_no_mesh() -> None:
    how = {**HOW, "method": kd.KD(0.3) + kd.SP("hidden.0"), "epochs": 2}
    student = net().init(0)
    alone = kd.distill(student, teacher(), DATA, **how)
    found = kd.distill(student, teacher(), DATA, mesh=one_device("data"), **how)
    assert_same(found.state, alone.state)
    assert_same(found.model(X), alone.model(X))
    # The user's arrays are not given away.
    assert np.isfinite(np.asarray(student(X))).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mesh": 8}, "mesh is 8: give a jax.sharding.Mesh"),
        ({"mesh": ("batch",)}, "the mesh has the axis batch, and batches lie along an axis data"),
        ({"sharding": kd.Sharding()}, "sharding is given without a mesh"),
        ({"mesh": ("data",), "sharding": len}, "sharding is <built-in function len>: give kd.Sharding"),
        ({"mesh": ("data",), "sharding": kd.Sharding(student=lambda path, shape: "data")}, "gives 'data' for hidden.0"),
        ({"mesh": ("data",), "sharding": kd.Sharding(student=lambda path, shape: TWICE)}, "lie along 'data' twice"),
        ({"mesh": ("seed",)}, "this is one training"),
    ],
)
def test_what_is_no_mesh_is_one_sentence(more: dict[str, Any], words: str) -> None:
    mesh = more.get("mesh")
    given = more | ({"mesh": one_device(*mesh)} if isinstance(mesh, tuple) else {})
    with pytest.raises(ConfigError, match=words):
        kd.distill(net(), teacher(), DATA, **HOW, **given)


def test_a_mesh_of_some_of_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would be waited for."""

    class Device:
        process_index = 1

    class Places(Mesh):
        devices: Any = np.array([jax.devices()[0], Device()], object)
        axis_names: Any = ("data",)

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"the mesh has devices of 2 of 3 processes: give a mesh of jax"):
        as_mesh(object.__new__(Places))


def test_fit_with_a_mesh_is_not_traced() -> None:
    def whole(key: Any) -> Any:
        return kd.fit(key, DATA, net(), method=kd.CrossEntropy(), mesh=one_device("data"), **HOW)

    with pytest.raises(ConfigError, match="fit has a mesh and is called inside of jit, vmap"):
        jax.jit(whole)(jax.random.key(0))


def test_seeds_take_no_rules() -> None:
    given: dict[str, Any] = {"methods": {"kd": kd.KD()}, "mesh": one_device("seed"), "sharding": kd.Sharding()}
    with pytest.raises(ConfigError, match="the axis seed, and sharding is given"):
        kd.compare(net(), teacher(), DATA, DATA, **HOW, **given)


class Named(nn.Module):
    """A kernel with the mesh's name, and one with a logical name."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lecun = nn.initializers.lecun_normal()
        x = nn.Dense(5, kernel_init=nn.with_partitioning(lecun, (None, "model")))(x)
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(lecun, ("embed", None)))(x)


def test_metadata_of_linen_is_read() -> None:
    model = kd.from_linen(Named(), jnp.asarray(X[:1]))
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    with nn.logical_axis_rules((("embed", "model"),)):
        said = partitioning(model.network, shapes)["params"]
    assert said["Dense_0"]["kernel"].value == PartitionSpec(None, "model")
    assert said["Dense_1"]["kernel"].value == PartitionSpec("model", None)
    assert said["Dense_0"]["bias"] == PartitionSpec()
    assert jax.tree.structure(said) == jax.tree.structure(shapes["params"])


def test_a_rule_goes_before_the_module_and_sees_the_names_of_files() -> None:
    model = kd.from_linen(Named(), jnp.asarray(X[:1]))
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    seen = {}

    def rule(path: str, shape: tuple[int, ...]) -> PartitionSpec | None:
        seen[path] = shape
        return PartitionSpec("data") if path == "Dense_0.kernel.value" else None

    mesh = as_mesh(one_device("data", "model"))
    with nn.logical_axis_rules((("embed", "model"),)):
        lying = variable_shardings(mesh, model.network, shapes, rule, "student")["params"]
    assert lying["Dense_0"]["kernel"].value.spec == PartitionSpec("data")
    assert lying["Dense_1"]["kernel"].value.spec == PartitionSpec("model", None)
    assert seen["Dense_0.bias"] == (5,)


def test_an_optimisers_state_lies_as_its_parameters_below_masks_too() -> None:
    """Of moments with the shape of their parameter; counters and sums of rows are whole."""
    import optax

    model = net().init(0)
    kernels = jax.tree.map(lambda leaf: leaf.ndim == 2, model.variables["params"])
    optimizer = optax.chain(optax.masked(optax.trace(0.9), kernels), optax.scale_by_factored_rms(), SGD)
    moments = optimizer.init(model.variables["params"])
    state = TrainState(model.variables, (), (), moments, jnp.int32(0))
    rules = kd.Sharding(student=lambda path, shape: PartitionSpec(None, "model") if len(shape) == 2 else None)
    layout = layout_of(as_mesh(one_device("data", "model")), rules, model.network, None, state)
    lying = layout.as_tree(state).optimizer_state
    trace = lying[0].inner_state.trace
    assert trace["output"]["kernel"].spec == PartitionSpec(None, "model")
    assert lying[1].v["output"]["kernel"].spec == PartitionSpec(None, "model")
    assert lying[1].v_row["output"]["kernel"].spec == PartitionSpec()
    assert lying[1].count.spec == PartitionSpec()


def test_a_program_is_not_taken_for_that_of_other_devices() -> None:
    sharding = jax.sharding.NamedSharding(one_device("data"), PartitionSpec())
    assert str(jax.devices()[0].id) in repr(programs._place(sharding))
    assert programs._place(None) is None
