"""A labelled image set: rows, and the row numbers that are in it."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jkd.data.rows import IN_MEMORY_BYTES, ArrayRows, Batch, BlankRows, JoinedRows, Rows, check_arrays
from jkd.data.seeding import random_state
from jkd.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one shape, read by number; its transforms select rows and never copy images.

    Attributes:
      name: what errors and tables call it.
      num_classes: labels are in [0, num_classes).
      shape: (height, width, channels) of every image.
      rows: where the images are, shared by all data sets made from one another.
      indices: int32[N], the row of `rows` behind each example.
      parts: the stored rows that `rows` are, as (split, first, last + 1); empty where nothing is stored.
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    rows: Rows
    indices: np.ndarray
    parts: tuple[tuple[str, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every example, int32[N]; a set on disk is read through once and remembers them."""
        return self.rows.labels[self.indices]

    @property
    def arrays(self) -> Batch | None:
        """All of `rows` (not only this set's) as {"image", "label"}, or None where they stay on disk."""
        return self.rows.arrays

    @property
    def nbytes(self) -> int:
        """Bytes that the images of all of `rows` fill in memory."""
        return len(self.rows) * int(np.prod(self.shape))

    def read(self, indices: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Reads examples by number as {"image": uint8[n, H, W, C], "label": int32[n]}.

        Images that vary in size on disk get the central crop, or, with a `seed` and the examples' `positions`
        in the stream of a training run, the random resized crop that (seed, position) decides.
        """
        return self.rows.read(self.indices[indices], seed, positions)

    def overlaps(self, other: "Dataset") -> bool:
        """Whether both were loaded from the same set with splits that share rows (all of `rows` counted)."""
        return self.name == other.name and any(
            split == name and max(start, first) < min(stop, last)
            for split, start, stop in self.parts
            for name, first, last in other.parts
        )

    def subset(self, indices: np.ndarray | Sequence[int]) -> "Dataset":
        """Returns the examples `indices` of this set, in that order."""
        return dataclasses.replace(self, indices=self.indices[np.asarray(indices, np.int64)])

    def take(self, count: int) -> "Dataset":
        """Returns the first `count` examples.

        Raises:
          UserError: if there are fewer.
        """
        if not 0 < count <= len(self):
            raise UserError(f"count must be in [1, {len(self)}] for {self.name!r}, got {count}.")
        return self.subset(np.arange(count))

    def per_class(self, count: int, seed: int = 0) -> "Dataset":
        """Returns `count` random examples of every class, in data set order.

        Raises:
          UserError: if a class has fewer.
        """
        return self._draw([count] * self.num_classes, "per class", seed)

    def long_tail(self, imbalance_factor: float | int, seed: int = 0) -> "Dataset":
        """Returns a long-tailed subset: class k keeps n_max * factor^(-k / (K - 1)) random examples.

        n_max is the largest class; counts are rounded down (as in CIFAR-10-LT and -100-LT), at least 1 and at
        most what the class has. Cui et al., "Class-balanced loss based on effective number of samples", 2019.

        Raises:
          UserError: if `imbalance_factor` < 1 or the set has fewer than two classes.
        """
        if imbalance_factor < 1 or self.num_classes < 2:
            raise UserError(
                f"imbalance_factor must be >= 1 on a set of >= 2 classes, got {imbalance_factor} on "
                f"{self.num_classes} class(es)."
            )
        have = np.bincount(self.labels, minlength=self.num_classes)
        exponent = -np.arange(self.num_classes) / (self.num_classes - 1)
        # The small term keeps 500 * 0.01 from becoming 4.
        want = np.floor(have.max() * float(imbalance_factor) ** exponent + 1e-9).astype(int)
        return self._draw(np.minimum(np.maximum(want, 1), have), "long tail", seed)

    def split(self, first: float | int, seed: int = 0, stratified: bool = True) -> tuple["Dataset", "Dataset"]:
        """Cuts the set in two at random: the examples of the first part and all others, in data set order.

        Args:
          first: size of the first part, an int (examples) or a float in (0, 1) (share, rounded to nearest).
          seed: the same seed gives the same parts, on any numpy.
          stratified: every class is cut in the same proportion, up to one example.

        Raises:
          UserError: if a part would be empty.
        """
        size = round(first * len(self)) if isinstance(first, float) else int(first)
        if not 0 < size < len(self):
            raise UserError(
                f"The first part of {self.name!r} must leave examples to both parts: it must be in (0, {len(self)}), "
                f"got {first}."
            )
        if stratified:
            part = self._draw_positions(_proportional(self._counts(), size), "split", seed)
        else:
            part = np.sort(random_state("split", seed).permutation(len(self))[:size])
        inside = np.zeros(len(self), bool)
        inside[part] = True
        return self.subset(np.flatnonzero(inside)), self.subset(np.flatnonzero(~inside))

    def _counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=self.num_classes)

    def _draw(self, counts: Sequence[int] | np.ndarray, purpose: str, seed: int) -> "Dataset":
        return self.subset(self._draw_positions(np.asarray(counts), purpose, seed))

    def _draw_positions(self, counts: np.ndarray, purpose: str, seed: int) -> np.ndarray:
        """Draws counts[k] of this set's examples of each class k without replacement: sorted positions."""
        have = self._counts()
        for k in np.flatnonzero((counts > have) | (counts < 0)):
            raise UserError(f"Class {k} of {self.name!r} has {have[k]} examples, asked for {counts[k]}.")
        by_class = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(have)[:-1])
        drawn = [
            members[random_state(purpose, seed, k).permutation(len(members))[: counts[k]]]
            for k, members in enumerate(by_class)
        ]
        return np.sort(np.concatenate(drawn))


def _proportional(counts: np.ndarray, size: int) -> np.ndarray:
    """Shares out `size` among classes by their `counts`: rounded down, then by largest remainder."""
    quota = counts * size
    share, remainder = np.divmod(quota, counts.sum())
    largest = np.argsort(-remainder, kind="stable")[: size - share.sum()]
    share[largest] += 1
    return share


def from_arrays(
    image: np.ndarray, label: np.ndarray, *, num_classes: int | None = None, name: str = "arrays"
) -> Dataset:
    """Makes a data set of images uint8[N, H, W, C] and classes int[N].

    Raises:
      UserError: if shapes or dtypes differ from that, or a label is not in [0, num_classes).
    """
    image, label = np.asarray(image), np.asarray(label)
    if num_classes is None:
        num_classes = int(label.max()) + 1 if label.size else 0
    check_arrays(name, image, label, num_classes)
    rows = ArrayRows(image, label.astype(np.int32))
    height, width, channels = image.shape[1:]
    return Dataset(name, num_classes, (height, width, channels), rows, np.arange(len(image), dtype=np.int32))


def blank(num_examples: int, shape: tuple[int, int, int], num_classes: int, name: str = "blank") -> Dataset:
    """Stands in for a set that is not on this machine, where only shapes matter (plans).

    Black images with labels 0, 1, .. K-1, 0, ..; in memory where a real set of this size would be, and made on
    reading where it would be streamed.
    """
    label = (np.arange(num_examples) % num_classes).astype(np.int32)
    if num_examples * math.prod(shape) < IN_MEMORY_BYTES:
        return from_arrays(np.zeros((num_examples, *shape), np.uint8), label, num_classes=num_classes, name=name)
    return Dataset(name, num_classes, shape, BlankRows(label, shape), np.arange(num_examples, dtype=np.int32))


def concat(datasets: Sequence[Dataset]) -> Dataset:
    """Joins sets of different classes into one: the classes of each follow those of the one before.

    Row numbers of the result count through the joined sets, in order.

    Raises:
      UserError: if there is none, or their image shapes differ.
    """
    if len({dataset.shape for dataset in datasets}) != 1:
        shapes = ", ".join(f"{dataset.name} {dataset.shape}" for dataset in datasets)
        raise UserError(f"concat needs data sets of one image shape, got: {shapes or 'none'}.")
    num_classes = [dataset.num_classes for dataset in datasets]
    offsets = np.cumsum([0] + num_classes[:-1]).tolist()
    joined = JoinedRows(list(zip(datasets, offsets, strict=True)))
    rows: Rows = joined
    if all(dataset.arrays is not None for dataset in datasets):
        rows = ArrayRows(**joined.read(np.arange(len(joined))))
    name = "+".join(dataset.name for dataset in datasets)
    indices = np.arange(len(joined), dtype=np.int32)
    return Dataset(name, sum(num_classes), datasets[0].shape, rows, indices)
