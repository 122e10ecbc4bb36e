"""Patches of photographs: from disjoint regions, the same every time."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from jkd import data
from jkd.data import patches
from jkd.errors import UserError


@pytest.fixture(scope="module")
def both():
    return {split: data.load("patches32", split) for split in ("train", "test")}


def test_no_pixel_is_in_both_splits():
    rows, columns = np.mgrid[:50, :70].astype(np.uint8)
    photo = np.stack([rows, columns, 0 * rows], -1)
    seen = {}
    for split, count in (("train", 475), ("test", 1)):
        cut = patches.cut_patches(
            photo[: 50 if split == "train" else 14], split, count, np.random.RandomState(0), side=14
        )
        assert cut.shape == (count, 14, 14, 3)
        # Each patch is a square of the photo: rows and columns count up by one.
        np.testing.assert_array_equal(cut[..., 0] - cut[:, :1, :1, 0], np.broadcast_to(rows[:14, :14], cut.shape[:3]))
        np.testing.assert_array_equal(
            cut[..., 1] - cut[:, :1, :1, 1], np.broadcast_to(columns[:14, :14], cut.shape[:3])
        )
        assert len({tuple(corner) for corner in cut[:, 0, 0].tolist()}) == count
        seen[split] = set(cut[..., 1].ravel().tolist())
    assert seen == {"train": set(range(56)), "test": set(range(56, 70))}


def test_patches_are_of_their_photo_and_their_side(both):
    photos = load_sample_images().images
    for split, region in (("train", slice(0, 512)), ("test", slice(512, 640))):
        batch = both[split].read(np.arange(40))
        for image, label in zip(batch["image"], batch["label"], strict=True):
            part = photos[label][:, region]
            corners = np.argwhere((part[: 427 - 31, : part.shape[1] - 31] == image[0, 0]).all(-1))
            assert any((part[y : y + 32, x : x + 32] == image).all() for y, x in corners)


def test_sizes_labels_and_determinism(both):
    for split, size in (("train", 8000), ("test", 2000)):
        found, again = both[split], data.load("patches32", split)
        assert (found.shape, found.num_classes, len(found)) == ((32, 32, 3), 2, size)
        assert np.bincount(found.labels).tolist() == [size // 2] * 2
        assert (np.diff(found.labels) < 0).any()
        np.testing.assert_array_equal(found.arrays["image"], again.arrays["image"])
        assert found.arrays["image"].reshape(size, -1).std(1).mean() > 10
    assert len({image.tobytes() for image in both["train"].arrays["image"]}) > 7900
    assert not both["train"].overlaps(both["test"])
    assert len(data.load("patches32", "train[:10]+test")) == 2010


def test_the_places_are_what_they_were(both):
    assert both["train"].labels[:12].tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0]
    means = both["train"].arrays["image"][:4].mean((1, 2, 3))
    np.testing.assert_allclose(means, [244.46, 192.62, 214.22, 89.8], atol=0.5)


def test_errors():
    with pytest.raises(UserError, match="count must be at most 8 here, the places of a patch, got 9"):
        patches.cut_patches(np.zeros((34, 65, 3), np.uint8)[:33, :44], "train", 9, np.random.RandomState(0))
    with pytest.raises(UserError, match="'patches32' have one size"):
        data.load("patches32", image_size=32)
