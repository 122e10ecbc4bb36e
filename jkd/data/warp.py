"""Augmentations that interpolate: rotations and random resized crops of whole batches, bilinear and keyed.

Images are [batch, height, width, channel]; bytes come back as bytes, rounded to the nearest.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Num, PRNGKeyArray

from jkd.checks import check_share
from jkd.errors import UserError

Images = Num[Array, "batch height width channel"]
Resized = Num[Array, "batch side side channel"]
ASPECT = 4 / 3  # the largest of a random crop, either way


def random_rotation(key: PRNGKeyArray, images: Images, degrees: float) -> Images:
    """Rotates each image about its center by an angle of its own, uniform in [-degrees, degrees]; outside is 0.

    Raises:
      UserError: if `degrees` is negative.
    """
    if degrees < 0:
        raise UserError(f"degrees must be >= 0, got {degrees}.")
    return rotated(images, jnp.deg2rad(jax.random.uniform(key, (len(images),), minval=-degrees, maxval=degrees)))


def rotated(images: Images, angles: Float[Array, " batch"]) -> Images:
    """Images rotated counter-clockwise by `angles` (radians) about their centers, bilinear, zeros outside."""
    bottom, right = ((side - 1) / 2 for side in images.shape[1:3])
    y, x = jnp.arange(images.shape[1])[:, None] - bottom, jnp.arange(images.shape[2])[None] - right

    def one(image: Array, angle: Array) -> Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        # Where each pixel comes from.
        place = [cos * y + sin * x + bottom, cos * x - sin * y + right]
        return map_coordinates(image, place, order=1)

    channels = jax.vmap(one, in_axes=(-1, None), out_axes=-1)
    return _like(images, jax.vmap(channels)(images.astype(jnp.float32), angles))


def random_resized_crop(key: PRNGKeyArray, images: Images, size: int, area: float = 0.08) -> Resized:
    """Resizes a random box of each image to `size` x `size`: its share of the area uniform in [area, 1].

    The logarithm of its aspect is uniform in +-log(4/3), its place uniform; a box that is larger than the image is cut
    to it. (Drawing again instead, as is usual, takes another number of steps for every image.)

    Raises:
      UserError: if `size` is not positive, or `area` is outside [0, 1].
    """
    _check_size(size)
    check_share("area", area)
    _, height, width, channels = images.shape
    shares, aspects, places = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(shares, (len(images), 1), minval=area) * height * width)
    bend = jnp.exp(jax.random.uniform(aspects, (len(images), 1), minval=-1.0) * jnp.log(ASPECT) / 2)
    whole = jnp.array([[height, width]], jnp.float32)
    box = jnp.clip(jnp.concatenate([side / bend, side * bend], axis=1), 1, whole)
    start = jax.random.uniform(places, box.shape) * (whole - box)

    def one(image: Array, start: Array, box: Array) -> Array:
        scale = size / box
        shape = (size, size, channels)
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, -start * scale, "linear")

    return _like(images, jax.vmap(one)(images.astype(jnp.float32), start, box))


def resize(images: Images, size: int) -> Resized:
    """Resizes images to `size` x `size`, bilinear with half-pixel centers.

    Raises:
      UserError: if `size` is not positive.
    """
    _check_size(size)
    shape = (len(images), size, size, images.shape[-1])
    return _like(images, jax.image.resize(images.astype(jnp.float32), shape, "bilinear"))


def _check_size(size: int) -> None:
    if size < 1:
        raise UserError(f"size must be >= 1 pixels, got {size}.")


def _like(images: Array, values: Array) -> Array:
    if jnp.issubdtype(images.dtype, jnp.integer):
        limits = jnp.iinfo(images.dtype)
        values = jnp.clip(jnp.round(values), limits.min, limits.max)
    return values.astype(images.dtype)
