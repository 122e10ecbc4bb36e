"""A procedural set whose classes form a hierarchy: no real data, made from a seed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jkd.data.dataset import Dataset, from_arrays
from jkd.data.seeding import random_state
from jkd.errors import UserError

LATENT = 16  # dimensions that prototypes and noise live in
SIDE = 8  # images are SIDE x SIDE x 1: vectors of 64 numbers
RANGE = 4.0  # standard deviations that 0..255 spans on either side of the mean


class Hierarchy(NamedTuple):
    """Both splits, and the super-class of each class."""

    train: Dataset
    test: Dataset
    superclass: np.ndarray


def make_hierarchy(
    num_superclasses: int = 10,
    num_subclasses: int = 4,
    *,
    offset: float = 0.3,
    noise: float = 0.35,
    train_per_class: int = 100,
    test_per_class: int = 50,
    seed: int = 0,
) -> Hierarchy:
    """Makes examples of a class hierarchy from Gaussian prototypes behind a random two-layer network.

        super-class s    p_s ~ N(0, I)
        class (s, i)     c_si = p_s + offset |p_s| u_si,    |u_si| = 1, of random direction
        example          x = tanh(W_1 (c_si + noise |p_s| e) + b) W_2,    e ~ N(0, I / LATENT)

    x has 64 numbers, each brought to bytes by the mean and the standard deviation of the training examples: 0..255
    spans 4 of them on either side. Vectors are stored as images uint8[N, 8, 8, 1], as everything else in
    `jkd.data`; their neighborhood in the image means nothing, so they are for networks that flatten.

    The class of sub-class i of super-class s is s num_subclasses + i. Rows are in random order. The same arguments
    give the same examples.

    Args:
      num_superclasses: at least 1.
      num_subclasses: of each super-class, at least 1.
      offset: how far a class lies from its super-class, as a share of that one's radius; >= 0.
      noise: how far examples lie from their class, in the same unit; >= 0.
      train_per_class: examples of each class to train, at least 1.
      test_per_class: examples of each class to test, at least 1.
      seed: decides everything.

    Raises:
      UserError: if a size is below 1, or `offset` or `noise` is negative.
    """
    sizes = (num_superclasses, num_subclasses, train_per_class, test_per_class)
    if min(sizes) < 1 or not (0 <= offset < np.inf and 0 <= noise < np.inf):
        raise UserError(
            "A hierarchy needs sizes of at least 1 and an offset and noise of at least 0, got "
            f"{num_superclasses} x {num_subclasses} classes, {train_per_class} + {test_per_class} examples of each, "
            f"offset {offset} and noise {noise}."
        )
    superclass = np.repeat(np.arange(num_superclasses, dtype=np.int32), num_subclasses)
    radius, classes = _prototypes(superclass, offset, seed)
    warp = _warp(seed)
    vectors, labels = {}, {}
    for split, size in (("train", train_per_class), ("test", test_per_class)):
        draw = random_state(f"hierarchy {split}", seed)
        order = draw.permutation(len(classes) * size)
        labels[split] = np.repeat(np.arange(len(classes), dtype=np.int32), size)[order]
        spread = draw.standard_normal((len(order), LATENT)) / np.sqrt(LATENT)
        vectors[split] = warp(classes[labels[split]] + noise * radius[labels[split], None] * spread)
    mean, scale = vectors["train"].mean(axis=0), vectors["train"].std(axis=0) * RANGE / 127.5

    def dataset(split: str) -> Dataset:
        images = _to_bytes((vectors[split] - mean) / scale)
        return from_arrays(images, labels[split], num_classes=len(classes), name="hierarchy")

    return Hierarchy(dataset("train"), dataset("test"), superclass)


def _prototypes(superclass: np.ndarray, offset: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The radius of each class's super-class, and the prototype of each class."""
    draw = random_state("hierarchy prototypes", seed)
    above = draw.standard_normal((superclass[-1] + 1, LATENT))[superclass]
    direction = draw.standard_normal(above.shape)
    radius = np.linalg.norm(above, axis=1)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return radius, above + offset * radius[:, None] * direction


def _warp(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A random two-layer network."""
    draw = random_state("hierarchy warp", seed)
    first, second = draw.standard_normal((LATENT, 64)), draw.standard_normal((64, SIDE * SIDE))
    bias = draw.standard_normal(64)
    return lambda x: np.tanh(x @ first / np.sqrt(LATENT) + bias) @ second / 8


def _to_bytes(centered: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(127.5 + centered, 0, 255)).astype(np.uint8).reshape(-1, SIDE, SIDE, 1)
