"""Where a data set's rows come from: whole arrays in memory, records on disk, or several of them joined."""

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.errors import UserError

Batch = dict[str, np.ndarray]
IN_MEMORY_BYTES = 1_000_000_000


class Rows(abc.ABC):
    """Labelled rows of one or several columns, such as images, that are read by row number.

    Attributes:
      arrays: all rows as whole arrays, or None where they stay on disk.
    """

    arrays: Batch | None = None

    @property
    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """The class of every row, int32[rows], or its classes, bool[rows, classes]."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Reads `rows` as {column: array[n, ...]}, "label" among them; images are uint8[n, H, W, C].

        With a `seed`, images of variable size take a random resized crop that (seed, position) decides;
        without one they take the central crop. Images of fixed size are read as they are.
        """


class ArrayRows(Rows):
    """Rows held as whole arrays."""

    arrays: Batch

    def __init__(self, **columns: np.ndarray):
        """Holds columns of equal length, "label" among them."""
        self.arrays = columns

    def __len__(self) -> int:
        return len(self.arrays["label"])

    @property
    def labels(self) -> np.ndarray:
        """The class of every row."""
        return self.arrays["label"]

    @functools.cached_property
    def on_device(self) -> dict[str, jax.Array]:
        """The same arrays on the default device, moved once and shared by all sources over them."""
        return jax.tree.map(jnp.asarray, self.arrays)

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Takes `rows` out of the arrays."""
        del seed, positions  # whole arrays have a fixed size: nothing is cropped
        return {name: array[rows] for name, array in self.arrays.items()}


class BlankRows(Rows):
    """Zeros (black images) with labels, made when they are read."""

    def __init__(self, label: np.ndarray, columns: Mapping[str, tuple[tuple[int, ...], Any]]):
        """Takes the (shape of one row, dtype) of every column but the labels."""
        self._label, self._columns = label, columns

    def __len__(self) -> int:
        return len(self._label)

    @property
    def labels(self) -> np.ndarray:
        """The class of every row."""
        return self._label

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Zeros and labels."""
        zeros = {name: np.zeros((len(rows), *shape), kind) for name, (shape, kind) in self._columns.items()}
        return {**zeros, "label": self._label[rows]}


class JoinedRows(Rows):
    """Rows of several sets one after the other, at least one of them on disk; classes are offset."""

    def __init__(self, parts: Sequence[tuple[Any, int]]):
        """Joins (data set, class offset) pairs."""
        self.parts = parts
        self.starts = np.cumsum([0] + [len(dataset) for dataset, _ in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every row, offset."""
        return np.concatenate([dataset.labels + np.int32(offset) for dataset, offset in self.parts])

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Reads each part's rows at once."""
        part_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        out: Batch = {}
        for number in np.unique(part_of_row):
            dataset, offset = self.parts[number]
            here = np.flatnonzero(part_of_row == number)
            there = None if positions is None else positions[here]
            read = dataset.read(rows[here] - self.starts[number], seed, there)
            read["label"] = read["label"] + np.int32(offset)
            for name, values in read.items():
                out.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[here] = values
        return out


def check_arrays(name: str, image: np.ndarray, label: np.ndarray, num_classes: int) -> None:
    """Raises UserError unless `image` is uint8[N, H, W, C] and `label` holds N classes."""
    if image.ndim != 4 or image.dtype != np.uint8:
        raise UserError(f"Images of {name!r} must be uint8[N, H, W, C], got {image.dtype}{list(image.shape)}.")
    if label.shape != image.shape[:1]:
        raise UserError(f"{name!r} has {len(image)} images but labels of shape {list(label.shape)}.")
    check_labels(name, label, num_classes)


def check_labels(name: str, label: np.ndarray, num_classes: int) -> None:
    """Raises UserError unless all labels are in [0, num_classes)."""
    if label.size and not (label.min() >= 0 and label.max() < num_classes):
        raise UserError(f"Labels of {name!r} must be in [0, {num_classes}), got {label.min()} to {label.max()}.")


def check_columns(name: str, columns: Batch, num_classes: int | None) -> int:
    """The number of classes of columns; UserError unless they are as `from_columns` says."""
    if "label" not in columns or "index" in columns:
        raise UserError(
            f"{name!r} needs a column 'label', and none 'index', which batches add; it has {', '.join(columns)}."
        )
    label = columns["label"]
    lengths = {key: len(column) if column.ndim else 0 for key, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"The columns of {name!r} must be of equal length, got {lengths}.")
    for key, column in columns.items():
        if column.dtype == np.float32 and not np.isfinite(column).all():
            row = int(np.argmin(np.isfinite(column.reshape(len(column), -1)).all(1)))
            raise UserError(f"Column {key!r} of {name!r} holds NaN or inf, first in row {row}.")
    if label.dtype == np.bool_ and label.ndim == 2 and num_classes in (None, label.shape[1]):
        return label.shape[1]
    if label.dtype != np.int32 or label.ndim != 1:
        expected = f"bool[N, {'classes' if num_classes is None else num_classes}]"
        raise UserError(f"Labels of {name!r} must be int[N] or {expected}, got {label.dtype}{list(label.shape)}.")
    if num_classes is None:
        num_classes = int(label.max(initial=-1)) + 1
    check_labels(name, label, num_classes)
    return num_classes
