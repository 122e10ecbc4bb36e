"""The IDX format of MNIST and its relatives: gzipped or plain files of bytes behind a small header."""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from jkd.errors import UserError

UNSIGNED_BYTE = 0x08
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: str | pathlib.Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not, as uint8 of the shape in its header.

    Header: two zero bytes, a type (8 = unsigned byte), the number of dimensions, each size as big-endian u32.

    Raises:
      UserError: if the file is missing, not IDX, truncated, too long or damaged; the message names it.
    """
    path = pathlib.Path(path)
    data = _contents(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} is not an IDX file of unsigned bytes (it starts with {data[:4].hex()!r}).")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{path} is truncated: it ends inside its header. Get the file again.")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - start != expected:
        raise UserError(
            f"{path} is {'truncated' if len(data) - start < expected else 'too long'}: its header says "
            f"{list(shape)} = {expected} bytes, it holds {len(data) - start}. Get the file again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def has_idx(folder: str | pathlib.Path) -> bool:
    """Whether `folder` holds any IDX file by name."""
    return any(pathlib.Path(folder).glob("*idx?-ubyte*"))


def read_idx_split(folder: str | pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads "train" or "test" of an MNIST-like folder: images uint8[N, H, W, 1] and labels int32[N].

    Raises:
      UserError: if a file is missing or damaged, or the two do not belong together.
    """
    images_path = _find(folder, PREFIXES[split], "images", 3)
    labels_path = _find(folder, PREFIXES[split], "labels", 1)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1:
        raise UserError(
            f"{images_path} must have 3 dimensions and {labels_path} 1, got {images.ndim} and {labels.ndim}."
        )
    if len(images) != len(labels):
        raise UserError(f"{images_path} has {len(images)} images but {labels_path} {len(labels)} labels.")
    return images[..., None], labels.astype(np.int32)


def _contents(path: pathlib.Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except OSError as error:
        # gzip.BadGzipFile is an OSError too.
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: {error}. Get the file again.") from error


def _find(folder: str | pathlib.Path, prefix: str, kind: str, dimensions: int) -> pathlib.Path:
    """Finds e.g. train-images-idx3-ubyte.gz; also the spelling train-images.idx3-ubyte."""
    found = sorted(pathlib.Path(folder).glob(f"{prefix}-{kind}?idx{dimensions}-ubyte*"))
    if not found:
        raise UserError(f"No {prefix}-{kind}-idx{dimensions}-ubyte[.gz] in {folder}: put the IDX file there.")
    return found[0]
