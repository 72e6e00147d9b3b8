"""A token transformer with padding teaches a smaller one: `python examples/tokens_with_padding.py`.

The task: label each token with how often it came before in its sequence, at most 3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tabulate import tabulate

import kd_jax as kd

TOKENS, LONGEST, LABELS = 8, 12, 4


class Tagger(nnx.Module):
    """One block of attention over what came before."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(TOKENS, width, rngs=rngs)
        self.positions = nnx.Embed(LONGEST, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(width, 2 * width, rngs=rngs)
        self.output = nnx.Linear(2 * width, LABELS, rngs=rngs)

    def __call__(self, tokens: jax.Array, present: jax.Array) -> jax.Array:
        """Logits `[batch, positions, labels]`. present: False for padding."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        before = jnp.tril(jnp.ones((LONGEST, LONGEST), bool))[None, None]
        x = x + self.attention(x, mask=before & present[:, None, None, :])
        return self.output(nnx.relu(self.hidden(x)))


def sequences(count: int, seed: int) -> kd.Batch:
    """Sequences of 4 to 12 tokens. The padding has the weight 0, so its labels may be anything."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TOKENS, (count, LONGEST)).astype(np.int32)
    present = np.arange(LONGEST) < rng.integers(4, LONGEST + 1, (count, 1))
    same = (tokens[:, :, None] == tokens[:, None, :]) & np.tri(LONGEST, k=-1, dtype=bool)
    labels = np.where(present, np.minimum(same.sum(-1), LABELS - 1), -100).astype(np.int32)
    return kd.Batch((tokens, present), labels, present.astype(np.float32))


def main(count: int = 4000) -> None:
    """Trains on `count` sequences, and prints a table of 1000 others."""
    train, test = sequences(count, 0), sequences(1000, 1)
    how = dict(optimizer=optax.adamw(3e-3), epochs=8, batch_size=64)
    teacher = kd.distill(Tagger(64, nnx.Rngs(0)), None, train, **how).student
    alone = kd.distill(Tagger(8, nnx.Rngs(1)), None, train, **how).student
    distilled = kd.distill(
        Tagger(8, nnx.Rngs(1)), teacher, train, method=kd.KD(alpha=0.5, temperature=2.0), **how
    ).student

    models = {"teacher": teacher, "student alone": alone, "student distilled": distilled}
    found = {name: kd.evaluate(model, test, teacher=teacher) for name, model in models.items()}
    columns = ("accuracy", "nll", "agreement")
    print(
        tabulate([[name, *(of[one] for one in columns)] for name, of in found.items()], ["", *columns], floatfmt=".4f")
    )


if __name__ == "__main__":
    main()
