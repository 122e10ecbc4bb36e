import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jkd.errors import UserError
from jkd.hashing import hamming_search, sharded_hamming_search

RANDOM = np.random.default_rng(0)
found_by = jax.jit(hamming_search, static_argnames=("k", "max_minima"))


def brute_force(queries, database, k):
    distances = np.bitwise_count(queries[:, None] ^ database[None]).sum(-1).astype(np.int32)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def check(found, queries, database, k):
    distances, indices = brute_force(queries, database, k)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.distances, distances)
    assert found.distances.dtype == found.indices.dtype == jnp.int32


def codes(rows, words=2, values=2**32):
    """With few values, many ties."""
    return RANDOM.integers(0, values, (rows, words), np.uint32)


@functools.cache
def large():
    """Three chunks, the last of which is padded, and many ties."""
    return codes(5), np.repeat(codes(100_003), 3, 0)


def test_by_hand():
    database = np.array([[0b0000], [0b1111], [0b0001], [0b0010], [0b0000]], np.uint32)
    found = hamming_search(np.array([[0b0000], [0b0111]], np.uint32), database, 3)
    np.testing.assert_array_equal(found.indices, [[0, 4, 2], [1, 2, 3]])
    np.testing.assert_array_equal(found.distances, [[0, 0, 1], [1, 2, 2]])


@pytest.mark.parametrize(
    ("items", "k", "words", "values"),
    [(1, 1, 2, 2**32), (17, 17, 1, 4), (500, 3, 2, 8), (500, 500, 2, 2**32), (5000, 40, 9, 2)],
)
def test_brute_force_agrees(items, k, words, values):
    queries, database = codes(4, words, values), codes(items, words, values)
    check(found_by(queries, database, k=k), queries, database, k)


def test_many_items_and_ties():
    queries, database = large()
    check(found_by(queries, database, k=100), queries, database, 100)


def test_the_same_whatever_is_held_at_once():
    queries, database = codes(7), codes(1000)
    for max_minima in (1, 3 * 64):
        check(found_by(queries, database, k=5, max_minima=max_minima), queries, database, 5)


def test_no_distances_of_all_pairs_are_held():
    queries, database = (jax.ShapeDtypeStruct((n, 2), jnp.uint32) for n in (100, 2**20))
    memory = found_by.lower(queries, database, k=100).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100 * 2**20


@pytest.mark.parametrize(("items", "k"), [(9, 9), (1000, 30), (1003, 200)])
def test_shards_agree_with_the_whole(items, k):
    # With few values, ties cross the shards; nine items leave some without any.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    queries, database = codes(4, 1, 16), codes(items, 1, 16)
    sharded = jax.jit(functools.partial(sharded_hamming_search, k=k, mesh=mesh))(queries, database)
    check(sharded, queries, database, k)
    whole = found_by(queries, database, k=k)
    np.testing.assert_array_equal(sharded.indices, whole.indices)


def test_rows_stay_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["data"], []))
    shapes = (
        jax.ShapeDtypeStruct((2, 2), jnp.uint32, sharding=whole),
        jax.ShapeDtypeStruct((2**16, 2), jnp.uint32, sharding=rows),
    )
    program = jax.jit(functools.partial(sharded_hamming_search, k=10, mesh=mesh)).lower(*shapes).compile()
    assert "s32[2,80]" in program.as_text()  # what is gathered: ten neighbors from each of eight devices
    assert "u32[65536,2]" not in program.as_text()


def test_faiss_agrees():
    faiss = pytest.importorskip("faiss")
    queries, database = codes(20), codes(3000)
    index = faiss.IndexBinaryFlat(64)
    index.add(database.view(np.uint8))
    distances, _ = index.search(queries.view(np.uint8), 50)
    np.testing.assert_array_equal(found_by(queries, database, k=50).distances, distances)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    queries, database = codes(2), codes(5)
    with pytest.raises(UserError, match=r"k must lie in \[1, 5\], the number of items, got 6"):
        hamming_search(queries, database, 6)
    with pytest.raises(UserError, match="k must lie in"):
        hamming_search(queries, database, 0)
    with pytest.raises(UserError, match="a row has 2 in queries and 1 in database words"):
        hamming_search(queries, database[:, :1], 1)
    with pytest.raises(UserError, match="database must have at least one row"):
        hamming_search(queries, database[:0], 1)
    with pytest.raises(UserError, match="queries must be uint32"):
        hamming_search(queries.astype(np.float32), database, 1)
    with pytest.raises(UserError, match="max_minima|max_pairs"):
        hamming_search(queries, database, 1, max_minima=0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(UserError, match="axis must be one of the mesh's, data; got 'rows'"):
        sharded_hamming_search(queries, database, 1, mesh, axis="rows")
