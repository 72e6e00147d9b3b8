"""Metrics of a step that leave a program as few arrays are those of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.train.done import Done, packed


@pytest.mark.parametrize("wide", [False, True])
def test_numbers_come_back_by_their_names_and_types(wide: bool) -> None:
    with jax.enable_x64(wide):
        metrics = {
            "loss": jnp.asarray(0.1, float), "accuracy": jnp.asarray(0.25, jnp.float32),
            "soft": jnp.asarray(3.0, float), "count": jnp.asarray(7, jnp.int32),
        }  # fmt: skip
        given = jax.tree.map(lambda value: value[None], jax.jit(packed)(metrics))
        assert len(given.values) == (3 if wide else 2)
        found = Done(None, 1, given, None, 4).on_host()
    assert list(found) == sorted(metrics)  # whatever their types, as in memory
    for name, value in metrics.items():
        assert found[name].shape == (1,)
        assert found[name].dtype == value.dtype
        assert float(found[name][0]) == float(value)


def test_what_comes_to_the_host_keeps_nothing_of_the_device() -> None:
    losses = jnp.arange(3.0)
    for found in (
        Done(None, 3, {"loss": losses}, True, 4).on_host()["loss"],
        Done(None, 1, jax.tree.map(lambda value: value[None], packed({"loss": losses[1]})), None, 4).on_host()["loss"],
    ):
        base = found if found.base is None else found.base
        assert isinstance(base, np.ndarray)
        assert base.flags.owndata
