"""One door to every data set: bundled ones, IDX folders, made and joined ones, and what TFDS has prepared."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from jkd.data.dataset import Dataset, concat, from_arrays
from jkd.data.hierarchy import make_hierarchy
from jkd.data.idx import has_idx, read_idx_split
from jkd.data.patches import read_patches
from jkd.data.rows import IN_MEMORY_BYTES, Rows
from jkd.data.seeding import random_state
from jkd.data.silhouettes import read_silhouettes
from jkd.errors import UserError, unknown

BUNDLED = ("digits8x8", "mnist5k")
IDX = ("fashion_mnist", "kmnist", "mnist")
JOINED = {
    "digits_fashion": ("digits", "fashion_mnist"),
    "digits_fashion_animals": ("digits", "fashion_mnist", "animal_mnist"),
}
WHOLE = ("animal_mnist", "hierarchy", "patches32", *JOINED)  # sets that are made or read as a whole, here
# Debian's package dataset-fashion-mnist.
FASHION_MNIST_DIR = pathlib.Path("/usr/share/datasets/fashion-mnist")
IDX_HINTS = dict.fromkeys(IDX, " (Or give a data_dir that holds its four IDX files.)")
IDX_HINTS["fashion_mnist"] += " (Debian has them: apt install dataset-fashion-mnist.)"


def load(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    in_memory: bool | None = None,
) -> Dataset:
    """Loads one split of a data set; nothing is ever downloaded.

    - "mnist5k" (5,000 MNIST digits 28x28x1; train 1,000, test 4,000) and "digits8x8" (scikit-learn's 1,797
      digits, grey levels 0..16 scaled to 0..255; train 1,297, test 500) come with the dependencies. Their
      first use writes them as array_record to `data_dir`, by default $JKD_DATA_DIR or ~/.cache/jkd.
    - "fashion_mnist", "mnist", "kmnist" from a `data_dir` with IDX files; fashion_mnist also without one
      where Debian's dataset-fashion-mnist is installed.
    - "animal_mnist" (9,716 silhouettes of ten animals, 28x28x1; train 7,773, test 1,943) where the package
      animal-mnist is installed.
    - "digits_fashion" (20 classes) and "digits_fashion_animals" (30): the classes of digits (0-9), Fashion-MNIST
      (10-19) and silhouettes (20-29) as one set, each part with its own split, in random order. The digits are
      "mnist5k", or "mnist" where `data_dir` has a folder mnist with its IDX files; fashion_mnist likewise.
    - "hierarchy": no real data, but 10 super-classes x 4 classes made by `make_hierarchy` with its defaults (8x8x1;
      train 4,000, test 2,000).
    - "patches32": patches 32x32x3 of scikit-learn's two photographs, the label says of which; train 8,000 from the left
      80 % of their width, test 2,000 from the rest.
    - Any other name: a TFDS set prepared as array_record in `data_dir` (TFDS's own default folder: None) with
      features "image" and "label"; "name/config:version" works.

    Args:
      name: the data set.
      split: "train", "test", "all" (train, then test) or what TFDS accepts, such as "train[:90%]+test".
      data_dir: see above; "animal_mnist", "hierarchy" and "patches32" do not use it.
      image_size: needed for images of variable size (ImageNet: 224): training sources read random resized
        crops, everything else the central crop of 224/256 of the shorter side.
      in_memory: whether to read a TFDS set into memory; None: images of fixed size under 1 GB. All sets
        of the other kinds always are.

    Raises:
      UserError: one line with the fix, for an unknown name or split, a set that is not prepared or only as
        TFRECORD, or IDX files that are missing or damaged.
    """
    folder = None if data_dir is None else os.fspath(data_dir)
    split = "train+test" if split == "all" else split
    idx = _idx_folder(name, folder)
    if (name in (*BUNDLED, *WHOLE) or idx) and image_size is not None:
        raise UserError(f"Images of {name!r} have one size: leave image_size={image_size} out.")
    if idx:
        return _load_arrays(name, split, functools.partial(read_idx_split, idx), num_classes=10)
    if name in WHOLE:
        return _load_whole(name, split, folder)
    # Imported here: a third of a second that programs without TFDS data do not spend.
    from jkd.data import builders, records

    if name in BUNDLED:
        rows = records.RecordRows(builders.bundled_builder(name, folder), split)
        return _dataset(name, rows, in_memory=True)
    try:
        builder = records.find_builder(name, folder, (*BUNDLED, *IDX, *WHOLE))
    except UserError as error:
        raise UserError(f"{error}{IDX_HINTS.get(name, '')}") from error
    rows = records.RecordRows(builder, split, image_size)
    if in_memory is None:
        in_memory = not rows.varies and len(rows) * int(np.prod(rows.shape)) < IN_MEMORY_BYTES
    return _dataset(name, rows, in_memory)


def _dataset(name: str, records, in_memory: bool) -> Dataset:
    rows: Rows = records.in_memory() if in_memory else records
    everything = np.arange(len(rows), dtype=np.int32)
    return Dataset(name, records.num_classes, rows, everything, records.parts, shape=records.shape)


def _idx_folder(name: str, data_dir: str | None) -> str | None:
    """The folder to read IDX files from, or None where `name` is not an IDX set."""
    if name not in IDX:
        return None
    if data_dir is not None:
        return data_dir if has_idx(data_dir) else None
    return str(FASHION_MNIST_DIR) if name == "fashion_mnist" and has_idx(FASHION_MNIST_DIR) else None


def _load_arrays(name: str, split: str, read: Callable, num_classes: int) -> Dataset:
    """Any split of a set whose `read` gives the images and labels of "train" and of "test"."""
    if split in ("train", "test"):
        one = from_arrays(*read(split), num_classes=num_classes, name=name)
        return dataclasses.replace(one, parts=((split, 0, len(one)),))
    if not set("[+") & set(split):
        raise unknown("split", split, ("train", "test", "all"))
    from jkd.data.records import slices

    whole = {part: read(part) for part in ("train", "test")}
    sizes = {part: len(labels) for part, (_, labels) in whole.items()}
    chosen = slices(split, sizes)
    pieces = [[array[rows] for array in whole[part]] for part, rows in chosen]
    images, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    joined = from_arrays(images, labels, num_classes=num_classes, name=name)
    return dataclasses.replace(joined, parts=tuple((part, rows.start, rows.stop) for part, rows in chosen))


def _load_whole(name: str, split: str, folder: str | None) -> Dataset:
    if name == "hierarchy":
        made = make_hierarchy()
        return _load_arrays(name, split, lambda part: _arrays(getattr(made, part)), len(made.superclass))
    if name in JOINED:
        return _load_arrays(name, split, functools.partial(_read_joined, JOINED[name], folder), 10 * len(JOINED[name]))
    if name == "patches32":
        return _load_arrays(name, split, read_patches, num_classes=2)
    return _load_arrays(name, split, read_silhouettes, num_classes=10)


def _arrays(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    batch = dataset.read(np.arange(len(dataset)))
    return batch["image"], batch["label"]


def _read_joined(parts: tuple[str, ...], folder: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _arrays(concat([_load_part(part, split, folder) for part in parts]))
    # A slice of a split must hold all classes, not the first few.
    order = random_state(f"joined {split}", 0).permutation(len(labels))
    return images[order], labels[order]


def _load_part(part: str, split: str, folder: str | None) -> Dataset:
    name = "mnist" if part == "digits" else part
    inside = os.path.join(folder, name) if folder is not None else None
    if inside is not None and _idx_folder(name, inside):
        return load(name, split, inside)
    try:
        return load("mnist5k" if part == "digits" else part, split)
    except UserError as error:
        if part != "fashion_mnist" or _idx_folder(part, None):
            raise
        raise UserError(
            "Fashion-MNIST is not here: apt install dataset-fashion-mnist, or give a data_dir with its IDX files in a "
            "folder fashion_mnist."
        ) from error
