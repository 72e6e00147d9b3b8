"""Models of other libraries, called back from compiled programs: they can teach, and cannot learn."""

import abc
import os
import threading
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float

from kd_jax.errors import ConfigError
from kd_jax.models.calling import as_output, unknown_feature
from kd_jax.models.compiled import Owner
from kd_jax.models.network import Network, Output, Params, PyTree, State, Variables

# Bytes of an array that JAX may copy on a thread of its own.
_COPIED_ELSEWHERE = 100 << 10


class Host(Owner, abc.ABC):
    """What is called back, compared and hashed as the object that it is, by one thread at a time.

    name: what a person calls it. kind: what it is, such as "a PyTorch module".
    """

    name: str
    kind: str

    def __init__(self) -> None:
        super().__init__(lambda host: HostNetwork(host, weak=True))
        self._lock = threading.Lock()
        self._shapes: dict[Any, tuple[int, ...]] = {}

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 of what makes it this model and no other: its values, and what is computed with them."""

    @abc.abstractmethod
    def asked(self, inputs: PyTree) -> Float[np.ndarray, "..."]:
        """Logits in float32 of inputs on the host. Raises `ConfigError`."""

    def logits(self, inputs: PyTree) -> Float[np.ndarray, "..."]:
        """What it says."""
        with self._lock:
            return self.asked(inputs)

    def shape(self, inputs: PyTree) -> tuple[int, ...]:
        """The shape of the logits, found once for inputs of each shape by asking for those of zeros."""
        leaves, structure = jax.tree.flatten(inputs)
        what = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if what not in self._shapes:
            zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
            self._shapes[what] = self.logits(jax.tree.unflatten(structure, zeros)).shape
        return self._shapes[what]


@dataclass(frozen=True)
class HostNetwork(Network):
    """A `Network` that calls a `Host`. It has no variables, and can only teach.

    weak: whether programs do not keep the host alive.
    """

    host: Host
    weak: bool = field(default=False, compare=False)

    @property
    def owner(self) -> Owner:
        """The host."""
        return self.host

    def init(self, key: Any) -> Variables:
        """None: the values are the host's."""
        return {}

    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """As of every `Network`. Raises `ConfigError` where it shall be trained, differentiated, or name features."""
        host, name, kind = self.host, self.host.name, self.host.kind
        if train:
            raise ConfigError(f"{host.name} is {host.kind} and cannot be trained here: give it as the teacher")
        for path in features:
            raise unknown_feature(path, ())
        _check_threads(host, inputs)
        shape, find = host.shape(inputs), host.token.owner

        def weakly(inputs: PyTree) -> Any:
            known: Any = find()
            return known.logits(inputs)

        answer = weakly if self.weak else host.logits

        @jax.custom_jvp
        def asked(inputs: PyTree) -> jax.Array:
            return jax.pure_callback(answer, jax.ShapeDtypeStruct(shape, np.float32), inputs, vmap_method="sequential")

        @asked.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            raise ConfigError(f"{name} is {kind} and has no gradient here: stop it with jax.lax.stop_gradient")

        return as_output(_everywhere(asked(_everywhere(inputs))), host.name), {}

    def split(self, variables: Variables) -> tuple[Params, State]:
        """Nothing twice."""
        return {}, {}

    def merge(self, params: Params, state: State) -> Variables:
        """Nothing."""
        return {}


def _check_threads(host: Host, inputs: PyTree) -> None:
    """Raises `ConfigError` where JAX has one thread: called back on it, the host would wait for a copy by it, forever.

    https://github.com/jax-ml/jax/issues/24255
    """
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs)), default=0)
    if largest > _COPIED_ELSEWHERE and jax.default_backend() == "cpu" and _threads() < 2:
        raise ConfigError(
            f"{host.name} would be called back on the only thread that JAX has on one processor, and wait there for "
            f"its inputs of {largest:,} bytes, forever: set NPROC=2 in the environment before Python starts"
        )


def _threads() -> int:
    """Of JAX's pool on a CPU."""
    known = os.environ.get("NPROC", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(known) if known.isdigit() else allowed, jax.local_device_count("cpu"))


def _everywhere(tree: PyTree) -> PyTree:
    """On all devices of a mesh that XLA partitions: what is called back has its answer on the first alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
