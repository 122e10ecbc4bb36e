"""What happens to images between their maker and their reader: noise, blur, JPEG, crops; pure, keyed, differentiable.

Images are floating [batch, height, width, channel] in [0, 1]; results are cut to [0, 1] and have the same dtype, and
the arithmetic between is float32 at least. Gradients are those of the operation, and 0 where a result is cut.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import fft

from jkd.checks import Scalar, Tensor, as_float, check_positive, check_share, concrete
from jkd.data.jitter import LUMA
from jkd.errors import UserError, unknown

Images = Float[Tensor, "batch height width channel"]
Same = Float[Array, "batch height width channel"]

BLOCK = 8
HIGHEST = jax.lax.Precision.HIGHEST
DCT = fft.dct(np.eye(BLOCK), axis=0, norm="ortho")
# Annex K of the JPEG standard: for luminance, then for both chrominances.
TABLES = (
    np.array(
        [
            [16, 11, 10, 16, 24, 40, 51, 61],
            [12, 12, 14, 19, 26, 58, 60, 55],
            [14, 13, 16, 24, 40, 57, 69, 56],
            [14, 17, 22, 29, 51, 87, 80, 62],
            [18, 22, 37, 56, 68, 109, 103, 77],
            [24, 35, 55, 64, 81, 104, 113, 92],
            [49, 64, 78, 87, 103, 121, 120, 101],
            [72, 92, 95, 98, 112, 100, 103, 99],
        ]
    ),
    np.array(
        [
            [17, 18, 24, 47, *4 * [99]],
            [18, 21, 26, 66, *4 * [99]],
            [24, 26, 56, *5 * [99]],
            [47, 66, *6 * [99]],
            *4 * [8 * [99]],
        ]
    ),
)
# From R, G, B to Y, (B - Y) / 1.772 and (R - Y) / 1.402, for columns.
TO_YCC = np.stack([LUMA, (np.eye(3)[2] - LUMA) / 1.772, (np.eye(3)[0] - LUMA) / 1.402])


def gaussian_noise(key: PRNGKeyArray, images: Images, sigma: Scalar) -> Same:
    """Adds noise of its own to every value: clip(x + sigma n, 0, 1), n standard normal, sigma >= 0.

    Raises:
      UserError: if the images are not floating [batch, height, width, channel], or `sigma` is known to be negative.
    """
    x = _check_images(images)
    _check_sigma(sigma)
    return _finish(images, x + sigma * jax.random.normal(key, x.shape, x.dtype))


def gaussian_blur(images: Images, sigma: Scalar, size: int) -> Same:
    """Filters rows, then columns, with exp(-k^2 / (2 sigma^2)), k = -(size // 2) ... size // 2, normalized to sum 1.

    Beyond an edge the image is mirrored about the edge's pixels. A `sigma` of 0 changes nothing; in pixels.

    Raises:
      UserError: if the images are not floating [batch, height, width, channel], `sigma` is known to be negative, or
        `size` is not odd or reaches beyond the mirrored image.
    """
    x = _check_images(images)
    _check_sigma(sigma)
    side = min(x.shape[1:3])
    if size < 1 or size % 2 == 0 or size // 2 >= side:
        raise UserError(f"size must be odd and in [1, 2 side - 1], got {size} for a side of {side} pixels.")
    offsets = jnp.arange(size, dtype=x.dtype) - size // 2
    # Small enough for all weight to fall on the center; a sigma of 0 would be 0 / 0.
    weights = jax.nn.softmax(-jnp.square(offsets / jnp.maximum(sigma, 1e-3)) / 2)
    for axis in (1, 2):
        x = _filtered(x, weights, axis)
    return _finish(images, x)


def jpeg(images: Images, quality: int, *, subsampling: bool = True) -> Same:
    """What is left of images that are written as baseline JPEG files and read again.

        c = DCT(8x8 blocks of 255 YCbCr),    c' = q round(c / q),    q = clip(floor((s table + 50) / 100), 1, 255),
        s = floor(5000 / quality) for quality < 50, else 200 - 2 quality

    The tables are the standard's, scaled as in the Independent JPEG Group's library. With `subsampling`, chrominance
    has half the resolution (4:2:0): means of 2x2 pixels, read with bilinear interpolation. Sizes that are no
    multiples of 8 (16 with `subsampling`) are padded by repeating the edges. As in files, planes are rounded to whole
    levels on both ways; the resulting colors are not, so round them to bytes for what a reader of files would see.

    The gradient passes through the rounding as if it were not there, so it is finite at every quality.

    Args:
      images: of one channel (grey) or three (RGB).
      quality: 1 to 100; static.
      subsampling: of chrominance; nothing to a grey image.

    Raises:
      UserError: if the images are not floating [batch, height, width, 1 or 3], or `quality` is no integer in
        [1, 100].

    Reference: Wallace, The JPEG still picture compression standard, Communications of the ACM 34, 1991.
    """
    x = 255 * _check_images(images)
    if x.shape[-1] not in (1, 3):
        raise UserError(f"jpeg takes images of 1 or 3 channels, got {x.shape[-1]}.")
    tables = [quantization_table(quality, table) for table in TABLES]
    if x.shape[-1] == 1:
        return _finish(images, _coded(x - 128, tables[0]) / 255 + 128 / 255)
    planes = jnp.matmul(x, TO_YCC.T.astype(x.dtype), precision=HIGHEST)
    luma = _coded(planes[..., :1] - 128, tables[0]) + 128
    coded_chroma = _coded_at_half_size if subsampling else _coded
    planes = jnp.concatenate([luma, coded_chroma(planes[..., 1:], tables[1])], axis=-1)
    return _finish(images, jnp.matmul(planes, np.linalg.inv(TO_YCC).T.astype(x.dtype), precision=HIGHEST) / 255)


def quantization_table(quality: int, table: np.ndarray) -> np.ndarray:
    """The steps of an 8x8 block's coefficients at a `quality`; see `jpeg`.

    Raises:
      UserError: if `quality` is no integer in [1, 100].
    """
    if not isinstance(quality, int | np.integer) or not 1 <= quality <= 100:
        raise UserError(f"quality must be an integer in [1, 100], got {quality!r}.")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * scale + 50) // 100, 1, 255)


def crop_resize(key: PRNGKeyArray, images: Images, share: Scalar) -> Same:
    """Cuts a box of `share` of each side out of each image, at a uniform place, and enlarges it to the image's size.

    Bilinear with half-pixel centers; places are no whole pixels.

    Raises:
      UserError: if the images are not floating [batch, height, width, channel], or `share` is known to be outside
        (0, 1].
    """
    x = _check_images(images)
    check_positive("share", share)
    check_share("share", share)
    sides = jnp.array([x.shape[1:3]], x.dtype)
    starts = jax.random.uniform(key, (len(x), 2), x.dtype) * (1 - share) * sides
    scale = jnp.broadcast_to(1 / jnp.asarray(share, x.dtype), 2)

    def one(image: Array, start: Array) -> Array:
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -start * scale, "linear")

    return _finish(images, jax.vmap(one)(x, starts))


def _blur(key: PRNGKeyArray, images: Images, strength: float | int) -> Same:
    del key
    _check_sigma(strength)
    radius = min(math.ceil(3 * strength), min(images.shape[1:3]) - 1)
    return gaussian_blur(images, strength, 2 * radius + 1)


def _jpeg(key: PRNGKeyArray, images: Images, strength: int) -> Same:
    del key
    return jpeg(images, strength)


# What the strength of each is: sigma; sigma in pixels; quality; share of the side.
PERTURBATIONS: dict[str, Callable[..., Same]] = {
    "noise": gaussian_noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "crop": crop_resize,
}


def perturb(key: PRNGKeyArray, images: Images, name: str, strength: float | int) -> Same:
    """Changes images by the perturbation `name`, of a static `strength`.

    "noise": its standard deviation, see `gaussian_noise`. "blur": sigma in pixels, with a filter that ends at 3 sigma,
    see `gaussian_blur`. "jpeg": the quality, 1 to 100, see `jpeg`. "crop": the share of each side that is kept, see
    `crop_resize`.

    Raises:
      UserError: if the name is unknown, or the images or the strength are not what the perturbation takes.
    """
    if name not in PERTURBATIONS:
        raise unknown("perturbation", name, PERTURBATIONS)
    return PERTURBATIONS[name](key, images, strength)


def _check_images(images: Images) -> Array:
    if jnp.ndim(images) != 4:
        raise UserError(f"images must be [batch, height, width, channel], got {list(jnp.shape(images))}.")
    return as_float("images", images)


def _check_sigma(sigma: Scalar) -> None:
    known = concrete(sigma)
    if known is not None and not 0 <= known < math.inf:
        raise UserError(f"sigma must be finite and >= 0, got {sigma}.")


def _finish(images: Images, values: Array) -> Array:
    return jnp.clip(values, 0, 1).astype(images.dtype)


def _filtered(x: Array, weights: Array, axis: int) -> Array:
    radius = len(weights) // 2
    edges = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    padded, side = jnp.pad(x, edges, mode="reflect"), x.shape[axis]
    parts = (weights[i] * jax.lax.slice_in_dim(padded, i, i + side, axis=axis) for i in range(len(weights)))
    return functools.reduce(jnp.add, parts)


def _round(x: Array) -> Array:
    """The nearest integers, with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, ((0, 0), *((0, -side % multiple) for side in x.shape[1:3]), (0, 0)), mode="edge")


def _coded(planes: Array, table: np.ndarray) -> Array:
    """Planes [batch, height, width, plane] of levels about 0, after their 8x8 coefficients are rounded to `table`."""
    batch, height, width, count = planes.shape
    padded = _padded(_round(planes), BLOCK)
    rows, columns = (side // BLOCK for side in padded.shape[1:3])
    blocks = padded.reshape(batch, rows, BLOCK, columns, BLOCK, count)
    dct, steps = jnp.asarray(DCT, planes.dtype), jnp.asarray(table, planes.dtype)[None, None, :, None, :, None]
    coefficients = jnp.einsum("ui,bricjp,vj->brucvp", dct, blocks, dct, precision=HIGHEST)
    kept = _round(coefficients / steps) * steps
    blocks = jnp.einsum("ui,brucvp,vj->bricjp", dct, kept, dct, precision=HIGHEST)
    return jnp.clip(_round(blocks), -128, 127).reshape(padded.shape)[:, :height, :width]


def _coded_at_half_size(planes: Array, table: np.ndarray) -> Array:
    batch, height, width, count = planes.shape
    padded = _padded(planes, 2)
    rows, columns = (side // 2 for side in padded.shape[1:3])
    half = padded.reshape(batch, rows, 2, columns, 2, count).mean((2, 4))
    full = jax.image.resize(_coded(half, table), padded.shape, "bilinear")
    return full[:, :height, :width]
