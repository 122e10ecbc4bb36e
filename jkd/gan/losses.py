"""Adversarial losses of logits that are higher for what looks real, each as the discriminator's and generator's part.

Both parts are minimized. Logits may have any shape (a discriminator of patches gives one each location), except where
a loss compares every image with all others; bfloat16 becomes float32, and a NaN stays one. Nothing is detached here:
the caller differentiates with respect to the parameters of the one network that the step trains.
"""

import jax.numpy as jnp
import optax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Float

from jkd.checks import Tensor
from jkd.gan.checks import check_same_shape, logit_vector, some_logits
from jkd.reduction import reduce


def _sum_of_parts(real: Float[Array, "*real"], fake: Float[Array, "*fake"], reduction: str) -> Array:
    """The reductions of the two parts, added; unreduced they must have one shape."""
    if reduction == "none":
        check_same_shape(real_logits=real, fake_logits=fake)
    return reduce(real, reduction) + reduce(fake, reduction)


# --- one logit at a time ---


def nonsaturating_logistic_d_loss(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The cross-entropy of a discriminator that calls real images 1 and fake ones 0.

        L_D = mean softplus(-r) + mean softplus(f)    (nats, >= 0; 2 ln 2 where all logits are 0)

    Args:
      real_logits: r, of real images; any shape.
      fake_logits: f, of generated images; any shape, not necessarily that of r.
      reduction: "mean", "sum" or "none", of either part before they are added; "none" needs equal shapes.

    Raises:
      UserError: on a wrong dtype or reduction, an empty array, or unequal shapes where they must be equal.

    Reference: Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014.
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    cross_entropy = optax.losses.sigmoid_binary_cross_entropy
    return _sum_of_parts(cross_entropy(real, jnp.ones_like(real)), cross_entropy(fake, jnp.zeros_like(fake)), reduction)


def nonsaturating_logistic_g_loss(
    fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The cross-entropy of generated images that should be called real.

        L_G = mean softplus(-f)    (nats, >= 0)

    Its gradient stays where the discriminator is sure, unlike that of -mean softplus(f).

    Args:
      fake_logits: f, of generated images; any shape.
      reduction: "mean", "sum" or "none".

    Raises:
      UserError: on a wrong dtype or reduction, or an empty array.

    Reference: Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014.
    """
    fake = some_logits("fake_logits", fake_logits)
    return reduce(optax.losses.sigmoid_binary_cross_entropy(fake, jnp.ones_like(fake)), reduction)


def hinge_d_loss(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The hinge loss of a discriminator: logits beyond the margin of 1 are not pushed further.

        L_D = mean max(0, 1 - r) + mean max(0, 1 + f)    (>= 0)

    Arguments and errors are those of `nonsaturating_logistic_d_loss`.

    Reference: Lim and Ye, Geometric GAN, 2017; Miyato et al., Spectral Normalization for GANs, ICLR 2018.
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    hinge = optax.losses.hinge_loss
    return _sum_of_parts(hinge(real, jnp.ones_like(real)), hinge(fake, -jnp.ones_like(fake)), reduction)


def hinge_g_loss(fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean") -> Float[Array, "*reduced"]:
    """The generator's part of the hinge loss, the same as `wgan_g_loss`: L_G = -mean f.

    Arguments, errors and reference are those of `nonsaturating_logistic_g_loss` and `hinge_d_loss`.
    """
    return wgan_g_loss(fake_logits, reduction=reduction)


def least_squares_d_loss(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The squared distances of real logits from 1 and of fake ones from 0.

        L_D = mean (r - 1)^2 + mean f^2    (>= 0)

    Without the paper's factor 1/2. Arguments and errors are those of `nonsaturating_logistic_d_loss`.

    Reference: Mao et al., Least Squares Generative Adversarial Networks, ICCV 2017, equation 9.
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    return _sum_of_parts(optax.losses.squared_error(real, jnp.ones_like(real)), jnp.square(fake), reduction)


def least_squares_g_loss(fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean") -> Float[Array, "*reduced"]:
    """The squared distance of fake logits from 1: L_G = mean (f - 1)^2, without the paper's factor 1/2.

    Arguments, errors and reference are those of `nonsaturating_logistic_g_loss` and `least_squares_d_loss`.
    """
    fake = some_logits("fake_logits", fake_logits)
    return reduce(optax.losses.squared_error(fake, jnp.ones_like(fake)), reduction)


def wgan_d_loss(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The difference of a critic's means, which bounds the Wasserstein distance if the critic is 1-Lipschitz.

        L_D = mean f - mean r    (any sign)

    Something else must hold the critic's slope: see `one_centered_gradient_penalty`. Arguments and errors are those of
    `nonsaturating_logistic_d_loss`.

    Reference: Arjovsky, Chintala and Bottou, Wasserstein Generative Adversarial Networks, ICML 2017.
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    return _sum_of_parts(-real, fake, reduction)


def wgan_g_loss(fake_logits: Float[Tensor, "*fake"], *, reduction: str = "mean") -> Float[Array, "*reduced"]:
    """The generator's part of the critic's difference: L_G = -mean f.

    Arguments, errors and reference are those of `nonsaturating_logistic_g_loss` and `wgan_d_loss`.
    """
    return reduce(-some_logits("fake_logits", fake_logits), reduction)


def drift_penalty(real_logits: Float[Tensor, "*real"], *, reduction: str = "mean") -> Float[Array, "*reduced"]:
    """The mean square of the real logits, unscaled (1e-3 is a usual weight): mean r^2.

    It holds the level of the logits where the loss sees their differences only, as those of Wasserstein, relativistic
    and dual contrastive form do.

    Args:
      real_logits: r, of real images; any shape.
      reduction: "mean", "sum" or "none".

    Raises:
      UserError: on a wrong dtype or reduction, or an empty array.

    Reference: Karras, Aila, Laine and Lehtinen, Progressive Growing of GANs, ICLR 2018.
    """
    return reduce(jnp.square(some_logits("real_logits", real_logits)), reduction)


# --- real against fake ---


def relativistic_logistic_d_loss(
    real_logits: Float[Tensor, "*shape"], fake_logits: Float[Tensor, "*shape"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """How far fake images look more real than the real ones that they are paired with.

        L_D = mean_i softplus(f_i - r_i)    (nats, >= 0)

    Adding one number to all logits changes nothing: see `drift_penalty`.

    Args:
      real_logits: r, of real images; any shape.
      fake_logits: f, of generated images, of the same shape: the i-th is paired with the i-th real one.
      reduction: "mean", "sum" or "none" (over the pairs).

    Raises:
      UserError: on a wrong dtype or reduction, an empty array, or unequal shapes.

    Reference: Jolicoeur-Martineau, The Relativistic Discriminator, ICLR 2019 (the paired form).
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    check_same_shape(real_logits=real, fake_logits=fake)
    return reduce(softplus(fake - real), reduction)


def relativistic_logistic_g_loss(
    real_logits: Float[Tensor, "*shape"], fake_logits: Float[Tensor, "*shape"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """How far real images look more real than the fake ones: L_G = mean_i softplus(r_i - f_i).

    Arguments, errors and reference are those of `relativistic_logistic_d_loss`, whose roles it swaps.
    """
    real, fake = some_logits("real_logits", real_logits), some_logits("fake_logits", fake_logits)
    check_same_shape(real_logits=real, fake_logits=fake)
    return reduce(softplus(real - fake), reduction)


def contrastive_half(
    anchor: Float[Tensor, " anchors"], others: Float[Tensor, " others"], *, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """The cross-entropy of telling each anchor from all the others, which it should exceed.

        H_i(a; b) = -log( e^a_i / (e^a_i + sum_j e^b_j) ) = softplus(logsumexp(b) - a_i)    (nats, >= 0)

    ln(1 + M) where all logits are equal and there are M others: the sum is over the whole (global) array, and so the
    value grows with the batch. Work and memory are O(N + M). Adding one number to all logits changes nothing.

    Args:
      anchor: a, one logit an image.
      others: b, one logit an image; any number of them.
      reduction: "mean", "sum" or "none" (over the anchors).

    Raises:
      UserError: on a wrong shape, dtype or reduction, or an empty array.

    Reference: Yu et al., Dual Contrastive Loss and Attention for GANs, ICCV 2021.
    """
    anchor, others = logit_vector("anchor", anchor), logit_vector("others", others)
    return reduce(softplus(logsumexp(others) - anchor), reduction)


def dual_contrastive_d_loss(
    real_logits: Float[Tensor, " real"], fake_logits: Float[Tensor, " fake"]
) -> Float[Array, ""]:
    """Every real image against all fake ones, and every fake image against all real ones.

        L_D = mean_i H_i(r; f) + mean_j H_j(-f; -r)    (nats, >= 0; H as in `contrastive_half`)

    ln(1 + M) + ln(1 + N) where all logits are equal; for one pair, twice `relativistic_logistic_d_loss`. Parts of a
    batch taken one after another have fewer opposites: their mean is another loss. Adding one number to all logits
    changes nothing, so that nothing holds their level: see `drift_penalty`.

    Args:
      real_logits: r [N], of real images.
      fake_logits: f [M], of generated images; N and M may differ.

    Raises:
      UserError: on a wrong shape or dtype, or an empty array.

    Reference: Yu et al., Dual Contrastive Loss and Attention for GANs, ICCV 2021.
    """
    real, fake = logit_vector("real_logits", real_logits), logit_vector("fake_logits", fake_logits)
    return contrastive_half(real, fake) + contrastive_half(-fake, -real)


def dual_contrastive_g_loss(
    real_logits: Float[Tensor, " real"], fake_logits: Float[Tensor, " fake"], *, saturating: bool = False
) -> Float[Array, ""]:
    """The generator's part of the dual contrastive loss.

        L_G = dual(f, r) with the roles swapped, or -dual(r, f) where `saturating`;    dual(r, f): the discriminator's

    The paper's min-max is the saturating one; the swap is what later implementations train with. Real logits are needed
    in the generator's step; they do not depend on it, and must come from the discriminator of the same step.

    Args:
      real_logits: r [N], of real images.
      fake_logits: f [M], of generated images; N and M may differ.
      saturating: which of the two.

    Raises:
      UserError: on a wrong shape or dtype, or an empty array.

    Reference: Yu et al., Dual Contrastive Loss and Attention for GANs, ICCV 2021.
    """
    real, fake = logit_vector("real_logits", real_logits), logit_vector("fake_logits", fake_logits)
    return -dual_contrastive_d_loss(real, fake) if saturating else dual_contrastive_d_loss(fake, real)
