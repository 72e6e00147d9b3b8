"""Models of other libraries, called back from compiled programs: they can teach, and cannot learn."""

import abc
import threading
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kd_jax.errors import ConfigError
from kd_jax.models.calling import as_output, unknown_feature
from kd_jax.models.network import Network, Output, Params, PyTree, State, Variables


class Host(abc.ABC):
    """What is called back, compared and hashed as the object that it is, by one thread at a time.

    name: what a person calls it. kind: what it is, such as "a PyTorch module".
    """

    name: str
    kind: str

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shapes: dict[Any, tuple[int, ...]] = {}

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
    """A `Network` that calls a `Host`. It has no variables, and can only teach."""

    host: Host

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
        host = self.host
        if train:
            raise ConfigError(f"{host.name} is {host.kind} and cannot be trained here: give it as the teacher")
        for path in features:
            raise unknown_feature(path, ())
        shape = host.shape(inputs)

        @jax.custom_jvp
        def asked(inputs: PyTree) -> jax.Array:
            return jax.pure_callback(
                host.logits, jax.ShapeDtypeStruct(shape, np.float32), inputs, vmap_method="sequential"
            )

        @asked.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            raise ConfigError(
                f"{host.name} is {host.kind} and has no gradient here: stop it with jax.lax.stop_gradient"
            )

        return as_output(asked(inputs), host.name), {}

    def split(self, variables: Variables) -> tuple[Params, State]:
        """Nothing twice."""
        return {}, {}

    def merge(self, params: Params, state: State) -> Variables:
        """Nothing."""
        return {}
