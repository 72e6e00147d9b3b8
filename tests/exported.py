"""Models of every kind, with inputs, which the tests of files for other runtimes share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import CNN, IMAGES, Residual

import kd_jax as kd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5)).astype(np.float32)
PIXELS = IMAGES.astype(np.float32)
TOKENS = RNG.integers(0, 9, (4, 6)).astype(np.int32)
PRESENT = np.arange(6) < np.array([[6], [3], [4], [1]])


class Tagger(nnx.Module):
    """Attention over what came before, beside padding."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(9, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.output = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens: jax.Array, present: jax.Array) -> jax.Array:
        x = self.tokens(tokens)
        mask = jnp.tril(jnp.ones((6, 6), bool))[None, None] & present[:, None, None, :]
        return self.output(nnx.gelu(x + self.attention(self.norm(x), mask=mask)))


def network(name):
    return kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=4, rngs=rngs)).init(0)


MODELS = {
    "mlp": (kd.mlp([5, 4, 3], dropout=0.5).init(0), X),
    "nnx": (kd.from_nnx(CNN(rngs=nnx.Rngs(0))), PIXELS),
    "linen": (kd.from_linen(Residual(), PIXELS).init(0), PIXELS),
    "function": (kd.from_function(lambda params, x: jax.nn.log_softmax(x @ params), jnp.ones((5, 2))), X),
    "len": (kd.from_function(lambda params, x: x.reshape(len(x), -1) @ params, jnp.ones((192, 2)) / 99), PIXELS),
    "resnet8": (network("resnet8"), PIXELS),
    "tokens": (kd.from_nnx(Tagger(nnx.Rngs(0))), (TOKENS, PRESENT)),
    # Tied embeddings, rotary positions, grouped heads.
    "decoder": (
        kd.from_nnx(kd.models.transformer(9, layers=2, width=16, heads=4, kv_heads=2, rngs=nnx.Rngs(0))),
        TOKENS,
    ),
    "dict": (kd.from_nnx(Tagger(nnx.Rngs(0))), {"tokens": TOKENS, "present": PRESENT}),
}


def assert_logits_of_any_number(run, path, model, inputs):
    """run: the logits of a file, without kd_jax, of inputs by name."""
    leaves = jax.tree.leaves(inputs)
    names = {1: ["inputs"], 2: ["inputs_0", "inputs_1"]}[len(leaves)]
    names = sorted(inputs) if isinstance(inputs, dict) else names
    for count in (len(leaves[0]), 1, 2):
        found = run(path, {one: leaf[:count] for one, leaf in zip(names, leaves, strict=True)})
        wanted = np.asarray(model(jax.tree.map(lambda leaf, n=count: leaf[:n], inputs)))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert np.abs(wanted).max() > 0.01
