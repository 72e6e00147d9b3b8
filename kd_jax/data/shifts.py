"""Augmentation by shifts: finitely many views of an image, so that a teacher's outputs of all of them can be kept."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt8


def view_count(shift: int) -> int:
    """How many views an image has: a shift of -`shift` to `shift` pixels, downwards and to the right."""
    return (2 * shift + 1) ** 2


def pad(images: UInt8[Array, "examples height width channels"], shift: int) -> UInt8[Array, "examples h w channels"]:
    """Images with `shift` pixels of 0 around them, as `views` and `all_views` take them."""
    return jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))


def draw(key: Key[Array, ""], count: int, shift: int) -> Int[Array, " batch"]:
    """A view for each of `count` images, all equally likely."""
    return jax.random.randint(key, (count,), 0, view_count(shift), jnp.int32)


def some(key: Key[Array, ""], chosen: Int[Array, " batch"], shift: int, share: float) -> Int[Array, " batch"]:
    """The views `chosen`, each with the probability `share`, in [0, 1], else the image in its place.

    key: another than that of `draw`, of whose bits this must know nothing.
    """
    moves = jax.random.bernoulli(key, jnp.float32(share), chosen.shape)
    return jnp.where(moves, chosen, jnp.int32(view_count(shift) // 2))


def views(
    padded: UInt8[Array, "examples h w channels"],
    rows: Int[Array, " batch"],
    chosen: Int[Array, " batch"],
    *,
    shift: int,
) -> UInt8[Array, "batch height width channels"]:
    """The view `chosen` of each of the images `rows`; view `(2 shift + 1) dy + dx` starts at (dy, dx) of the padded."""
    _, height, width, channels = padded.shape
    size = (1, height - 2 * shift, width - 2 * shift, channels)

    def one(row: Int[Array, ""], view: Int[Array, ""]) -> Array:
        down, right = view // (2 * shift + 1), view % (2 * shift + 1)
        return jax.lax.dynamic_slice(padded, (row, down, right, jnp.zeros_like(row)), size)[0]

    return jax.vmap(one)(rows.astype(jnp.int32), chosen)


def view(
    padded: UInt8[Array, "examples h w channels"], number: Int[Array, ""], *, shift: int
) -> UInt8[Array, "examples height width channels"]:
    """The view `number` of all images."""
    examples, height, width, channels = padded.shape
    none = jnp.zeros_like(number)
    start = (none, number // (2 * shift + 1), number % (2 * shift + 1), none)
    return jax.lax.dynamic_slice(padded, start, (examples, height - 2 * shift, width - 2 * shift, channels))


def all_views(
    padded: UInt8[Array, "examples h w channels"], *, shift: int
) -> Iterator[UInt8[Array, "examples height width channels"]]:
    """Every view of all images, in the order of `views`."""
    _, height, width, _ = padded.shape
    for down in range(2 * shift + 1):
        for right in range(2 * shift + 1):
            yield padded[:, down : down + height - 2 * shift, right : right + width - 2 * shift]
