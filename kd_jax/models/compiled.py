"""Compiled functions of models and teachers, kept as long as these are, or as long as there are few."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any

_MOST = 64


class Owner:
    """What compiled programs depend on beside their arguments, and what they are forgotten with.

    It is compared as the object that it is. token: what stands for it in the structures of PyTrees, which JAX keeps.
    programs: of `call`.
    """

    def __init__(self, make: Callable[[Any], Any] = lambda own: own) -> None:
        """make: what is made of it where a PyTree is put together again."""
        self.token = Token(self, make)
        self.programs: dict[Any, Callable[..., Any]] = {}

    @property
    def owner(self) -> "Owner":
        """Itself."""
        return self


class Token:
    """Stands for an `Owner` without keeping it alive."""

    def __init__(self, owner: Owner, make: Callable[[Any], Any]) -> None:
        self.owner, self._make = weakref.ref(owner), make

    def find(self) -> Any:
        """What is made of it, while it is there."""
        return self._make(self.owner())


class Own(Owner):
    """A function that equals itself alone, whatever it says: what it holds has no hash, or may change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        functools.update_wrapper(self, function, updated=())
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.function = function

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As the function."""
        return self.function(*given, **named)

    def __getattr__(self, name: str) -> Any:
        """What the function has beside."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.function, name)


def hashable(function: Any) -> Any:
    """A function, or `Own` of one that has no hash."""
    return function if has_hash(function) else Own(function)


def call(function: Callable[..., Any], *arguments: PyTree, **static: Any) -> Any:
    """`function(*arguments, **static)`, compiled once for equal `static`, or the same where it has no hash.

    What has an `owner` is forgotten with it; of the other programs the last few are kept.
    """
    leaves, structure = jax.tree.flatten(arguments)
    key = function, structure, tuple((name, _known(value)) for name, value in static.items())
    owners = [getattr(value, "owner", None) for value in (*arguments, *static.values())]
    owner = next((one for one in owners if isinstance(one, Owner)), None)
    if owner is None:
        return _kept(*key)(leaves)
    if key not in owner.programs:
        owner.programs[key] = _program(*key)
    return owner.programs[key](leaves)


def _program(function: Callable[..., Any], structure: Any, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def flat(leaves: Any) -> Any:
        known = {name: one.value if isinstance(one, _Same) else one for name, one in static}
        found = {name: one.find() if isinstance(one, Token) else one for name, one in known.items()}
        return function(*jax.tree.unflatten(structure, leaves), **found)

    return jax.jit(flat)


_kept = functools.lru_cache(maxsize=_MOST)(_program)


class _Same:
    """A value that is compared as the object that it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _known(value: Any) -> Any:
    owner = getattr(value, "owner", None)
    if isinstance(owner, Owner):
        return owner.token
    return value if has_hash(value) else _Same(value)


def has_hash(value: Any) -> bool:
    """Whether it can be a key: what holds an array, a list or a dict cannot."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
