"""RandAugment and AutoAugment for uint8 batches: pure, keyed, jit-able, the same under any sharding.

The operations are those of Pillow, on which both methods were built. Every image goes through three stages (a nearest
neighbor warp, a table of 256 values, a blend), of which its operation sets one and leaves the others without effect:
each image may then have an operation of its own at the cost of one pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from jkd.errors import UserError, unknown

Number = float | int
Bytes = UInt8[Array, "batch height width channel"]
Image = UInt8[Array, "height width channel"]

GEOMETRIC = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "color", "contrast", "sharpness")
TABLES = ("posterize", "solarize", "auto_contrast", "equalize", "invert")
OPERATIONS = GEOMETRIC + BLENDS + TABLES
RAND_AUGMENT_OPERATIONS = OPERATIONS[:-1]  # all but invert, as in the paper
LEVELS = 30

# Two operations each: name, probability, level of 0 to 9.
POLICIES = {
    "cifar10": (
        (("invert", 0.1, 0), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 0)),
        (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
        (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
        (("color", 0.9, 9), ("equalize", 0.6, 0)),
        (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 0), ("invert", 0.1, 0)),
        (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
    ),
    "imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
        (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
        (("color", 0.4, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    ),
}


def rand_augment(
    key: PRNGKeyArray, images: Bytes, num_operations: int = 2, magnitude: Number = 10, *, fill: int = 128
) -> Bytes:
    """Applies `num_operations` operations to each image, drawn uniformly and with replacement from 14.

    All have the same strength, magnitude / 30 of their range (see `apply_operations`); the sign of those that have one
    is drawn too. Cubuk et al., "RandAugment", 2020, on whose scale ImageNet models take 9 and smaller sets 2 to 14.

    Args:
      key: one for the whole batch.
      images: uint8, before any normalization; 1 or 3 channels.
      num_operations: how many follow one another; static.
      magnitude: in [0, 30].
      fill: value of the pixels that come in from outside.

    Raises:
      UserError: if the images are not uint8 of 1 or 3 channels, `num_operations` is negative, or `magnitude` is
        outside [0, 30].
    """
    _check_images(images)
    if num_operations < 0 or not 0 <= magnitude <= LEVELS:
        raise UserError(
            f"num_operations must be >= 0 and magnitude in [0, {LEVELS}], got {num_operations} and {magnitude}."
        )
    which, sign = jax.random.split(key)
    shape = (num_operations, len(images))
    operations = jax.random.randint(which, shape, 0, len(RAND_AUGMENT_OPERATIONS))
    strengths = jax.random.rademacher(sign, shape, jnp.float32) * (magnitude / LEVELS)
    return _in_turn(images, operations, strengths, fill)


def auto_augment(key: PRNGKeyArray, images: Bytes, policy: str = "cifar10", *, fill: int = 128) -> Bytes:
    """Applies to each image one of the 25 pairs of operations of a learned policy, each with its own probability.

    Strengths are level / 9 of an operation's range (see `apply_operations`); the sign of those that have one is drawn.
    Cubuk et al., "AutoAugment", 2019.

    Args:
      key: one for the whole batch.
      images: uint8, before any normalization; 1 or 3 channels.
      policy: "cifar10" or "imagenet".
      fill: value of the pixels that come in from outside.

    Raises:
      UserError: if the images are not uint8 of 1 or 3 channels, or the policy is unknown.
    """
    _check_images(images)
    if policy not in POLICIES:
        raise unknown("policy", policy, POLICIES)
    table = np.array([[(OPERATIONS.index(n), p, level / 9) for n, p, level in pair] for pair in POLICIES[policy]])
    keys = jax.random.split(key, 3)
    pairs = jnp.asarray(table, jnp.float32)[jax.random.randint(keys[0], (len(images),), 0, len(table))]
    signs = jax.random.rademacher(keys[1], (len(images), 2), jnp.float32)
    applied = jax.random.uniform(keys[2], (len(images), 2)) < pairs[..., 1]
    operations = jnp.where(applied, pairs[..., 0], 0).astype(jnp.int32)
    return _in_turn(images, operations.T, (pairs[..., 2] * signs).T, fill)


def apply_operations(
    images: Bytes, operations: Int[Array, " batch"], strengths: Float[Array, " batch"], *, fill: int = 128
) -> Bytes:
    """Applies to each image one of the `OPERATIONS`, by its index, at a strength s in [-1, 1].

    Shears by 0.3 s (about the first pixel), translations by 150/331 s of the side (in whole pixels), rotation by 30 s
    degrees about the center; brightness, color, contrast and sharpness by the factor 1 + 0.9 s; of |s| only:
    posterize to 8 - round(4 |s|) bits, solarize from the value 256 (1 - |s|) on. auto_contrast, equalize, invert and
    identity have no strength.

    Raises:
      UserError: if the images are not uint8 of 1 or 3 channels.
    """
    _check_images(images)

    def one(image: Image, operation: Int[Array, ""], strength: Float[Array, ""]) -> Image:
        image = _warp(image, _matrix(operation, strength, image.shape[:2]), fill)
        image = _look_up(image, operation, jnp.abs(strength))
        return _blend(image, operation, strength)

    return jax.vmap(one)(images, operations, strengths)


def _in_turn(
    images: Bytes, operations: Int[Array, "steps batch"], strengths: Float[Array, "steps batch"], fill: int
) -> Bytes:
    def step(images: Bytes, drawn: tuple[Array, Array]) -> tuple[Bytes, None]:
        return apply_operations(images, *drawn, fill=fill), None

    return jax.lax.scan(step, images, (operations, strengths))[0]


def _check_images(images: Array) -> None:
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            "images must be uint8 [batch, height, width, 1 or 3] (augment before normalizing), "
            f"got {images.dtype} {list(images.shape)}."
        )


def _matrix(operation: Array, strength: Array, size: tuple[int, ...]) -> Float[Array, "2 3"]:
    """Where a pixel (x, y, 1) of the result comes from; the identity for what is not geometric."""
    height, width = size
    angle = strength * (np.pi / 6)
    cos, sin, shear = jnp.cos(angle), jnp.sin(angle), 0.3 * strength
    x, y = width / 2, height / 2
    shift = [jnp.trunc(strength * (150 / 331) * side) for side in (width, height)]
    rows = {
        "identity": (1, 0, 0, 0, 1, 0),
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift[0], 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift[1]),
        "rotate": (cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos),
    }
    table = jnp.stack([jnp.stack([jnp.asarray(value, jnp.float32) for value in rows[name]]) for name in GEOMETRIC])
    return table[jnp.where(operation < len(GEOMETRIC), operation, 0)].reshape(2, 3)


def _warp(image: Image, matrix: Float[Array, "2 3"], fill: int) -> Image:
    height, width = image.shape[:2]
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    column, row = (jnp.floor(m[0] * x + m[1] * y + m[2]).astype(jnp.int32) for m in matrix)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    moved = image.at[row, column].get(mode="clip")
    return jnp.where(inside[..., None], moved, jnp.uint8(fill))


def _look_up(image: Image, operation: Array, strength: Array) -> Image:
    """Replaces every value by that in a table; the table is the identity for what is no table operation."""
    value = jnp.arange(256)
    mask = -(2 ** jnp.round(4 * strength).astype(jnp.int32))
    common = [value & mask, jnp.where(value < 256 * (1 - strength), value, 255 - value)]

    def channel(pixels: Array) -> Array:
        tables = jnp.stack([*common, _auto_contrast(pixels), _equalize(pixels), 255 - value, value])
        index = operation - len(GEOMETRIC + BLENDS)
        return tables[jnp.where(index < 0, len(TABLES), index)][pixels]

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image.astype(jnp.int32)).astype(jnp.uint8)


def _auto_contrast(pixels: Int[Array, "height width"]) -> Int[Array, "256"]:
    low, high = pixels.min(), pixels.max()
    value = jnp.arange(256)
    stretched = jnp.clip((value - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, value)


def _equalize(pixels: Int[Array, "height width"]) -> Int[Array, "256"]:
    counts = jnp.zeros(256, jnp.int32).at[pixels.ravel()].add(1)
    value = jnp.arange(256)
    step = (pixels.size - counts[pixels.max()]) // 255
    below = jnp.cumsum(counts) - counts
    flat = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, flat, value)


def _blend(image: Image, operation: Array, strength: Array) -> Image:
    """Away from, or towards, black, gray, the mean gray or the smoothed image; a factor of 1 changes nothing."""
    pixels = image.astype(jnp.float32)
    gray = _gray(image.astype(jnp.int32))
    mean = jnp.floor(gray.mean(dtype=jnp.float32) + 0.5)
    plain = [jnp.zeros_like(pixels), jnp.broadcast_to(gray, pixels.shape), jnp.broadcast_to(mean, pixels.shape)]
    index = operation - len(GEOMETRIC)
    degenerate = jnp.stack([*plain, _smooth(pixels)])[jnp.clip(index, 0, len(BLENDS) - 1)]
    factor = jnp.where((index >= 0) & (index < len(BLENDS)), 1 + 0.9 * strength, 1)
    return jnp.clip(degenerate + factor * (pixels - degenerate), 0, 255).astype(jnp.uint8)


def _gray(image: Int[Array, "height width channel"]) -> Float[Array, "height width 1"]:
    """Luma as Pillow computes it, in whole numbers."""
    if image.shape[-1] == 1:
        return image.astype(jnp.float32)
    weighted = image * jnp.array([19595, 38470, 7471])[None, None, :]
    return ((weighted.sum(-1, keepdims=True) + 0x8000) >> 16).astype(jnp.float32)


def _smooth(pixels: Float[Array, "height width channel"]) -> Float[Array, "height width channel"]:
    """The mean of 3 x 3 pixels, the middle one weighted 5 times; the border stays."""
    height, width, _ = pixels.shape
    if min(height, width) < 3:
        return pixels
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = jnp.floor((around + 4 * pixels[1:-1, 1:-1]) / 13 + 0.5)
    return pixels.at[1:-1, 1:-1].set(inner)
