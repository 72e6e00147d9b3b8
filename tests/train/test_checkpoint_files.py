from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import DataError, MismatchError
from kd_jax.train.checkpoint_files import named_arrays, restore_tree
from kd_jax.train.step import TrainState


def test_trees_are_named_and_restored() -> None:
    tree = TrainState({"hidden": {0: jnp.ones(2)}}, (), {}, (jnp.zeros(3),), jnp.int32(4))
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_arrays(tree).items()}
    assert list(arrays) == ["variables.hidden.0", "optimizer_state.0", "step"]
    restored = restore_tree(arrays, tree)
    assert isinstance(restored, TrainState)
    assert int(restored.step) == 4
    with pytest.raises(MismatchError, match=r"optimizer_state\.0"):
        restore_tree(arrays | {"optimizer_state.0": np.zeros(4, np.float32)}, tree)
    with pytest.raises(MismatchError, match="the checkpoint has nothing for step"):
        restore_tree({name: array for name, array in arrays.items() if name != "step"}, tree)


def test_keys_are_kept_as_their_numbers() -> None:
    tree = {"key": jax.random.key(3, impl="rbg"), "more": jnp.ones(2)}
    arrays = {name: np.asarray(leaf) for name, leaf in named_arrays(tree).items()}
    restored = restore_tree(arrays, jax.tree.map(lambda leaf: leaf, tree))
    assert restored["key"].dtype == tree["key"].dtype
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(tree["key"]))
    with pytest.raises(MismatchError, match="for key"):
        restore_tree(arrays | {"key": np.zeros(3, np.uint32)}, tree)


def test_what_holds_nothing_needs_no_file() -> None:
    tree = {"empty": jnp.zeros((0, 3)), "more": jnp.ones(2)}
    arrays = {name: np.asarray(leaf) for name, leaf in named_arrays(tree).items()}
    assert list(arrays) == ["more"]
    assert restore_tree(arrays, tree)["empty"].shape == (0, 3)


def test_two_arrays_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match=r"two arrays of the training have the name a\.w: rename one of them"):
        named_arrays({"a": {"w": 1}, "a.w": 2})
