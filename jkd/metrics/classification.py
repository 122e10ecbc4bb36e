"""Counts for classification that add up over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jkd.errors import UserError

Tensor = jax.Array | np.ndarray


def topk_correct(
    logits: Float[Tensor, "batch classes"], labels: Integer[Tensor, " batch"], k: int = 1
) -> Bool[Array, " batch"]:
    """True where the labeled class is among the k largest logits.

        correct_b = #{c: z_c > z_y} + #{c < y: z_c = z_y} < k

    Ties go by class index, as in `jax.lax.top_k`: of equal logits the one with the lower index ranks
    first. A row with a NaN counts as wrong, and so does a label outside [0, classes): neither may pass as
    a lucky hit. No sort is needed.

    Args:
      logits: any order-preserving scores.
      labels: in [0, classes).
      k: in 1..classes; static.

    Raises:
      UserError: if `k` is outside 1..classes, or the shapes do not fit.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            "logits must have the shape [batch, classes] and labels [batch], "
            f"got {list(logits.shape)} and {list(labels.shape)}."
        )
    classes = logits.shape[1]
    if not 1 <= k <= classes:
        raise UserError(f"k must lie in 1..{classes} (the number of classes), got {k}.")
    target = jax.nn.one_hot(labels, classes, dtype=bool)
    score = jnp.sum(logits, axis=1, where=target, keepdims=True)
    before = jnp.arange(classes)[None, :] < labels.astype(jnp.int32)[:, None]
    rank = jnp.sum((logits > score) | ((logits == score) & before), axis=1)
    return (rank < k) & target.any(axis=1) & ~jnp.isnan(logits).any(axis=1)


class PerClassCounts(NamedTuple):
    """For each class, how many of its examples are correct and how many there are."""

    correct: Int[Array, " classes"]
    total: Int[Array, " classes"]


def per_class_counts(
    correct: Bool[Tensor, " batch"],
    labels: Integer[Tensor, " batch"],
    num_classes: int,
    mask: Bool[Tensor, " batch"] | None = None,
) -> PerClassCounts:
    """Correct and total counts by class: add them over batches, divide once at the end.

        total_c = #{b: y_b = c, mask_b},    correct_c = #{b: y_b = c, mask_b, correct_b}

    Top-1 accuracy is `counts.correct.sum() / counts.total.sum()`; the mean over classes of
    `counts.correct / counts.total` is the balanced accuracy. Counts are int32. Labels outside
    [0, num_classes) are in no class.

    Args:
      correct: as from `topk_correct`.
      labels: the true classes.
      num_classes: static.
      mask: False for padding; None counts every row.

    Raises:
      UserError: if the shapes differ, or `num_classes` is not positive.
    """
    rows = {"correct": correct, "labels": labels} | ({} if mask is None else {"mask": mask})
    shapes = {name: list(jnp.shape(value)) for name, value in rows.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or len(shapes["labels"]) != 1:
        raise UserError(f"correct, labels and mask must share one shape [batch], got {shapes}.")
    if num_classes < 1:
        raise UserError(f"num_classes must be positive, got {num_classes}.")
    counted = jnp.ones(jnp.shape(labels), jnp.int32) if mask is None else jnp.asarray(mask, jnp.int32)
    both = jnp.stack([counted * jnp.asarray(correct, jnp.int32), counted], axis=1)
    sums = jax.ops.segment_sum(both, jnp.asarray(labels).astype(jnp.int32), num_classes)
    return PerClassCounts(sums[:, 0], sums[:, 1])
