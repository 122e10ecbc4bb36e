"""Animal silhouettes as a package ships them: numpy arrays in gzipped pickles, read without trusting them."""

import gzip
import importlib.util
import io
import pathlib
import pickle
import zlib
from typing import Any

import numpy as np

from jkd.data.dataset import from_arrays
from jkd.data.seeding import random_state
from jkd.errors import UserError

PACKAGE = "animal_mnist"
# Its dependencies (TensorFlow among them) are not needed to read its files.
INSTALL = "pip install --no-deps animal-mnist==0.4"
FILES = {kind: f"data/Animal_MNIST/animal_{kind}_version_3.gz" for kind in ("data", "label")}
TRAIN_SHARE = 0.8


def _empty(kind: type, shape: tuple[int, ...], code: bytes | str) -> np.ndarray:
    """What numpy's pickles call to begin an array; its shape and type come later, with its bytes."""
    del kind, shape, code
    return np.ndarray((0,), np.int8)


ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy._core.multiarray", "_reconstruct"): _empty,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else: a pickle may otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns one of the few names that an array needs."""
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_array_pickle(path: pathlib.Path) -> np.ndarray:
    """Reads one numpy array from a gzipped pickle; nothing but an array is ever built.

    Raises:
      UserError: if the file cannot be read, is damaged, or holds anything else; the message names it.
    """
    try:
        value = _ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (pickle.UnpicklingError, EOFError, zlib.error, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged or no pickle of a numpy array: {error}.") from error
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        raise UserError(f"{path} is no pickle of a numpy array of numbers.")
    return value


def silhouettes_folder() -> pathlib.Path | None:
    """The folder of the installed package, or None; it is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    return pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def read_silhouettes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads "train" or "test" of the silhouettes: images uint8[N, 28, 28, 1] and labels int32[N].

    The package has no split. Images that are equal to an earlier one are left out, so that none is in
    both parts; four fifths of the others, by class, are to train. Rows are in random order.

    Raises:
      UserError: if the package is not installed, or its files are not what they were.
    """
    folder = silhouettes_folder()
    if folder is None:
        raise UserError(f"Animal silhouettes come with the package animal-mnist, which is not installed: {INSTALL}.")
    images, labels = (read_array_pickle(folder / file) for file in FILES.values())
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{folder} holds {images.dtype}{list(images.shape)} and {list(labels.shape)} labels instead of "
            f"uint8[N, 28, 28] and N: {INSTALL}."
        )
    # Reversed: of equal images the first stays.
    first = sorted({image.tobytes(): i for i, image in reversed(list(enumerate(images)))}.values())
    whole = from_arrays(images[first][..., None], labels[first], num_classes=10, name=PACKAGE)
    part = dict(zip(("train", "test"), whole.split(TRAIN_SHARE, seed=0), strict=True))[split]
    batch = part.read(random_state(f"silhouettes {split}", 0).permutation(len(part)))
    return batch["image"], batch["label"]
