"""Penalties on the slopes of discriminators and generators, as functions of an apply function.

`d_fn(images)` and `g_fn(latents)` are networks whose variables are closed over, as by
`functools.partial(model.apply, variables)`; the penalties are differentiated with respect to those variables.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jkd.checks import Scalar, Tensor, as_float, check_share
from jkd.gan.checks import check_same_shape, some_batch
from jkd.reduction import reduce

Network = Callable[[Array], Array]


def _squared_slopes(d_fn: Network, images: Float[Array, " batch *image"]) -> Float[Array, " batch"]:
    """The squared norm of the gradient of each image's logits with respect to that image."""
    slopes = jax.grad(lambda x: as_float("d_fn(images)", d_fn(x)).sum())(images)
    return jnp.square(slopes).reshape(len(images), -1).sum(1)


def _root(squares: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """The square root, whose gradient at 0 is 0; NaN stays."""
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def _between(
    real: Float[Array, " batch *image"], fake: Float[Array, " batch *image"], key: Key[Array, ""]
) -> Float[Array, " batch *image"]:
    """A point on the line from each real image to the fake one in its place, uniformly."""
    share = jax.random.uniform(key, (len(real),) + (1,) * (real.ndim - 1), real.dtype)
    return real + share * (fake - real)


def r1_penalty(
    d_fn: Network, images: Float[Tensor, " batch *image"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The mean squared norm of a discriminator's gradient at real images, unscaled.

        R1 = mean_b || grad_x D(x_b) ||^2    (R2: the same at generated images)

    Its usual weight is gamma / 2, times k where it is added in every k-th step only. The gradient of the sum of all
    logits is taken: an image's own where logits do not depend on other images; what statistics over the batch pass
    from image to image is counted too. Where D takes a reference image as well, close over it. In float32 at least;
    finite gradients where D is flat.

    Args:
      d_fn: images -> logits, of any shape that begins with the batch (of patches: their sum).
      images: of any rank; real ones for R1, generated ones for R2.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong dtype, shape or reduction.

    Reference: Mescheder, Geiger and Nowozin, Which Training Methods for GANs do actually Converge?, ICML 2018.
    """
    return reduce(_squared_slopes(d_fn, some_batch("images", images)), reduction)


def zero_centered_gradient_penalty(
    d_fn: Network,
    real_images: Float[Tensor, " batch *image"],
    fake_images: Float[Tensor, " batch *image"],
    key: Key[Array, ""],
    *,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """The mean squared norm of a critic's gradient between real and generated images, unscaled (10 is usual).

        GP_0 = mean_b || grad_x D(x^_b) ||^2,    x^_b = r_b + u_b (f_b - r_b),    u_b ~ U[0, 1)

    Args:
      d_fn: images -> logits, as in `r1_penalty`.
      real_images: r, of any rank.
      fake_images: f, of the same shape.
      key: for u, one number an image.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong dtype, shape or reduction.

    Reference: Thanh-Tung, Tran and Venkatesh, Improving Generalization and Stability of GANs, ICLR 2019.
    """
    return reduce(_slopes_between(d_fn, real_images, fake_images, key), reduction)


def one_centered_gradient_penalty(
    d_fn: Network,
    real_images: Float[Tensor, " batch *image"],
    fake_images: Float[Tensor, " batch *image"],
    key: Key[Array, ""],
    *,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """How far the norm of a critic's gradient between real and generated images is from 1, unscaled (10 is usual).

        GP_1 = mean_b ( || grad_x D(x^_b) || - 1 )^2    (x^ as in `zero_centered_gradient_penalty`)

    Where D is flat the value is 1 and its gradient 0: the norm has none there. Arguments and errors are those of
    `zero_centered_gradient_penalty`.

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017, equation 3.
    """
    norms = _root(_slopes_between(d_fn, real_images, fake_images, key))
    return reduce(jnp.square(norms - 1), reduction)


def _slopes_between(
    d_fn: Network, real: Float[Tensor, "..."], fake: Float[Tensor, "..."], key: Key[Array, ""]
) -> Float[Array, " batch"]:
    real, fake = some_batch("real_images", real), some_batch("fake_images", fake)
    check_same_shape(real_images=real, fake_images=fake)
    return _squared_slopes(d_fn, _between(real, fake, key))


class PathLengthPenalty(NamedTuple):
    """The penalty, and the running mean of path lengths that the next step starts from."""

    penalty: Float[Array, ""]
    mean: Float[Array, ""]


def path_length_penalty(
    g_fn: Network,
    latents: Float[Tensor, "batch *layers dim"],
    key: Key[Array, ""],
    mean: Scalar,
    *,
    decay: Scalar = 0.01,
) -> PathLengthPenalty:
    """How much the length of a generator's steps differs from place to place, unscaled (2 is usual).

        l_b = sqrt( mean_layers sum_dim ( J_b^T y_b )^2 ),    y ~ N(0, I) / sqrt(height width),    J = dG / dw
        a' = a + decay (mean_b l_b - a),    penalty = mean_b (l_b - a')^2

    As in the authors' code, a' is the mean AFTER this step's lengths entered it, and the gradient passes through it;
    none reaches the old mean or leaves by the returned one. In float32 at least; finite gradients where G is flat.

    Args:
      g_fn: latents -> images [batch, height, width, channels] (or [batch, pixels]: then y is not divided).
      latents: w, one vector an image or one for each layer of it: what the lengths are measured in.
      key: for y.
      mean: a, the running mean, which starts at 0.
      decay: in [0, 1], the share by which the mean moves.

    Raises:
      UserError: on a wrong dtype or shape, or a decay known to be outside [0, 1].

    Reference: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, equation 4.
    """
    check_share("decay", decay)
    latents = some_batch("latents", latents)
    images, pull_back = jax.vjp(lambda w: as_float("g_fn(latents)", g_fn(w)), latents)
    y = jax.random.normal(key, images.shape, images.dtype) / math.sqrt(math.prod(images.shape[1:-1]))
    squares = jnp.square(pull_back(y)[0]).sum(-1)
    lengths = _root(squares.reshape(len(latents), -1).mean(1))
    start = jax.lax.stop_gradient(jnp.asarray(mean, lengths.dtype))
    moved = start + decay * (lengths.mean() - start)
    return PathLengthPenalty(jnp.square(lengths - moved).mean(), jax.lax.stop_gradient(moved))
