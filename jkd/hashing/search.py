"""The nearest codes of a database, exactly, without an array of all distances and without a sort.

The database is cut into blocks of neighbors in index. The k nearest items of a query, ordered by distance and then by
index, lie in the k blocks with the smallest least distance (of equals, those that come first): each block before
another in this order holds an item that comes before all items of the other. So one pass over all pairs keeps the least
distance of each block, and only k blocks are looked into. Blocks are found among groups of blocks in the same way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt32

from jkd.checks import Tensor
from jkd.errors import UserError
from jkd.metrics.distances import in_tiles, rows_at_once
from jkd.metrics.hamming import WORD, check_words

# Items of a block, blocks of a group, groups side by side: a chunk of 2^17 codes of 64 bits is a MiB, which stays in
# the cache of a core while all queries are compared with it.
BLOCK, GROUP, LANES = 16, 16, 512
# Least distances held at once: of as many queries as that allows.
MAX_MINIMA = 2**25


class Neighbors(NamedTuple):
    """The nearest items of each query, the nearest first; of equally near ones the lower index."""

    distances: Int32[Array, "queries k"]
    indices: Int32[Array, "queries k"]


class _Sizes(NamedTuple):
    """How a database is laid out: item ((chunk * lanes + lane) * group + block) * BLOCK + item of the block."""

    chunks: int
    lanes: int
    group: int

    @property
    def groups(self) -> int:
        return self.chunks * self.lanes

    @property
    def items(self) -> int:
        return self.groups * self.group * BLOCK


def hamming_search(
    queries: UInt32[Tensor, "queries words"],
    database: UInt32[Tensor, "items words"],
    k: int,
    *,
    max_minima: int = MAX_MINIMA,
) -> Neighbors:
    """The k items of a database that differ from each query in the fewest bits; exact.

    Ordered by distance, and of equal distances by index. Indices are int32. No gradient.

    Args:
      queries: packed codes, made by `jkd.metrics.pack_bits`.
      database: packed codes of the same length.
      k: static.
      max_minima: least distances of blocks held at once, at a byte each for codes of up to 254 bits (but those of one
        query at least); static. The result is the same.

    Raises:
      UserError: if the two are no matrices of uint32 with equally many words, one of them has no rows, `k` is not in
        [1, items], or `max_minima` is not positive.
    """
    _check(queries, database, k)
    database = jnp.asarray(database)
    return _search(jnp.asarray(queries), database, k, jnp.asarray(len(database), jnp.int32), max_minima)


def sharded_hamming_search(
    queries: UInt32[Tensor, "queries words"],
    database: UInt32[Tensor, "items words"],
    k: int,
    mesh: Mesh,
    *,
    axis: str = "data",
    max_minima: int = MAX_MINIMA,
) -> Neighbors:
    """`hamming_search` of a database whose rows are divided among the devices of a mesh: equal to it, ties included.

    Every device searches its rows for all queries; what the devices find is gathered in the order of their rows, and
    the k best of it are taken. What crosses are 8 bytes for each query, device and neighbor.

    Args:
      queries: packed codes; on all devices.
      database: packed codes; rows that the devices do not divide evenly are padded, which moves them.
      k: static.
      mesh: its other axes hold copies.
      axis: of the mesh, that the rows are divided along.
      max_minima: as `hamming_search`, on each device.

    Raises:
      UserError: as `hamming_search`, or if the mesh has no such axis.
    """
    _check(queries, database, k)
    if axis not in mesh.shape:
        raise UserError(f"axis must be one of the mesh's, {', '.join(mesh.shape)}; got {axis!r}.")
    items, shards = len(database), mesh.shape[axis]
    rows = -(-items // shards)
    padded = _padded(jnp.asarray(database), rows * shards)

    def local(queries: Array, rows_here: Array) -> Neighbors:
        first = jax.lax.axis_index(axis).astype(jnp.int32) * rows
        here = _search(queries, rows_here, min(k, rows), jnp.clip(items - first, 0, rows), max_minima)
        found = (here.distances, here.indices + first)
        distances, indices = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in found)
        best, place = _smallest(distances, k)
        return Neighbors(best, jnp.take_along_axis(indices, place, axis=1))

    search = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(), check_vma=False)
    return search(jnp.asarray(queries), padded)


def _check(queries: Tensor, database: Tensor, k: int) -> None:
    check_words(queries=queries, database=database)
    for name, codes in (("queries", queries), ("database", database)):
        if len(codes) < 1:
            raise UserError(f"{name} must have at least one row.")
    if not 1 <= k <= len(database):
        raise UserError(f"k must lie in [1, {len(database)}], the number of items, got {k}.")


@functools.partial(jax.jit, static_argnames=("k", "max_minima"))  # its steps by themselves would hold all distances
def _search(queries: Array, database: Array, k: int, valid: Array, max_minima: int) -> Neighbors:
    """Of the first `valid` rows of the database, which are followed by copies of the last of them.

    Distances of what is found beyond those are more than the bits of a code.
    """
    sizes = _layout(len(database))
    padded = _padded(database, sizes.items)
    words = padded.shape[1]
    # Transposed as matrices, before it is cut: XLA for TPU would hold every piece padded to 128 times its size.
    columns = padded.T.reshape(words, sizes.groups, -1).swapaxes(1, 2)
    columns = jax.lax.optimization_barrier(columns).reshape(words, sizes.group, BLOCK, sizes.chunks, sizes.lanes)
    # [words, item of a block, chunks, block of a group, lanes]: neighboring numbers in memory are compared at once.
    planes = columns.transpose(0, 2, 3, 1, 4)
    blocks = padded.reshape(-1, BLOCK, words)
    tile = functools.partial(_search_tile, planes=planes, blocks=blocks, sizes=sizes, k=k, valid=valid)
    at_once = rows_at_once(max_minima, len(queries), sizes.groups * sizes.group)
    return in_tiles(tile, queries, at_once)


def _layout(items: int) -> _Sizes:
    blocks = -(-items // BLOCK)
    group = min(GROUP, blocks)
    groups = -(-blocks // group)
    chunks = -(-groups // LANES)
    return _Sizes(chunks, -(-groups // chunks), group)


def _padded(database: Array, rows: int) -> Array:
    """With copies of the last row, which leave the least distance of its block what it is."""
    return jnp.pad(database, ((0, rows - len(database)), (0, 0)), mode="edge") if rows > len(database) else database


def _search_tile(queries: Array, *, planes: Array, blocks: Array, sizes: _Sizes, k: int, valid: Array) -> Neighbors:
    bits = WORD * queries.shape[1]
    rows = len(queries)
    kind = jnp.dtype(jnp.uint8 if bits < 255 else jnp.uint16)
    least = _least(queries, planes, kind)
    # A reduction, which XLA does not fuse with the transposition: together they take 20 times as long on a CPU.
    group_least = least.min(2).transpose(1, 0, 2).reshape(rows, -1).astype(jnp.int32)
    # Groups of padding alone are not to be found before others: copies would tie with what they are copies of.
    empty = jnp.arange(sizes.groups, dtype=jnp.int32) * (sizes.group * BLOCK) >= valid
    _, groups = _smallest(jnp.where(empty[None], bits + 1, group_least), min(k, sizes.groups))
    groups = jnp.sort(groups, axis=1)
    # [rows, groups found, blocks of each]
    inside = least[groups // sizes.lanes, jnp.arange(rows)[:, None], :, groups % sizes.lanes].astype(jnp.int32)
    candidates = (groups[:, :, None] * sizes.group + jnp.arange(sizes.group, dtype=jnp.int32)[None, None]).reshape(
        rows, -1
    )
    inside = jnp.where(candidates * BLOCK >= valid, bits + 1, inside.reshape(rows, -1))
    _, place = _smallest(inside, min(k, candidates.shape[1]))
    found = jnp.take_along_axis(candidates, jnp.sort(place, axis=1), axis=1)
    return _nearest_of_blocks(queries, blocks, found, k, valid)


def _least(queries: Array, planes: Array, dtype: jnp.dtype) -> Array:
    """[chunks, queries, block of a group, lanes]: the least distance of every block."""

    def distance(item: int) -> Array:
        words = (
            jax.lax.population_count(queries[:, w][None, :, None, None] ^ planes[w, item][:, None])
            for w in range(planes.shape[0])
        )
        return functools.reduce(jnp.add, words).astype(dtype)

    # Written out: a reduction of XLA would hold all distances.
    return functools.reduce(jnp.minimum, (distance(item) for item in range(BLOCK)))


def _nearest_of_blocks(queries: Array, blocks: Array, found: Array, k: int, valid: Array) -> Neighbors:
    """The k nearest items of the blocks found for each query, which are in ascending order."""
    rows, bits = len(queries), WORD * queries.shape[1]
    codes = blocks[found]  # [rows, blocks, BLOCK, words]
    distances = jax.lax.population_count(codes ^ queries[:, None, None]).sum(-1, dtype=jnp.uint32).astype(jnp.int32)
    indices = found[:, :, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
    distances = jnp.where(indices >= valid, bits + 1, distances).reshape(rows, -1)
    best, place = _smallest(distances, k)
    return Neighbors(best, jnp.take_along_axis(indices.reshape(rows, -1), place, axis=1))


def _smallest(values: Array, k: int) -> tuple[Array, Array]:
    """The k smallest of each row and where they are, in order; of equals the first."""
    # XLA for CPU selects among float32 alone, and sorts all else; integers up to 2^24 are exact.
    negated, place = jax.lax.top_k(-values.astype(jnp.float32), k)
    return (-negated).astype(jnp.int32), place.astype(jnp.int32)
