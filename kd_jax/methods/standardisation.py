"""Logit standardisation around a method."""

from dataclasses import dataclass

from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch
from kd_jax.methods.base import Method, Parts, PyTree, Terms, Wrapped, as_method, terms_of
from kd_jax.methods.logits import require_teacher
from kd_jax.methods.sparse import Sparse, needs_all
from kd_jax.models import Output


@dataclass(frozen=True)
class Standardised(Wrapped):
    """Logit standardisation: Sun et al. (2024), https://arxiv.org/abs/2403.01427. `standardised` makes it."""

    method: Method

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The method's terms, `hard` ones of the logits as they are."""
        taught = require_teacher(self, teacher)
        plain, _ = terms_of(self.method, parts, student, taught, batch, step)
        ours, theirs = (one._replace(logits=losses.standardise(one.logits)) for one in (student, taught))
        terms, carried = terms_of(self.method, parts, ours, theirs, batch, step)
        return {name: plain[name] if name.partition("_")[0] == "hard" else terms[name] for name in terms}, carried

    def check_sparse(self, sparse: Sparse) -> None:
        """Raises `MethodError`: the mean and the deviation are those of all logits."""
        raise needs_all(self, sparse)


def standardised(method: Method) -> Standardised:
    """The method, with the logits z in its soft loss replaced by (z − mean) / (1e-7 + sd) of each position, in both.

    Sun et al. (2024), https://arxiv.org/abs/2403.01427: `kd.CrossEntropy() + kd.standardised(9 * kd.KD(alpha=0,
    temperature=2))` has their usual numbers, 9 and 2 (and 0.1 for the cross entropy). The sd is the unbiased one. Terms
    named `hard` see the logits as they are. The weight 9 also makes the effective step larger: a fair comparison
    chooses the weight of the method without standardisation, too.
    """
    return Standardised(as_method(method))
