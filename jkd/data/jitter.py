"""Random changes of color, keyed, for whole batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from jkd.checks import check_share
from jkd.errors import UserError

LUMA = (0.299, 0.587, 0.114)


def color_jitter(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channel"], strength: float
) -> UInt8[Array, "batch height width channel"]:
    """Changes brightness, then contrast, then saturation, each image by factors of its own in 1 -+ strength.

    Each step mixes the image with what the factor 0 would leave of it: black; the image's mean grey; each pixel's own
    grey (left out for images of one channel). Values are cut to [0, 255] after each step.

    Raises:
      UserError: if `strength` is outside [0, 1], or the images have neither one channel nor three.
    """
    check_share("strength", strength)
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"color_jitter takes images of 1 or 3 channels, got {channels}.")
    factors = jax.random.uniform(key, (3, len(images), 1, 1, 1), minval=1 - strength, maxval=1 + strength)

    def grey(x: Array) -> Array:
        return (x * jnp.array(LUMA)[None, None, None]).sum(-1, keepdims=True) if channels == 3 else x

    def mean_grey(x: Array) -> Array:
        return grey(x).mean((1, 2, 3), keepdims=True)

    steps: tuple[Callable[[Array], Array], ...] = (jnp.zeros_like, mean_grey, grey)
    x = images.astype(jnp.float32)
    for factor, rest in zip(factors, steps, strict=True):
        x = jnp.clip(factor * x + (1 - factor) * rest(x), 0, 255)
    return jnp.round(x).astype(images.dtype)
