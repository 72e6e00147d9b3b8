"""A decoder-only transformer in the form of Llama and Qwen: RMSNorm, RoPE, grouped heads, SwiGLU."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kd_jax.errors import ConfigError, ShapeError
from kd_jax.models.zoo.attention import at_least_float32, masked_attention
from kd_jax.models.zoo.layers import Start, check_float, embedding, initialise, linear

Hidden = Float[Array, "batch positions width"]
Heads = Float[Array, "batch heads positions head_width"]
# Checked where they are used, with an error that says what to give.
Places = Int[Any, "..."]
Mask = Bool[Array, "..."]
_DEVIATION = 0.02


class Rotation(NamedTuple):
    """Cosines and sines of RoPE, `[batch or 1, 1, positions, head_width / 2]`, in float32."""

    cos: Float[Array, "..."]
    sin: Float[Array, "..."]


class KeysValues(NamedTuple):
    """What attention keeps of each position of a layer, `[batch, kv_heads, positions, head_width]`."""

    keys: Heads
    values: Heads


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequencies for contexts longer than those of its first training.

    Wavelengths above original_positions / low are `factor` times as long, those below original_positions / high stay,
    and those between are interpolated.
    """

    factor: float
    low: float
    high: float
    original_positions: int


class RMSNorm(nnx.Module):
    """x / √(mean of x² + epsilon) · scale, computed in float32 at least: Zhang and Sennrich (2019)."""

    def __init__(self, width: int, *, epsilon: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*places width"]) -> Float[Array, "*places width"]:
        """In the type of the input."""
        wide = x.astype(at_least_float32(x))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(x.dtype)
        return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Attention(nnx.Module):
    """Grouped attention with RoPE: `heads` heads of queries share `kv_heads` of keys and values."""

    def __init__(
        self, width: int, *, heads: int, kv_heads: int, head_width: int, qkv_bias: bool, output_bias: bool,
        qk_norm: bool, epsilon: float, param_dtype: Any,
    ):  # fmt: skip
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        kind: dict[str, Any] = {"bias": qkv_bias, "param_dtype": param_dtype}
        self.q_proj = linear(width, heads * head_width, **kind)
        self.k_proj = linear(width, kv_heads * head_width, **kind)
        self.v_proj = linear(width, kv_heads * head_width, **kind)
        self.o_proj = linear(heads * head_width, width, bias=output_bias, param_dtype=param_dtype)
        norms: dict[str, Any] = {"epsilon": epsilon, "param_dtype": param_dtype}
        self.q_norm = RMSNorm(head_width, **norms) if qk_norm else None
        self.k_norm = RMSNorm(head_width, **norms) if qk_norm else None

    def __call__(self, x: Hidden, rotation: Rotation, mask: Mask) -> Hidden:
        """What each position takes from those that its mask, `[batch or 1, 1, 1, queries, keys]`, lets it see."""
        return self.attend(x, rotation, self.keys_values(x, rotation), mask)

    def keys_values(self, x: Hidden, rotation: Rotation) -> KeysValues:
        """Keys, turned by their positions, and values."""
        keys = self._split(self.k_proj(x), self.kv_heads)
        keys = keys if self.k_norm is None else self.k_norm(keys)
        return KeysValues(_rotated(keys, rotation), self._split(self.v_proj(x), self.kv_heads))

    def attend(self, x: Hidden, rotation: Rotation, known: KeysValues, mask: Mask) -> Hidden:
        """Attention of the positions of `x` to those of keys and values."""
        queries = self._split(self.q_proj(x), self.heads)
        queries = queries if self.q_norm is None else self.q_norm(queries)
        queries = _rotated(queries, rotation) * jnp.asarray(self.head_width**-0.5, x.dtype)
        batch, _, positions, _ = queries.shape
        queries = queries.reshape(batch, self.kv_heads, -1, positions, self.head_width)
        seen = masked_attention(queries, known.keys, known.values, mask)
        return self.o_proj(seen.reshape(batch, self.heads, positions, -1).swapaxes(1, 2).reshape(batch, positions, -1))

    def _split(self, x: Hidden, heads: int) -> Heads:
        return x.reshape(*x.shape[:2], heads, self.head_width).swapaxes(1, 2)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)): Shazeer (2020), https://arxiv.org/abs/2002.05202."""

    def __init__(self, width: int, hidden: int, *, param_dtype: Any):
        self.gate_proj = linear(width, hidden, bias=False, param_dtype=param_dtype)
        self.up_proj = linear(width, hidden, bias=False, param_dtype=param_dtype)
        self.down_proj = linear(hidden, width, bias=False, param_dtype=param_dtype)

    def __call__(self, x: Hidden) -> Hidden:
        """As wide as the input."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, hidden: int, *, epsilon: float, param_dtype: Any, **attention: Any):
        norms: dict[str, Any] = {"epsilon": epsilon, "param_dtype": param_dtype}
        self.input_layernorm = RMSNorm(width, **norms)
        self.self_attn = Attention(width, **attention, **norms)
        self.post_attention_layernorm = RMSNorm(width, **norms)
        self.mlp = SwiGLU(width, hidden, param_dtype=param_dtype)

    def __call__(self, x: Hidden, rotation: Rotation, mask: Mask) -> Hidden:
        """The hidden states behind this layer."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

    def cached(
        self, x: Hidden, rotation: Rotation, mask: Mask, kept: KeysValues, at: Int[Array, " batch"]
    ) -> tuple[Hidden, KeysValues]:
        """As the call, of one position of each row, `at`, beside what is kept of those before."""
        normed = self.input_layernorm(x)
        new = self.self_attn.keys_values(normed, rotation)
        rows = jnp.arange(len(at))
        kept = KeysValues(*(old.at[rows, :, at].set(one[:, :, 0]) for old, one in zip(kept, new, strict=True)))
        x = x + self.self_attn.attend(normed, rotation, kept, mask)
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Transformer(nnx.Module):
    """A decoder-only transformer; `transformer` says what its numbers are.

    Features: `norm`, the hidden states before the head, `layers.0`, … behind each layer, `layers.0.self_attn`,
    `layers.0.mlp`, and whatever else is called. The head is `lm_head.kernel`, or `embed_tokens.embedding` transposed.
    """

    def __init__(
        self, vocabulary: int, *, layers: int, width: int, heads: int, kv_heads: int, head_width: int, hidden: int,
        tied: bool, qkv_bias: bool, output_bias: bool, qk_norm: bool, rope_base: float,
        rope_scaling: RopeScaling | None, epsilon: float, remat: bool, param_dtype: Any, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.heads, self.kv_heads, self.head_width, self.hidden = heads, kv_heads, head_width, hidden
        self.qkv_bias, self.output_bias, self.qk_norm = qkv_bias, output_bias, qk_norm
        self.rope_base, self.rope_scaling, self.epsilon, self.remat = rope_base, rope_scaling, epsilon, remat
        self.embed_tokens = embedding(vocabulary, width, param_dtype=param_dtype)
        self.layers = nnx.List([
            DecoderLayer(
                width, hidden, heads=heads, kv_heads=kv_heads, head_width=head_width, qkv_bias=qkv_bias,
                output_bias=output_bias, qk_norm=qk_norm, epsilon=epsilon, param_dtype=param_dtype,
            ) for _ in range(layers)
        ])  # fmt: skip
        self.norm = RMSNorm(width, epsilon=epsilon, param_dtype=param_dtype)
        self.lm_head = None if tied else linear(width, vocabulary, bias=False, param_dtype=param_dtype)
        initialise(self, rngs, linears=_normal, embeddings=_normal)

    def __call__(
        self,
        tokens: Places,
        segments: Places | None = None,
        positions: Places | None = None,
    ) -> Float[Array, "batch _positions vocabulary"]:
        """Logits of the token after each position, from it and those before it in its own segment.

        segments: tell the packed sequences of a row apart; 0 is padding, whatever its tokens. positions: of each token
        within its sequence, for RoPE; 0, 1, … without them. All three are the inputs of `kd.token_batch`. Raises
        `ShapeError`.
        """
        if tokens.ndim != 2 or any(one is not None and one.shape != tokens.shape for one in (segments, positions)):
            raise ShapeError(
                f"the tokens have the shape {list(tokens.shape)}: give tokens, segments and positions alike, "
                "[batch, positions]"
            )
        places = jnp.arange(tokens.shape[1])
        mask = (places[:, None] >= places[None, :])[None]
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        rotation = self._rotation(places[None] if positions is None else positions)
        # Padding may be a token that has no embedding, which would make the whole row NaN: 0 times NaN is NaN.
        x = self.embed_tokens(tokens if segments is None else jnp.where(segments == 0, 0, tokens))
        call = nnx.remat(_called) if self.remat else _called
        for layer in self.layers:
            x = call(layer, x, rotation, mask[:, None, None])
        return self._head(self.norm(x))

    @property
    def vocabularies(self) -> dict[str, int]:
        """How many tokens its inputs have, by name."""
        return {"tokens": self.embed_tokens.num_embeddings}

    def prefill(
        self, inputs: dict[str, Any], lengths: Int[Array, " batch"], capacity: int
    ) -> tuple[Float[Array, "batch vocabulary"], tuple[KeysValues, ...]]:
        """Logits behind the first `lengths` tokens of each row, and a cache that has room for `capacity` positions."""
        tokens = inputs["tokens"]
        places = jnp.arange(tokens.shape[1])
        mask = (places[:, None] >= places[None, :])[None, None, None]
        rotation = self._rotation(places[None])
        x, caches = self.embed_tokens(tokens), []
        room = ((0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0))
        for layer in self.layers:
            known = layer.self_attn.keys_values(layer.input_layernorm(x), rotation)
            caches.append(KeysValues(*(jnp.pad(one, room) for one in known)))
            x = layer(x, rotation, mask)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        return self._head(self.norm(last))[:, 0], tuple(caches)

    def decode(
        self, tokens: Int[Array, " batch"], at: Int[Array, " batch"], cache: tuple[KeysValues, ...]
    ) -> tuple[Float[Array, "batch vocabulary"], tuple[KeysValues, ...]]:
        """Logits behind one more token of each row, at its position; what the cache has behind that is not seen."""
        capacity = cache[0].keys.shape[2]
        mask = (jnp.arange(capacity)[None] <= at[:, None])[:, None, None, None]
        rotation = self._rotation(at[:, None])
        x, after = self.embed_tokens(tokens[:, None]), []
        for layer, kept in zip(self.layers, cache, strict=True):
            x, kept = layer.cached(x, rotation, mask, kept, at)
            after.append(kept)
        return self._head(self.norm(x))[:, 0], tuple(after)

    def _rotation(self, positions: Int[Array, "batch positions"]) -> Rotation:
        frequencies = rope_frequencies(self.head_width, self.rope_base, self.rope_scaling)
        angles = positions[:, None, :, None].astype(jnp.float32) * frequencies[None, None, None]
        # XLA on a CPU computes cosines anew wherever they are used, for each head and layer, but no product.
        same = jnp.eye(len(frequencies), dtype=frequencies.dtype)
        return Rotation(*(jnp.matmul(turn(angles), same, precision="highest") for turn in (jnp.cos, jnp.sin)))

    def _head(self, x: Hidden) -> Float[Array, "batch positions vocabulary"]:
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)


def transformer(
    vocabulary: int = 256, *, layers: int = 4, width: int = 128, heads: int = 4, kv_heads: int | None = None,
    head_width: int | None = None, hidden: int | None = None, tied: bool = True, qkv_bias: bool = False,
    output_bias: bool = False, qk_norm: bool = False, rope_base: float = 10_000.0,
    rope_scaling: RopeScaling | None = None, epsilon: float = 1e-6, remat: bool = False, param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Transformer:  # fmt: skip
    """A decoder-only language model: 836,736 parameters with the default numbers, of bytes.

    Called with tokens `[batch, positions]`, or with the inputs of `kd.token_batch`, it gives logits
    `[batch, positions, vocabulary]`. `kd.generate` uses its cache of keys and values.

    heads: of queries. kv_heads: of keys and values, each shared by heads / kv_heads; as many as heads where it is
    None. head_width: width / heads where it is None. hidden: of SwiGLU; 4 · width · 2/3, rounded up to a multiple of
    32, where it is None. tied: whether the head is the embedding. qkv_bias, output_bias: of attention (Qwen2 has the
    first). qk_norm: an RMSNorm of each head's queries and keys (Qwen3). rope_base: of RoPE's frequencies, with the
    halves of a head turned as in Hugging Face's code. remat: layers are computed again in the backward pass, which
    then holds the hidden states between layers alone. Weights start normal with a deviation of 0.02. Attention has a
    gradient of its own: `jax.jvp` of the network is refused by JAX.

    Raises `ConfigError` for numbers that do not fit each other.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_float(param_dtype, "param_dtype")
    if min(vocabulary, layers, width, heads, kv_heads) < 1 or heads % kv_heads:
        raise ConfigError(
            f"a transformer of {vocabulary} tokens, {layers} layers, width {width}, {heads} heads and {kv_heads} heads "
            "of keys cannot be: give numbers of at least 1, and heads as a multiple of kv_heads"
        )
    if head_width is None and width % heads:
        raise ConfigError(f"width is {width} and heads is {heads}: give a multiple of heads, or head_width")
    head_width = width // heads if head_width is None else head_width
    if head_width % 2 or head_width < 2:
        raise ConfigError(f"a head is {head_width} wide, and RoPE turns pairs: give an even head_width")
    hidden = -(-width * 8 // (3 * 32)) * 32 if hidden is None else hidden
    return Transformer(
        vocabulary, layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_width=head_width, hidden=hidden,
        tied=tied, qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=qk_norm, rope_base=rope_base,
        rope_scaling=rope_scaling, epsilon=epsilon, remat=remat, param_dtype=param_dtype, rngs=rngs,
    )  # fmt: skip


def rope_frequencies(head_width: int, base: float, scaling: RopeScaling | None) -> Float[Array, " half"]:
    """Angles for each position, base^(−2i / head_width): Su et al. (2021), https://arxiv.org/abs/2104.09864."""
    frequencies = base ** -(jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if scaling is None:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * jnp.pi)
    smooth = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def _rotated(x: Heads, rotation: Rotation) -> Heads:
    """The two halves of each head turned against each other, by the angles of its position."""
    wide = x.astype(at_least_float32(x))
    first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = (part.astype(wide.dtype) for part in rotation)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _called(layer: DecoderLayer, x: Hidden, rotation: Rotation, mask: Mask) -> Hidden:
    return layer(x, rotation, mask)


def _normal(shape: tuple[int, ...]) -> Start:
    return Start(True, _DEVIATION)
