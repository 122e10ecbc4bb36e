"""Damaged record files: one line that names the file and the row, from every way of reading."""

import shutil

import numpy as np
import pytest

from jkd import data
from jkd.errors import UserError

WAYS = {
    "in memory": lambda root: data.load("cifar100", "train", data_dir=root, in_memory=True),
    "labels": lambda root: data.load("cifar100", "train", data_dir=root, in_memory=False).labels,
    "streamed": lambda root: list(
        data.source(data.load("cifar100", "train", data_dir=root, in_memory=False), 8, resident="stream").iterate(0, 5)
    ),
}


@pytest.fixture
def copy(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JKD_DATA_DIR", str(tmp_path / "cache"))  # no labels of the sound set
    shutil.copytree(tfds_dir / "cifar100", tmp_path / "cifar100")
    (file,) = (tmp_path / "cifar100").glob("*/*array_record*")
    return tmp_path, file


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """Flips bits all over what is not padding."""
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    used = np.flatnonzero(content)
    content[used[200 :: len(used) // 50]] ^= 0x5A
    file.write_bytes(content.tobytes())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("harm", [truncate, empty, flip], ids=lambda harm: harm.__name__)
def test_a_damaged_file_is_named_with_a_row(harm, way, copy):
    root, file = copy
    harm(file)
    with pytest.raises(UserError, match=r"Row \d+ of data set 'cifar100' cannot be read: ") as caught:
        WAYS[way](root)
    assert str(file) in str(caught.value)
    assert "Get the file again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_file_is_named_before_anything_is_read(way, copy):
    root, file = copy
    file.unlink()
    with pytest.raises(UserError, match=rf"Data set 'cifar100' has no file {file}\. Get the file again"):
        WAYS[way](root)


def test_a_single_damaged_image_is_found(copy):
    root, _ = copy
    rows = data.load("cifar100", "train[3:30]", data_dir=root, in_memory=False).rows
    records = rows._records

    class Broken:
        def __getitems__(self, wanted):
            found = records.__getitems__(wanted)
            for row, record in zip(wanted, found, strict=True):
                record["image"] = b"no image" if row == 5 else record["image"]
            return found

    rows._records = Broken()
    with pytest.raises(
        UserError, match=r"Row 5 of data set 'cifar100' cannot be read: .* is damaged \(cannot identify"
    ):
        rows.read(np.arange(8))
