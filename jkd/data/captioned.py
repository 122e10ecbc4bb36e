"""Features of pictures and their captions from users' files: one .npz, or a folder of .npy files that stay on disk."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jkd.data.examples import Examples, from_columns
from jkd.data.rows import Batch, Rows
from jkd.data.vocabulary import PADDING
from jkd.errors import UserError

NEEDED, OPTIONAL = ("image", "words", "split"), ("mask", "table")
# Karpathy's names; "restval" are training images too.
SPLITS = {"train": "train", "restval": "train", "val": "validation", "validation": "validation", "test": "test"}


class CaptionFile(NamedTuple):
    """What a file holds.

    Attributes:
      examples: with the columns "image", "words", "mask" and "label" (0).
      rows: of "train", "validation" and "test".
      words: how many there are where words are numbers, padding among them; 0 where they are vectors.
      table: float32[words, dim], the vectors of the words, where the file has them.
    """

    examples: Examples
    rows: dict[str, np.ndarray]
    words: int
    table: np.ndarray | None


class MappedRows(Rows):
    """Columns that stay on disk, of which single rows are read."""

    def __init__(self, columns: Mapping[str, np.ndarray]):
        """Takes memory-mapped or whole arrays of one length."""
        self._columns = columns
        self._count = len(columns["image"])

    @property
    def labels(self) -> np.ndarray:
        """Zeros."""
        return np.zeros(self._count, np.int32)

    def __len__(self) -> int:
        return self._count

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Takes `rows` out of the files."""
        del seed, positions
        found = {name: np.asarray(column[rows]) for name, column in self._columns.items()}
        return found | {"label": np.zeros(len(rows), np.int32)}


def read_captioned(path: str | os.PathLike[str]) -> CaptionFile:
    """Reads features of pictures with their captions.

    An .npz with these arrays, or a folder with each of them as NAME.npy, of which "image" then stays on disk:

      image  float[N, h, w, C] or [N, positions, C], maps of a network; or uint8[N, H, W, C], pixels
      words  int[N, captions, length], numbers of words, 0 behind the last one; or their vectors, float[.., dim]
      split  names[N]: train, restval, val, test
      mask   bool[N, captions, length], optional where words are numbers: by default, what is not 0
      table  float[words, dim], optional: the vectors of the numbers, of which that of 0 is not used

    Nothing is unpickled. Numbers that are not finite are found at once in an .npz, and by the training in a folder.

    Raises:
      UserError: one line that names the array, if one is missing, unknown, of another type or shape, a caption is
        empty, or a number is not in the table.
    """
    columns = _arrays(pathlib.Path(path).expanduser())
    image, words = columns["image"], columns["words"]
    split, table, mask = columns["split"], columns.get("table"), columns.get("mask")
    if image.ndim not in (3, 4) or not (image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)):
        raise _wrong(path, "image", image, "float[N, h, w, C], float[N, positions, C] or uint8[N, H, W, C]")
    numbers = np.issubdtype(words.dtype, np.integer)
    if words.ndim != (3 if numbers else 4) or not (numbers or np.issubdtype(words.dtype, np.floating)):
        raise _wrong(path, "words", words, "int[N, captions, length] or float[N, captions, length, dim]")
    if mask is None and numbers:
        mask = words != PADDING
    if mask is None or mask.dtype != np.bool_ or mask.shape != words.shape[:3]:
        raise UserError(f"{path}: 'mask' must be bool{list(words.shape[:3])}, True where a caption has a word.")
    if not mask.any(2).all():
        row, caption = np.argwhere(~mask.any(2))[0]
        raise UserError(f"{path}: caption {caption} of row {row} is empty: a text needs at least one word.")
    size = _vocabulary(path, words, table) if numbers else 0
    if len({len(image), len(words), len(split)}) != 1:
        raise UserError(f"{path}: {len(image)} images, {len(words)} rows of words and {len(split)} splits.")
    found = {"image": image, "words": words.astype(np.int32 if numbers else np.float32, copy=False), "mask": mask}
    count, where = len(image), str(path)
    if isinstance(image, np.memmap):
        examples = Examples(where, 1, MappedRows(found), np.arange(count, dtype=np.int32))
    else:
        examples = from_columns(found | {"label": np.zeros(count, np.int32)}, name=where, num_classes=1)
    return CaptionFile(examples, _split_rows(path, split), size, table)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        if path.is_dir():
            found = {
                file.stem: np.load(file, mmap_mode="r" if file.stem == "image" else None, allow_pickle=False)
                for file in sorted(path.glob("*.npy"))
            }
        else:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an .npz, or a folder of .npy files: {error}") from error
    missing = [name for name in NEEDED if name not in found]
    unknown = [name for name in found if name not in (*NEEDED, *OPTIONAL)]
    if missing or unknown:
        raise UserError(
            f"{path} needs the arrays {', '.join(NEEDED)} (and may have {', '.join(OPTIONAL)}); "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    return found


def _vocabulary(path: Any, words: np.ndarray, table: np.ndarray | None) -> int:
    size = int(words.max(initial=0)) + 1
    if words.min(initial=0) < 0:
        raise UserError(f"{path}: 'words' must be numbers >= 0, got {words.min()}.")
    if table is None:
        return size
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.floating) or not np.isfinite(table).all():
        raise _wrong(path, "table", table, "finite float[words, dim]")
    if size > len(table):
        raise UserError(f"{path}: 'words' has the number {size - 1}, but 'table' has {len(table)} rows.")
    return len(table)


def _split_rows(path: Any, split: np.ndarray) -> dict[str, np.ndarray]:
    names = [str(name) for name in split]
    strange = sorted(set(names) - set(SPLITS))
    if strange:
        raise UserError(f"{path}: 'split' must hold {', '.join(SPLITS)}; got {strange[0]!r}.")
    parts = np.array([SPLITS[name] for name in names])
    rows = {part: np.flatnonzero(parts == part).astype(np.int32) for part in ("train", "validation", "test")}
    for part, index in rows.items():
        if not len(index):
            raise UserError(f"{path}: 'split' has no row of {part}.")
    return rows


def _wrong(path: Any, name: str, array: np.ndarray, wanted: str) -> UserError:
    return UserError(f"{path}: {name!r} must be {wanted}, got {array.dtype}{list(array.shape)}.")
