"""Adaptive augmentation of what a discriminator sees: real and generated images alike, as often as it overfits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jkd import data
from jkd.checks import Scalar, Tensor, check_positive, check_share
from jkd.errors import UserError
from jkd.gan.checks import some_logits


def ada_update(
    probability: Scalar,
    real_logits: Float[Tensor, "*shape"],
    *,
    images: Scalar,
    target: Scalar = 0.6,
    adjust_images: Scalar = 500_000,
) -> Float[Array, ""]:
    """The next probability of augmentation: higher while the discriminator is too sure of the training images.

        p' = clip( p + sign(r_t - target) images / adjust_images, 0, 1 ),    r_t = mean sign(D(real)) in [-1, 1]

    A NaN stays one; no gradient passes.

    Args:
      probability: p, in [0, 1]; it starts at 0.
      real_logits: D(real), of any shape, of all training images since the last update.
      images: how many training images the discriminator saw since then.
      target: of r_t; 0 where it does not overfit at all, 1 where it is right about every training image.
      adjust_images: over how many images p goes from 0 to 1.

    Raises:
      UserError: on a wrong dtype, no logits, a probability known to be outside [0, 1], or numbers of images known not
        to be positive.

    Reference: Karras et al., Training Generative Adversarial Networks with Limited Data, NeurIPS 2020.
    """
    check_share("probability", probability)
    check_positive("images", images)
    check_positive("adjust_images", adjust_images)
    overfitting = jnp.sign(some_logits("real_logits", real_logits)).mean()
    moved = jnp.asarray(probability) + jnp.sign(overfitting - target) * (jnp.asarray(images) / adjust_images)
    return jax.lax.stop_gradient(jnp.clip(moved, 0, 1))


def _flip(key: Key[Array, ""], images: Array) -> Array:
    return data.flip(key, images)


def _rotate(key: Key[Array, ""], images: Array) -> Array:
    turns = jax.random.randint(key, (len(images), 1, 1, 1), 0, 4)
    return jnp.select([turns == k for k in (1, 2, 3)], [jnp.rot90(images, k, (1, 2)) for k in (1, 2, 3)], images)


def _translate(key: Key[Array, ""], images: Array) -> Array:
    return data.pad_crop(key, images, min(images.shape[1:3]) // 8, mode="reflect")


def _brighten(key: Key[Array, ""], images: Array) -> Array:
    return images + 0.2 * jax.random.normal(key, (len(images), 1, 1, 1), images.dtype)


def _contrast(key: Key[Array, ""], images: Array) -> Array:
    return images * jnp.exp2(0.5 * jax.random.normal(key, (len(images), 1, 1, 1), images.dtype))


def _cut(key: Key[Array, ""], images: Array) -> Array:
    return data.cutout(key, images, min(images.shape[1:3]) // 2)


def augment_with_probability(
    key: Key[Array, ""],
    images: Float[Tensor, "batch height width channels"],
    probability: Scalar,
    *,
    flip: bool = True,
    rotate: bool = True,
) -> Float[Array, "batch height width channels"]:
    """Six augmentations one after the other, each applied to each image with one probability.

        mirrored (or not), turned by 0, 90, 180 or 270 degrees, moved by up to an eighth of the shorter side
        (whole pixels, reflected edges), + b with b ~ N(0, 0.2^2), * c with log2 c ~ N(0, 0.5^2), and a square of half
        the shorter side set to 0

    Generated images hardly learn the augmentations while the probability stays below about 0.8, the paper finds. The
    result is differentiable with respect to the images, keeps their dtype, and is not clipped. At 0 the images are
    returned as they are; a traced probability of NaN gives NaN.

    Args:
      key: for the whole (global) batch; real and generated images take different ones.
      images: about [-1, 1].
      probability: in [0, 1], as of `ada_update`.
      flip: whether images are mirrored; static.
      rotate: whether images are turned, which must then be square; static.

    Raises:
      UserError: on a wrong dtype or shape, or a probability known to be outside [0, 1].

    Reference: Karras et al., Training Generative Adversarial Networks with Limited Data, NeurIPS 2020, whose pipeline
      has more.
    """
    check_share("probability", probability)
    found = jnp.asarray(images)
    if found.ndim != 4 or not jnp.issubdtype(found.dtype, jnp.floating):
        wanted = "images must be floating point [batch, height, width, channels]"
        raise UserError(f"{wanted}, got {found.dtype} {list(found.shape)}.")
    if rotate and found.shape[1] != found.shape[2]:
        raise UserError(f"images must be square where rotate is True, got {list(found.shape[1:3])}.")
    steps = [*([_flip] if flip else []), *([_rotate] if rotate else []), _translate, _brighten, _contrast, _cut]
    for step, part in zip(steps, jax.random.split(key, len(steps)), strict=True):
        gate, draw = jax.random.split(part)
        chosen = jax.random.bernoulli(gate, probability, (len(found), 1, 1, 1))
        found = jnp.where(chosen, step(draw, found), found)
    # A comparison with NaN is False and would hide it.
    return jnp.where(jnp.isnan(jnp.asarray(probability)), jnp.nan, found)
