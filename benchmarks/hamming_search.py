"""The 100 nearest of a million and of ten million 64-bit codes, against faiss's IndexBinaryFlat.

Both sides hold the database in memory already and answer 1,000 queries at once, exactly. Distances must be equal, and
ours ordered by index where they are, before any clock starts. All take turns, forth and back, in one process. faiss
runs in both of its forms (a heap for each query, and counting), with as many threads as there are cores.

    python -m benchmarks.hamming_search [--items 1000000 10000000] [--queries 1000] [--k 100] [--repeats 7] [--no-peer]

With --topology nothing is run: the search of a database that is divided among these devices is compiled, and what each
of them needs is printed; TPUs need the `tpu` extra.

    python -m benchmarks.hamming_search --topology v5e:4x4 --items 100000000
"""

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks._hashing import Limits, compiled, header, measured_limits, random_codes, variant
from benchmarks.distill_step import Variant, measure
from experiments.plan import use_cpu_devices
from experiments.report import table_console
from jkd import hashing
from jkd.hashing.search import BLOCK
from jkd.train.plan import report as report_of
from jkd.train.topology import topology_devices

GOAL = 1.0


def ours(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[Variant, Any, str]:
    """The search, what it finds, and what is known of the program."""
    asked, codes = jnp.asarray(queries), jnp.asarray(database)
    program, about = compiled(functools.partial(hashing.hamming_search, k=k), asked, codes)
    return variant("jkd", lambda: program(asked, codes)), program(asked, codes), about


def peers(queries: np.ndarray, database: np.ndarray, k: int, threads: int) -> list[tuple[Variant, np.ndarray]]:
    """Faiss in both of its forms, and the distances that it finds."""
    import faiss

    faiss.omp_set_num_threads(threads)
    asked, found = queries.view(np.uint8), []
    for name, heap in (("faiss, heap", True), ("faiss, counting", False)):
        index = faiss.IndexBinaryFlat(32 * queries.shape[1])
        index.add(database.view(np.uint8))
        index.use_heap = heap
        search = functools.partial(index.search, asked, k)
        found.append((variant(name, search, peer=True), search()[0]))
    return found


def check(found: Any, queries: np.ndarray, database: np.ndarray, others: Sequence[np.ndarray]) -> None:
    """The distances are those of the items and of the others; equal ones are in the order of their indices."""
    distances, indices = (np.asarray(x) for x in found)
    counted = np.bitwise_count(queries[:, None] ^ database[indices]).sum(-1, dtype=np.int32)
    np.testing.assert_array_equal(distances, counted)
    later = np.diff(distances.astype(np.int64) * len(database) + indices, axis=1)
    assert (later > 0).all(), "equal distances are not in the order of their indices"
    for other in others:
        np.testing.assert_array_equal(distances, other)
    for query, row, last in zip(queries[:3], indices, distances[:, -1], strict=False):  # nobody nearer is left out
        every = np.bitwise_count(query[None] ^ database).sum(-1, dtype=np.int32)
        order = np.flatnonzero(every <= last)
        np.testing.assert_array_equal(order[np.argsort(every[order], kind="stable")][: len(row)], row)


def report(variants: Sequence[Variant], pairs: float, moved: float, limits: Limits) -> None:
    """A row a variant: milliseconds, rate, share of what counting allows, and the peer's time over ours."""
    mine = next(v for v in variants if not v.peer)
    heads = ("ms", "fastest", "CPU ms", "G pairs/s", "% of counting", "/ ours")
    print("search".ljust(18) + "".join(head.rjust(n) for head, n in zip(heads, (9, 9, 9, 11, 15, 8), strict=True)))
    for v in variants:
        ms = statistics.median(v.times)
        rate = pairs / ms * 1e3
        ratio = statistics.median(a / b for a, b in zip(v.times, mine.times, strict=True))
        cells = f"{ms:9.1f}{min(v.times):9.1f}{statistics.median(v.cpu):9.1f}{rate / 1e9:11.2f}"
        print(f"{v.name:18}{cells}{100 * rate / limits.counting:15.1f}{ratio:8.2f}")
    floors = pairs / limits.counting, pairs / limits.product, moved / limits.memory
    told = ", ".join(f"{name} {1e3 * x:.1f}" for name, x in zip(("counting", "product", "memory"), floors, strict=True))
    print(f"floors, ms: {told} (a float32 product; memory: the codes once, the least distances written and read)")


def compare(items: int, args: argparse.Namespace, limits: Limits) -> None:
    queries, database = random_codes(args.queries, args.bits, 1), random_codes(items, args.bits, 0)
    mine, found, about = ours(queries, database, args.k)
    others = []
    if not args.no_peer:
        others = peers(queries, database, args.k, len(os.sched_getaffinity(0)))
    check(found, queries, database, [distances for _, distances in others])
    variants = [mine, *(v for v, _ in others)]
    measure(variants, args.repeats, 1)
    pairs = len(queries) * items
    print(f"\n{len(queries)} queries, {items} codes of {args.bits} bits, top {args.k}")
    report(variants, pairs, database.nbytes + 2 * pairs / BLOCK, limits)
    print(about)


def plan(items: int, args: argparse.Namespace) -> None:
    """Prints what each device of a topology needs to search its share of a database, of which all hold as much."""
    devices = topology_devices(args.topology, 1)
    items += -items % len(devices)
    mesh = Mesh(np.array(devices), ("data",))
    words = -(-args.bits // 32)

    def codes(rows: int, spec: P) -> Any:
        return jax.ShapeDtypeStruct((rows, words), jnp.uint32, sharding=NamedSharding(mesh, spec))

    search = jax.jit(functools.partial(hashing.sharded_hamming_search, k=args.k, mesh=mesh))
    compiled = search.lower(codes(args.queries, P()), codes(items, P("data"))).compile()
    print(f"\n{args.queries} queries, {items} codes of {args.bits} bits, top {args.k}, divided among {args.topology}")
    table_console().print(report_of(compiled, devices).table())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="without faiss")
    parser.add_argument("--topology", metavar="NAME:LAYOUT", help="compile for v5e:4x4, cpu:8, ..., and run nothing")
    args = parser.parse_args(argv)
    if args.topology:
        use_cpu_devices(args.topology)
        for items in args.items:
            plan(items, args)
        return
    print(header())
    if not args.no_peer and importlib.util.find_spec("faiss") is None:
        print("without faiss, which is not installed: pip install faiss-cpu")
        args.no_peer = True
    limits = measured_limits(args.bits)
    print(limits.told())
    for items in args.items:
        compare(items, args, limits)
    print(f"goal: {GOAL} x faiss, the faster of its forms")


if __name__ == "__main__":
    main()
