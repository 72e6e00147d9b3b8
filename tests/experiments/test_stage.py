import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kd_jax.experiments import images as of_images
from kd_jax.experiments import stage
from kd_jax.experiments.images import Settings, Setup
from kd_jax.experiments.stage import plan_chunks
from kd_jax.methods import CrossEntropy
from kd_jax.models import Model, from_nnx, mlp


@pytest.mark.parametrize(("steps", "every"), [(1875, None), (1875, 100), (30, 7), (30, 1), (5, 1000), (1, 1), (97, 50)])
def test_a_plan_is_every_step_once_and_checkpoints_come_as_asked(steps: int, every: int | None) -> None:
    chunks = plan_chunks(steps, 3, every)
    done = 0
    saved = []
    for chunk in chunks:
        assert chunk.epoch * steps + chunk.start == done
        done += chunk.length
        if chunk.place:
            saved.append(done)
    assert done == 3 * steps
    of_epoch = [*range(every or steps, steps, every or steps), steps]
    assert saved == [epoch * steps + step for epoch in range(3) for step in of_epoch]
    assert len({chunk.length for chunk in chunks}) <= 4


class Convolution(nnx.Module):
    """Small, with a kernel of four axes."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Conv(1, 3, (2, 2), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        return self.layer(images).mean((1, 2))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have no trainings in turn")
@pytest.mark.parametrize(
    ("model", "in_turn"),
    [(mlp([784, 20, 20, 10]), False), (mlp([784, 1200, 1200, 10]), True), (from_nnx(Convolution), True)],
    ids=["small", "large", "convolution"],
)
def test_small_networks_train_side_by_side_and_large_ones_and_convolutions_in_turn(model: Model, in_turn: bool) -> None:
    setup = Setup(model.network)
    one = jax.eval_shape(
        lambda key: of_images.init(key, Settings(jnp.float32(0.1), CrossEntropy()), setup=setup), jax.random.key(0)
    )
    states = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, 2, *leaf.shape), leaf.dtype), one)
    assert stage._large(setup, states, 6) == in_turn
