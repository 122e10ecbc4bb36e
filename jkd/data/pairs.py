"""Examples with two sides, "first" and "second": cut from images, made, paired with text, or read from users' files."""

import os
import pathlib
from typing import Any

import numpy as np

from jkd.data.captions import label_captions
from jkd.data.dataset import Dataset
from jkd.data.examples import Examples, from_columns
from jkd.data.registry import load
from jkd.data.seeding import random_state
from jkd.data.sentences import sentence_encoder
from jkd.data.words import token_vectors
from jkd.errors import UserError, unknown

TEXTS = ("tokens", "sentences")
SPLITS = ("train", "validation", "query", "database")


def image_halves(dataset: Dataset) -> Examples:
    """Cuts images in two: "first" is the upper half and "second" the lower one, flat, float32 in [0, 1]."""
    batch = dataset.read(np.arange(len(dataset)))
    image, middle = batch["image"].astype(np.float32) / 255, dataset.shape[0] // 2
    halves = {"first": image[:, :middle], "second": image[:, middle:]}
    flat = {name: half.reshape(len(half), -1) for name, half in halves.items()}
    return from_columns(
        {**flat, "label": batch["label"]}, num_classes=dataset.num_classes, name=f"{dataset.name} halves"
    )


def make_factors(
    num_examples: int = 3000,
    *,
    shared: int = 4,
    private: int = 4,
    features: int = 32,
    hidden: int = 64,
    noise: float = 0.3,
    seed: int = 0,
) -> Examples:
    """Makes pairs of which it is known what their sides share, and what each has for itself.

        s, p_1, p_2     independent fair bits, as +-1: `shared`, `private` and `private` of them
        x_m             tanh([s, p_m] W_m + b_m) V_m + noise e,    m = 1, 2,  e ~ N(0, I)

    with random W_m, b_m ~ N(0, 1) and V_m ~ N(0, 1 / hidden). Columns: "first" and "second" float32[N, features];
    "first_private" and "second_private" bool[N, private]; "label", which of the 2^shared values s has.

    Args:
      num_examples: at least 1.
      shared: bits that both sides show, at least 1.
      private: bits that one side shows, at least 0.
      features: numbers of a side.
      hidden: of the random networks.
      noise: standard deviation of what is added, >= 0.
      seed: decides everything.

    Raises:
      UserError: for numbers out of range.
    """
    if min(num_examples, shared, features, hidden) < 1 or private < 0 or not 0 <= noise < np.inf:
        raise UserError(
            "Factors need num_examples, shared, features and hidden of at least 1, and private and noise of at least "
            f"0, got {num_examples}, {shared}, {features}, {hidden}, {private} and {noise}."
        )
    draw = random_state("factors", seed)
    common = draw.randint(2, size=(num_examples, shared))
    columns: dict[str, np.ndarray] = {"label": common @ (1 << np.arange(shared))}
    for side in ("first", "second"):
        own = draw.randint(2, size=(num_examples, private))
        bits = 2.0 * np.concatenate([common, own], axis=1) - 1
        warp = np.tanh(bits @ draw.standard_normal((bits.shape[1], hidden)) + draw.standard_normal(hidden))
        clean = warp @ draw.standard_normal((hidden, features)) / np.sqrt(hidden)
        columns[side] = clean + noise * draw.standard_normal(clean.shape)
        columns[f"{side}_private"] = own.astype(bool)
    return from_columns(columns, num_classes=2**shared, name="factors")


def make_two_view_clusters(
    num_examples: int = 400,
    num_clusters: int = 6,
    *,
    dims: tuple[int, int] = (8, 6),
    spread: float = 1.0,
    noise: float = 1.0,
    seed: int = 0,
) -> Examples:
    """Makes clusters seen in two views: x_m = c_m(k) + noise e, with centers c_m(k) ~ N(0, spread^2 I) and e ~ N(0, I).

    Columns: "first" float32[N, dims[0]], "second" float32[N, dims[1]], "label" the cluster k, drawn uniformly.

    Raises:
      UserError: for sizes below 1, or a negative spread or noise.
    """
    if min(num_examples, num_clusters, *dims) < 1 or min(spread, noise) < 0:
        raise UserError(
            "Two-view clusters need sizes of at least 1, and a spread and noise of at least 0, got "
            f"{num_examples}, {num_clusters}, {dims}, {spread} and {noise}."
        )
    draw = random_state("two-view clusters", seed)
    label = draw.randint(num_clusters, size=num_examples)
    sides = {}
    for side, dim in zip(("first", "second"), dims, strict=True):
        centers = spread * draw.standard_normal((num_clusters, dim))
        sides[side] = centers[label] + noise * draw.standard_normal((num_examples, dim))
    return from_columns({**sides, "label": label}, num_classes=num_clusters, name="two-view clusters")


def with_label_text(dataset: Dataset, classes: str, text: str = "tokens", **options: Any) -> Examples:
    """Images beside texts of their labels: "first" float32[N, H, W, C] in [0, 1], and "second", the text.

    Args:
      dataset: the images.
      classes: the set whose classes these are, of `captions.WORDS`.
      text: "tokens": "second" is float32[N, T, 64], one vector a piece of a word, and "second_mask" bool[N, T] says
        which of them are there; "sentences": "second" is float32[N, 384].
      **options: of `label_captions`.

    Raises:
      UserError: for another `text`, where the package that it needs is not installed, or as `label_captions`.
    """
    if text not in TEXTS:
        raise unknown("text", text, TEXTS)
    batch = dataset.read(np.arange(len(dataset)))
    captions = label_captions(classes, batch["label"], **options)
    columns = {"first": batch["image"].astype(np.float32) / 255, "label": batch["label"]}
    if text == "tokens":
        vectors, mask = token_vectors().embed(captions.texts)
        columns |= {"second": vectors[captions.chosen], "second_mask": mask[captions.chosen]}
    else:
        columns["second"] = sentence_encoder().embed(captions.texts)[captions.chosen]
    return from_columns(columns, num_classes=dataset.num_classes, name=f"{dataset.name} and text")


def read_pairs(path: str | os.PathLike[str]) -> tuple[Examples, dict[str, np.ndarray]]:
    """Reads pairs from a .npz file: features of both sides, labels, and the part that each row belongs to.

    The file holds "first" and "second" (numbers [N, ...]); "label", int[N], or 0 and 1 as [N, classes] where examples
    have several tags; optionally "first_mask" and "second_mask" [N, T]; and "split", N of "train", "validation",
    "query" and "database" as strings. Training rows are also what is searched.

    Returns:
      The pairs, and the int32 row numbers of each part that the file names.

    Raises:
      UserError: if the file cannot be read, or is not as above; pickled objects are never read.
    """
    file = pathlib.Path(path)
    try:
        with np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged or no .npz file of plain arrays: {error}.") from error
    if missing := [name for name in ("first", "second", "label", "split") if name not in columns]:
        raise UserError(f"{file} lacks the arrays {', '.join(missing)}; it holds {', '.join(columns)}.")
    split = columns.pop("split").astype(str)
    label = columns["label"]
    columns["label"] = label.astype(bool) if label.ndim == 2 else label
    for name in columns:
        columns[name] = columns[name].astype(bool) if name.endswith("_mask") else columns[name]
    pairs = from_columns(columns, name=file.stem)
    if split.shape != (len(pairs),) or not set(split) <= set(SPLITS):
        raise UserError(f"'split' of {file} must be {len(pairs)} strings, each one of {', '.join(SPLITS)}.")
    return pairs, {name: np.flatnonzero(split == name).astype(np.int32) for name in SPLITS if (split == name).any()}


def load_image_halves(name: str, data_dir: str | None = None) -> Examples:
    """`image_halves` of all images of a set; see `load`."""
    return image_halves(load(name, "all", data_dir))
