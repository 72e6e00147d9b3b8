"""Losses of several layers and of transformers, written from the papers' formulas. See `feature_oracles`."""

from typing import Any

import numpy as np
from losses.oracle_tools import Long, by_example, dot, length, softmax


def semckd(pairs: list[list[tuple[np.ndarray, np.ndarray]]], attention: np.ndarray) -> np.ndarray:
    values = []
    for b in range(len(attention)):
        terms = [
            attention[b, i, j] * np.mean((s[b] - t[b]) ** 2)
            for i, row in enumerate(pairs)
            for j, (s, t) in enumerate(row)
        ]
        values.append(sum(terms) / len(pairs))
    return np.array(values)


@by_example
def hidden_states(s: np.ndarray, t: np.ndarray) -> Any:
    return [np.mean((s[p] - t[p]) ** 2) for p in range(len(s))]


@by_example
def cosine(s: np.ndarray, t: np.ndarray) -> Any:
    return [1 - dot(s[p], t[p]) / (length(s[p]) * length(t[p])) for p in range(len(s))]


@by_example
def attention_maps(s: np.ndarray, t: np.ndarray, keys: np.ndarray) -> Any:
    valid = [k for k in range(s.shape[2]) if keys[k]]
    rows = []
    for q in range(s.shape[1]):
        squares = [(s[h, q, k] - t[h, q, k]) ** 2 for h in range(len(s)) for k in valid]
        rows.append(sum(squares) / len(squares) if squares else Long(0))
    return rows


def minilm(s: np.ndarray, t: np.ndarray, keys: Any, heads: int) -> np.ndarray:
    """`s` and `t`: queries and keys of a batch, `[2, batch, positions, width]`; `keys`: which positions count."""

    def relation(queries: np.ndarray, others: np.ndarray, head: int, query: int, valid: list[int]) -> list[Any]:
        d = queries.shape[-1] // heads
        part = slice(head * d, (head + 1) * d)
        return softmax([dot(queries[query, part], others[k, part]) / np.sqrt(Long(d)) for k in valid])

    out = np.zeros(s.shape[1:3], dtype=Long)
    for b, q in np.ndindex(out.shape):
        valid = [k for k in range(out.shape[1]) if keys[b][k]]
        if q in valid:
            for head in range(heads):
                p = relation(t[0, b], t[1, b], head, q, valid)
                r = relation(s[0, b], s[1, b], head, q, valid)
                out[b, q] += sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, r, strict=True)) / heads
    return out
