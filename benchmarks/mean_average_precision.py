"""Mean average precision over the whole ranking of 20,000 codes, against numpy and against faiss.

Ours takes packed codes and labels, as does faiss; numpy takes signs (one product gives all distances) and sorts. All
averages must agree before any clock starts (faiss breaks ties by its own rule, so its average agrees roughly). All take
turns, forth and back, in one process. numpy also runs in its best form: distances of 8 bits, which it sorts by digits,
and as many threads as there are cores.

    python -m benchmarks.mean_average_precision [--queries 1000] [--items 20000] [--bits 64] [--repeats 7] [--no-peer]
"""

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

from benchmarks._hashing import Limits, compiled, header, measured_limits, random_codes, variant
from benchmarks.distill_step import Variant, measure
from jkd import metrics

GOAL, FAISS_GOAL = 3.0, 1.0
CLASSES = 10
Task = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_task(queries: int, items: int, bits: int) -> Task:
    """Packed codes of both, and their labels: codes are those of their class, a quarter of the bits flipped."""
    random = np.random.default_rng(2)
    centers, labels = random_codes(CLASSES, bits, 0), random.integers(0, CLASSES, queries + items).astype(np.int32)
    codes = centers[labels] ^ (random_codes(len(labels), bits, 3) & random_codes(len(labels), bits, 4))
    return codes[:queries], codes[queries:], labels[:queries], labels[queries:]


def ours(task: Task) -> tuple[Variant, float, str]:
    """The measure of packed codes, its value, and what is known of the program."""
    given = [jnp.asarray(x) for x in task]
    program, about = compiled(metrics.hamming_mean_average_precision, *given)
    return variant("jkd", lambda: program(*given)), float(program(*given).map), about


def signs(words: np.ndarray) -> np.ndarray:
    """-1 and 1 in float32."""
    return 2 * np.unpackbits(words.view(np.uint8), axis=1).astype(np.float32) - 1


def ranked(order: np.ndarray, query_labels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precisions of a ranking."""
    relevant = labels[order] == query_labels[:, None]
    hits = np.cumsum(relevant, axis=1, dtype=np.int32)
    precision = hits / np.arange(1, order.shape[1] + 1, dtype=np.float32)
    return np.where(relevant, precision, 0).sum(1) / hits[:, -1]


def by_numpy(queries: np.ndarray, database: np.ndarray, query_labels: np.ndarray, labels: np.ndarray) -> float:
    """A product and a stable sort, as it is mostly written; signs come in."""
    distances = (queries.shape[1] - queries @ database.T) / 2
    return float(ranked(np.argsort(distances, axis=1, kind="stable"), query_labels, labels).mean())


def by_small_numpy(
    queries: np.ndarray, database: np.ndarray, query_labels: np.ndarray, labels: np.ndarray, threads: int
) -> float:
    """The same with distances of 8 bits, in threads."""

    def part(rows: np.ndarray) -> np.ndarray:
        distances = ((queries.shape[1] - queries[rows] @ database.T) / 2).astype(np.uint8)
        return ranked(np.argsort(distances, axis=1, kind="stable"), query_labels[rows], labels)

    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(part, np.array_split(np.arange(len(queries)), 8 * threads))
    return float(np.concatenate(list(parts)).mean())


def by_faiss(task: Task, threads: int, heap: bool) -> Callable[[], float]:
    """All items in faiss's order."""
    import faiss

    faiss.omp_set_num_threads(threads)
    queries, database, query_labels, labels = task
    index = faiss.IndexBinaryFlat(32 * queries.shape[1])
    index.add(database.view(np.uint8))
    index.use_heap = heap

    def average() -> float:
        order = index.search(queries.view(np.uint8), len(database))[1]
        return float(ranked(order, query_labels, labels).mean())

    return average


def compare(task: Task, repeats: int, no_peer: bool) -> tuple[list[Variant], str]:
    """Variants that agree, timed, and what is known of our program."""
    threads = len(os.sched_getaffinity(0))
    mine, value, about = ours(task)
    given = (signs(task[0]), signs(task[1]), *task[2:])
    sorts = {"numpy": functools.partial(by_numpy, *given)}
    sorts["numpy, 8 bits, threads"] = functools.partial(by_small_numpy, *given, threads)
    for name, fn in sorts.items():
        np.testing.assert_allclose(fn(), value, rtol=1e-4, err_msg=name)
    others = {} if no_peer else {f"faiss, {n}": by_faiss(task, threads, n == "heap") for n in ("heap", "counting")}
    for name, fn in others.items():
        np.testing.assert_allclose(fn(), value, rtol=0.02, err_msg=name)
    variants = [mine, *(variant(name, fn, peer=True) for name, fn in {**sorts, **others}.items())]
    measure(variants, repeats, 1)
    return variants, f"mAP {value:.4f}; {about}"


def report(variants: Sequence[Variant], pairs: float, limits: Limits) -> None:
    """A row a variant: milliseconds, nanoseconds a pair, and the peer's time over ours."""
    mine = next(v for v in variants if not v.peer)
    heads = ("ms", "fastest", "CPU ms", "ns a pair", "/ ours")
    print("mAP@all".ljust(24) + "".join(head.rjust(n) for head, n in zip(heads, (9, 9, 9, 11, 8), strict=True)))
    for v in variants:
        ms = statistics.median(v.times)
        ratio = statistics.median(a / b for a, b in zip(v.times, mine.times, strict=True))
        cells = f"{ms:9.1f}{min(v.times):9.1f}{statistics.median(v.cpu):9.1f}{1e6 * ms / pairs:11.2f}"
        print(f"{v.name:24}{cells}{ratio:8.2f}")
    floors = pairs / limits.counting, pairs / limits.product, 8 * pairs / limits.memory
    told = ", ".join(f"{name} {1e3 * x:.1f}" for name, x in zip(("counting", "product", "memory"), floors, strict=True))
    print(f"floors, ms: {told} (distances alone; memory: a rank of 4 bytes written and read)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="without faiss")
    args = parser.parse_args(argv)
    print(header())
    if not args.no_peer and importlib.util.find_spec("faiss") is None:
        print("without faiss, which is not installed: pip install faiss-cpu")
        args.no_peer = True
    limits = measured_limits(args.bits)
    variants, about = compare(make_task(args.queries, args.items, args.bits), args.repeats, args.no_peer)
    print(f"{limits.told()}\n\n{args.queries} queries, {args.items} codes of {args.bits} bits")
    report(variants, args.queries * args.items, limits)
    print(f"{about}\ngoals: {GOAL} x numpy, {FAISS_GOAL} x faiss")


if __name__ == "__main__":
    main()
