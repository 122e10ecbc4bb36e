"""Batches as a pure function of (seed, step): from arrays on the device, or streamed from disk.

Step t takes positions t B .. t B + B - 1 of an endless stream of epochs, each a permutation of all examples:
nothing is dropped, every example comes once an epoch, and a batch may cross into the next epoch. The step
number is the only state, so a resumed run, or one on other processes, sees the same batches.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.data.examples import Examples
from jkd.data.rows import IN_MEMORY_BYTES, ArrayRows
from jkd.data.seeding import epoch_order, random_state
from jkd.errors import UserError, unknown

Tree = dict[str, Any]
RESIDENT = ("auto", "device", "stream")


def assemble_resident(resident: Tree, crossed: Tree) -> Tree:
    """Gathers all columns, and "index", from the arrays on the device by the row numbers that crossed."""
    index = crossed["index"]
    gathered = jax.tree.map(lambda rows: jnp.asarray(rows).at[index].get(mode="promise_in_bounds"), resident)
    return gathered | {"index": index}


def assemble_streamed(resident: Tree, crossed: Tree) -> Tree:
    """Returns what crossed: a streamed batch is whole."""
    del resident
    return crossed


@dataclasses.dataclass(frozen=True, eq=False)
class Source(abc.ABC):
    """Batches of `batch_size` (global) examples of `dataset`; `seed` None is data set order.

    A batch is {"image": uint8[B, H, W, C], "label": int32[B], "index": int32[B]}, or all columns of `from_columns`
    and "index", which counts the rows of the set that was loaded, before any subset was taken: it finds an example's
    cached teacher logits.

    Attributes:
      dataset: the examples.
      batch_size: of the global batch, all processes together.
      seed: of the shuffle.
      prefetch: how many batches ahead a loop should prepare `local`; 0 where it is cheap.
    """

    dataset: Examples
    batch_size: int
    seed: int | None = None
    prefetch: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}.")
        if not len(self.dataset):
            raise UserError(f"Data set {self.dataset.name!r} has no examples.")
        if self.seed is not None:
            random_state("epoch order", self.seed)  # checks its range before the first step

    @property
    def num_examples(self) -> int:
        """Examples in an epoch."""
        return len(self.dataset)

    @property
    def num_batches(self) -> int:
        """Batches that one pass needs, the last one padded: ceil(num_examples / batch_size)."""
        return -(-self.num_examples // self.batch_size)

    @property
    def resident(self) -> Tree:
        """Host arrays for a loop to put on its devices once; one object for all sources of a set."""
        return {}

    @staticmethod
    @abc.abstractmethod
    def assemble(resident: Tree, crossed: Tree) -> Tree:
        """Makes the batch of `resident` and what `crossed`: traced; one function for each kind of source."""

    @abc.abstractmethod
    def local(self, t: int, rows: np.ndarray | None = None) -> Tree:
        """Returns what crosses to the devices at step `t`: `rows` of the global batch (int[n]; None: all)."""

    def batch(self, t: int) -> Tree:
        """Returns the whole global batch of step `t`, assembled on the default device."""
        return self.assemble(self._resident_on_device(), jax.tree.map(jnp.asarray, self.local(t)))

    def in_order(self, batch_size: int | None = None) -> "Source":
        """Returns the same examples in data set order: one pass is t in range(num_batches).

        The last batch is padded with the first examples: example i of batch t is real where
        t batch_size + i < num_examples. Images of variable size get the central crop.
        """
        return dataclasses.replace(self, seed=None, batch_size=batch_size or self.batch_size)

    def iterate(self, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Tree]:
        """Yields local(t, rows) for t in start..stop-1."""
        return (self.local(t, rows) for t in range(start, stop))

    def _resident_on_device(self) -> Tree:
        return {}

    def _rows(self, t: int, rows: np.ndarray | None) -> np.ndarray:
        """The row numbers, int32[n], of these rows of batch `t`."""
        batch = self._batch_rows(t)
        return batch if rows is None else batch[rows]

    def _batch_rows(self, t: int) -> np.ndarray:
        epoch, offset = divmod(t * self.batch_size, self.num_examples)
        count = self.batch_size
        if offset + count <= self.num_examples:
            return self._epoch(epoch)[offset : offset + count]
        pieces = [self._epoch(epoch)[offset:]]
        while (left := count - sum(map(len, pieces))) > 0:
            epoch += 1
            pieces.append(self._epoch(epoch)[:left])
        return np.concatenate(pieces)

    @functools.cached_property
    def _epoch(self) -> Callable[[int], np.ndarray]:
        """The rows of an epoch; the last two are kept, since a batch may cross from one into the next."""

        @functools.lru_cache(maxsize=2)
        def rows(epoch: int) -> np.ndarray:
            order = self.dataset.indices[epoch_order(self.seed, epoch, self.num_examples)]
            order.flags.writeable = False
            return order

        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class MemorySource(Source):
    """Batches of a set in memory: its arrays live on the devices, and a step sends row numbers only."""

    assemble = staticmethod(assemble_resident)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dataset.rows, ArrayRows):
            raise UserError(f"Data set {self.dataset.name!r} is on disk: load it with in_memory=True, or stream it.")

    @property
    def resident(self) -> Tree:
        """All rows of the loaded set, by column: subsets of it share them."""
        return self.dataset.rows.arrays  # type: ignore[return-value]

    def local(self, t: int, rows: np.ndarray | None = None) -> Tree:
        """Returns {"index": int32[n]}."""
        return {"index": self._rows(t, rows)}

    def _resident_on_device(self) -> Tree:
        return self.dataset.rows.on_device  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSource(Source):
    """Batches read by row number, a whole batch at a time, by `workers` threads up to `prefetch` ahead.

    Threads, not processes: Pillow and array_record release the interpreter while they decode and read.
    Images of variable size get random resized crops where `seed` is given, central crops in data set order.
    """

    workers: int = dataclasses.field(default=4, kw_only=True)
    prefetch: int = dataclasses.field(default=4, kw_only=True)

    assemble = staticmethod(assemble_streamed)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1 or self.prefetch < 1:
            raise UserError(f"workers and prefetch must be at least 1, got {self.workers} and {self.prefetch}.")

    def local(self, t: int, rows: np.ndarray | None = None) -> Tree:
        """Reads these rows: all columns and "index"."""
        index = self._rows(t, rows)
        positions = t * self.batch_size + (np.arange(self.batch_size) if rows is None else rows)
        return self.dataset.rows.read(index, self.seed, positions) | {"index": index}

    def iterate(self, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Tree]:
        """Yields local(t, rows) for t in start..stop-1, read ahead by threads."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(lambda t: self.local(int(t), rows))
        options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=self.prefetch)
        return iter(steps.to_iter_dataset(options))


def source(
    dataset: Examples,
    batch_size: int,
    seed: int | None = None,
    *,
    resident: str = "auto",
    workers: int = 4,
    prefetch: int = 4,
) -> Source:
    """Makes the source for `dataset`: on the device if it is in memory and under 1 GB, else streamed.

    Args:
      dataset: what to read.
      batch_size: examples in a GLOBAL batch.
      seed: of the shuffle, one permutation an epoch; None: data set order.
      resident: "auto", "device" or "stream".
      workers: threads of a streamed source.
      prefetch: batches that a streamed source reads ahead.

    Raises:
      UserError: for values out of range, or "device" for a set that stays on disk.
    """
    if resident not in RESIDENT:
        raise unknown("resident", resident, RESIDENT)
    small = dataset.arrays is not None and dataset.nbytes < IN_MEMORY_BYTES
    if resident == "device" or (resident == "auto" and small):
        return MemorySource(dataset, batch_size, seed)
    return StreamSource(dataset, batch_size, seed, workers=workers, prefetch=prefetch)
