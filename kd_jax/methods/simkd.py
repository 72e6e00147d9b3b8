"""SimKD: a student that ends in the teacher's own classifier, which it keeps after the training."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kd_jax import losses
from kd_jax.data.batch import Batch, check_whole
from kd_jax.errors import ConfigError
from kd_jax.files import as_numpy, floats
from kd_jax.methods import blocks
from kd_jax.methods.base import Values
from kd_jax.methods.relations import FeatureMethod
from kd_jax.models import Model, Network, Output, as_model
from kd_jax.models.doors import as_shapes
from kd_jax.models.heads import HIDDEN, no_head
from kd_jax.models.network import Params, PyTree, State, Variables
from kd_jax.models.trying import told

PROJECTED = "projected"
"""The path of the projected feature of such a student."""

# Of the running moments, in a step; as in PyTorch.
_SHARE = 0.1


@dataclass(frozen=True)
class SimKD(FeatureMethod):
    """SimKD: Chen et al. (2022), https://arxiv.org/abs/2203.14001. Mean squared error of features, no labels.

    The student is one of `with_classifier`, which ends in the teacher's classifier. teacher_feature: path of what the
    teacher's classifier is given, before it is pooled. It has more parameters than the student alone: a projector and
    that classifier. The paper's table counts KD at another weight than others do (74.42, not 73.33, for one pair).
    """

    feature: str = PROJECTED
    teacher_feature: str | None = None

    def compare(self, student: Any, teacher: Any, batch: Batch) -> Values:
        """`kd.losses.simkd`."""
        return losses.simkd(student, teacher)


def with_classifier(
    student: Any, teacher: Any, inputs: PyTree, *, feature: str, teacher_feature: str, kernel: Any, bias: Any = None,
    factor: int = 2,
) -> Model:  # fmt: skip
    """A student for `SimKD`: its feature, a learned projector, the mean over the space, and the teacher's classifier.

    student, teacher: models or modules. inputs: a batch as both are called with, or its shapes. feature,
    teacher_feature: paths of `[batch, *space, channels]`, or `[batch, channels]`; the student's is average-pooled where
    it is the larger. kernel, bias: the teacher's last linear layer, `[channels, classes]` and `[classes]`; they are
    kept with the model and not trained. factor: the projector (1 × 1, 3 × 3, 1 × 1 convolutions, each with batch
    normalisation and ReLU) has the teacher's channels divided by it inside.

    Its `Output` has the projected feature at "projected": `kd.SimKD(teacher_feature=…)` compares it. Raises
    `ConfigError` and `DataError`.
    """
    model, taught = as_model(student), as_model(teacher)
    inputs, factor = as_shapes(inputs), check_whole(factor, "factor")
    ours, theirs = (
        _feature(one, inputs, path, who) for one, path, who in
        ((model, feature, "the student"), (taught, teacher_feature, "the teacher"))
    )  # fmt: skip
    known = _numbers(kernel, "kernel")
    offset = np.zeros(known.shape[-1:], np.float32) if bias is None else _numbers(bias, "bias")
    if known.ndim != 2 or known.shape[0] != theirs.shape[-1] or offset.shape != known.shape[1:]:
        raise ConfigError(
            f"the classifier has a kernel of the shape {known.shape} and a bias of {offset.shape}, and the teacher's "
            f"{teacher_feature} has {theirs.shape[-1]} channels: give [{theirs.shape[-1]}, classes] and [classes]"
        )
    if ours.ndim != theirs.ndim:
        raise ConfigError(
            f"{feature} has the shape {ours.shape} and the teacher's {teacher_feature} {theirs.shape}: choose two with "
            "the same number of axes"
        )
    space = tuple(min(s, t) for s, t in zip(ours.shape[1:-1], theirs.shape[1:-1], strict=True))
    inner = max(1, theirs.shape[-1] // factor)
    widths = (ours.shape[-1], inner, inner, theirs.shape[-1])
    network = _Reused(model.network, feature, space, widths, _Array(known), _Array(offset))
    if model.variables is None:
        return Model(network)
    return Model(network, network.around(model.variables, jax.random.key(0)))


class _Array:
    """An array that is compared by its value."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.known = (values.shape, values.tobytes())

    def __hash__(self) -> int:
        return hash(self.known)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self.known == other.known


@dataclass(frozen=True)
class _Reused(Network):
    """The student's network, a projector, and a classifier that is state."""

    student: Network
    feature: str
    space: tuple[int, ...]
    widths: tuple[int, ...]
    kernel: _Array
    bias: _Array

    def init(self, key: Any) -> Variables:
        """A new student and a new projector."""
        first, second = jax.random.split(key)
        return self.around(self.student.init(first), second)

    def around(self, variables: Variables, key: Any) -> Variables:
        """A student's variables, and a new projector."""
        params, state = self.student.split(variables)
        moments = [(jnp.zeros(width, jnp.float32), jnp.ones(width, jnp.float32)) for width in self.widths[1:]]
        projector = blocks.network(key, self.widths, (1, 3, 1), space=len(self.space))
        classifier = {"kernel": jnp.asarray(self.kernel.values), "bias": jnp.asarray(self.bias.values)}
        return {
            "params": {"student": params, "projector": projector},
            "state": {"student": state, "moments": moments, "classifier": classifier},
        }

    def apply(
        self, variables: Variables, inputs: PyTree, *, train: bool = False, key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:  # fmt: skip
        """The classifier's logits, the student's features, and the projected one."""
        if HIDDEN in features:
            # That of the student itself makes other logits.
            raise no_head()
        params, state = variables["params"], variables["state"]
        asked = tuple(dict.fromkeys((self.feature, *(path for path in features if path != PROJECTED))))
        output, inner = self.student.apply(
            self.student.merge(params["student"], state["student"]), inputs, train=train, key=key, features=asked
        )
        maps, moments = output.features[self.feature].astype(jnp.float32), []
        if maps.shape[1:-1] != self.space:
            maps = losses.average_pool(maps, self.space)
        for one, known in zip(params["projector"], state["moments"], strict=True):
            maps = blocks.convolve(one["convolution"], maps)
            now = blocks.moments(maps) if train else known
            maps = jax.nn.relu(blocks.normalise_by(one["norm"], maps, *now))
            moments.append(
                tuple(
                    jax.lax.stop_gradient((1 - _SHARE) * k + _SHARE * n.astype(k.dtype))
                    for k, n in zip(known, now, strict=True)
                )
            )
        last = state["classifier"]
        pooled = jnp.mean(maps, axis=tuple(range(1, maps.ndim - 1)))
        logits = blocks.project(jax.lax.stop_gradient(last), pooled)
        after = {"student": inner, "moments": moments, "classifier": last} if train else state
        return Output(logits, {**output.features, PROJECTED: maps}), after

    def split(self, variables: Variables) -> tuple[Params, State]:
        """The parameters of student and projector; the rest."""
        return variables["params"], variables["state"]

    def merge(self, params: Params, state: State) -> Variables:
        """Both."""
        return {"params": params, "state": state}


def _feature(model: Model, inputs: PyTree, path: str, who: str) -> Any:
    """The shape of a feature. Raises `ConfigError`."""
    network = model.network
    variables = jax.eval_shape(network.init, jax.random.key(0)) if model.variables is None else model.variables
    with told(who, inputs):
        output, _ = jax.eval_shape(
            lambda values, given: network.apply(values, given, key=jax.random.key(0), features=(path,)),
            variables, inputs,
        )  # fmt: skip
    if path not in output.features:
        raise ConfigError(f"{who} has no feature {path!r}: kd.feature_names lists those that it has")
    return output.features[path]


def _numbers(values: Any, what: str) -> Float[np.ndarray, "..."]:
    """An array of the classifier in float32. Raises `DataError`."""
    array = as_numpy(values, f"the {what} of the classifier")
    whole = array.dtype.kind in "iu"
    return floats(array.astype(np.float32) if whole else array, f"the {what} of the classifier").astype(np.float32)
