"""TFDS data sets prepared as array_record, read at random without TensorFlow."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jkd.data import images
from jkd.data.rows import ArrayRows, Batch, Rows
from jkd.errors import UserError, nearest, unknown

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
CHUNK = 1024
AGAIN = "Get the file again, or prepare the set again."


class RecordRows(Rows):
    """Rows in array_record files: images of one shape, or of variable size and cropped to `image_size`."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, image_size: int | None = None):
        """Opens `split` (TFDS slices such as train[:90%] included) of a prepared `builder`."""
        self.name = builder.info.name
        image, label = _image_and_label(builder.info)
        self.num_classes = label.num_classes
        self.shape, self.varies = _shape(self.name, image.shape, image_size)
        self._encoded = isinstance(image, tfds.features.Image)
        # Everything but images stored as arrays comes raw: encoded images are decoded here, so that the
        # result does not depend on whether OpenCV is installed, and ids are not decoded at all.
        skipped = {name: tfds.decode.SkipDecoding() for name in builder.info.features}
        if not self._encoded:
            del skipped["image"]
        self._records = _open(builder, split, skipped)
        self._labels_path = _labels_path(builder, split)
        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        self.parts = tuple((name, rows.start, rows.stop) for name, rows in slices(split, sizes))
        self._files = _files(builder, self.parts)

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every row: read through once, then kept in the cache folder."""
        if self._labels_path.exists():
            return np.load(self._labels_path)
        chunks = (self._fetch(rows) for rows in _ranges(len(self)))
        labels = np.concatenate([np.array([record["label"] for record in chunk], np.int32) for chunk in chunks])
        write_atomically(self._labels_path, labels)
        return labels

    def read(self, rows: np.ndarray, seed: int | None = None, positions: np.ndarray | None = None) -> Batch:
        """Reads `rows` in one request; see `Rows.read`."""
        records = self._fetch(rows)
        out = np.empty((len(records), *self.shape), np.uint8)
        for i, record in enumerate(records):
            position = None if seed is None or positions is None else int(positions[i])
            try:
                out[i] = self._pixels(record["image"], seed, position)
            except Exception as error:
                raise self._damaged(int(rows[i]), error) from error
        return {"image": out, "label": np.array([record["label"] for record in records], np.int32)}

    def in_memory(self) -> ArrayRows:
        """Reads all rows into whole arrays."""
        chunks = [self.read(rows) for rows in _ranges(len(self))]
        return ArrayRows(**{name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("image", "label")})

    def _fetch(self, rows: np.ndarray) -> list[Any]:
        wanted = np.asarray(rows).tolist()
        try:
            return self._records_at(wanted)
        except Exception as error:
            raise self._damaged(next(filter(self._fails, wanted), wanted[0]), error) from error

    def _records_at(self, rows: list[int]) -> list[Any]:
        found = self._records.__getitems__(rows)
        if any(record["label"] is None for record in found):
            raise ValueError("it is truncated")  # what is beyond the end is read as an empty record
        return found

    def _fails(self, row: int) -> bool:
        try:
            self._records_at([row])
        except Exception:
            return True
        return False

    def _damaged(self, row: int, error: Exception) -> UserError:
        """The error for a row that cannot be read: names its file."""
        ends = np.cumsum([count for _, count in self._files])
        file = self._files[int(np.searchsorted(ends, row, side="right"))][0]
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return UserError(f"Row {row} of data set {self.name!r} cannot be read: {file} is damaged ({reason}). {AGAIN}")

    def _pixels(self, stored: Any, seed: int | None, position: int | None) -> np.ndarray:
        if not self._encoded:
            return stored
        image = images.decode(stored, self.shape[-1])
        if not self.varies:
            return images.to_array(image)
        if seed is None or position is None:
            return images.crop(image, images.central_box(*image.size), self.shape[0])
        return images.crop(image, images.random_box(*image.size, seed, position), self.shape[0])


def find_builder(name: str, data_dir: str | None, known: tuple[str, ...]) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a set prepared as array_record in `data_dir` (None: TFDS's default).

    Raises:
      UserError: with the fix, if the name is unknown, or the set is not prepared, or only in another format.
    """
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=data_dir)
            prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError as error:
        close = nearest(name, (*known, *tfds.list_builders(with_community_datasets=False)))
        raise UserError(
            f"Unknown data set {name!r}.{close} Known: {', '.join(sorted(known))}, every TFDS name, "
            f"and sets prepared by TFDS in data_dir={data_dir!r}."
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        close = nearest(name, (*known, *tfds.list_builders(with_community_datasets=False)))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"Data set {name!r} cannot be opened: {reason}{close}") from error
    folder = os.fspath(builder.data_path)
    if not prepared:
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"Data set {name!r} is not prepared in {folder}, and nothing downloads by itself. Prepare "
            f"it once, where TensorFlow is installed: tfds build {name} --file_format=array_record{where}"
        )
    # As it is on disk: a builder made from TFDS's code does not see formats that were added by conversion.
    builder = tfds.builder_from_directory(folder)
    formats = builder.info.available_file_formats()
    if ARRAY_RECORD not in formats:
        raise UserError(
            f"Data set {name!r} in {folder} is stored as {_names(formats)} only, which needs TensorFlow to "
            "read. Convert it once, where tensorflow and apache-beam are installed: python -m "
            f"tensorflow_datasets.scripts.convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record"
        )
    return builder


def slices(split: str, sizes: dict[str, int]) -> list[tuple[str, slice]]:
    """Resolves a TFDS split such as "train[:90%]+test" into (split name, slice of its rows) pairs.

    Raises:
      UserError: if the split is unknown or malformed.
    """
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in sizes.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise split_error(split, sizes, error) from error
    ends = [sizes[part.splitname] if part.to is None else part.to for part in parts]
    found = [(part.splitname, slice(part.from_ or 0, end)) for part, end in zip(parts, ends, strict=True)]
    if any(rows.start >= rows.stop for _, rows in found):
        raise UserError(f"The split {split!r} has an empty slice; there are {sizes} examples.")
    return found


def split_error(split: str, known: Any, error: Exception) -> UserError:
    """The error for a `split` that TFDS did not accept: an unknown name, or a malformed slice."""
    for name in re.split(r"\[[^\]]*\]?|\+", split):
        if name and name not in known:
            return unknown("split", name, known)
    return UserError(f"Cannot read split {split!r}: {str(error).splitlines()[0]} Slices look like train[:90%].")


def cache_dir() -> pathlib.Path:
    """The folder for what jkd prepares: $JKD_DATA_DIR, by default ~/.cache/jkd."""
    return pathlib.Path(os.environ.get("JKD_DATA_DIR") or "~/.cache/jkd").expanduser()


def write_atomically(path: pathlib.Path, array: np.ndarray) -> None:
    """Saves `array` so that other processes see all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, array)
    os.chmod(file.name, 0o666 & ~_umask())  # temporary files are private; caches are shared
    os.replace(file.name, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's log lines and progress bars: what goes wrong is said by one error instead."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            yield
    finally:
        logger.setLevel(level)


def _open(builder: tfds.core.DatasetBuilder, split: str, decoders: dict[str, Any]) -> Any:
    try:
        return builder.as_data_source(split, decoders=decoders, file_format=ARRAY_RECORD)
    except (ValueError, AssertionError) as error:
        raise split_error(split, list(builder.info.splits), error) from error


def _files(builder: tfds.core.DatasetBuilder, parts: Iterable[tuple[str, int, int]]) -> list[tuple[str, int]]:
    """The files of these slices in order, each with the number of its rows; they must all be there."""
    splits = builder.info.splits
    found = [f for name, start, stop in parts for f in splits[f"{name}[{start}:{stop}]"].file_instructions]
    there = {path.name for path in epath.Path(builder.data_path).iterdir()}
    for file in found:
        if epath.Path(file.filename).name not in there:
            raise UserError(f"Data set {builder.info.name!r} has no file {file.filename}. {AGAIN}")
    return [(file.filename, file.take) for file in found]


def _image_and_label(info: tfds.core.DatasetInfo) -> tuple[Any, Any]:
    named = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(info.features.items()) if named else {}
    image, label = features.get("image"), features.get("label")
    if image is None or not isinstance(label, tfds.features.ClassLabel) or len(image.shape) != 3:
        raise UserError(
            f"Data set {info.name!r} needs an 'image' of three dimensions and a class 'label'; its features: "
            f"{', '.join(features) or info.features}."
        )
    if np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"Images of {info.name!r} must be uint8, got {image.np_dtype}.")
    return image, label


def _shape(name: str, stored: tuple[int | None, ...], image_size: int | None) -> tuple[tuple[int, int, int], bool]:
    """The shape that images are read with, and whether they are cropped to it."""
    height, width, channels = stored
    if height is not None and width is not None:
        if image_size is not None and (height, width) != (image_size, image_size):
            raise UserError(f"Images of {name!r} are {height}x{width}: leave image_size={image_size} out.")
        return (height, width, channels or 3), False
    if image_size is None:
        raise UserError(f"Images of {name!r} vary in size: give image_size (224 for ImageNet).")
    return (image_size, image_size, channels or 3), True


def _labels_path(builder: tfds.core.DatasetBuilder, split: str) -> pathlib.Path:
    """Where the labels of `split` are cached: a re-prepared set gets another place."""
    sizes = {name: (info.shard_lengths, info.num_bytes) for name, info in builder.info.splits.items()}
    written = (epath.Path(builder.data_path) / "dataset_info.json").stat().mtime
    text = json.dumps([os.fspath(builder.data_path), split, sizes, written])
    return cache_dir() / "labels" / f"{builder.info.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"


def _names(formats: Any) -> str:
    return " and ".join(sorted(file_format.value for file_format in formats))


def _ranges(size: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))
