"""What all feature and relation losses have in common: each is its oracle, and none breaks where it could.

Values to 1e-13 and gradients to 1e-11 of their largest element, in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import CASES, CHANNELS, assert_close, assert_is_oracle, compiled, draw, floats, slopes

from kd_jax.losses import summaries

names = pytest.mark.parametrize("name", CASES)


@names
def test_values_and_gradients_are_the_oracles(name: str) -> None:
    assert_is_oracle(CASES[name].loss, CASES[name].oracle, *draw(name))


@names
def test_in_float32(name: str) -> None:
    student, teacher = floats(name)
    found = compiled(name)(student, teacher)
    assert found.dtype == jnp.float32
    assert_close(found, CASES[name].oracle(*oracles.long(student, teacher)), rtol=3e-6)


@names
def test_bfloat16_is_widened_before_anything_is_computed(name: str) -> None:
    narrow = [array.astype(jnp.bfloat16) for array in floats(name)]
    wide = [array.astype(jnp.float32) for array in narrow]
    (found, gradients), (expected, exact) = slopes(name)(*narrow), slopes(name)(*wide)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    for gradient, other in zip(gradients, exact, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient.astype(jnp.float32), other, rtol=2**-8)
    # A wide teacher beside a narrow student.
    assert jax.eval_shape(CASES[name].loss, narrow[0], wide[1]).dtype == jnp.float32


@names
def test_equal_features(name: str) -> None:
    case = CASES[name]
    if case.at_equal is None:
        pytest.skip("not a distance of the features as they are")
    features = floats(name)[0]
    np.testing.assert_allclose(compiled(name)(features, features), case.at_equal, rtol=1e-6, atol=1e-6)
    if name == "ft":
        return  # The size of a difference has a kink there.
    for gradient in slopes(name)(features, features)[1]:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@names
@pytest.mark.parametrize("kind", ["zeros", "zero student", "zero teacher", "equal examples", "one", "constant", "1e4"])
def test_gradients_are_finite_where_lengths_and_distances_are_0_or_large(name: str, kind: str) -> None:
    student, teacher = (array.astype(np.float32) for array in draw(name, batch=1 if kind == "one" else 4))
    if kind in ("zeros", "zero student"):
        student = np.zeros_like(student)
    if kind in ("zeros", "zero teacher"):
        teacher = np.zeros_like(teacher)
    if kind == "equal examples":
        student[1], teacher[1:3], student[2:4, ..., 0] = student[0], teacher[0], 0
    if kind == "constant":
        student, teacher = np.full_like(student, 0.7), np.full_like(teacher, -2.0)
    if kind == "1e4":
        student, teacher = 1e4 * np.sign(student), 1e4 * np.sign(teacher)
    found, gradients = slopes(name)(jnp.asarray(student), jnp.asarray(teacher))
    for array in (found, *gradients):
        assert np.isfinite(array).all()


@names
def test_vmap_changes_nothing(name: str) -> None:
    pairs = [floats(name), floats(name, seed=1)]
    students, teachers = map(jnp.stack, zip(*pairs, strict=True))
    found = jax.jit(jax.vmap(CASES[name].loss))(students, teachers)
    assert_close(found, np.stack([compiled(name)(*pair) for pair in pairs]), rtol=1e-6)


@names
def test_another_order_of_the_batch(name: str) -> None:
    if name == "cc":
        pytest.skip("its authors' code compares neighbours in the batch's order")
    order, (student, teacher) = np.array([2, 0, 3, 1]), floats(name)
    found = compiled(name)(student[order], teacher[order])
    assert_close(found, compiled(name)(student, teacher)[order], rtol=2e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.couples])
def test_a_value_depends_on_its_own_example_alone(name: str) -> None:
    student, teacher = floats(name)
    mixed = [array.at[1:].set(array[::-1][:3]) for array in (student, teacher)]
    np.testing.assert_array_equal(compiled(name)(*mixed)[0], compiled(name)(student, teacher)[0])


OF_POSITIONS = ("fitnet", "vid", "ab", "ofd", "simkd", "mgd", "vkd", "at", "nst", "fsp", "ft", "ickd")


@pytest.mark.parametrize("shape", [(4,), (2, 1, 2), (1, 2, 1, 2)], ids=["signals", "volumes", "of four axes"])
@pytest.mark.parametrize("name", OF_POSITIONS)
def test_maps_have_any_number_of_axes(name: str, shape: tuple[int, ...]) -> None:
    """Where the formula is a sum over positions, a signal and a volume with those of an image have its value."""
    loss = CASES[name].loss
    if name == "fsp":
        # Of a map and one beside it.
        def loss(student: Any, teacher: Any) -> Any:
            return summaries.fsp(student, 2 * student, teacher, jnp.sin(teacher))

    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(rng.normal(0, 1.5, (4, 2, 2, CHANNELS)), jnp.float32) for _ in range(2))
    as_shaped = [array.reshape(4, *shape, CHANNELS) for array in (student, teacher)]
    found, by = jax.value_and_grad(lambda *given: jnp.sum(loss(*given)), (0, 1))(*as_shaped)
    expected, exact = jax.value_and_grad(lambda *given: jnp.sum(loss(*given)), (0, 1))(student, teacher)
    assert_close(found, expected, rtol=2e-6)
    for gradient, other in zip(by, exact, strict=True):
        assert_close(gradient.reshape(other.shape), other, rtol=5e-6)


SCALE_FREE = {
    "at": (1, 1), "nst": (1, 1), "ft": (1, 1), "ickd": (1, 1), "cat_kd": (1, 1), "sp": (1, 1), "rkd_distance": (1, 1),
    "rkd_angle": (1, 1), "pkt": (1, 1), "cc_gaussian": (1, 1), "cosine": (1, 1), "vkd": (0, 1), "srd": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("factor", [3.0, 2.0**-60, 2.0**60])
def test_a_common_factor_changes_nothing(name: str, factor: float) -> None:
    """Also where squares leave float32. VkD and SRD have a constant in a variance."""
    student, teacher = floats(name)
    expected = compiled(name)(student, teacher)
    if name in ("vkd", "srd"):
        factor = 30.0
    by_student, by_teacher = ((factor if does else 1.0) for does in SCALE_FREE[name])
    found = compiled(name)(by_student * student, by_teacher * teacher)
    assert_close(found, expected, rtol=1e-3 if name in ("vkd", "srd") else 2e-6)


def rotated(array: np.ndarray, seed: int) -> np.ndarray:
    width = int(np.prod(array.shape[1:]))
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return (array.reshape(len(array), -1) @ q).reshape(array.shape)


@pytest.mark.parametrize("name", ["sp", "rkd_distance", "rkd_angle", "pkt", "cc_gaussian"])
def test_rotations_of_either_network_change_nothing(name: str) -> None:
    student, teacher = draw(name)
    with jax.enable_x64(True):
        expected = compiled(name)(jnp.asarray(student), jnp.asarray(teacher))
        found = compiled(name)(*map(jnp.asarray, (rotated(student, 1), rotated(teacher, 2))))
    assert_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_rkd_does_not_see_where_the_origin_is(name: str) -> None:
    student, teacher = draw(name)
    with jax.enable_x64(True):
        expected = compiled(name)(jnp.asarray(student), jnp.asarray(teacher))
        found = compiled(name)(jnp.asarray(student + 5), jnp.asarray(teacher - 3))
    assert_close(found, expected, rtol=1e-12)


@names
def test_other_batches_are_refused_while_tracing(name: str) -> None:
    student, teacher = draw(name)
    with pytest.raises(ValueError, match=r"of different batches: give both the same examples") as raised:
        jax.eval_shape(CASES[name].loss, student.astype(np.float32), teacher.astype(np.float32)[:3])
    assert str([4, *student.shape[1:]]) in str(raised.value) or name == "fsp"


@names
def test_whole_numbers_are_refused(name: str) -> None:
    student, teacher = (jnp.ones(array.shape, int) for array in draw(name))
    with pytest.raises(ValueError, match="features are int32, and feature losses take floats"):
        CASES[name].loss(student, teacher)


@pytest.mark.parametrize("name", ["fitnet", "mgd", "at", "nst", "ickd", "cat_kd", "wkd_f", "reviewkd"])
@pytest.mark.parametrize("space", [(), (4,), (2, 3, 2)])
def test_maps_of_any_number_of_space_axes(name: str, space: tuple[int, ...]) -> None:
    """And their oracles, which know no axes by name."""
    if name in ("wkd_f", "cat_kd") and not space:
        pytest.skip("needs positions")
    student, teacher = np.random.default_rng(1).normal(size=(2, 2, *space, 2))
    assert_is_oracle(CASES[name].loss, CASES[name].oracle, student, teacher)


def check(name: str, *, message: str, shapes: tuple[Any, Any]) -> None:
    student, teacher = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    for loss in (CASES[name].loss, jax.jit(CASES[name].loss)):
        with pytest.raises(ValueError, match=message) as raised:
            jax.eval_shape(loss, student, teacher)
        assert "student features [4, " in str(raised.value)
        assert "teacher features [4, " in str(raised.value)


@pytest.mark.parametrize(
    "name", ["fitnet", "vid", "ab", "ofd", "simkd", "mgd", "vkd", "ickd", "cat_kd", "wkd_f", "reviewkd"]
)
def test_other_channels_are_refused_while_tracing(name: str) -> None:
    check(name, message="(regressor|connector|project|align|fusion)", shapes=((4, 3, 3, 3), (4, 3, 3, 2)))


@pytest.mark.parametrize("name", ["cc", "srd", "ft", "hidden_states", "cosine"])
def test_other_lengths_are_refused_while_tracing(name: str) -> None:
    check(name, message="(embed|project|translator)", shapes=((4, 2, 3), (4, 2, 2)))


@pytest.mark.parametrize("name", ["at", "nst"])
def test_other_numbers_of_space_axes_are_refused_while_tracing(name: str) -> None:
    check(name, message="differ in their space axes", shapes=((4, 3, 3, 2), (4, 3, 2)))
