"""Deep mutual learning: several students in one training, each of which teaches the others."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError, MethodError
from kd_jax.methods.base import Method, Parts, Terms, Values, static, weighted
from kd_jax.methods.bounds import Temperature, Weight
from kd_jax.methods.logits import is_left_out, is_zero, require_labels
from kd_jax.models import Model, Network, Output, as_model
from kd_jax.models.doors import as_list
from kd_jax.models.network import Params, PyTree, State, Variables


@dataclass(frozen=True)
class DML(Method):
    """Deep mutual learning: Zhang et al. (2018), https://arxiv.org/abs/1706.00384. The student is a `cohort`.

    Each member minimises its cross entropy and the mean of T² KL(other ‖ member) over the others, who have no gradient
    from it. The terms are sums over the members, so that each trains as it would alone. members: how many the cohort
    has. hard: the weight of the cross entropy. All learn in the same step; in the paper in turn. A common public copy
    has the squared difference of logits in place of the KL.
    """

    members: int = static(2)
    temperature: Temperature = 1.0
    hard: Weight = 1.0
    needs_teacher: ClassVar[bool] = False
    compares_logits: ClassVar[bool] = False
    of_classes: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Unless `hard` is 0."""
        return not is_zero(self.hard)

    @property
    def student_features(self) -> tuple[str, ...]:
        """The logits of each member."""
        return tuple(f"members.{number}" for number in range(self.members))

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """Two terms, `hard` with its weight, and `mutual`."""
        if self.members < 2:
            raise MethodError(f"DML has {self.members} member, who has nobody to learn from: give at least 2")
        count = sum(path.startswith("members.") and path.count(".") == 1 for path in student.features)
        if count != self.members:
            raise MethodError(f"DML has {self.members} members and the cohort {count}: give members={count}")
        each = [student.features[path] for path in self.student_features]
        mutual = [
            losses.kd(own, jax.lax.stop_gradient(other), temperature=self.temperature)
            for own in each for other in each if other is not own
        ]  # fmt: skip
        terms = {"mutual": _total(mutual) / (self.members - 1)}
        if is_left_out(self.hard, batch):
            return terms
        hard = _total([losses.cross_entropy(own, require_labels(self, batch)) for own in each])
        return {"hard": weighted(self.hard, hard), **terms}


def cohort(models: Any) -> Model:
    """Several models as one student: its logits are the logarithm of the mean of their probabilities.

    Member i's logits are the feature `members.i`, its own feature at a path `members.i.path`. After a training
    `kd.members(result.model)` has them one by one. models: a list, of any architectures with the same classes; those
    without variables start from the training's key, each from others. Raises `ConfigError`.
    """
    known = [as_model(model) for model in as_list(models, "the members of a cohort")]
    if len(known) < 2:
        raise ConfigError(f"a cohort of {len(known)} has nobody to learn from: give at least 2 models")
    network = _Cohort(tuple(model.network for model in known))
    have = [model.variables is not None for model in known]
    if any(have) and not all(have):
        raise ConfigError("some models of the cohort have variables and others none: give all of them, or none")
    return Model(network, {str(n): model.variables for n, model in enumerate(known)} if all(have) else None)


def members(model: Model) -> list[Model]:
    """The models of a `cohort`, with their variables. Raises `ConfigError` for another model."""
    model = as_model(model)
    if not isinstance(model.network, _Cohort):
        raise ConfigError(f"{model!r} is no cohort: give the model of one, result.model")
    values: Any = model.variables or {}
    return [Model(network, values.get(str(n))) for n, network in enumerate(model.network.networks)]


def _total(values: list[Values]) -> Values:
    return sum(values[1:], values[0])


@dataclass(frozen=True)
class _Cohort(Network):
    """Networks side by side; variables by number."""

    networks: tuple[Network, ...]

    def init(self, key: Any) -> Variables:
        """Each from a key of its own."""
        return {str(n): network.init(jax.random.fold_in(key, n)) for n, network in enumerate(self.networks)}

    def apply(
        self, variables: Variables, inputs: PyTree, *, train: bool = False, key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:  # fmt: skip
        """The mean of the members' probabilities, and what each said."""
        found: dict[str, Any] = {}
        logs, after = [], {}
        for n, network in enumerate(self.networks):
            start = f"members.{n}."
            paths = tuple(path.removeprefix(start) for path in features if path.startswith(start))
            own = None if key is None else jax.random.fold_in(key, n)
            output, after[str(n)] = network.apply(variables[str(n)], inputs, train=train, key=own, features=paths)
            found |= {start + path: value for path, value in output.features.items()} | {start[:-1]: output.logits}
            logs.append(jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1))
        shapes = list(dict.fromkeys(one.shape for one in logs))
        if len(shapes) > 1:
            raise ConfigError(
                f"members of the cohort give logits of {list(shapes[0])} and of {list(shapes[1])}: give models with "
                "the same classes"
            )
        mean: Array = jax.nn.logsumexp(jnp.stack(logs), axis=0) - jnp.log(jnp.float32(len(logs)))
        return Output(mean, found), after

    def split(self, variables: Variables) -> tuple[Params, State]:
        """The parameters of all, and the state of all."""
        pairs = {name: self.networks[int(name)].split(own) for name, own in variables.items()}
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

    def merge(self, params: Params, state: State) -> Variables:
        """Both."""
        return {name: self.networks[int(name)].merge(own, state[name]) for name, own in params.items()}
