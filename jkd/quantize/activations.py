"""Low-bit activations whose levels are sums of a basis, found by least squares that serve every channel.

Weighting the squared error of a channel by its variance or energy is this library's reading of the paper's aim; the
basis, its update and the clipped gradient are those of LQ-Nets.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jkd.checks import Tensor, as_float
from jkd.errors import UserError, unknown
from jkd.quantize.direct import solve_basis, straight_through
from jkd.quantize.levels import Levels, activation_basis, levels_from_basis, nearest_index, nearest_value

MODES = ("uniform", "variance", "energy", "robust")
EPSILON = 1e-5
STARTS = 5  # of `fit_basis`


def quantize_by_thresholds(
    x: Num[Tensor, "*shape"], levels: Float[Tensor, " levels"]
) -> tuple[Float[Array, "*shape"], Int[Array, "*shape"]]:
    """The nearest of sorted levels, and its number: x above the midpoint of two takes the upper one, x on it the lower.

    A NaN stays a NaN (its number means nothing). No gradient passes to `x`.

    Raises:
      UserError: if the levels are no floating point vector.
    """
    levels = as_float("levels", levels)
    if levels.ndim != 1:
        raise UserError(f"levels must be a vector, got the shape {list(levels.shape)}.")
    index = nearest_index(x, levels)
    return jnp.where(jnp.isnan(x), jnp.nan, nearest_value(x, levels, levels)), index


def channel_weights(
    x: Float[Tensor, "*batch channels"], mode: str = "variance", *, error: Float[Tensor, " channels"] | None = None
) -> Float[Array, " channels"]:
    """What a channel's squared errors count: 1, or 1 / (its variance), 1 / (mean x^2), 1 / sqrt(its error), plus eps.

    Over all other axes (the global batch), eps = 1e-5. A dead channel (nothing but one value; under "energy" nothing
    but zeros) counts nothing. No gradient passes. In float32 at least.

    Args:
      x: activations, channels last.
      mode: "uniform", "variance", "energy" or "robust"; the last tends to the least sum of the channels' root errors.
      error: "robust" only: each channel's mean squared error so far.

    Raises:
      UserError: if the mode is unknown, or "robust" has no error.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    x = jax.lax.stop_gradient(as_float("x", x))
    axes = tuple(range(x.ndim - 1))
    if mode == "uniform":
        return jnp.ones(x.shape[-1], x.dtype)
    variance = x.var(axes)
    if mode == "robust":
        if error is None:
            raise UserError('mode="robust" weights channels by their error so far: give error, f32[channels].')
        return jnp.where(variance > 0, 1 / (jnp.sqrt(error) + EPSILON), 0)
    spread = variance if mode == "variance" else jnp.square(x).mean(axes)
    return jnp.where(spread > 0, 1 / (spread + EPSILON), 0)


def weighted_basis_update(
    x: Float[Tensor, "*batch channels"],
    basis: Float[Tensor, " bits"],
    weights: Float[Tensor, " channels"],
    *,
    delta: float = 1e-4,
) -> Float[Array, " bits"]:
    """The basis of least weighted squared error, for the levels that each activation has now.

        u* = (E^T D E + delta I)^-1 (E^T D x + delta u),  E the digits {0, 1}, D the weights of the channels

    Where all channels are dead it stays. A NaN makes it NaN. No gradient passes. In float32 at least.

    Args:
      x: activations >= 0, channels last.
      basis: u, now.
      weights: of the channels, see `channel_weights`.
      delta: >= 0; keeps the system solvable where a digit is never used.

    Raises:
      UserError: if the shapes do not fit.
    """
    x, basis = (jax.lax.stop_gradient(as_float(name, v)) for name, v in (("x", x), ("basis", basis)))
    weights = jax.lax.stop_gradient(as_float("weights", weights))
    if weights.shape != x.shape[-1:]:
        raise UserError(f"weights must have the shape [channels] = {list(x.shape[-1:])}, got {list(weights.shape)}.")
    batch = x if x.ndim > 1 else x.reshape(1, -1)
    gram, moment = _moments(batch, levels_from_basis(basis, signed=False), weights)
    return solve_basis(gram, moment, basis, delta)


def _moments(x: Array, levels: Levels, weights: Array) -> tuple[Array, Array]:
    """E^T D E and E^T D x."""
    digits = [levels.codes[:, j] for j in range(levels.codes.shape[-1])]
    pairs = [(i, j) for i in range(len(digits)) for j in range(i + 1)]
    counts = _counts(x, levels.values, [digits[i] * digits[j] for i, j in pairs])
    gram = {pair: (count * weights).sum() for pair, count in zip(pairs, counts, strict=True)}
    rows = [jnp.stack([gram[max(i, j), min(i, j)] for j in range(len(digits))]) for i in range(len(digits))]
    # A digit times x: a NaN of x stays one.
    sums = [_over_batch(_first_axis(nearest_value(x, levels.values, digit) * x)) for digit in digits]
    return jnp.stack(rows), jnp.stack([(total * weights).sum() for total in sums])


def _counts(x: Array, levels: Array, marks: list[Array]) -> list[Array]:
    """For each table of marks in {0, 1}, how many activations of a channel have a nearest level that is marked.

    Several counts share a 32-bit word, so that a pass over the activations finds them all.
    """
    width = _first_size(x).bit_length()
    counts = []
    for start in range(0, len(marks), 31 // width):
        part = marks[start : start + 31 // width]
        word = sum((mark.astype(jnp.int32) << (width * n) for n, mark in enumerate(part)), jnp.int32(0))
        words = _first_axis(nearest_value(x, levels, word))
        counts += [_over_batch((words >> (width * n)) & (2**width - 1)) for n in range(len(part))]
    return counts


# Sums over channels begin with an image's first axis: it is on one device where a batch is split over several.


def _first_size(x: Array) -> int:
    return x.shape[1] if x.ndim > 2 else x.shape[0]


def _first_axis(x: Array) -> Array:
    return x.sum(1 if x.ndim > 2 else 0)


def _over_batch(x: Array) -> Array:
    return x.sum(tuple(range(x.ndim - 1)))


def quantize_activation(x: Float[Tensor, "*shape"], basis: Float[Tensor, " bits"]) -> Float[Array, "*shape"]:
    """Activations as the nearest sums of a basis; the gradient is 1 up to the top level and 0 above it.

        x_q = sum_j u_j e_j, e in {0, 1}^bits;   dL/dx = dL/dx_q where x <= the top level, else 0

    Negative activations become the lowest level, which is 0 for a basis >= 0. The basis gets no gradient: it follows
    the activations by `weighted_basis_update`. A NaN stays a NaN. In float32 at least.

    Raises:
      UserError: if the basis is no floating point vector of 1..8 numbers.

    Reference: Zhang et al., LQ-Nets, ECCV 2018.
    """
    x = as_float("x", x)
    levels = jax.lax.stop_gradient(levels_from_basis(basis, signed=False).values)
    found, _ = quantize_by_thresholds(x, levels)
    return straight_through(found, jnp.where(x <= levels[-1], x, jax.lax.stop_gradient(x)))


def follow_activations(
    x: Float[Tensor, "*batch channels"], basis: Float[Tensor, " bits"], mode: str = "variance", momentum: float = 0.9
) -> Float[Array, " bits"]:
    """One step of the moving average, `u <- momentum u + (1 - momentum) u*`, u* by `weighted_basis_update`."""
    old: Array = jax.lax.stop_gradient(as_float("basis", basis))
    return momentum * old + (1 - momentum) * weighted_basis_update(x, basis, _weights(x, basis, mode))


def fit_basis(
    x: Float[Tensor, "*batch channels"], bits: int, mode: str = "variance", *, iterations: int = 50
) -> Float[Array, " bits"]:
    """The basis of least weighted squared error: `weighted_basis_update` and nearest levels in turn.

    Of several starts, `activation_basis` as large as the smallest, the middle and the largest channels, the one that
    ends best. No gradient passes.

    Args:
      x: activations >= 0, channels last.
      bits: 1..8; static.
      mode: see `channel_weights`.
      iterations: static.

    Raises:
      UserError: if `bits` is outside 1..8 or the mode is unknown.
    """
    x, start = jax.lax.stop_gradient(as_float("x", x)), activation_basis(bits)
    axes = tuple(range(x.ndim - 1))
    size = jnp.sqrt(jnp.square(x).mean(axes))
    scales = jnp.nanquantile(jnp.where(size > 0, size, jnp.nan), jnp.linspace(0, 1, STARTS))

    def settle(scale: Array) -> tuple[Array, Array]:
        def better(_: Any, basis: Array) -> Array:
            return weighted_basis_update(x, basis, _weights(x, basis, mode))

        basis = jax.lax.fori_loop(0, iterations, better, scale * jnp.asarray(start, x.dtype))
        error = jnp.square(x - quantize_activation(x, basis)).mean(axes)
        return basis, jnp.sqrt(error).sum() if mode == "robust" else (_weights(x, basis, mode) * error).sum()

    bases, costs = jax.lax.map(settle, jnp.where(jnp.isnan(scales), 1, scales))
    return bases[jnp.argmin(costs)]


def _weights(x: Tensor, basis: Tensor, mode: str) -> Array:
    error = None
    if mode == "robust":
        error = jnp.square(x - quantize_activation(x, basis)).mean(tuple(range(x.ndim - 1)))
    return channel_weights(x, mode, error=error)


def quantization_error(
    x: Float[Tensor, "*batch channels"], quantized: Float[Tensor, "*batch channels"], *, per_channel: bool = True
) -> Float[Array, "*channels"]:
    """The relative squared error `sum (x - x_q)^2 / sum x^2`, for each channel (the last axis) or over all.

    0 where both are 0 throughout, inf where only x is. In float32 at least.

    Raises:
      UserError: if the shapes differ.
    """
    x, quantized = as_float("x", x), as_float("quantized", quantized)
    if x.shape != quantized.shape:
        raise UserError(f"quantized must have the shape of x, {list(x.shape)}, got {list(quantized.shape)}.")
    axes = tuple(range(x.ndim - 1)) if per_channel else None
    error, power = (jnp.square(v).sum(axes) for v in (x - quantized, x))
    return jnp.where(error == 0, 0, error / power)
