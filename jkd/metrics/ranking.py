"""Ranks by distance without a sort: counting, where distances are small integers.

Items of one query are ranked by distance, and items of one distance by their index: the rank of item i is the number of
items that are nearer, plus that of items up to i of the same distance. Both come from counts: of each distance in all
items, in all blocks of items before that of i, and among the items before i in its block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Items of a block: an item is compared with all of its block. Counts of a block have to fit into 8 bits.
BLOCK = 64
# Distances for which counting pays: every block has a count of each.
MOST_BINS = 1024


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
    return _sums(sorted_relevance & (ranks <= k), hits, jnp.broadcast_to(ranks, hits.shape), relevance, (1,))


@functools.partial(jax.jit, static_argnames=("k", "bins"))  # its steps by themselves would take hundreds of programs
def by_counting(
    distances: Int[Array, "queries items"], relevance: Bool[Array, "queries items"], k: int, bins: int
) -> RankSums:
    """Of distances in [0, bins - 2]; what is above is held to be bins - 2."""
    rows, items = distances.shape
    blocks = -(-items // BLOCK)
    # The last bin is that of padding, which no item comes after.
    small = jnp.clip(distances, 0, bins - 2).astype(jnp.uint8 if bins <= 256 else jnp.uint16)
    padding = ((0, 0), (0, blocks * BLOCK - items))
    small, hit = jnp.pad(small, padding, constant_values=bins - 1), jnp.pad(relevance, padding)
    # An item counts 1, a relevant one 256 + 1: two counts in one sum of 16 bits.
    weight = jnp.where(hit, 257, 1).astype(jnp.uint16)
    small, weight = (x.reshape(rows, blocks, BLOCK).transpose(1, 0, 2) for x in (small, weight))
    before = _counts_before(_block_counts(small, weight, bins))
    place = small.astype(jnp.int32)
    ranks, hits = (
        jnp.take_along_axis(table, place, axis=2, mode="promise_in_bounds") + inside
        for table, inside in zip(before, _split(_counts_inside(small, weight)), strict=True)
    )
    return _sums((weight > 1) & (ranks <= k), hits, ranks, relevance, (0, 2))


def _sums(counts: Array, hits: Array, ranks: Array, relevance: Array, axes: tuple[int, ...]) -> RankSums:
    precision = hits.astype(jnp.result_type(float)) / ranks
    total = jnp.where(counts, precision, 0).sum(axes)
    return RankSums(total, counts.sum(axes, dtype=jnp.int32), relevance.sum(1, dtype=jnp.int32))


def _split(counts: Array) -> tuple[Array, Array]:
    """Of all, and of relevant items."""
    return (counts & 255).astype(jnp.int32), (counts >> 8).astype(jnp.int32)


def _block_counts(small: Array, weight: Array, bins: int) -> Array:
    """[blocks, rows, bins]: how many items of a block have each distance."""
    values = jnp.arange(bins, dtype=small.dtype)[None, None]
    counts = jnp.zeros((*small.shape[:2], bins), jnp.uint16)
    for j in range(BLOCK):  # written out: XLA's reductions would hold an array of all that they add
        counts += jnp.where(small[:, :, j : j + 1] == values, weight[:, :, j : j + 1], 0)
    return counts


def _counts_inside(small: Array, weight: Array) -> Array:
    """[blocks, rows, BLOCK]: how many items of a block have the distance of each, up to itself."""
    index = jnp.arange(BLOCK, dtype=jnp.uint8)[None, None]
    counts = jnp.zeros(small.shape, jnp.uint16)
    for j in range(BLOCK):
        counts += jnp.where((small[:, :, j : j + 1] == small) & (index >= j), weight[:, :, j : j + 1], 0)
    return counts


def _counts_before(block_counts: Array) -> tuple[Array, Array]:
    """[blocks, rows, bins]: how many items are nearer than each distance, or equally near and in an earlier block."""

    def next_block(counts: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        all_items, relevant = _split(block)
        return (counts[0] + all_items, counts[1] + relevant), counts

    zeros = jnp.zeros(block_counts.shape[1:], jnp.int32)
    totals, before = jax.lax.scan(next_block, (zeros, zeros), block_counts)
    nearer = [jnp.cumsum(total, axis=1) - total for total in totals]
    return before[0] + nearer[0][None], before[1] + nearer[1][None]
