"""Ranking losses of visual-semantic embedding: a matching image and text are to be closer than any others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import relu
from jaxtyping import Array, Bool, Float, Int

from jkd.checks import Scalar, Tensor, as_float, check_positive
from jkd.errors import UserError, unknown
from jkd.reduction import reduce
from jkd.similarity import pairwise_cosine, unit_rows

NEGATIVES = ("hard", "all")
Negatives = int | str


class RankingTerms(NamedTuple):
    """The hinges of each pair: of its image among all texts, and of its text among all images; >= 0."""

    image_to_text: Float[Array, " batch"]
    text_to_image: Float[Array, " batch"]


def vse_ranking_terms(
    scores: Float[Tensor, "batch batch"],
    *,
    margin: Scalar = 0.2,
    negatives: Negatives = "hard",
    same_image_ids: Int[Tensor, " batch"] | None = None,
) -> RankingTerms:
    """How far the wrong ones among B texts and B images come near each pair: what `vse_ranking_loss` reduces.

        image_to_text_i = max(0, margin + max_(j != i) s_ij - s_ii)                        negatives="hard"
                          sum_(j != i) max(0, margin + s_ij - s_ii)                        negatives="all"
                          the same sum over the k largest s_ij, j != i                     negatives=k

    and text_to_image_j likewise down the columns. A gradient passes to one of several equally hard negatives only (the
    first). In float32 at least. NaN gives NaN in all pairs that it is compared with.

    Args:
      scores: s_ij, of image i and text j; pairs on the diagonal.
      margin: > 0.
      negatives: "hard", "all", or how many in [1, batch - 1]; static.
      same_image_ids: of which image each pair is: pairs of one image are no negatives of each other.

    Raises:
      UserError: if `scores` is no floating point square of at least 2 rows, the shape of `same_image_ids` is not
        [batch], `negatives` is none of the above, or `margin` is known not to be positive.
    """
    scores = _square(scores)
    check_positive("margin", margin)
    _check_negatives(negatives, len(scores))
    blocked = _blocked(jnp.arange(len(scores)), len(scores), _ids(same_image_ids, len(scores)))
    own = jnp.diagonal(scores)
    return RankingTerms(
        _hinges(scores, own, blocked, margin, negatives),
        _hinges(scores.T, own, blocked.T, margin, negatives),
    )


def vse_ranking_loss(
    scores: Float[Tensor, "batch batch"],
    *,
    margin: Scalar = 0.2,
    negatives: Negatives = "hard",
    same_image_ids: Int[Tensor, " batch"] | None = None,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """The ranking loss in both directions of a matrix of scores.

        L_i = image_to_text_i + text_to_image_i        (see `vse_ranking_terms`)

    Over the whole (global) batch, in float32 at least. Scores that are all equal give 2 margin a pair with
    negatives="hard", which is where training collapses to. The authors' code sums over the batch (reduction="sum") and
    flips the sign of the diagonal to leave it out, which is the same unless all negatives are below -s_ii.

    Args:
      scores: s_ij, of image i and text j; pairs on the diagonal.
      margin: > 0.
      negatives: "hard", "all", or how many of the hardest; static.
      same_image_ids: of which image each pair is: pairs of one image are no negatives of each other.
      reduction: "mean", "sum" or "none" (over the pairs).

    Raises:
      UserError: as `vse_ranking_terms`, or for another reduction.

    Reference: Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, BMVC 2018, eqs. 4 and 6.
    """
    terms = vse_ranking_terms(scores, margin=margin, negatives=negatives, same_image_ids=same_image_ids)
    return reduce(terms.image_to_text + terms.text_to_image, reduction)


def vse_hard_negative_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    margin: Scalar = 0.2,
    negatives: Negatives = "hard",
    same_image_ids: Int[Tensor, " batch"] | None = None,
    chunk_size: int | None = None,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """`vse_ranking_loss` of the cosines s_ij of image i's and text j's vectors.

    Negatives are sought in the whole (global) batch, whatever its sharding. The vectors need not be of unit length; a
    zero vector has cosine 0 with all others, and a finite gradient.

    Args:
      images: one vector an image.
      texts: the vector of the text of each.
      margin: > 0.
      negatives: "hard", "all", or how many of the hardest; static.
      same_image_ids: of which image each pair is: pairs of one image are no negatives of each other.
      chunk_size: rows whose scores are in memory at a time, where those of all do not fit; divides the batch. The same
        values for twice the products, plus as many again in the backward pass. Static.
      reduction: "mean", "sum" or "none" (over the pairs).

    Raises:
      UserError: if the shapes or dtypes do not fit, there are fewer than 2 pairs, or as `vse_ranking_loss`.

    Reference: Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, BMVC 2018; Park et al.,
      MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020.
    """
    images, texts = as_float("images", images), as_float("texts", texts)
    if images.ndim != 2 or images.shape != texts.shape:
        raise UserError(
            f"images and texts must have one shape [batch, dim], got {list(images.shape)} and {list(texts.shape)}."
        )
    named: Any = {"margin": margin, "negatives": negatives}
    if chunk_size is None:
        return vse_ranking_loss(
            pairwise_cosine(images, texts), **named, same_image_ids=same_image_ids, reduction=reduction
        )
    _check_batch(len(images))
    check_positive("margin", margin)
    _check_negatives(negatives, len(images))
    if chunk_size < 1 or len(images) % chunk_size:
        raise UserError(f"chunk_size must be >= 1 and divide the batch of {len(images)}, got {chunk_size}.")
    ids = _ids(same_image_ids, len(images))
    first, second = unit_rows(images), unit_rows(texts)
    own = (first * second).sum(1)

    def terms(queries: Array, keys: Array) -> Float[Array, " batch"]:
        def one(rows: Int[Array, " chunk"], queries: Array, own: Array) -> Float[Array, " chunk"]:
            scores = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
            return _hinges(scores, own, _blocked(rows, len(keys), ids), margin, negatives)

        return _in_chunks(one, (jnp.arange(len(own)), queries, own), chunk_size)

    return reduce(terms(first, second) + terms(second, first), reduction)


def _in_chunks(fn: Callable[..., Array], rows: tuple[Array, ...], size: int) -> Array:
    """fn(*rows) for so many of the rows at a time; its intermediate values are computed again in the backward pass.

    A chunk is every n-th row, so that every device has its share of each.
    """
    split = [jnp.moveaxis(x.reshape(size, -1, *x.shape[1:]), 1, 0) for x in rows]
    found = jax.lax.map(lambda one: jax.checkpoint(fn)(*one), tuple(split))
    return jnp.moveaxis(found, 0, 1).reshape(-1)


def _hinges(
    scores: Float[Array, "rows columns"],
    own: Float[Array, " rows"],
    blocked: Bool[Array, "rows columns"],
    margin: Scalar,
    negatives: Negatives,
) -> Float[Array, " rows"]:
    if negatives == "all":
        # Blocked scores are selected away before the hinge and after it: no gradient, and no NaN, passes either.
        known = jnp.where(blocked, 0, scores)
        return jnp.where(blocked, 0, relu(margin + known - own[:, None])).sum(1)
    rest = jnp.where(blocked, -jnp.inf, scores)
    if negatives == "hard":
        # Not max, which would share the gradient among equals. argmax finds a NaN.
        hardest = jnp.take_along_axis(rest, jnp.argmax(rest, 1)[:, None], 1)
    else:
        hardest = jax.lax.top_k(rest, int(negatives))[0]
        # A NaN may be sorted to either end.
        hardest = jnp.where(jnp.isnan(rest).any(1)[:, None], jnp.nan, hardest)
    return relu(margin + hardest - own[:, None]).sum(1)


def _blocked(
    rows: Int[Array, " rows"], columns: int, ids: Int[Array, " columns"] | None
) -> Bool[Array, "rows {columns}"]:
    """Which pairs are no negatives: a pair of itself, and those of the same image."""
    own = rows[:, None] == jnp.arange(columns)[None]
    return own if ids is None else own | (ids[rows][:, None] == ids[None])


def _check_batch(size: int) -> None:
    if size < 2:
        raise UserError(f"A ranking loss needs at least 2 pairs, got {size}: the others are the negatives.")


def _square(scores: Tensor) -> Array:
    scores = as_float("scores", scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise UserError(f"scores must have the shape [batch, batch], got {list(scores.shape)}.")
    _check_batch(len(scores))
    return scores


def _ids(ids: Tensor | None, batch: int) -> Array | None:
    if ids is not None and jnp.shape(ids) != (batch,):
        raise UserError(f"same_image_ids must have the shape [{batch}], got {list(jnp.shape(ids))}.")
    return None if ids is None else jnp.asarray(ids)


def _check_negatives(negatives: Negatives, batch: int) -> None:
    if isinstance(negatives, str):
        if negatives not in NEGATIVES:
            raise unknown("negatives", negatives, NEGATIVES)
    elif isinstance(negatives, bool) or not 1 <= negatives < batch:
        raise UserError(f"negatives must be 'hard', 'all' or a number in [1, {batch - 1}], got {negatives}.")
