from typing import NamedTuple

import jax

from kd_jax.files.names import path_name


class Pair(NamedTuple):
    first: object
    second: object


def test_a_leaf_has_the_keys_places_and_fields_on_its_way() -> None:
    tree = Pair({"hidden": {0: {"kernel": 1}}}, [2, (3,)])
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    assert names == ["first.hidden.0.kernel", "second.0", "second.1.0"]
