"""Labelled image sets: examples whose columns are images of one shape and their classes."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jkd.data.examples import Examples
from jkd.data.rows import IN_MEMORY_BYTES, ArrayRows, BlankRows, JoinedRows, Rows, check_arrays
from jkd.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Examples):
    """Labelled images of one shape: every batch is {"image": uint8[n, H, W, C], "label": int32[n]}.

    Images that vary in size on disk get the central crop, or, with a `seed` and the examples' `positions` in the
    stream of a training run, the random resized crop that (seed, position) decides.

    Attributes:
      shape: (height, width, channels) of every image.
    """

    shape: tuple[int, int, int] = dataclasses.field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes that the images of all of `rows` fill in memory."""
        return len(self.rows) * math.prod(self.shape)


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
    rows = ArrayRows(image=image, label=label.astype(np.int32))
    height, width, channels = image.shape[1:]
    indices = np.arange(len(image), dtype=np.int32)
    return Dataset(name, num_classes, rows, indices, shape=(height, width, channels))


def blank(num_examples: int, shape: tuple[int, int, int], num_classes: int, name: str = "blank") -> Dataset:
    """Stands in for a set that is not on this machine, where only shapes matter (plans).

    Black images with labels 0, 1, .. K-1, 0, ..; in memory where a real set of this size would be, and made on
    reading where it would be streamed.
    """
    label = (np.arange(num_examples) % num_classes).astype(np.int32)
    if num_examples * math.prod(shape) < IN_MEMORY_BYTES:
        return from_arrays(np.zeros((num_examples, *shape), np.uint8), label, num_classes=num_classes, name=name)
    rows = BlankRows(label, {"image": (shape, np.uint8)})
    return Dataset(name, num_classes, rows, np.arange(num_examples, dtype=np.int32), shape=shape)


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
    return Dataset(name, sum(num_classes), rows, indices, shape=datasets[0].shape)
