"""How well pictures and captions find each other, and where attention heads look: evaluators and pictures."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.captions import CaptionTask, Inputs
from jkd import metrics, retrieval, train
from jkd.data.vocabulary import PADDING, Vocabulary

KS = (1, 5, 10)
TOTAL = "total"
CELL, LEAST, GAP = 12, 64, 2  # pixels of a position of an attention map, of a map at least, and between maps


def encode_images(model: Any, inputs: Inputs, published: Any, batch: Any) -> retrieval.Embedded:
    """The pictures of a batch."""
    return model.apply(published, inputs.images(batch["image"]), method="encode_image")


def encode_texts(model: Any, inputs: Inputs, published: Any, consts: Any, batch: Any) -> retrieval.Embedded:
    """The captions [B, captions, length] of a batch, as texts of their own."""
    words, mask = (x.reshape(-1, *x.shape[2:]) for x in (inputs.words(batch["words"], consts), batch["mask"]))
    return model.apply(published, words, mask, method="encode_text")


def embed(model: Any, inputs: Inputs, published: Any, consts: Any, batch: Any) -> tuple[Any, Any]:
    """Both."""
    texts = encode_texts(model, inputs, published, consts, batch)
    return encode_images(model, inputs, published, batch), texts


def evaluators(
    task: CaptionTask, model: Any, inputs: Inputs, *, batch_size: int, every: int, folds: int, gallery: int
) -> dict[str, train.Evaluator]:
    """Recalls on validation and test rows, and pictures of where the heads look in the first test rows.

    Args:
      task: the data.
      model: an `MHSAN`.
      inputs: how batches come to it.
      batch_size: pictures at a time.
      every: steps between evaluations.
      folds: parts of the test rows that are searched separately, besides all of them; 1: none.
      gallery: pictures whose attention is drawn; 0: none.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        image, text = embed(model, inputs, published, consts, batch)
        rows = {"image": image.vector, "text": text.vector.reshape(len(image.vector), -1, text.vector.shape[-1])}
        return rows | _overlaps(image.attention, text.attention, len(image.vector))

    def look(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        image, text = embed(model, inputs, published, consts, batch)
        first = slice(None, None, task.captions)
        attention = {"image_attention": image.attention, "text_attention": text.attention[first]}
        shown = batch["words"][:, 0] if batch["words"].ndim == 3 else batch["mask"][:, 0].astype(jnp.int32)
        return attention | {"words": shown, "image": batch["image"]}

    def part(name: str) -> train.Evaluator:
        named: dict[str, Any] = {"kind": "gather", "every": every}
        finish = functools.partial(measure, folds=folds if name == "test" else 1)
        return train.Evaluator(functools.partial(task.part, name=name, batch_size=batch_size), collect, finish, **named)

    found = {name: part(name) for name in ("validation", "test")}
    if gallery:
        source = functools.partial(task.part, name="test", batch_size=min(batch_size, gallery), limit=gallery)
        picture = functools.partial(draw, vocabulary=task.vocabulary)
        found["gallery"] = train.Evaluator(source, look, lambda rows: {}, kind="gather", draw=picture)
    return found


def _overlaps(image: jax.Array, text: jax.Array, batch: int) -> dict[str, jax.Array]:
    """The overlap of the heads, for each picture; none of a single head."""
    if image.shape[1] < 2:
        return {}
    texts = retrieval.head_overlap(text, reduction="none").reshape(batch, -1).mean(1)
    return {"image_overlap": retrieval.head_overlap(image, reduction="none"), "text_overlap": texts}


def measure(rows: Mapping[str, np.ndarray], folds: int = 1) -> dict[str, float]:
    """Recalls both ways in percent, their sum, median ranks, and how much the heads overlap."""
    texts = rows["text"].reshape(-1, rows["text"].shape[-1])
    named = {"captions_per_image": rows["text"].shape[1]}
    found = _named(metrics.embedding_recall(rows["image"], texts, ks=_ks(len(rows["image"])), **named))
    if folds > 1:
        ks = _ks(len(rows["image"]) // folds)
        apart = _named(metrics.embedding_recall(rows["image"], texts, ks=ks, folds=folds, **named))
        found |= {f"folds_{name}": value for name, value in apart.items()}
    return found | {name: float(rows[name].mean()) for name in ("image_overlap", "text_overlap") if name in rows}


def _ks(images: int) -> tuple[int, ...]:
    return tuple(k for k in KS if k <= images)


def _named(recall: metrics.ImageTextRecall) -> dict[str, float]:
    found = {TOTAL: float(recall.total)}
    for name, of in (("i2t", recall.image_to_text), ("t2i", recall.text_to_image)):
        found |= {f"{name}_r{k}": float(value) for k, value in zip(KS, of, strict=False)}
    medians = (recall.image_to_text_median, recall.text_to_image_median)
    return found | {f"{name}_median": float(value) for name, value in zip(("i2t", "t2i"), medians, strict=True)}


def draw(rows: Mapping[str, np.ndarray], vocabulary: Vocabulary | None = None) -> dict[str, np.ndarray]:
    """Where every head looks: in the pictures (one row each: the picture, then its heads), and among the words.

    Bright is much, relative to each head's largest weight. Words are drawn with names where those are known.
    """
    maps = rows["image_attention"]
    sides = _sides(maps.shape[-1], rows["image"].shape)
    pictures = [_row(image, heads.reshape(-1, *sides)) for image, heads in zip(rows["image"], maps, strict=True)]
    gap = np.full((GAP, pictures[0].shape[1]), 255, np.uint8)
    found = {"image-attention": np.concatenate([part for picture in pictures for part in (picture, gap)])}
    return found | {"text-attention": _texts(rows["text_attention"], rows["words"], vocabulary)}


def _sides(positions: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a map of so many positions: in the proportion of the picture."""
    height, width = (shape[1], shape[2]) if len(shape) == 4 else (1, positions)
    for rows in range(1, positions + 1):
        if positions % rows == 0 and rows * width == positions // rows * height:
            return rows, positions // rows
    return 1, positions


def _row(image: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """One picture, in grey, and the maps of its heads at the same height."""
    grey = image.astype(np.float32)
    grey = grey.mean(-1) if image.dtype == np.uint8 else np.linalg.norm(grey, axis=-1)
    grey = grey[None] if grey.ndim == 1 else grey
    scale = -(-LEAST // max(heads.shape[1:]))
    height = max(max(CELL, scale) * heads.shape[1], grey.shape[0])
    width = max(max(CELL, scale) * heads.shape[2], grey.shape[1])
    parts = [_enlarged(_bytes(one), height, width) for one in (grey, *heads)]
    gap = np.full((height, GAP), 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)], 1)


def _bytes(values: np.ndarray) -> np.ndarray:
    values = values - min(float(values.min()), 0.0)
    return np.rint(255 * values / max(float(values.max()), 1e-12)).astype(np.uint8)


def _enlarged(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbours."""
    rows = np.arange(height) * pixels.shape[0] // height
    columns = np.arange(width) * pixels.shape[1] // width
    return pixels[rows][:, columns]


def _texts(attention: np.ndarray, words: np.ndarray, vocabulary: Vocabulary | None) -> np.ndarray:
    """Captions as tables, heads down and words across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count, heads, length = attention.shape
    figure, axes = plt.subplots(
        count, 1, figsize=(1.0 * length + 1, count * (0.3 * heads + 0.8)), squeeze=False, layout="constrained", dpi=60
    )
    for axis, weights, numbers in zip(axes[:, 0], attention, words, strict=True):
        axis.imshow(weights, cmap="gray", vmin=0, aspect="auto")
        axis.set_xticks(range(length), [_name(int(n), vocabulary) for n in numbers], fontsize=7)
        axis.set_yticks([])
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    plt.close(figure)
    return pixels


def _name(number: int, vocabulary: Vocabulary | None) -> str:
    if number == PADDING:
        return ""
    return vocabulary.words[number] if vocabulary else str(number)
