"""Names of the arrays in a tree, as files keep them."""

from typing import Any


def path_name(path: tuple[Any, ...]) -> str:
    """`hidden.0.kernel` for the path of a leaf, as `jax.tree.leaves_with_path` gives it."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
