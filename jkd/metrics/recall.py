"""Recall of retrieval between images and their captions, as captioning sets are evaluated."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.similarity import unit_rows


class ImageTextRanks(NamedTuple):
    """Places from 1: of each image's best caption among all captions, and of each caption's image among all images."""

    image_to_text: Int[Array, " images"]
    text_to_image: Int[Array, " captions"]


class ImageTextRecall(NamedTuple):
    """Recall at each k in percent, and the median rank, in both directions."""

    image_to_text: Float[Array, " ks"]
    text_to_image: Float[Array, " ks"]
    image_to_text_median: Float[Array, ""]
    text_to_image_median: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """The sum of all recalls: what checkpoints are chosen by."""
        return self.image_to_text.sum() + self.text_to_image.sum()


def image_text_ranks(scores: Float[Tensor, "images captions"], *, captions_per_image: int = 5) -> ImageTextRanks:
    """How far one has to read until the right caption, or image, comes.

        image i:    1 + #{j of other images: s_ij >= max over i's own captions of s}
        caption j:  1 + #{i of other images: s_ij >= s of j's own image}

    Pessimistic: of equal scores, the wrong ones come first, so that constant scores rank last. So does whatever is
    compared with NaN.

    Args:
      scores: of image i and caption j, the larger the closer; captions c i .. c i + c - 1 are those of image i, for c
        captions an image.
      captions_per_image: c; static.

    Raises:
      UserError: if `scores` is no floating point [images, c images], or is known to hold NaN.
    """
    scores = as_float("scores", scores)
    _check_layout("scores", scores.ndim == 2, scores.shape, captions_per_image)
    known = concrete(scores)
    if known is not None:
        _check_no_nan("scores", known)
    image_of = jnp.arange(scores.shape[1]) // captions_per_image
    return ImageTextRanks(
        _rows_ranks(scores, jnp.arange(len(scores)), image_of),
        _columns_ranks(scores, jnp.arange(scores.shape[1]), image_of),
    )


def _rows_ranks(scores: Array, images: Array, image_of: Array) -> Array:
    """Of the rows of `images`, with all captions as columns."""
    own = images[:, None] == image_of[None]
    best = jnp.where(own, scores, -jnp.inf).max(1)
    # Not >=, which a NaN would never be.
    return 1 + (~(scores < best[:, None]) & ~own).sum(1, dtype=jnp.int32)


def _columns_ranks(scores: Array, captions: Array, image_of: Array) -> Array:
    """Of the columns of `captions`, with all images as rows."""
    own = jnp.arange(len(scores))[:, None] == image_of[captions][None]
    right = jnp.where(own, scores, 0).sum(0)
    return 1 + (~(scores < right[None]) & ~own).sum(0, dtype=jnp.int32)


def embedding_ranks(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "captions dim"],
    *,
    captions_per_image: int = 5,
    chunk_size: int = 256,
) -> ImageTextRanks:
    """`image_text_ranks` of the cosines of vectors, without the matrix of all scores.

    Holds chunk_size x captions scores at a time, by images and then by captions (all 5,000 x 25,000 of COCO: 500 MB).
    Vectors need not be of unit length. NaN values rank last, and so does all that they are compared with.

    Args:
      images: one vector an image.
      texts: one vector a caption, the captions of an image behind one another.
      captions_per_image: how many; static.
      chunk_size: images at a time, or as many captions times `captions_per_image`; static.

    Raises:
      UserError: if shapes or dtypes do not fit, or the vectors are known to hold NaN.
    """
    shapes = list(jnp.shape(images)), list(jnp.shape(texts))
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
        raise UserError(f"images and texts must be [images, dim] and [captions, dim], got {shapes[0]} and {shapes[1]}.")
    _check_layout("texts", True, (shapes[0][0], shapes[1][0]), captions_per_image)
    if chunk_size < 1:
        raise UserError(f"chunk_size must be at least 1, got {chunk_size}.")
    for name, values in (("images", images), ("texts", texts)):
        known = concrete(values)
        if known is not None:
            _check_no_nan(name, known)
    return _embedding_ranks(unit_rows(images), unit_rows(texts), captions_per_image, chunk_size)


def _embedding_ranks(first: Array, second: Array, captions_per_image: int, chunk_size: int) -> ImageTextRanks:
    image_of = jnp.arange(len(second)) // captions_per_image

    def by_images(rows: Array) -> Array:
        return _rows_ranks(_scores(first[rows], second), rows, image_of)

    def by_captions(columns: Array) -> Array:
        return _columns_ranks(_scores(first, second[columns]), columns, image_of)

    return ImageTextRanks(
        _chunked(by_images, len(first), chunk_size), _chunked(by_captions, len(second), chunk_size * captions_per_image)
    )


def _scores(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def _chunked(ranks: object, count: int, size: int) -> Array:
    """ranks(numbers) for so many of 0 .. count - 1 at a time; the last chunk is filled up with the last number."""
    size = min(size, count)
    chunks = -(-count // size)
    numbers = jnp.minimum(jnp.arange(chunks * size), count - 1).reshape(chunks, size)
    return jax.lax.map(ranks, numbers).reshape(-1)[:count]


def recall_of_ranks(ranks: ImageTextRanks, ks: Sequence[int] = (1, 5, 10)) -> ImageTextRecall:
    """The share of ranks <= k in percent for each k, and the medians of the ranks.

    Raises:
      UserError: if a k is not in [1, images].
    """
    images = len(ranks.image_to_text)
    if not ks or not all(1 <= k <= images for k in ks):
        raise UserError(f"ks must lie in [1, {images}], the number of images, got {tuple(ks)}.")
    places = jnp.asarray(tuple(ks))

    def recall(found: Array) -> Array:
        return 100 * (found[:, None] <= places[None]).mean(0)

    medians = (jnp.median(found.astype(jnp.float32)) for found in ranks)
    return ImageTextRecall(recall(ranks.image_to_text), recall(ranks.text_to_image), *medians)


def image_text_recall(
    scores: Float[Tensor, "images captions"], *, captions_per_image: int = 5, ks: Sequence[int] = (1, 5, 10)
) -> ImageTextRecall:
    """Recall at k of images and their captions from all scores; see `image_text_ranks`.

    An image is found if one of its captions is among the k best ones, a caption if its image is.

    Args:
      scores: of image i and caption j, the larger the closer; captions c i .. c i + c - 1 are those of image i.
      captions_per_image: c; static.
      ks: how many results are looked at, each in [1, images]; static.

    Raises:
      UserError: if shapes, dtypes or `ks` do not fit, or the scores are known to hold NaN.
    """
    return recall_of_ranks(image_text_ranks(scores, captions_per_image=captions_per_image), ks)


def embedding_recall(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "captions dim"],
    *,
    captions_per_image: int = 5,
    ks: Sequence[int] = (1, 5, 10),
    folds: int = 1,
    chunk_size: int = 256,
) -> ImageTextRecall:
    """`image_text_recall` of the cosines of vectors, averaged over folds, without the matrix of all scores.

    The images are cut into `folds` equal parts, in order, which are searched separately: COCO's "1K" is the mean
    over 5 folds of 5,000 images, its "5K" is folds=1.

    Args:
      images: one vector an image.
      texts: one vector a caption, the captions of an image behind one another.
      captions_per_image: how many; static.
      ks: how many results are looked at, each in [1, images of a fold]; static.
      folds: how many; divides the images; static.
      chunk_size: see `embedding_ranks`.

    Raises:
      UserError: if shapes, dtypes, `ks` or `folds` do not fit, or the vectors are known to hold NaN.
    """
    count = jnp.shape(images)[0]
    if folds < 1 or count % folds:
        raise UserError(f"folds must be at least 1 and divide the {count} images, got {folds}.")
    parts = []
    for k in range(folds):
        rows = slice(k * count // folds, (k + 1) * count // folds)
        columns = slice(rows.start * captions_per_image, rows.stop * captions_per_image)
        named = {"captions_per_image": captions_per_image, "chunk_size": chunk_size}
        parts.append(recall_of_ranks(embedding_ranks(images[rows], texts[columns], **named), ks))
    return jax.tree.map(lambda *found: jnp.stack(found).mean(0), *parts)


def _check_layout(name: str, fits: bool, shape: tuple[int, ...], captions_per_image: int) -> None:
    if captions_per_image < 1:
        raise UserError(f"captions_per_image must be at least 1, got {captions_per_image}.")
    if not fits or shape[0] < 1 or shape[1] != captions_per_image * shape[0]:
        raise UserError(
            f"{name} must be of {captions_per_image} captions for each image: [images, {captions_per_image} images], "
            f"got {list(shape)} images and captions."
        )


def _check_no_nan(name: str, known: object) -> None:
    if jnp.isnan(known).any():  # type: ignore[arg-type]
        raise UserError(f"{name} must not hold NaN: there is no rank to give.")
