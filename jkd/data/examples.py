"""Labelled examples: rows of whatever columns, and the row numbers that are among them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jkd.data.rows import IN_MEMORY_BYTES, ArrayRows, Batch, BlankRows, Rows, check_columns
from jkd.data.seeding import random_state
from jkd.errors import UserError

Of = TypeVar("Of", bound="Examples")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples, read by number; transforms select rows and never copy them.

    Attributes:
      name: what errors and tables call them.
      num_classes: labels are in [0, num_classes).
      rows: where the columns are, shared by all examples made from one another.
      indices: int32[N], the row of `rows` behind each example.
      parts: the stored rows that `rows` are, as (split, first, last + 1); empty where nothing is stored.
    """

    name: str
    num_classes: int
    rows: Rows
    indices: np.ndarray
    parts: tuple[tuple[str, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every example, int32[N], or its classes, bool[N, num_classes].

        A set on disk is read through once and remembers them.
        """
        return self.rows.labels[self.indices]

    @property
    def arrays(self) -> Batch | None:
        """All of `rows` (not only these examples') as {column: array}, or None where they stay on disk."""
        return self.rows.arrays

    @property
    def nbytes(self) -> int:
        """Bytes that all of `rows` fill in memory."""
        if self.arrays is not None:
            return sum(column.nbytes for column in self.arrays.values())
        row = self.rows.read(np.zeros(1, np.int32))
        return len(self.rows) * sum(column.nbytes for column in row.values())

    def read(self, indices: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Reads examples by number as {column: array[n, ...]}, "label" among them; see `Rows.read`."""
        return self.rows.read(self.indices[indices], seed, positions)

    def overlaps(self, other: "Examples") -> bool:
        """Whether both were loaded from the same set with splits that share rows (all of `rows` counted)."""
        return self.name == other.name and any(
            split == name and max(start, first) < min(stop, last)
            for split, start, stop in self.parts
            for name, first, last in other.parts
        )

    def subset(self: Of, indices: np.ndarray | Sequence[int]) -> Of:
        """Returns the examples `indices` of these, in that order."""
        return dataclasses.replace(self, indices=self.indices[np.asarray(indices, np.int64)])

    def take(self: Of, count: int) -> Of:
        """Returns the first `count` examples.

        Raises:
          UserError: if there are fewer.
        """
        if not 0 < count <= len(self):
            raise UserError(f"count must be in [1, {len(self)}] for {self.name!r}, got {count}.")
        return self.subset(np.arange(count))

    def per_class(self: Of, count: int, seed: int = 0) -> Of:
        """Returns `count` random examples of every class, in data set order.

        Raises:
          UserError: if a class has fewer, or examples have several classes.
        """
        return self._draw([count] * self.num_classes, "per class", seed)

    def long_tail(self: Of, imbalance_factor: float | int, seed: int = 0) -> Of:
        """Returns a long-tailed subset: class k keeps n_max * factor^(-k / (K - 1)) random examples.

        n_max is the largest class; counts are rounded down (as in CIFAR-10-LT and -100-LT), at least 1 and at
        most what the class has. Cui et al., "Class-balanced loss based on effective number of samples", 2019.

        Raises:
          UserError: if `imbalance_factor` < 1, there are fewer than two classes, or examples have several.
        """
        if imbalance_factor < 1 or self.num_classes < 2:
            raise UserError(
                f"imbalance_factor must be >= 1 on a set of >= 2 classes, got {imbalance_factor} on "
                f"{self.num_classes} class(es)."
            )
        have = self._counts()
        exponent = -np.arange(self.num_classes) / (self.num_classes - 1)
        # The small term keeps 500 * 0.01 from becoming 4.
        want = np.floor(have.max() * float(imbalance_factor) ** exponent + 1e-9).astype(int)
        return self._draw(np.minimum(np.maximum(want, 1), have), "long tail", seed)

    def split(self: Of, first: float | int, seed: int = 0, stratified: bool = True) -> tuple[Of, Of]:
        """Cuts the set in two at random: the examples of the first part and all others, in data set order.

        Args:
          first: size of the first part, an int (examples) or a float in (0, 1) (share, rounded to nearest).
          seed: the same seed gives the same parts, on any numpy.
          stratified: every class is cut in the same proportion, up to one example; not where examples have several.

        Raises:
          UserError: if a part would be empty.
        """
        size = round(first * len(self)) if isinstance(first, float) else int(first)
        if not 0 < size < len(self):
            raise UserError(
                f"The first part of {self.name!r} must leave examples to both parts: it must be in (0, {len(self)}), "
                f"got {first}."
            )
        if stratified and self.labels.ndim == 1:
            part = self._draw_positions(_proportional(self._counts(), size), "split", seed)
        else:
            part = np.sort(random_state("split", seed).permutation(len(self))[:size])
        inside = np.zeros(len(self), bool)
        inside[part] = True
        return self.subset(np.flatnonzero(inside)), self.subset(np.flatnonzero(~inside))

    def _counts(self) -> np.ndarray:
        if self.labels.ndim != 1:
            raise UserError(f"Examples of {self.name!r} have several classes each: none can be drawn by class.")
        return np.bincount(self.labels, minlength=self.num_classes)

    def _draw(self: Of, counts: Sequence[int] | np.ndarray, purpose: str, seed: int) -> Of:
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


def from_columns(columns: Mapping[str, Any], *, name: str = "columns", num_classes: int | None = None) -> Examples:
    """Makes labelled examples of columns of any shape, such as the two sides of a pair and a mask.

    A batch of `jkd.data.source` holds every column, and "index". Floating-point columns become float32, integer ones
    int32; bool and uint8 stay what they are.

    Args:
      columns: {name: array[N, ...]}; "label" is int[N], or bool[N, num_classes] where examples have several classes.
      name: what errors call them.
      num_classes: by default what the labels need.

    Raises:
      UserError: if "label" is missing or not in range, columns differ in length, one is named "index", is of another
        type, or holds a number that is not finite.
    """
    columns = {key: _stored(name, key, np.asarray(column)) for key, column in columns.items()}
    num_classes = check_columns(name, columns, num_classes)
    return Examples(name, num_classes, ArrayRows(**columns), np.arange(len(columns["label"]), dtype=np.int32))


def _stored(name: str, key: str, column: np.ndarray) -> np.ndarray:
    """A column with the type that it is kept in."""
    if column.dtype in (np.bool_, np.uint8):
        return column
    for kind, kept in ((np.floating, np.float32), (np.integer, np.int32)):
        if np.issubdtype(column.dtype, kind):
            return column.astype(kept, copy=False)
    raise UserError(f"Column {key!r} of {name!r} must hold numbers or booleans, got {column.dtype}.")


def blank_columns(
    num_examples: int,
    columns: Mapping[str, tuple[tuple[int, ...], Any]],
    num_classes: int,
    *,
    several: bool = False,
    name: str = "blank",
) -> Examples:
    """Stands in for columns that are not on this machine, where only shapes matter (plans).

    Args:
      num_examples: how many.
      columns: {name: (shape of one example, dtype)}; all zeros.
      num_classes: of "label": 0, 1, .. K-1, 0, ..
      several: whether labels are bool[N, num_classes].
      name: what errors call them.

    They are in memory where real ones of this size would be, and made on reading where those would be streamed.
    """
    label: np.ndarray = (np.arange(num_examples) % num_classes).astype(np.int32)
    if several:
        label = label[:, None] == np.arange(num_classes)
    rows: Rows = BlankRows(label, columns)
    size = num_examples * sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in columns.values())
    if size < IN_MEMORY_BYTES:
        rows = ArrayRows(**rows.read(np.arange(num_examples)))
    return Examples(name, num_classes, rows, np.arange(num_examples, dtype=np.int32))
