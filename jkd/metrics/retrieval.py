"""How good a ranking of items by distance is: average precision and precision, with one rule of ties.

Items are ranked by distance, and of equal distances the lower index comes first. Queries without relevant items have no
precision: they are left out of means, and the others are counted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from jkd.checks import Tensor, concrete
from jkd.errors import UserError
from jkd.metrics.distances import in_tiles, rows_at_once
from jkd.metrics.hamming import WORD, check_words, pack_bits, packed_hamming_distance
from jkd.metrics.ranking import BLOCK, CHUNK, MOST_BINS, RankSums, by_counting, by_sorting

MAX_PAIRS = 2**22


class MeanAveragePrecision(NamedTuple):
    """The mean over queries that have relevant items, and what it is the mean of.

    Attributes:
      map: in [0, 1]; NaN where no query has a relevant item.
      per_query: the average precision of each; NaN without relevant items.
      counted: queries with relevant items.
      undefined: distances that are NaN, which rank last.
    """

    map: Float[Array, ""]
    per_query: Float[Array, " queries"]
    counted: Int[Array, ""]
    undefined: Int[Array, ""]


class Precision(NamedTuple):
    """The mean over queries that have relevant items, and what it is the mean of.

    Attributes:
      precision: in [0, 1]; NaN where no query has a relevant item.
      per_query: NaN without relevant items.
      counted: queries with relevant items.
    """

    precision: Float[Array, ""]
    per_query: Float[Array, " queries"]
    counted: Int[Array, ""]


class PrecisionRecallCurve(NamedTuple):
    """Means over queries that have relevant items, one point a threshold.

    Attributes:
      threshold: radii from 0 up, or ranks from 1 up.
      precision: the share of relevant ones among the items within the threshold; 0 for a query with none there.
      recall: the share of a query's relevant items that lie there.
      counted: queries with relevant items.
    """

    threshold: Int[Array, " points"]
    precision: Float[Array, " points"]
    recall: Float[Array, " points"]
    counted: Int[Array, ""]


def share_label(
    a: Int[Tensor, " rows"] | Bool[Tensor, "rows classes"], b: Int[Tensor, " columns"] | Bool[Tensor, "columns classes"]
) -> Bool[Array, "rows columns"]:
    """Whether two samples have a label in common.

    Args:
      a: class numbers, or one boolean a class for samples of several labels (or none).
      b: as `a`.

    Raises:
      UserError: if the two are of different kinds or have different numbers of classes.
    """
    kinds = [(jnp.ndim(x), x.dtype == jnp.bool_) for x in (a, b)]
    if kinds == [(2, True), (2, True)] and jnp.shape(a)[1] == jnp.shape(b)[1] > 0:
        words = zip(pack_bits(a).T, pack_bits(b).T, strict=True)
        return functools.reduce(jnp.logical_or, (one[:, None] & other[None] != 0 for one, other in words))
    if kinds == [(1, False), (1, False)] and all(jnp.issubdtype(x.dtype, jnp.integer) for x in (a, b)):
        return jnp.asarray(a)[:, None] == jnp.asarray(b)[None]
    found = " and ".join(f"{x.dtype} {list(jnp.shape(x))}" for x in (a, b))
    raise UserError(f"Labels must be integers [rows], or booleans [rows, classes] of the same classes; got {found}.")


def mean_average_precision(
    distances: Num[Tensor, "queries items"],
    relevance: Bool[Tensor, "queries items"],
    k: int | None = None,
    normalize: str = "found",
    *,
    largest: int | None = None,
) -> MeanAveragePrecision:
    """The mean over queries of the average precision of the ranking by distance.

        AP_q = 1 / N_q sum over relevant items i within the first k of (relevant items of rank <= r_i) / r_i

    The rank r_i of an item is 1 + the number of items that are nearer, or equally near and of a lower index. N_q is
    the number of relevant items within the first k (`normalize="found"`; AP is 0 where there is none), or the
    smaller of k and the number of all relevant items ("min"). Without k the two are equal. Queries without relevant
    items are left out and counted. NaN ranks last, and is counted. No gradient.

    Integers up to about a thousand (Hamming distances) are ranked by counting, in time proportional to the items,
    where `largest` is given or the values are known; everything else by a stable sort.

    Args:
      distances: of any real dtype; for similarities pass their negatives.
      relevance: whether an item is what the query asks for.
      k: the cut-off; static; all items by default.
      normalize: "found" or "min"; static.
      largest: what integer distances do not exceed (the bits of a code); static. What is above is farther than that,
        and equally far.

    Raises:
      UserError: if the shapes differ or are empty, `relevance` is not boolean, `k` is not in [1, items], `normalize`
        is unknown, or `largest` is negative.
    """
    _check(distances, relevance)
    k = _cut_off(k, jnp.shape(relevance)[1])
    _check_normalize(normalize)
    return _mean(_rank_sums(distances, relevance, k, largest), k, normalize, _undefined(distances))


def hamming_mean_average_precision(
    queries: UInt32[Tensor, "queries words"],
    database: UInt32[Tensor, "items words"],
    query_labels: Int[Tensor, " queries"] | Bool[Tensor, "queries classes"],
    database_labels: Int[Tensor, " items"] | Bool[Tensor, "items classes"],
    k: int | None = None,
    normalize: str = "found",
    *,
    max_pairs: int = MAX_PAIRS,
) -> MeanAveragePrecision:
    """`mean_average_precision` of packed codes, a few queries after the other: no distances of all pairs are held.

    An item is relevant if it shares a label with the query (`share_label`). Exact, as the other.

    Args:
      queries: packed codes, made by `pack_bits`.
      database: packed codes of the same length.
      query_labels: class numbers, or one boolean a class.
      database_labels: as `query_labels`.
      k: the cut-off; static; all items by default.
      normalize: "found" or "min"; static.
      max_pairs: distances held at once (but those of one query and some items at least); static. The result is the
        same.

    Raises:
      UserError: as `mean_average_precision` and `share_label`; if the codes are of different lengths, or there are
        not as many labels as codes.
    """
    check_words(queries=queries, database=database)
    for name, codes, labels in (("query", queries, query_labels), ("database", database, database_labels)):
        if not len(codes) == len(labels) > 0:
            raise UserError(f"There must be one label a {name} code, at least one; got {len(labels)} for {len(codes)}.")
    share_label(query_labels[:1], database_labels[:1])
    k = _cut_off(k, len(database))
    _check_normalize(normalize)
    sums = _sums_of_codes(
        *(jnp.asarray(x) for x in (queries, database, query_labels, database_labels)), k=k, max_pairs=max_pairs
    )
    return _mean(sums, k, normalize, jnp.zeros((), jnp.int32))


def precision_at_k(
    distances: Num[Tensor, "queries items"],
    relevance: Bool[Tensor, "queries items"],
    k: int,
    *,
    largest: int | None = None,
) -> Precision:
    """The share of relevant items among the k nearest, ranked as by `mean_average_precision`.

    Args:
      distances: of any real dtype; NaN ranks last.
      relevance: whether an item is what the query asks for.
      k: static.
      largest: as `mean_average_precision`.

    Raises:
      UserError: as `mean_average_precision`.
    """
    _check(distances, relevance)
    sums = _rank_sums(distances, relevance, _cut_off(k, jnp.shape(relevance)[1]), largest)
    return _mean_precision(sums.found / k, sums.relevant)


def precision_at_radius(
    distances: Num[Tensor, "queries items"], relevance: Bool[Tensor, "queries items"], radius: int | float
) -> Precision:
    """The share of relevant items among those at a distance of at most `radius`; 0 for a query with none there.

    (Usual for a look-up of codes within 2 bits.) NaN lies within no radius.

    Args:
      distances: of any real dtype.
      relevance: whether an item is what the query asks for.
      radius: a number of bits, for Hamming distances.

    Raises:
      UserError: if the shapes differ or are empty, or `relevance` is not boolean.
    """
    _check(distances, relevance)
    near, relevant = jnp.asarray(distances) <= radius, jnp.asarray(relevance)
    found = (near & relevant).sum(1)
    return _mean_precision(found / jnp.maximum(near.sum(1), 1), relevant.sum(1))


def precision_recall(
    distances: Num[Tensor, "queries items"],
    relevance: Bool[Tensor, "queries items"],
    over: str = "radius",
    *,
    largest: int | None = None,
) -> PrecisionRecallCurve:
    """Precision and recall at every radius from 0 to the largest distance, or at every rank from 1 to all items.

        precision(t) = mean_q |relevant within t| / |within t|,    recall(t) = mean_q |relevant within t| / |relevant|

    Args:
      distances: integers for radii, of any real dtype for ranks (ranked as by `mean_average_precision`).
      relevance: whether an item is what the query asks for.
      over: "radius" or "rank"; static.
      largest: radius, static; that of the distances by default, which are then not traced.

    Raises:
      UserError: if the shapes differ or are empty, `relevance` is not boolean, `over` is unknown, or radii are asked
        for of what are not integers >= 0 or of a largest one that is not known.
    """
    _check(distances, relevance)
    if over == "rank":
        order = jnp.argsort(jnp.asarray(distances), axis=1, stable=True)
        found = jnp.cumsum(jnp.take_along_axis(jnp.asarray(relevance), order, axis=1), axis=1, dtype=jnp.int32)
        threshold = jnp.arange(1, order.shape[1] + 1, dtype=jnp.int32)
        within = jnp.broadcast_to(threshold[None], found.shape)
    elif over == "radius":
        threshold = jnp.arange(_largest(distances, largest) + 1, dtype=jnp.int32)
        within, found = _within(jnp.asarray(distances), jnp.asarray(relevance), threshold)
    else:
        raise UserError(f"over must be 'radius' or 'rank', got {over!r}.")
    relevant = jnp.asarray(relevance).sum(1)
    shares = found / jnp.maximum(within, 1), found / jnp.maximum(relevant, 1)[:, None]
    weights = (relevant > 0).astype(shares[0].dtype)
    counted = weights.sum()
    precision, recall = ((share * weights[:, None]).sum(0) / counted for share in shares)
    return PrecisionRecallCurve(threshold, precision, recall, counted.astype(jnp.int32))


def _within(distances: Array, relevance: Array, radii: Array) -> tuple[Array, Array]:
    """[queries, radii]: items within each radius, and relevant ones."""

    def at(radius: Array) -> tuple[Array, Array]:
        near = distances <= radius
        return near.sum(1, dtype=jnp.int32), (near & relevance).sum(1, dtype=jnp.int32)

    within, found = jax.lax.map(at, radii)
    return within.T, found.T


def _check(distances: Tensor, relevance: Tensor) -> None:
    shapes = [jnp.shape(x) for x in (distances, relevance)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or 0 in shapes[0] or relevance.dtype != jnp.bool_:
        found = f"{list(shapes[0])} and {relevance.dtype} {list(shapes[1])}"
        raise UserError(f"distances and a boolean relevance must share the shape [queries, items]; got {found}.")


def _check_normalize(normalize: str) -> None:
    if normalize not in ("found", "min"):
        raise UserError(f"normalize must be 'found' or 'min', got {normalize!r}.")


def _cut_off(k: int | None, items: int) -> int:
    if k is not None and not 1 <= k <= items:
        raise UserError(f"k must lie in [1, {items}], the number of items, got {k}.")
    return items if k is None else k


def _known_largest(distances: Tensor, largest: int | None) -> int | None:
    """What integer distances >= 0 do not exceed, where that is known."""
    if largest is not None and largest < 0:
        raise UserError(f"largest must not be negative, got {largest}.")
    if not jnp.issubdtype(distances.dtype, jnp.integer):
        return None
    known = concrete(distances) if largest is None else None
    if known is not None and known.min() >= 0:
        return int(known.max())
    return largest


def _largest(distances: Tensor, largest: int | None) -> int:
    found = _known_largest(distances, largest)
    if found is None:
        raise UserError("Radii need integer distances >= 0; where they are traced, also `largest`, the bits of a code.")
    return found


@functools.partial(jax.jit, static_argnames=("k", "max_pairs"))  # its steps would take hundreds of programs
def _sums_of_codes(queries: Array, database: Array, asked: Array, labels: Array, *, k: int, max_pairs: int) -> RankSums:
    bins, items = WORD * queries.shape[1] + 2, len(database)
    counted = bins <= MOST_BINS

    def tile(some: tuple[Array, Array]) -> RankSums:
        def pairs(given: tuple[Array, Array]) -> tuple[Array, Array]:
            return packed_hamming_distance(given[0], some[0]), share_label(given[1], some[1])

        if counted:
            return by_counting(pairs, (database, labels), items, len(some[0]), k, bins)
        distances, relevance = pairs((database, labels))
        return by_sorting(distances.T, relevance.T, k)

    at_once = rows_at_once(max_pairs, len(queries), min(items, CHUNK * BLOCK) if counted else items)
    return in_tiles(tile, (queries, asked), at_once)


def _rank_sums(distances: Tensor, relevance: Tensor, k: int, largest: int | None) -> RankSums:
    known = _known_largest(distances, largest)
    bins = None if known is None or known + 3 > MOST_BINS else known + 3  # 0 to the largest, what is above, padding
    return _sums_of_distances(jnp.asarray(distances), jnp.asarray(relevance), k=k, bins=bins)


@functools.partial(jax.jit, static_argnames=("k", "bins"))
def _sums_of_distances(distances: Array, relevance: Array, *, k: int, bins: int | None) -> RankSums:
    if bins is None:
        return by_sorting(distances, relevance, k)
    number = distances.shape[1]
    return by_counting(lambda pair: pair, (distances.T, relevance.T), number, len(distances), k, bins)


def _undefined(distances: Tensor) -> Array:
    values = jnp.asarray(distances)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return jnp.zeros((), jnp.int32)
    return jnp.isnan(values).sum(dtype=jnp.int32)


def _mean(sums: RankSums, k: int, normalize: str, undefined: Array) -> MeanAveragePrecision:
    number = sums.found if normalize == "found" else jnp.minimum(sums.relevant, k)
    precision = _mean_precision(sums.precisions / jnp.maximum(number, 1), sums.relevant)
    return MeanAveragePrecision(*precision, undefined)


def _mean_precision(values: Array, relevant: Array) -> Precision:
    counts = relevant > 0
    mean = jnp.where(counts, values, 0).sum() / counts.sum()
    return Precision(mean, jnp.where(counts, values, jnp.nan), counts.sum(dtype=jnp.int32))
