"""Patches of two photographs that scikit-learn ships: small color images of real things, wherever jkd is installed."""

import numpy as np

from jkd.data.seeding import random_state
from jkd.errors import UserError

SIDE = 32
COUNTS = {"train": 8000, "test": 2000}
TRAIN_SHARE = 0.8  # of a photo's width, from the left; the rest is for testing


def cut_patches(
    photo: np.ndarray, split: str, count: int, draw: np.random.RandomState, *, side: int = SIDE
) -> np.ndarray:
    """Cuts `count` square patches at different random places of a photo's left ("train") or right part ("test").

    Patches of one part overlap each other, and no pixel is in both parts.

    Args:
      photo: uint8[height, width, channels].
      split: "train": columns below `int(0.8 width)`; "test": the others.
      count: how many.
      draw: decides the places and their order.
      side: of a patch.

    Returns:
      uint8[count, side, side, channels].

    Raises:
      UserError: if the part has fewer places than `count`.
    """
    middle = int(TRAIN_SHARE * photo.shape[1])
    part = photo[:, :middle] if split == "train" else photo[:, middle:]
    windows = np.lib.stride_tricks.sliding_window_view(part, (side, side), axis=(0, 1))
    rows, columns = windows.shape[:2]
    if count > rows * columns:
        raise UserError(f"count must be at most {rows * columns} here, the places of a patch, got {count}.")
    places = draw.choice(rows * columns, count, replace=False)
    return windows[places // columns, places % columns].transpose(0, 2, 3, 1)


def read_patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads "train" (8,000) or "test" (2,000): images uint8[N, 32, 32, 3] and labels int32[N].

    The photos are scikit-learn's china.jpg (label 0) and flower.jpg (1), half of the patches from each, in random
    order: training patches from the left 80 % of a photo's width and test patches from the right 20 %, so that no
    pixel is in both. The places are the same everywhere; decoders of JPEG may differ in a pixel's last bit.
    """
    # Imported here: most programs read no photos.
    from sklearn.datasets import load_sample_images

    photos, draw = load_sample_images().images, random_state(f"patches {split}", 0)
    each = COUNTS[split] // len(photos)
    images = np.concatenate([cut_patches(photo, split, each, draw) for photo in photos])
    labels = np.repeat(np.arange(len(photos), dtype=np.int32), each)
    order = draw.permutation(len(labels))
    return images[order], labels[order]
