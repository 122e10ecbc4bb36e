"""Levels of low-bit weights: found in trained weights, made of a basis, and the nearest of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jkd.checks import Tensor, as_float
from jkd.errors import UserError

MAX_BITS = 8
UNROLLED = 16  # up to so many levels, elementwise comparisons one after another
_HALF_NORMAL = 0.6745  # the median of |x| for a standard normal x


class Levels(NamedTuple):
    """Sorted levels, and the digits each is made of: `values[k] = basis @ codes[k]`."""

    values: Float[Array, " levels"]
    codes: Float[Array, "levels bits"]


def check_bits(bits: int) -> None:
    """Stops a number of bits outside 1..8.

    Raises:
      UserError: if so.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= MAX_BITS:
        raise UserError(f"bits must be an integer in 1..{MAX_BITS}, got {bits!r}.")


def init_levels(kernel: Float[Tensor, "*shape"], bits: int, *, iterations: int = 30) -> Float[Array, " levels"]:
    """The 2^bits levels closest to a trained kernel: 1-D k-means (Lloyd's), sorted.

    Starts at the evenly spaced quantiles (k + 1/2) / 2^bits. A level that no weight is nearest to stays where it
    is; a constant kernel gives equal levels. No gradient passes. In float32 at least; a NaN makes all levels NaN.

    Args:
      kernel: weights of one layer, any shape, not empty.
      bits: 1..8; static.
      iterations: of Lloyd's; static.

    Raises:
      UserError: if `bits` is outside 1..8, or the kernel is empty or not floating point.
    """
    check_bits(bits)
    weights = jnp.sort(jax.lax.stop_gradient(as_float("kernel", kernel)).ravel())
    if not weights.size:
        raise UserError("kernel must hold weights to find levels of, got none.")
    count = 2**bits
    start = weights[((jnp.arange(count) + 0.5) / count * weights.size).astype(int)]

    def better(_: Any, levels: Array) -> Array:
        index = nearest_index(weights, levels)
        size, total = (jax.ops.segment_sum(x, index, count) for x in (jnp.ones_like(weights), weights))
        return jnp.sort(jnp.where(size > 0, total / jnp.maximum(size, 1), levels))

    levels = jax.lax.fori_loop(0, iterations, better, start)
    return jnp.where(jnp.isnan(weights).any(), jnp.nan, levels)


def nearest_index(x: Num[Tensor, "*shape"], levels: Float[Array, "*channels levels"]) -> Int[Array, "*shape"]:
    """The index of the nearest of sorted levels; halfway between two, the lower one (x > threshold takes the upper).

    Args:
      x: of a NaN the index means nothing.
      levels: sorted; one set, or one for each of the last axis of x.
    """
    x, thresholds = jnp.asarray(x, levels.dtype), (levels[..., 1:] + levels[..., :-1]) / 2
    if levels.shape[-1] <= UNROLLED:
        above = (x > threshold for threshold in planes(thresholds, x.ndim))
        return functools.reduce(jnp.add, above, jnp.zeros(x.shape, jnp.int32))
    if levels.ndim == 1:
        return jnp.searchsorted(thresholds, x, side="left").astype(jnp.int32)
    search = jax.vmap(functools.partial(jnp.searchsorted, side="left"), in_axes=(0, -1), out_axes=-1)
    return search(thresholds, x).astype(jnp.int32)


def nearest_value(
    x: Num[Tensor, "*shape"], levels: Float[Array, "*channels levels"], values: Num[Array, "*channels levels"]
) -> Num[Array, "*shape"]:
    """What goes with the nearest of sorted levels: `lookup(values, nearest_index(x, levels))`, in fewer operations."""
    if levels.shape[-1] > UNROLLED:
        return lookup(values, nearest_index(x, levels))
    x, thresholds = jnp.asarray(x, levels.dtype), (levels[..., 1:] + levels[..., :-1]) / 2
    first, *others = planes(values, x.ndim)
    found = jnp.broadcast_to(first, x.shape)
    for threshold, value in zip(planes(thresholds, x.ndim), others, strict=True):
        found = jnp.where(x > threshold, value, found)
    return found


def lookup(levels: Num[Array, "*channels levels"], index: Int[Tensor, "*shape"]) -> Num[Array, "*shape"]:
    """`levels[index]`, or of one set a channel (the last axis of the index) `levels[channel, index]`."""
    if levels.shape[-1] <= UNROLLED:  # a chain of selections is several times faster than a gather on CPU
        first, *others = planes(levels, index.ndim)
        found = jnp.broadcast_to(first, index.shape)
        for k, level in enumerate(others, start=1):
            found = jnp.where(index == k, level, found)
        return found
    return levels[index] if levels.ndim == 1 else levels[jnp.arange(len(levels)), index]


def planes(levels: Num[Array, "*channels levels"], rank: int) -> list[Array]:
    """The levels one by one: scalars, or of one set a channel, arrays for the last of so many axes."""
    shape = () if levels.ndim == 1 else (1,) * (rank - 1) + (-1,)
    return [levels[..., k].reshape(shape) for k in range(levels.shape[-1])]


def levels_from_basis(basis: Float[Tensor, " bits"], *, signed: bool) -> Levels:
    """All sums of a basis, sorted: `sum_j basis_j e_j` with digits e in {-1, 1} (signed) or {0, 1} (0 is a level).

    Args:
      basis: 1 to 8 numbers; a gradient passes from the values to it.
      signed: static.

    Raises:
      UserError: if the basis is no floating point vector of 1..8 numbers.

    Reference: Zhang et al., LQ-Nets: Learned quantization for highly accurate and compact deep neural networks,
      ECCV 2018.
    """
    basis = as_float("basis", basis)
    if basis.ndim != 1:
        raise UserError(f"basis must have the shape [bits], got {list(basis.shape)}.")
    check_bits(basis.size)
    codes = jnp.asarray(digits(basis.size, signed=signed), basis.dtype)
    values = digit_sum(codes, basis)
    order = jnp.argsort(values)
    return Levels(values[order], codes[order])


def digits(bits: int, *, signed: bool) -> Int[np.ndarray, "levels bits"]:
    """The digits of 0 .. 2^bits - 1, the lowest first: in {-1, 1} (signed) or {0, 1}."""
    found = (np.arange(2**bits)[:, None] >> np.arange(bits)[None]) & 1
    return 2 * found - 1 if signed else found


def digit_sum(codes: Float[Array, "*shape bits"], basis: Float[Array, "*channels bits"]) -> Float[Array, "*shape"]:
    """`sum_j basis_j codes_j`, always in this order: what is stored as a level is the weight to the bit.

    The basis is one, or one for each of the codes' last axis but one.
    """
    terms = (codes[..., j] * number for j, number in enumerate(planes(basis, codes.ndim - 1)))
    return functools.reduce(jnp.add, terms)


def weight_basis(shape: tuple[int, ...], bits: int) -> Float[np.ndarray, " bits"]:
    """The basis to train from scratch with: `2^j 0.6745 sqrt(2 / n) / 2^(bits - 1)`, n = size of the window x outputs.

    Args:
      shape: of a kernel [..., inputs, outputs].
      bits: 1..8.

    Raises:
      UserError: if `bits` is outside 1..8, or the kernel has less than two axes.

    Reference: Zhang et al., LQ-Nets, ECCV 2018, as in its published code.
    """
    check_bits(bits)
    if len(shape) < 2:
        raise UserError(f"shape must be that of a kernel [..., inputs, outputs], got {shape}.")
    n = np.prod(shape[:-2]) * shape[-1]
    return (2.0 ** np.arange(bits) * _HALF_NORMAL * np.sqrt(2 / n) / 2 ** (bits - 1)).astype(np.float32)


def activation_basis(bits: int) -> Float[np.ndarray, " bits"]:
    """The basis that activations start with: `2^j 0.6745 * 2 / (2^bits - 1)`; 2 bits: (0.449667, 0.899333).

    Raises:
      UserError: if `bits` is outside 1..8.

    Reference: Zhang et al., LQ-Nets, ECCV 2018, as in its published code.
    """
    check_bits(bits)
    return (2.0 ** np.arange(bits) * _HALF_NORMAL * 2 / (2**bits - 1)).astype(np.float32)
