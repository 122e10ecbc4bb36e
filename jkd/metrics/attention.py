"""Where classifiers look: class activation maps, and how far those of several classifiers overlap."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jkd.checks import Scalar, Tensor, as_float, check_positive, check_share
from jkd.errors import UserError


def class_sum_attention(
    feat: Float[Tensor, "batch h w channels"],
    head_kernel: Float[Tensor, "channels classes"],
    head_bias: Float[Tensor, " classes"],
    out_size: int | tuple[int, int],
) -> Float[Array, "batch height width"]:
    """The class activation maps of a linear head, summed over all classes and resized.

        A_b[i, j] = sum_k (feat_b[i, j] . W[:, k] + beta_k) = feat_b[i, j] . (W 1) + sum_k beta_k

    Resized bilinearly with half-pixel centers. In float32 at least, at full precision on any device.

    Args:
      feat: the last feature map before global average pooling.
      head_kernel: W.
      head_bias: beta; it moves the whole map, and so no mask of `binarize_attention`.
      out_size: of the maps, as a side or (height, width); static.

    Raises:
      UserError: if the shapes do not fit, a dtype is not floating point, or `out_size` is not positive.

    Reference: Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism,
      Expert Systems with Applications 262, 2025.
    """
    size = (out_size, out_size) if isinstance(out_size, int) else tuple(out_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"out_size must be positive, as a side or (height, width), got {out_size}.")
    shapes = {"feat": jnp.shape(feat), "head_kernel": jnp.shape(head_kernel), "head_bias": jnp.shape(head_bias)}
    fits = [len(shape) for shape in shapes.values()] == [4, 2, 1]
    if not fits or (shapes["feat"][3], *shapes["head_bias"]) != shapes["head_kernel"]:
        raise UserError(
            "feat, head_kernel and head_bias must have the shapes [batch, h, w, channels], [channels, classes] and "
            f"[classes], got {', '.join(str(list(shape)) for shape in shapes.values())}."
        )
    features, kernel, bias = (
        as_float("feat", feat),
        as_float("head_kernel", head_kernel),
        as_float("head_bias", head_bias),
    )
    maps = jnp.matmul(features, kernel.sum(axis=1), precision=jax.lax.Precision.HIGHEST) + bias.sum()
    return jax.image.resize(maps, (maps.shape[0], *size), "bilinear", antialias=False)


def binarize_attention(
    att: Float[Tensor, "batch height width"], threshold: Scalar = 0.4, eps: float = 1e-8
) -> Bool[Array, "batch height width"]:
    """The part of each image that its map points to.

        mask = (A - min A) / (max A - min A + eps) > threshold,    min and max over each image

    No positive affine change of a map moves its mask, up to eps. A constant map gives an empty mask, and so
    does one with a NaN: `attention_counts` counts where both masks of a pair are empty.

    Args:
      att: attention maps.
      threshold: in [0, 1].
      eps: > 0.

    Raises:
      UserError: if `att` is no floating point array [batch, height, width], or `threshold` or `eps` is known to
        be out of range.
    """
    if jnp.ndim(att) != 3:
        raise UserError(f"att must have the shape [batch, height, width], got {list(jnp.shape(att))}.")
    check_share("threshold", threshold)
    check_positive("eps", eps)
    maps = as_float("att", att)
    low, high = (extreme(maps, axis=(1, 2), keepdims=True) for extreme in (jnp.min, jnp.max))
    return (maps - low) / (high - low + eps) > threshold


def _masks(masks: Tensor) -> Bool[Array, "maps batch height width"]:
    if jnp.ndim(masks) != 4 or jnp.shape(masks)[0] < 2:
        raise UserError(
            "masks must have the shape [maps, batch, height, width] with at least two maps of every image, "
            f"got {list(jnp.shape(masks))}."
        )
    if not jnp.issubdtype(jnp.result_type(masks), jnp.bool_):
        raise UserError(f"masks must be boolean, got {jnp.result_type(masks)}: see binarize_attention.")
    return jnp.asarray(masks)


def _ratio(intersection: Array, union: Array) -> Array:
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 1)


def attention_iou(masks: Bool[Tensor, "maps batch height width"], per_image: bool = False) -> Float[Array, "*images"]:
    """Intersection over union of the masks that M classifiers give the same images.

        IoU = #{pixels on in all M masks} / #{pixels on in any of them}

    Pooled over the pixels of all images, or image by image. Two empty masks are equal: 1. Pooled values do not
    add up over batches; `attention_counts` does. (The code of the authors below averages the pooled values
    of its batches, weighted by their sizes.)

    Args:
      masks: M >= 2 masks of every image.
      per_image: whether to give one value an image; static.

    Raises:
      UserError: if `masks` is no boolean array [maps, batch, height, width] with M >= 2.

    Reference: Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism,
      Expert Systems with Applications 262, 2025.
    """
    on = _masks(masks)
    axes = (1, 2) if per_image else (0, 1, 2)
    return _ratio(on.all(axis=0).sum(axis=axes), on.any(axis=0).sum(axis=axes))


class AttentionCounts(NamedTuple):
    """Pixels in the intersection and the union of every pair of M maps, and of all M; add them over batches.

    `empty` counts the images whose union is empty, hence of an IoU of 1 that says nothing. Pixels are float32:
    exact up to 2^24, and without the overflow of int32 beyond 2^31.
    """

    images: Int[Array, ""]
    intersection: Float[Array, "maps maps"]
    union: Float[Array, "maps maps"]
    empty: Int[Array, "maps maps"]
    all_intersection: Float[Array, ""]
    all_union: Float[Array, ""]
    all_empty: Int[Array, ""]

    @property
    def iou(self) -> Float[Array, "maps maps"]:
        """The pooled IoU of every pair."""
        return _ratio(self.intersection, self.union)

    @property
    def all_iou(self) -> Float[Array, ""]:
        """The pooled IoU of all maps."""
        return _ratio(self.all_intersection, self.all_union)


def attention_counts(
    masks: Bool[Tensor, "maps batch height width"], where: Bool[Tensor, " batch"] | None = None
) -> AttentionCounts:
    """What `attention_iou` divides, for every pair of maps and for all of them.

    Call it batch by batch and keep the counts: maps resized to the images are large.

    Args:
      masks: M >= 2 masks of every image.
      where: False for padding; None counts every image.

    Raises:
      UserError: if `masks` is no boolean array [maps, batch, height, width] with M >= 2, or the shape of `where`
        is not [batch].
    """
    on = _masks(masks)
    maps, batch = on.shape[:2]
    if where is not None and jnp.shape(where) != (batch,):
        raise UserError(f"where must have the shape [{batch}], got {list(jnp.shape(where))}.")
    counted = jnp.ones(batch, bool) if where is None else jnp.asarray(where, bool)
    # Of one image: float32 products of 0 and 1, exact up to 2^24 pixels.
    flat = on.reshape(maps, batch, -1).astype(jnp.float32)
    intersection = jnp.einsum("ibp,jbp->bij", flat, flat, precision=jax.lax.Precision.HIGHEST)
    size = jnp.diagonal(intersection, axis1=1, axis2=2)
    union = size[:, :, None] + size[:, None, :] - intersection
    every, some = on.all(axis=0).sum(axis=(1, 2)), on.any(axis=0).sum(axis=(1, 2))

    def add(values: Array, dtype: type) -> Array:
        return values.astype(dtype).sum(axis=0, where=counted.reshape(batch, *[1] * (values.ndim - 1)))

    return AttentionCounts(
        counted.sum(),
        add(intersection, jnp.float32),
        add(union, jnp.float32),
        add(union == 0, jnp.int32),
        add(every, jnp.float32),
        add(some, jnp.float32),
        add(some == 0, jnp.int32),
    )
