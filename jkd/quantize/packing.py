"""Low-bit weights as they are stored: codes of 1 to 8 bits side by side in bytes, and a table of levels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.quantize.direct import chosen
from jkd.quantize.levels import check_bits, lookup


class Codes(NamedTuple):
    """Level numbers and sorted levels, one set or one for each output channel: see `dequantize`."""

    numbers: UInt8[Array, "*shape"]
    levels: Float[Array, "*channels levels"]


def sort_codes(numbers: Integer[Array, "*shape"], levels: Float[Array, "*channels levels"]) -> Codes:
    """The codes of weights that have these numbers among these levels, which lie in any order."""
    order = jnp.argsort(levels)
    place = jnp.argsort(order)  # of a level among the sorted ones
    return Codes(lookup(place, numbers).astype(jnp.uint8), jnp.sort(levels))


def export_codes(assignment: Float[Tensor, "*shape levels"], levels: Float[Tensor, "*channels levels"]) -> Codes:
    """The chosen level of each weight, by its number among the sorted levels.

    Args:
      assignment: scores, see `direct_quantize`; at most 256 levels.
      levels: any order; one set, or one for each output channel (the kernel's last axis).

    Raises:
      UserError: if the shapes do not fit, there are more than 256 levels, or a number is known not to be finite: it
        would become a level.
    """
    assignment, levels = as_float("assignment", assignment), as_float("levels", levels)
    channels = assignment.shape[-2:-1] if levels.ndim == 2 else ()
    if levels.ndim not in (1, 2) or levels.shape != (*channels, assignment.shape[-1]) or levels.shape[-1] > 256:
        raise UserError(
            f"levels must be [levels] or [channels, levels] of the assignment's last axes "
            f"{list(assignment.shape[-2:])}, at most 256, got the shape {list(levels.shape)}."
        )
    for name, x in (("assignment", assignment), ("levels", levels)):
        known = concrete(x)
        if known is not None and not np.isfinite(known).all():
            raise UserError(f"{name} is not finite: a model that diverged is not exported.")
    return sort_codes(chosen(assignment), levels)


def pack_bits(index: Integer[Tensor, "*shape"], bits: int) -> UInt8[Array, "bytes"]:
    """Numbers below 2^bits as a stream of bits, the lowest first: ceil(size bits / 8) bytes.

    Number i takes the bits i*bits .. (i + 1)*bits - 1 of the stream; bit b is bit b % 8 of byte b // 8. The last
    byte is filled with zeros.

    Args:
      index: in row-major order; integers.
      bits: 1..8; static.

    Raises:
      UserError: if `bits` is outside 1..8, or a number is known not to fit.
    """
    check_bits(bits)
    known = concrete(index)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < 2**bits:
        raise UserError(f"index must lie in 0..{2**bits - 1} for {bits} bits, got {known.min()}..{known.max()}.")
    return _stream(jnp.asarray(index), int(bits))


@functools.partial(jax.jit, static_argnums=1)
def _stream(index: Array, bits: int) -> Array:
    stream = ((index.ravel()[:, None] >> jnp.arange(bits)[None]) & 1).ravel()
    return jnp.packbits(stream.astype(jnp.uint8), bitorder="little")


def unpack_bits(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Array, "*shape"]:
    """The numbers that `pack_bits` packed; traceable.

    Args:
      packed: the bytes.
      bits: 1..8; static.
      shape: of the numbers; static.

    Raises:
      UserError: if `bits` is outside 1..8, or the bytes are not as many as the shape needs.
    """
    check_bits(bits)
    size = int(np.prod(shape))
    expected = -(-size * bits // 8)
    if packed.size != expected:
        raise UserError(f"packed must hold {expected} bytes for {size} numbers of {bits} bits, got {packed.size}.")
    stream = jnp.unpackbits(jnp.asarray(packed), count=size * bits, bitorder="little").reshape(size, bits)
    return (stream << jnp.arange(bits, dtype=jnp.uint8)[None]).sum(-1, dtype=jnp.uint8).reshape(shape)


def dequantize(index: Integer[Tensor, "*shape"], levels: Float[Tensor, "*channels levels"]) -> Float[Array, "*shape"]:
    """The weights: `levels[index]`, or with one set for each output channel (the last axis) `levels[channel, index]`.

    A number outside the table gives NaN.
    """
    levels, index = jnp.asarray(levels), jnp.asarray(index)
    table = levels.at[index] if levels.ndim == 1 else levels.at[jnp.arange(len(levels)).reshape(_last(index)), index]
    return table.get(mode="fill", fill_value=jnp.nan)


def _last(index: Array) -> tuple[int, ...]:
    return (1,) * (index.ndim - 1) + (-1,)
