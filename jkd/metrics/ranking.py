"""Ranks by distance without a sort: counting, where distances are small integers.

Items of one query are ranked by distance, and items of one distance by their index: the rank of an item is the number
of items that are nearer, plus that of items up to itself of the same distance. Both come from counts for each distance:
of all items, of the items in earlier blocks, and of the items before it in its block. Items go by in blocks and queries
lie side by side, so that all is comparisons of small integers in vectors; nothing of the size of all pairs is held.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Items of a block: an item is compared with all of its block, and counts of a block fit into 8 bits.
BLOCK = 64
# Blocks whose distances are computed at once.
CHUNK = 32
# Comparisons in one expression: XLA for CPU turns longer ones into code that runs out of registers.
TERMS = 32
# Distances for which counting pays: every item is compared with each.
MOST_BINS = 1024
SMALL = jnp.uint16


class RankSums(NamedTuple):
    """What precision needs of each query.

    Attributes:
      precisions: the sum of precisions at the ranks of its relevant items, of those within the cut-off.
      found: relevant items within the cut-off.
      relevant: all relevant items.
    """

    precisions: Float[Array, " queries"]
    found: Int[Array, " queries"]
    relevant: Int[Array, " queries"]


def by_sorting(distances: Array, relevance: Bool[Array, "queries items"], k: int) -> RankSums:
    """Of distances of any dtype, by a stable sort; NaN comes last."""
    order = jnp.argsort(distances, axis=1, stable=True)
    sorted_relevance = jnp.take_along_axis(relevance, order, axis=1)
    ranks = jnp.arange(1, relevance.shape[1] + 1, dtype=jnp.int32)[None]
    hits = jnp.cumsum(sorted_relevance, axis=1, dtype=jnp.int32)
    counts = sorted_relevance & (ranks <= k)
    precision = jnp.where(counts, hits.astype(jnp.result_type(float)) / ranks, 0)
    return RankSums(precision.sum(1), counts.sum(1, dtype=jnp.int32), relevance.sum(1, dtype=jnp.int32))


def by_counting(
    pairs: Callable[[Any], tuple[Array, Array]], items: Any, number: int, queries: int, k: int, bins: int
) -> RankSums:
    """Of distances in [0, bins - 2]; what is above is held to be bins - 2.

    Args:
      pairs: `pairs(some of the items)`: their distances and relevance, [items, queries].
      items: a tree of arrays, all items along the leading axis.
      number: of items.
      queries: their number.
      k: the cut-off.
      bins: one more than distances; the last bin is that of padding.
    """
    blocks = min(CHUNK, -(-number // BLOCK))
    chunks = -(-number // (blocks * BLOCK))
    padding = chunks * blocks * BLOCK - number
    some = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))), items)
    there = jnp.arange(number + padding) < number
    some, there = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), (some, there))

    def scan(block: Callable[[Any, Array, Array], Any], state: Any) -> Any:
        """The state after all blocks: `block(state, distances, weights)`, each [BLOCK, queries]."""

        def chunk(state: Any, given: tuple[Any, Array]) -> tuple[Any, None]:
            distances, relevant = pairs(given[0])
            real = given[1][:, None]
            small = jnp.where(real, jnp.clip(distances, 0, bins - 2), bins - 1).astype(SMALL)
            # An item counts 1, a relevant one 256 + 1: two counts in one sum of 16 bits.
            weights = jnp.where(relevant & real, 257, 1).astype(SMALL)
            pieces = (x.reshape(blocks, BLOCK, queries) for x in (small, weights))
            return jax.lax.scan(lambda state, x: (block(state, *x), None), state, tuple(pieces))[0], None

        return jax.lax.scan(chunk, state, (some, there))[0]

    # Comparisons are cheaper the smaller the numbers.
    kind = SMALL if number + padding < 2**16 else jnp.int32
    zeros = jnp.zeros((-(-bins // TERMS) * TERMS if bins > 3 * TERMS else bins, queries), kind)
    totals = scan(lambda state, d, w: _plus(state, _block_counts(d, w, len(zeros))), (zeros, zeros))
    nearer = tuple(jnp.cumsum(total, axis=0, dtype=kind) - total for total in totals)

    def block(state: Any, d: Array, w: Array) -> Any:
        before, precisions, found = state
        ranks, hits = (
            x.astype(jnp.int32) + y for x, y in zip(_chosen(d, before), _split(_counts_inside(d, w)), strict=True)
        )
        counts = (w > 1) & (ranks <= k)
        precision = jnp.where(counts, hits.astype(precisions.dtype) / ranks, 0)
        after = _plus(before, _block_counts(d, w, len(zeros)))
        return after, precisions + precision.sum(0), found + counts.sum(0, dtype=jnp.int32)

    start = nearer, jnp.zeros(queries, jnp.result_type(float)), jnp.zeros(queries, jnp.int32)
    _, precisions, found = scan(block, start)
    return RankSums(precisions, found, totals[1].astype(jnp.int32).sum(0))


def _split(counts: Array) -> tuple[Array, Array]:
    """Of all, and of relevant items."""
    return (counts & 255).astype(jnp.int32), (counts >> 8).astype(jnp.int32)


def _plus(state: tuple[Array, Array], counts: Array) -> tuple[Array, Array]:
    all_items, relevant = _split(counts)
    return state[0] + all_items.astype(state[0].dtype), state[1] + relevant.astype(state[1].dtype)


def _in_parts(number: int, add: Callable[[Any, Array, int], Any], state: Any) -> Any:
    """`state` after `add(state, first, size)` of equal parts of a number, so that no expression has too many terms."""
    parts = next(n for n in range(-(-number // TERMS), number + 1) if number % n == 0)
    size = number // parts
    return jax.lax.fori_loop(0, parts, lambda n, state: add(state, n * size, size), state)


def _block_counts(d: Array, w: Array, bins: int) -> Array:
    """[bins, queries]: how many items of a block have each distance."""
    values = jnp.arange(bins, dtype=SMALL)[:, None]

    def add(counts: Array, first: Array, size: int) -> Array:
        rows, weights = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (d, w))
        for j in range(size):  # written out: XLA's reductions would hold an array of all that they add
            counts += jnp.where(rows[j][None] == values, weights[j][None], 0)
        return counts

    return _in_parts(BLOCK, add, jnp.zeros((bins, d.shape[1]), SMALL))


def _counts_inside(d: Array, w: Array) -> Array:
    """[BLOCK, queries]: how many items of a block have the distance of each, up to itself."""
    index = jnp.arange(BLOCK, dtype=jnp.int32)[:, None]

    def add(counts: Array, first: Array, size: int) -> Array:
        rows, weights = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (d, w))
        for j in range(size):
            counts += jnp.where((rows[j][None] == d) & (index >= first + j), weights[j][None], 0)
        return counts

    return _in_parts(BLOCK, add, jnp.zeros(d.shape, SMALL))


def _chosen(d: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """[BLOCK, queries] of each table [bins, queries]: the row that a distance says. Faster than a gather."""

    def add(state: tuple[Array, Array], first: Array, size: int) -> tuple[Array, Array]:
        rows = [jax.lax.dynamic_slice_in_dim(table, first, size) for table in tables]
        shifted, found = d - first.astype(SMALL), list(state)
        for j in range(size):
            here = shifted == j
            found = [x + jnp.where(here, row[j][None], 0) for x, row in zip(found, rows, strict=True)]
        return found[0], found[1]

    zeros = jnp.zeros(d.shape, tables[0].dtype)
    return _in_parts(len(tables[0]), add, (zeros, zeros))
