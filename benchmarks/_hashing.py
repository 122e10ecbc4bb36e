"""What both benchmarks of Hamming distances share: codes, and what this machine can do at best."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.distill_step import Variant, measured_peak


@dataclasses.dataclass(frozen=True)
class Limits:
    """Pairs a second that counting and a product allow, and bytes a second that memory does."""

    counting: float
    product: float
    memory: float

    def told(self) -> str:
        return (
            f"limits: counting {self.counting / 1e9:.2f} and a float32 product {self.product / 1e9:.2f} "
            f"billion pairs/s, memory {self.memory / 1e9:.1f} GB/s"
        )


def header() -> str:
    """What a table needs beside it."""
    device = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, {device}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


def random_codes(rows: int, bits: int, seed: int) -> np.ndarray:
    """Packed codes of fair coins; `bits` is a multiple of 32."""
    return np.random.default_rng(seed).integers(0, 2**32, (rows, bits // 32), np.uint32)


def measured_limits(bits: int, *, queries: int = 256, megabytes: int = 256, product: int = 2048) -> Limits:
    """The best of ten of each."""
    words = bits // 32
    codes, asked = random_codes(16 * 1024, bits, 0), random_codes(queries, bits, 1)
    planes = jnp.asarray(codes.reshape(1024, 16, words).transpose(2, 1, 0))  # stays in the cache
    counted = len(codes) * queries / best_seconds(jax.jit(least), jnp.asarray(asked), planes)
    large = jnp.zeros(megabytes * 2**18, jnp.uint32)
    moved = 2 * large.nbytes / best_seconds(jax.jit(lambda x: x + 1), large)  # read and written
    return Limits(counted, measured_peak("float32", product) / (2 * bits), moved)


def least(queries: jax.Array, planes: jax.Array) -> jax.Array:
    """The least distance of 16 codes, of 1024 groups of codes: what a search has to do for each pair, and no more."""
    found = []
    for item in range(planes.shape[1]):
        words = [
            jax.lax.population_count(queries[:, w][:, None] ^ planes[w, item][None]) for w in range(planes.shape[0])
        ]
        found.append(functools.reduce(jnp.add, words).astype(jnp.uint8))
    return functools.reduce(jnp.minimum, found)


def best_seconds(fn: Callable[..., Any], *args: Any, repeats: int = 10) -> float:
    """Of a call, once it is compiled."""
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - began)
    return min(times)


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """The program of `fn` for such arguments, and what is known of it."""
    began = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    megabytes = program.memory_analysis().temp_size_in_bytes / 2**20
    told = f"compiled in {time.perf_counter() - began:.1f} s; temporaries {megabytes:.0f} MiB"
    return program, f"{told}; load {os.getloadavg()[0]:.1f}"


def variant(name: str, fn: Callable[[], Any], *, peer: bool = False) -> Variant:
    """`fn`, run and waited for."""

    def run(steps: int) -> list[float]:
        for _ in range(steps):
            jax.block_until_ready(fn())
        return []

    return Variant(name, False, run, peer=peer)
