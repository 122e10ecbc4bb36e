"""Weights that a style scales for each example, without making weights for each example."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jkd.errors import UserError
from jkd.gan.resampling import filtered_conv_up
from jkd.nn import mixed
from jkd.nn.layers import at_least_float32


def demodulation(
    kernel: Float[Array, "*window inputs outputs"], style: Float[Array, "batch inputs"], *, eps: float = 1e-8
) -> Float[Array, "batch outputs"]:
    """What brings each output of a modulated kernel back to unit norm.

        d_bo = 1 / sqrt( sum_ki (s_bi W_kio)^2 + eps )

    In float32 at least. A kernel or a style of zeros gives 1 / sqrt(eps) and finite gradients.

    Args:
      kernel: W, of a dense layer or of a convolution (positions k).
      style: s, one number for each input channel.
      eps: > 0.
    """
    dtype = at_least_float32(style.dtype)
    energy = jnp.square(kernel.astype(dtype)).reshape(-1, *kernel.shape[-2:]).sum(0)
    return jax.lax.rsqrt(jnp.square(style.astype(dtype)) @ energy + eps)


def modulated_kernel(
    kernel: Float[Array, "*window inputs outputs"],
    style: Float[Array, " inputs"],
    *,
    demodulate: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "*window inputs outputs"]:
    """The kernel that one style makes: s_i W_kio, each output brought to unit norm where `demodulate`.

    For weights that are kept; `modulated_conv` computes with many styles at once and makes none.
    """
    axes = (1,) * (kernel.ndim - 2)
    scaled = kernel * style.reshape(*axes, -1, 1)
    if not demodulate:
        return scaled
    return scaled * demodulation(kernel, style[None], eps=eps)[0].reshape(*axes, 1, -1).astype(kernel.dtype)


def modulated_conv(
    x: Float[Array, "batch *window inputs"],
    kernel: Float[Array, "*kernel inputs outputs"],
    style: Float[Array, "batch inputs"],
    *,
    demodulate: bool = True,
    up: bool = False,
    eps: float = 1e-8,
) -> Float[Array, " batch *outputs"]:
    """A convolution (stride 1, zero padding to the same size) or dense layer with weights of its own for each example.

        y_b = x_b * W''_b,    W'_kio = s_i W_kio,    W''_kio = W'_kio / sqrt( sum_ki W'_kio^2 + eps )

    Inputs and outputs are scaled instead of weights, which is the same: no weights for each example in memory. With
    `demodulate` only the direction of the style counts. Computes in the dtype of x; sums of squares and gradients of
    the kernel are in float32 at least.

    Args:
      x: maps [batch, height, width, inputs], or vectors [batch, inputs].
      kernel: W [height, width, inputs, outputs], or [inputs, outputs].
      style: s, one number for each input channel of each example.
      demodulate: whether each output's weights are brought to unit norm.
      up: whether the maps become twice as large, by `resampling.filtered_conv_up`; kernels of 3x3 only.
      eps: > 0.

    Raises:
      UserError: if the shapes do not fit.

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, equations 1 and 3.
    """
    if x.ndim not in (2, 4) or kernel.ndim != x.ndim or style.shape != (len(x), x.shape[-1]):
        raise UserError(
            "x, kernel and style must be [batch, inputs], [inputs, outputs] and [batch, inputs], or [batch, height, "
            "width, inputs], [height, width, inputs, outputs] and [batch, inputs]; "
            f"got {list(x.shape)}, {list(kernel.shape)} and {list(style.shape)}."
        )
    if kernel.shape[-2] != x.shape[-1]:
        raise UserError(f"kernel takes {kernel.shape[-2]} channels, x has {x.shape[-1]}.")
    if up and kernel.shape[:-2] != (3, 3):
        raise UserError(f"up needs a kernel of 3x3, got {list(kernel.shape)}.")
    spread = (len(x), *(1,) * (x.ndim - 2), -1)
    scaled = x * style.astype(x.dtype).reshape(spread)
    if x.ndim == 2:
        y = mixed.dot_general(scaled, kernel, (((1,), (0,)), ((), ())))
    elif up:
        y = filtered_conv_up(scaled, kernel)
    else:
        layout = jax.lax.conv_dimension_numbers(scaled.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        padding = [(size // 2, (size - 1) // 2) for size in kernel.shape[:2]]
        y = mixed.conv_general_dilated(scaled, kernel, (1, 1), padding, dimension_numbers=layout)
    return y * demodulation(kernel, style, eps=eps).astype(y.dtype).reshape(spread) if demodulate else y
