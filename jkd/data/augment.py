"""Augmentations of whole batches: pure, keyed, jit-able, the same under any sharding.

Images are [batch, height, width, channel], uint8 or float; what only moves or removes pixels keeps the
dtype. Keys are drawn for the whole (global) batch. Mixing takes its permutation and weight from the caller,
who needs them for the labels too: `draw_mixup` and `draw_cutmix` draw them from a key.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, UInt8

from jkd.checks import check_positive, check_share
from jkd.errors import UserError, unknown

Images = Num[Array, "batch height width channel"]
Size = tuple[int, ...]  # (height, width)
Number = float | int
Augmentation = Callable[[PRNGKeyArray, Array], Array]
PADDING_MODES = {"zero": "constant", "reflect": "reflect"}


class MixupDraw(NamedTuple):
    """What mixup needs: the partner of each example, and the weight of the example itself."""

    permutation: Int[Array, " batch"]
    lam: Float[Array, "..."]


class CutmixDraw(NamedTuple):
    """What cutmix needs: partners, the share outside the box before clipping, and the box's center (x, y)."""

    permutation: Int[Array, " batch"]
    lam: Float[Array, "..."]
    center: Int[Array, "... 2"]


def compose(*augmentations: Augmentation) -> Augmentation:
    """Returns (key, images) -> images that applies `augmentations` in order, each with a key of its own."""

    def composed(key: PRNGKeyArray, images: Array) -> Array:
        for augmentation, part in zip(augmentations, jax.random.split(key, len(augmentations)), strict=True):
            images = augmentation(part, images)
        return images

    return composed


def normalize(
    images: UInt8[Array, "*batch height width channel"],
    mean: Number | Sequence[Number],
    std: Number | Sequence[Number],
) -> Float[Array, "*batch height width channel"]:
    """Returns (images / 255 - mean) / std in float32; `mean` and `std` in [0, 1] units, one or a channel.

    Raises:
      UserError: if `mean` or `std` has another length than 1 or the channels.
    """
    for name, value in (("mean", mean), ("std", std)):
        if np.size(value) not in (1, images.shape[-1]):
            raise UserError(f"{name} must be one number or one a channel ({images.shape[-1]}), got {np.size(value)}.")
    dims = (1,) * (images.ndim - 1) + (-1,)
    center, scale = (jnp.asarray(value, jnp.float32).reshape(dims) for value in (mean, std))
    return (images.astype(jnp.float32) / 255 - center) / scale


def pad_crop(key: PRNGKeyArray, images: Images, padding: int = 4, *, mode: str = "zero") -> Images:
    """Pads every side by `padding` and crops back to the size at a random place, uniform in [0, 2 padding]^2.

    Raises:
      UserError: if `padding` is negative (or not below the side, for "reflect"), or `mode` is not "zero" or
        "reflect".
    """
    if mode not in PADDING_MODES:
        raise unknown("mode", mode, PADDING_MODES)
    batch, height, width, _ = images.shape
    if padding < 0 or (mode == "reflect" and padding >= min(height, width)):
        raise UserError(f"padding must be in [0, side), got {padding} for {height}x{width}, mode {mode!r}.")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    return _crop(images, offsets, padding, PADDING_MODES[mode])


def shift(key: PRNGKeyArray, images: Images, max_shift: int) -> Images:
    """Moves each image by whole pixels, uniform in [-max_shift, max_shift]^2; what comes in is 0.

    Raises:
      UserError: if `max_shift` is negative.
    """
    if max_shift < 0:
        raise UserError(f"max_shift must be >= 0, got {max_shift}.")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)
    return _crop(images, offsets, max_shift, "constant")


def flip(key: PRNGKeyArray, images: Images, probability: Number = 0.5) -> Images:
    """Mirrors each image left to right with `probability`.

    Raises:
      UserError: if `probability` is known to be outside [0, 1].
    """
    check_share("probability", probability)
    chosen = jax.random.bernoulli(key, probability, (len(images),))
    return jnp.where(_per_image(chosen), images[:, :, ::-1], images)


def rotation_bank(images: np.ndarray, degrees: Sequence[Number]) -> np.ndarray:
    """Precomputes on the host the copies of uint8[N, H, W, C] rotated by `degrees`: uint8[A, N, H, W, C].

    Counter-clockwise about the image center, bilinear, zeros outside. Rotation inside a training step is slow
    on a CPU; a gather from this bank is not.
    """
    from scipy import ndimage

    images = np.asarray(images)
    bank = np.empty((len(degrees), *images.shape), images.dtype)
    for copy, angle in zip(bank, degrees, strict=True):
        # float32 first: interpolation in uint8 would cut off the fractions.
        turned = ndimage.rotate(images.astype(np.float32), angle, axes=(2, 1), reshape=False, order=1)
        copy[...] = np.rint(turned) if np.issubdtype(images.dtype, np.integer) else turned
    return bank


def rotate(
    key: PRNGKeyArray,
    bank: Num[Array, "angles rows height width channel"] | Num[np.ndarray, "angles rows height width channel"],
    index: Int[Array, " batch"],
) -> Images:
    """Gathers example `index` of a `rotation_bank`, each at an angle of its own, uniform among the bank's."""
    angle = jax.random.randint(key, index.shape, 0, len(bank))
    return jnp.asarray(bank).at[angle, index].get(mode="clip")


def cutout(key: PRNGKeyArray, images: Images, size: int, *, per_example: bool = True) -> Images:
    """Sets a square of side `size` to 0, centered on a uniformly drawn pixel and clipped to the image.

    One place an image, or, with `per_example` False, one for the whole batch. DeVries and Taylor, "Improved
    regularization of convolutional neural networks with cutout", 2017.

    Raises:
      UserError: if `size` is negative.
    """
    if size < 0:
        raise UserError(f"size must be >= 0, got {size}.")
    center = _draw_center(key, len(images) if per_example else 1, images.shape[1:3])
    sides = jnp.full((1, 2), size, jnp.int32)
    return jnp.where(_box(images.shape[1:3], center, sides), jnp.zeros((), images.dtype), images)


def mixup(images: Images, permutation: Int[Array, " batch"], lam: Number | Float[Array, "..."]) -> Images:
    """Returns lam x_i + (1 - lam) x_{permutation(i)} with `lam` in [0, 1], a scalar or [batch].

    Float images only; the result has their dtype. Zhang et al., "mixup: beyond empirical risk minimization",
    2018.

    Raises:
      UserError: if the images are not float (a mean of bytes would be cut off), or `lam` is known to be outside
        [0, 1].
    """
    check_share("lam", lam)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"mixup needs float images (normalize them first), got {images.dtype}.")
    weight = _per_image(jnp.atleast_1d(jnp.asarray(lam, jnp.float32)))
    return (weight * images + (1 - weight) * images[permutation]).astype(images.dtype)


def cutmix(
    images: Images,
    permutation: Int[Array, " batch"],
    lam: Number | Float[Array, "..."],
    center: Int[Array, "... 2"] | Sequence[int],
) -> Images:
    """Pastes a box of x_{permutation(i)} into each x_i; pixels are moved, so any dtype will do.

    The box is [c - h, c + h) along each axis, h = int(side sqrt(1 - lam)) // 2, clipped to the image;
    the share really pasted is `cutmix_share`. Yun et al., "CutMix", 2019, as in its code.

    Args:
      images: [batch, height, width, channel].
      permutation: the partner of each example.
      lam: in [0, 1], scalar or [batch].
      center: (x, y) = (column, row) in pixels, [2] or [batch, 2].

    Returns:
      Images of the same dtype. A traced `lam` that is NaN makes float images NaN.

    Raises:
      UserError: if `lam` is known to be outside [0, 1].
    """
    check_share("lam", lam)
    mixed = jnp.where(_cutmix_box(images.shape[1:3], lam, center), images[permutation], images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        return mixed
    # Comparing with a NaN box would paste nothing and hide it.
    return jnp.where(_per_image(jnp.isnan(jnp.atleast_1d(jnp.asarray(lam)))), jnp.nan, mixed)


def cutmix_share(
    size: Size, lam: Number | Float[Array, "..."], center: Int[Array, "... 2"] | Sequence[int]
) -> Float[Array, " boxes"]:
    """The share of a (height, width) image that `cutmix` replaces, after clipping.

    It is the weight of the partner's label: one value where `lam` and `center` are shared by the batch, else
    one an example. A traced `lam` that is NaN gives NaN.

    Raises:
      UserError: if `lam` is known to be outside [0, 1].
    """
    check_share("lam", lam)
    share = _cutmix_box(size, lam, center).mean(axis=(1, 2, 3), dtype=jnp.float32)
    return jnp.where(jnp.isnan(jnp.atleast_1d(jnp.asarray(lam))), jnp.nan, share)


def draw_mixup(key: PRNGKeyArray, batch_size: int, alpha: Number = 0.2, *, per_example: bool = False) -> MixupDraw:
    """Draws a permutation and lam ~ Beta(alpha, alpha), one for the batch or one an example.

    Raises:
      UserError: if `alpha` is not positive and finite.
    """
    check_positive("alpha", alpha)
    order_key, lam_key = jax.random.split(key)
    shape = (batch_size,) if per_example else ()
    if alpha == 1:  # uniform: without the rejection sampling of Beta, which takes seconds to compile
        lam = jax.random.uniform(lam_key, shape)
    else:
        lam = jax.random.beta(lam_key, alpha, alpha, shape, jnp.float32)
    return MixupDraw(jax.random.permutation(order_key, batch_size), lam)


def draw_cutmix(
    key: PRNGKeyArray,
    batch_size: int,
    size: Size,
    alpha: Number = 1.0,
    *,
    per_example: bool = False,
) -> CutmixDraw:
    """Draws a permutation, lam ~ Beta(alpha, alpha) and a uniform center (x, y) in a (height, width) image.

    One box for the batch, or one an example.

    Raises:
      UserError: if `alpha` is not positive and finite.
    """
    mix_key, center_key = jax.random.split(key)
    permutation, lam = draw_mixup(mix_key, batch_size, alpha, per_example=per_example)
    center = _draw_center(center_key, batch_size if per_example else 1, size)
    return CutmixDraw(permutation, lam, center if per_example else center[0])


def _crop(images: Array, offsets: Array, padding: int, mode: str) -> Array:
    """Crops images back to their size at `offsets` [batch, 2] (row, column) of their padded selves."""
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, edges, mode=mode)

    def one(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    # A slice an image is 2 to 6 times faster on a CPU than gathers by row and column, one-hot products or
    # a select among all static shifts.
    return jax.vmap(one)(padded, offsets)


def _per_image(values: Array) -> Array:
    return values[:, None, None, None]


def _draw_center(key: Array, count: int, size: Size) -> Array:
    """Draws pixels (x, y), int32[count, 2], uniform in a (height, width) image."""
    return jax.random.randint(key, (count, 2), 0, jnp.array([[size[1], size[0]]]))


def _cutmix_box(size: Size, lam: Array | float, center: Array | Sequence[int]) -> Array:
    side = jnp.sqrt(1 - jnp.atleast_1d(jnp.asarray(lam, jnp.float32)))[:, None] * jnp.array([[size[1], size[0]]])
    # The small term keeps 10 * sqrt(.64) from becoming 7 in float32.
    sides = 2 * (jnp.floor(side + 1e-4).astype(jnp.int32) // 2)
    return _box(size, jnp.atleast_2d(jnp.asarray(center, jnp.int32)), sides)


def _box(size: Size, center: Array, sides: Array) -> Array:
    """True inside boxes of `sides` about `center`, both int32[boxes or 1, 2] (x, y): bool[boxes, H, W, 1]."""
    start = center - sides // 2
    inside = []
    for axis, length in enumerate((size[1], size[0])):
        place = jnp.arange(length)[None, :]
        inside.append((place >= start[:, axis, None]) & (place < (start + sides)[:, axis, None]))
    return (inside[1][:, :, None] & inside[0][:, None, :])[..., None]
