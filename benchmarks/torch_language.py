"""The zoo's transformer in PyTorch, with `scaled_dot_product_attention`, a cache for sampling, and the zoo's names."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rotation = tuple[Tensor, Tensor]
Cache = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        return self.joined(functional.scaled_dot_product_attention(*self.parts(x, rotation), is_causal=True))

    def parts(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by their positions, and values: `[batch, heads, positions, head_width]`."""
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotated(q, rotation), rotated(k, rotation), v

    def joined(self, seen: Tensor) -> Tensor:
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.self_attn, self.mlp = Attention(width, heads), SwiGLU(width, hidden)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))

    def cached(self, x: Tensor, rotation: Rotation, kept: tuple[Tensor, Tensor], at: Tensor, mask: Tensor) -> Tensor:
        """As the call, of positions `at`; their keys and values are written beside what is kept of those before."""
        q, k, v = self.self_attn.parts(self.input_layernorm(x), rotation)
        keys, values = kept[0].index_copy_(2, at, k), kept[1].index_copy_(2, at, v)
        seen = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.self_attn.joined(seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, 1e-6)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        rotation = self.rotation(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.logits(x)

    def rotation(self, positions: Tensor) -> Rotation:
        half = torch.arange(0, self.width // self.heads, 2, dtype=torch.float32, device=positions.device)
        angles = positions[:, None] * 10_000.0 ** (-half / (self.width // self.heads))
        return angles.cos(), angles.sin()

    def logits(self, x: Tensor) -> Tensor:
        return functional.linear(self.norm(x), self.embed_tokens.weight)

    def cache(self, batch: int, room: int) -> Cache:
        """Zeros, `[batch, heads, room, head_width]`, for keys and values of each layer."""
        shape, place = (batch, self.heads, room, self.width // self.heads), self.embed_tokens.weight.device
        return [(torch.zeros(shape, device=place), torch.zeros(shape, device=place)) for _ in self.layers]

    def decode(self, tokens: Tensor, at: Tensor, cache: Cache) -> Tensor:
        """Logits behind tokens `[batch, positions]` at the positions `at`; what is kept of them is written."""
        mask = torch.arange(cache[0][0].shape[2], device=at.device) <= at[:, None]
        rotation, x = self.rotation(at), self.embed_tokens(tokens)
        layers: Any = self.layers
        for layer, kept in zip(layers, cache, strict=True):
            x = layer.cached(x, rotation, kept, at, mask)
        return self.logits(x[:, -1])


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """The two halves of each head turned against each other."""
    (first, second), (cos, sin) = x.chunk(2, dim=-1), rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
