import gzip
import struct

import numpy as np
import pytest

from jkd.data.idx import read_idx, read_idx_split
from jkd.errors import UserError


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_reads_raw_and_gzipped_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "raw").write_bytes(idx_bytes(array))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx_bytes(array)))
    for name in ("raw", "zipped"):
        read = read_idx(tmp_path / name)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
ZIPPED = gzip.compress(np.random.RandomState(0).bytes(4000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG", "not an IDX file of unsigned bytes .*89504e47"),
        (b"\0\0\x0d\x01" + b"\0" * 8, "not an IDX file of unsigned bytes"),
        (b"", "not an IDX file"),
        (GOOD[:9], "truncated: it ends inside its header"),
        (GOOD[:-1], r"truncated: its header says \[2, 3, 4\] = 24 bytes, it holds 23"),
        (GOOD + b"x", "too long: .*it holds 25"),
        (ZIPPED[:2000], "truncated or damaged"),
        (ZIPPED[:50] + b"\xff" * 20 + ZIPPED[70:], "damaged|cannot be read"),
        (ZIPPED[:-8] + b"\0" * 8, "cannot be read: CRC check failed"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="absent cannot be read"):
        read_idx(tmp_path / "absent")
    with pytest.raises(UserError, match=r"No t10k-images-idx3-ubyte\[.gz\] in .*put the IDX file there"):
        read_idx_split(tmp_path, "test")


def write_split(folder, images, labels):
    (folder / "train-images.idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


def test_reads_a_split(tmp_path):
    images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.array([2, 0, 1], np.uint8)
    write_split(tmp_path, images, labels)
    read_images, read_labels = read_idx_split(tmp_path, "train")
    np.testing.assert_array_equal(read_images, images[..., None])
    assert read_labels.tolist() == [2, 0, 1]
    assert read_labels.dtype == np.int32


def test_files_that_do_not_belong_together(tmp_path):
    images = np.zeros((3, 2, 2), np.uint8)
    write_split(tmp_path, images, np.zeros(4, np.uint8))
    with pytest.raises(UserError, match="has 3 images but .* 4 labels"):
        read_idx_split(tmp_path, "train")
    write_split(tmp_path, images, np.zeros((3, 1), np.uint8))
    with pytest.raises(UserError, match="must have 3 dimensions and .* 1, got 3 and 2"):
        read_idx_split(tmp_path, "train")
