"""Weights that are a learned choice among learned levels, without latent weights behind them.

How levels and choices get their gradients is this library's reading of the paper's aim; its own equations were not at
hand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jkd.checks import Scalar, Tensor, as_float, check_positive
from jkd.errors import UserError, unknown
from jkd.quantize.levels import check_bits, digit_sum, levels_from_basis, lookup, nearest_index, nearest_value

GRADIENTS = ("softmax", "identity")


def init_assignment(
    kernel: Float[Tensor, "*shape"], levels: Float[Tensor, "*channels levels"]
) -> Float[Array, "*shape levels"]:
    """Scores of the levels for each weight, highest for the nearest: `A_ik = -((w_i - v_k) / d)^2`.

    d is the mean gap between neighbouring levels. Equal levels (of a constant kernel) give equal scores at that value.

    Args:
      kernel: the weights.
      levels: at least 2, any order; one set, or one for each output channel (the kernel's last axis).

    Raises:
      UserError: if the levels are no floating point [levels] or [channels, levels] of at least 2.
    """
    kernel = as_float("kernel", kernel)
    levels = _levels_of(kernel, levels)
    if levels.ndim == 2:
        return jax.vmap(init_assignment, in_axes=(-1, 0), out_axes=-2)(kernel, levels)
    gap = (levels.max() - levels.min()) / (levels.size - 1)
    distance = kernel[..., None] - jnp.expand_dims(levels, range(kernel.ndim))
    return -jnp.square(distance / jnp.where(gap > 0, gap, 1))


def direct_quantize(
    assignment: Float[Tensor, "*shape levels"],
    levels: Float[Tensor, " levels"] | Float[Tensor, "channels levels"],
    tau: Scalar = 1.0,
    *,
    gradient: str = "softmax",
) -> Float[Array, "*shape"]:
    """Weights as their highest-scored levels: `w_i = v[argmax_k A_ik]`.

    With g = dL/dw, the levels get their exact gradient, and the scores that of a softmax, or of the score itself:

        dL/dv_k  = sum over i with level k of g_i
        dL/dA_ik = p_ik (v_k - sum_j p_ij v_j) g_i / tau,  p = softmax(A / tau)     ("softmax")
        dL/dA_ik = v_k g_i                                                          ("identity")

    so that under either a step goes towards levels that lower the linearized loss. Nothing of the size of A is kept
    for the backward pass but A itself. tau gets no gradient. A NaN among a weight's scores makes the weight NaN. Of
    equal scores the first counts. In float32 at least.

    Args:
      assignment: scores A, of the kernel's shape and one axis more.
      levels: v, any order; one set a layer, or one for each output channel (the kernel's last axis).
      tau: > 0.
      gradient: "softmax" or "identity".

    Raises:
      UserError: if the shapes do not fit, `tau` is known not to be positive, or `gradient` is unknown.

    Reference: the aim is that of Hoang et al., Direct quantization for training highly accurate low bit-width deep
      neural networks, IJCAI 2020; the equations are ours.
    """
    assignment, levels = as_float("assignment", assignment), as_float("levels", levels)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    check_positive("tau", tau)
    channels = assignment.shape[-2:-1] if levels.ndim == 2 else ()
    if levels.ndim not in (1, 2) or levels.shape != (*channels, assignment.shape[-1]):
        raise UserError(
            f"levels must have the shape [levels] or [channels, levels] of the assignment's last axes "
            f"{list(assignment.shape[-2:])}, got {list(levels.shape)}."
        )
    return _direct(assignment, levels, jnp.asarray(tau, assignment.dtype), gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _direct(assignment: Array, levels: Array, tau: Array, gradient: str) -> Array:
    return _forward(assignment, levels, tau, gradient)[0]


def _forward(assignment: Array, levels: Array, tau: Array, gradient: str) -> tuple[Array, Any]:
    index = chosen(assignment)
    weights = lookup(levels, index)
    # argmax takes a NaN for the largest: it would pass as that level.
    weights = jnp.where(jnp.isnan(assignment).any(-1), jnp.nan, weights)
    return weights, (assignment, levels, tau)


def _backward(gradient: str, kept: tuple[Tensor, ...], g: Tensor) -> tuple[Array, Array, Array]:
    assignment, levels, tau = (jnp.asarray(x) for x in kept)
    g, index = jnp.asarray(g), chosen(assignment)
    axes = tuple(range(g.ndim - (levels.ndim - 1)))
    # One masked sum for each level, not a scatter: it is split over devices like the weights.
    of_levels = jnp.stack([jnp.where(index == k, g, 0).sum(axes) for k in range(levels.shape[-1])], axis=-1)
    wide = jnp.broadcast_to(levels, assignment.shape)
    if gradient == "identity":
        of_scores = wide * g[..., None]
    else:
        p = jax.nn.softmax(assignment / tau)
        mean = (p * wide).sum(-1, keepdims=True)
        of_scores = p * (wide - mean) * g[..., None] / tau
    return of_scores, of_levels.astype(levels.dtype), jnp.zeros_like(tau)


_direct.defvjp(_forward, _backward)


def chosen(assignment: Float[Tensor, "*shape levels"]) -> Integer[Array, "*shape"]:
    """The number of each weight's level: the first of the highest scores, int32."""
    return jnp.argmax(assignment, axis=-1).astype(jnp.int32)


def hard_onehot_ste(
    assignment: Float[Tensor, "*shape levels"], tau: Scalar = 1.0, *, gradient: str = "softmax"
) -> Float[Array, "*shape levels"]:
    """One-hot choices with the gradient of a softmax, or of the scores themselves (straight through the argmax).

        z = onehot(argmax A);   dz/dA = d softmax(A / tau) / dA  or the identity

    `hard_onehot_ste(A, tau) @ levels` is `direct_quantize`, with one number for each weight and level kept for the
    backward pass.

    Raises:
      UserError: if `tau` is known not to be positive, or `gradient` is unknown.
    """
    assignment = as_float("assignment", assignment)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    check_positive("tau", tau)
    soft = jax.nn.softmax(assignment / tau) if gradient == "softmax" else assignment
    hard = jax.nn.one_hot(chosen(assignment), assignment.shape[-1], dtype=assignment.dtype)
    return straight_through(hard, soft)


def straight_through(hard: Array, soft: Array) -> Array:
    """The value of `hard`, to the bit, with the gradient of `soft`."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


# --- the binary-code form: a number a bit for each weight, not one a level ---


def init_binary(
    kernel: Float[Tensor, "*shape"], bits: int, *, iterations: int = 30
) -> tuple[Float[Array, "*shape bits"], Float[Array, " bits"]]:
    """Codes and a basis near a trained kernel: nearest sums of the basis and least squares, in turn.

    The codes start at +-1/2, inside the window where they have a gradient.

    Args:
      kernel: weights of one layer, not empty.
      bits: 1..8; static.
      iterations: static.

    Raises:
      UserError: if `bits` is outside 1..8, or the kernel is empty or not floating point.
    """
    check_bits(bits)
    weights = jax.lax.stop_gradient(as_float("kernel", kernel))
    if not weights.size:
        raise UserError("kernel must hold weights to find a basis of, got none.")
    start = jnp.abs(weights).mean() * 2.0 ** -jnp.arange(bits)[::-1].astype(weights.dtype)

    def better(_: Any, basis: Array) -> Array:
        return basis_update(weights, basis)

    basis = jax.lax.fori_loop(0, iterations, better, start)
    found = levels_from_basis(basis, signed=True)
    return found.codes[nearest_index(weights, found.values)] / 2, basis


def basis_update(
    kernel: Float[Tensor, "*shape"], basis: Float[Tensor, "*channels bits"], *, delta: float = 1e-4
) -> Float[Array, "*channels bits"]:
    """The basis whose nearest sums have least squared error, given the codes that `basis` leads to.

        v* = (B^T B + delta I)^-1 (B^T w + delta v),  B the codes in {-1, 1} of the nearest levels

    No gradient passes. In float32 at least.

    Args:
      kernel: weights.
      basis: one, or one for each output channel (the kernel's last axis), 1..8 numbers.
      delta: >= 0; keeps the system solvable where a level is never used.

    Raises:
      UserError: if the shapes do not fit.

    Reference: Zhang et al., LQ-Nets, ECCV 2018, as in its published code.
    """
    weights, basis = (jax.lax.stop_gradient(as_float(name, x)) for name, x in (("kernel", kernel), ("basis", basis)))
    sums_of(weights.shape, basis)  # its checks
    flat, rows = weights.reshape(-1, weights.shape[-1] if basis.ndim == 2 else 1), basis.reshape(-1, basis.shape[-1])
    return solve_basis(*basis_moments(flat, rows), rows, delta).reshape(basis.shape)


def basis_moments(
    weights: Float[Array, "size channels"], basis: Float[Array, "channels bits"]
) -> tuple[Float[Array, "channels bits bits"], Float[Array, "channels bits"]]:
    """B^T B and B^T w of each channel's weights, B the codes of their nearest sums."""
    found = jax.vmap(functools.partial(levels_from_basis, signed=True))(basis)
    index = nearest_index(weights, found.values)
    codes = jnp.stack([lookup(found.codes[..., j], index) for j in range(basis.shape[-1])], axis=-1)
    exact = jax.lax.Precision.HIGHEST
    gram = jnp.einsum("nci,ncj->cij", codes, codes, precision=exact)
    return gram, jnp.einsum("nc,nci->ci", weights, codes, precision=exact)


def solve_basis(gram: Array, moment: Array, basis: Array, delta: float) -> Array:
    """(G + delta I)^-1 (m + delta v), for one basis or several."""
    bits = basis.shape[-1]
    ridge = delta * jnp.eye(bits, dtype=gram.dtype).reshape((1,) * (gram.ndim - 2) + (bits, bits))
    return jnp.linalg.solve(gram + ridge, (moment + delta * basis)[..., None])[..., 0]


def direct_quantize_binary(
    codes: Float[Tensor, "*shape bits"], basis: Float[Tensor, "*channels bits"]
) -> Float[Array, "*shape"]:
    """Weights as signed sums of a basis: `w_i = sum_j v_j sign(a_ij)`, sign(0) = 1.

        dL/dv_j = sum_i g_i sign(a_ij);   dL/da_ij = g_i v_j where |a_ij| <= 1, else 0

    Takes a number a bit for each weight, where the one-hot form takes 2^bits. A NaN code makes its weight NaN. In
    float32 at least.

    Args:
      codes: a, of the kernel's shape and one axis more.
      basis: v; one, or one for each output channel (the kernel's last axis).

    Raises:
      UserError: if the shapes do not fit.
    """
    codes, basis = as_float("codes", codes), as_float("basis", basis)
    channels = codes.shape[-2:-1] if basis.ndim == 2 else ()
    if basis.ndim not in (1, 2) or basis.shape != (*channels, codes.shape[-1]):
        raise UserError(
            f"basis must have the shape [bits] or [channels, bits] of the codes' last axes {list(codes.shape[-2:])}, "
            f"got {list(basis.shape)}."
        )
    clipped = jnp.where(jnp.abs(codes) <= 1, codes, jax.lax.stop_gradient(codes))
    hard = jnp.where(codes >= 0, 1, jnp.where(codes < 0, -1, codes)).astype(codes.dtype)
    signs = straight_through(hard, clipped)
    return digit_sum(signs, basis)


# --- baselines: latent weights behind the levels ---


def nearest_levels(
    kernel: Float[Tensor, "*shape"], levels: Float[Tensor, "*channels levels"], *, learn_levels: bool = False
) -> Float[Array, "*shape"]:
    """The nearest level of each latent weight, straight through: the kernel gets the gradient of its levels.

    Args:
      kernel: latent weights.
      levels: any order; one set, or one for each output channel (the kernel's last axis).
      learn_levels: whether the levels get theirs too (the sum over their weights).

    Raises:
      UserError: if the levels are no floating point [levels] or [channels, levels] of at least 2.
    """
    kernel = as_float("kernel", kernel)
    levels = jnp.sort(_levels_of(kernel, levels))
    found = nearest_value(kernel, levels, levels)
    found = found if learn_levels else jax.lax.stop_gradient(found)
    return jnp.where(jnp.isnan(kernel), kernel, found + (kernel - jax.lax.stop_gradient(kernel)))


def nearest_sums(kernel: Float[Tensor, "*shape"], basis: Float[Tensor, "*channels bits"]) -> Float[Array, "*shape"]:
    """The nearest signed sum of a basis for each latent weight, straight through: the kernel gets the gradient whole.

    The basis gets none: it follows the weights by `basis_update`, or of a whole model by `refresh_bases`.

    Args:
      kernel: latent weights.
      basis: one, or one for each output channel (the kernel's last axis), 1..8 numbers.

    Raises:
      UserError: if the shapes do not fit.

    Reference: Zhang et al., LQ-Nets, ECCV 2018.
    """
    kernel = as_float("kernel", kernel)
    return nearest_levels(kernel, sums_of(kernel.shape, jax.lax.stop_gradient(as_float("basis", basis))))


def sums_of(shape: tuple[int, ...], basis: Float[Array, "*channels bits"]) -> Float[Array, "*channels levels"]:
    """The sorted signed sums of one basis, or of one for each output channel of a kernel of this shape.

    Raises:
      UserError: if the shapes do not fit.
    """
    if basis.ndim == 1:
        return levels_from_basis(basis, signed=True).values
    if basis.ndim != 2 or shape[-1:] != basis.shape[:1]:
        raise UserError(f"basis must have the shape [bits] or [{shape[-1]}, bits], got {list(basis.shape)}.")
    return jax.vmap(lambda one: levels_from_basis(one, signed=True).values)(basis)


def _levels_of(kernel: Array, levels: Tensor) -> Array:
    levels = as_float("levels", levels)
    if levels.ndim not in (1, 2) or levels.shape[-1] < 2:
        raise UserError(f"levels must be a vector of at least 2, or one a channel, got the shape {list(levels.shape)}.")
    if levels.ndim == 2 and levels.shape[:1] != kernel.shape[-1:]:
        raise UserError(f"levels must be [levels] or [{kernel.shape[-1]}, levels], got the shape {list(levels.shape)}.")
    return levels
