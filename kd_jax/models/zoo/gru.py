"""A GRU encoder and decoder: sequences to sequences, in PyTorch's layout."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kd_jax.errors import ShapeError
from kd_jax.models.zoo.layers import embedding, initialise, linear

State = Float[Any, "batch hidden"]
Tokens = Int[Any, "..."]
Logits = Float[Array, "..."]


class GRU(nnx.Module):
    """A layer of gated recurrent units, with the names and the order of gates (r, z, n) of PyTorch's `nn.GRU`.

    r, z = σ(W x + b + U h + c); n = tanh(W x + b + r · (U h + c)); h ← (1 − z) n + z h. Values start uniform in
    ±1/√hidden.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        def uniform(*shape: int) -> nnx.Param[Array]:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -(hidden**-0.5), hidden**-0.5))

        self.weight_ih_l0, self.bias_ih_l0 = uniform(3 * hidden, width), uniform(3 * hidden)
        self.weight_hh_l0, self.bias_hh_l0 = uniform(3 * hidden, hidden), uniform(3 * hidden)

    def __call__(
        self, inputs: Float[Any, "batch positions width"], state: State, present: Any = None
    ) -> tuple[Float[Array, "batch positions hidden"], State]:
        """The state behind each position, and behind the last.

        present: `[batch, positions]`; the state stays as it is where it is False.
        """
        gates = inputs @ self.weight_ih_l0[...].T + self.bias_ih_l0[...][None, None]
        present = jnp.ones(inputs.shape[:2], bool) if present is None else present

        def one(state: State, at: tuple[Array, Array]) -> tuple[State, State]:
            state = jnp.where(at[1][:, None], self._behind(at[0], state), state)
            return state, state

        last, states = jax.lax.scan(one, state, (gates.swapaxes(0, 1), present.T))
        return states.swapaxes(0, 1), last

    def step(self, inputs: Float[Any, "batch width"], state: State) -> State:
        """The state behind one more position."""
        return self._behind(inputs @ self.weight_ih_l0[...].T + self.bias_ih_l0[...][None], state)

    def _behind(self, gates: Float[Array, "batch gates"], state: State) -> State:
        own = state @ self.weight_hh_l0[...].T + self.bias_hh_l0[...][None]
        (r, z, n), (own_r, own_z, own_n) = (jnp.split(part, 3, axis=-1) for part in (gates, own))
        r, z = jax.nn.sigmoid(r + own_r), jax.nn.sigmoid(z + own_z)
        return (1 - z) * jnp.tanh(n + r * own_n) + z * state


class GRUSeq2Seq(nnx.Module):
    """An encoder whose last state begins the decoder; `gru_seq2seq` says what its numbers are."""

    def __init__(self, source_vocabulary: int, vocabulary: int, *, width: int, hidden: int, rngs: nnx.Rngs):
        self.hidden = hidden
        self.encoder_embedding = embedding(source_vocabulary, width)
        self.encoder = GRU(width, hidden, rngs=rngs)
        self.decoder_embedding = embedding(vocabulary, width)
        self.decoder = GRU(width, hidden, rngs=rngs)
        self.head = linear(hidden, vocabulary)
        initialise(self, rngs)

    def __call__(self, source: Tokens, tokens: Tokens) -> Logits:
        """Logits `[batch, positions, vocabulary]` of the token after each position, from the source and those before.

        source: `[batch, source positions]`, 0 behind its end. tokens: `[batch, positions]`. Raises `ShapeError`.
        """
        if source.ndim != 2 or tokens.ndim != 2 or source.shape[0] != tokens.shape[0]:
            raise ShapeError(
                f"source has the shape {list(source.shape)} and tokens {list(tokens.shape)}: give both as "
                "[batch, positions]"
            )
        states, _ = self.decoder(self.decoder_embedding(tokens), self._encoded(source))
        return self.head(states)

    @property
    def vocabularies(self) -> dict[str, int]:
        """How many tokens its inputs have, by name."""
        return {
            "source": self.encoder_embedding.num_embeddings, "tokens": self.decoder_embedding.num_embeddings,
        }  # fmt: skip

    def prefill(self, inputs: dict[str, Any], lengths: Int[Array, " batch"], capacity: int) -> tuple[Logits, State]:
        """Logits behind the first `lengths` tokens of each row, and the state there, which needs no `capacity`."""
        tokens = inputs["tokens"]
        present = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        _, state = self.decoder(self.decoder_embedding(tokens), self._encoded(inputs["source"]), present)
        return self.head(state), state

    def decode(self, tokens: Int[Array, " batch"], at: Int[Array, " batch"], cache: State) -> tuple[Logits, State]:
        """Logits behind one more token of each row, and the state there."""
        state = self.decoder.step(self.decoder_embedding(tokens), cache)
        return self.head(state), state

    def _encoded(self, source: Tokens) -> State:
        start = jnp.zeros((source.shape[0], self.hidden), self.encoder.weight_hh_l0.dtype)
        return self.encoder(self.encoder_embedding(source), start, source != 0)[1]


def gru_seq2seq(
    source_vocabulary: int, vocabulary: int, *, width: int = 256, hidden: int = 256, rngs: nnx.Rngs
) -> GRUSeq2Seq:
    """A GRU encoder and a GRU decoder, each of one layer.

    Called with source and tokens, both `[batch, positions]`, or a dict of these; `kd.generate` uses its state. Its
    arrays have PyTorch's names and layout (`encoder.weight_ih_l0`), so that `kd.models.load_state_dict` reads them.

    source_vocabulary, vocabulary: how many tokens the source and the target have; 0 of the source is its padding.
    width: of both embeddings. hidden: of both states.
    """
    return GRUSeq2Seq(source_vocabulary, vocabulary, width=width, hidden=hidden, rngs=rngs)
