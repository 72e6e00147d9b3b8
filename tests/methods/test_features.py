import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import MethodError
from kd_jax.train.step import weighted_mean

RNG = np.random.default_rng(0)
STEP = jnp.int32(0)
METHOD = kd.FitNet("conv", "block.1")


def outputs(
    ours: tuple[int, ...] = (2, 4, 4, 3), theirs: tuple[int, ...] = (2, 4, 4, 5)
) -> tuple[kd.Output, kd.Output]:
    logits = jnp.zeros((2, 3))
    return (
        kd.Output(logits, {"conv": jnp.asarray(RNG.normal(size=ours), jnp.float32)}),
        kd.Output(logits, {"block.1": jnp.asarray(RNG.normal(size=theirs), jnp.float32)}),
    )


def fitnet(
    student: kd.Output, teacher: kd.Output, batch: kd.Batch, learned: object = None
) -> tuple[jax.Array, kd.Parts]:
    parts = METHOD.init(jax.random.key(0), student, teacher) if learned is None else kd.Parts(learned)
    return METHOD.loss(parts, student, teacher, batch, STEP)["fitnet"], parts


def test_the_paths_are_those_that_are_named() -> None:
    assert METHOD.student_features == ("conv",)
    assert METHOD.teacher_features == ("block.1",)
    assert kd.FitNet("conv").teacher_features == ("conv",)
    assert not METHOD.compares_logits


@pytest.mark.parametrize("shape", [(2, 4, 4), (2,), (2, 7)])
def test_the_loss_is_the_mean_squared_error_after_the_projector(shape: tuple[int, ...]) -> None:
    student, teacher = outputs((*shape, 3), (*shape, 5))
    found, parts = fitnet(student, teacher, kd.Batch(None))
    kernel, bias = np.float64(parts.learned["kernel"]), np.float64(parts.learned["bias"])
    assert kernel.shape == (3, 5)
    assert np.abs(kernel).max() <= 1 / np.sqrt(3)
    error = np.float64(student.features["conv"]) @ kernel + bias - np.float64(teacher.features["block.1"])
    np.testing.assert_allclose(found, (error**2).reshape(2, -1).mean(-1), rtol=1e-5)


def test_the_projector_is_made_from_shapes_alone() -> None:
    shapes = jax.eval_shape(lambda: outputs())
    parts = METHOD.init(jax.random.key(0), *shapes)
    assert jax.tree.map(jnp.shape, parts.learned) == {"kernel": (3, 5), "bias": (5,)}


def test_maps_of_another_size_are_resized() -> None:
    student, teacher = outputs((2, 8, 2, 3), (2, 4, 4, 5))
    assert fitnet(student, teacher, kd.Batch(None))[0].shape == (2,)
    constant = {"conv": jnp.ones((2, 8, 2, 3))}, {"block.1": jnp.full((2, 4, 4, 5), 3.0)}
    learned = {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}
    found, _ = fitnet(
        kd.Output(student.logits, constant[0]), kd.Output(student.logits, constant[1]), kd.Batch(None), learned
    )
    np.testing.assert_allclose(found, 0, atol=1e-10)


def test_another_rank_is_refused() -> None:
    with pytest.raises(MethodError, match=r"shape \(2, 3\) and the teacher's \(2, 4, 4, 5\): choose two"):
        fitnet(*outputs((2, 3)), kd.Batch(None))


def test_positions_without_a_weight_have_no_gradient_whatever_stands_there() -> None:
    """As of the sequence without them, NaN or not."""
    student, teacher = outputs((2, 3, 3), (2, 3, 5))
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    learned = METHOD.init(jax.random.key(0), student, teacher).learned

    def loss(given: tuple[object, jax.Array], batch: kd.Batch) -> jax.Array:
        own = kd.Output(student.logits, {"conv": given[1]})
        values = fitnet(own, teacher, batch, given[0])[0]
        return jnp.sum(jnp.where(weights == 0, 0, values)) if values.ndim == 2 else jnp.sum(values)

    maps = student.features["conv"]
    broken = jnp.where(weights[..., None] == 0, jnp.nan, maps)
    batch = kd.Batch(None, None, weights)
    whole, nan = (jax.grad(loss)((learned, given), batch) for given in (maps, broken))
    jax.tree.map(np.testing.assert_array_equal, whole, nan)
    assert (np.asarray(whole[1])[np.asarray(weights) == 0] == 0).all()
    assert (np.asarray(whole[1])[np.asarray(weights) == 1] != 0).any()


def test_a_method_without_its_teacher_says_so() -> None:
    student, _ = outputs()
    with pytest.raises(MethodError, match="FitNet needs a teacher"):
        METHOD.init(jax.random.key(0), student, None)


PADDED = {"at": lambda: kd.AT("here"), "vid": lambda: kd.VID("here"), "vkd": lambda: kd.VkD("here")}


@pytest.mark.parametrize("name", PADDED)
def test_padding_does_not_count(name: str) -> None:
    """The mean is that of the same sequences without it, whatever stands there."""
    rng, method = np.random.default_rng(2), PADDED[name]()
    ours, theirs = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    weights = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    found = []
    for padding in (0, 4):
        room = ((0, 0), (0, padding))
        student, teacher = (
            kd.Output(jnp.zeros((2, 3)), {"here": jnp.asarray(np.pad(one, (*room, (0, 0)), constant_values=9.0))})
            for one in (ours, theirs)
        )
        batch = kd.Batch(None, weights=jnp.asarray(np.pad(weights, room)))
        parts = method.init(jax.random.key(0), student, teacher)
        values = method.loss(parts, student, teacher, batch, STEP)[name]
        found.append(weighted_mean(values, batch.weights))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    # Of one example without padding it is the loss without weights.
    whole = [jax.tree.map(lambda leaf: leaf[:1, :3], one) for one in (student, teacher)]
    alone = method.loss(parts, *whole, kd.Batch(None), STEP)[name]
    one = method.loss(parts, *whole, kd.Batch(None, weights=jnp.ones((1, 3))), STEP)[name]
    np.testing.assert_allclose(weighted_mean(one, jnp.ones((1, 3))), weighted_mean(alone, None), rtol=1e-5)


@pytest.mark.parametrize("method", [kd.AT("here"), kd.FitNet("here"), kd.ICKD("here"), kd.OFD("here"), kd.MGD("here")])
def test_padding_that_would_count_is_refused(method: kd.Method) -> None:
    """Of sequences of other lengths than the weights have, or of methods that see all positions at once."""
    length = 6 if isinstance(method, kd.AT | kd.FitNet) else 4
    one = kd.Output(jnp.zeros((2, 3)), {"here": jnp.ones((2, length, 5))})
    parts = method.init(jax.random.key(0), one, one)
    with pytest.raises(MethodError, match=r"weights of the shape \[2, 4\], and \w+ would count the padding"):
        method.loss(parts, one, one, kd.Batch(None, weights=jnp.ones((2, 4))), STEP)
    method.loss(parts, one, one, kd.Batch(None, weights=jnp.ones(2)), STEP)
