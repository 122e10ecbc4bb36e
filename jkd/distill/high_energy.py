"""Augmentation of the uncertain examples only, at a static capacity."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from jkd.checks import Scalar, Tensor, as_float, concrete
from jkd.distill.energy import check_threshold
from jkd.distill.losses import kd_loss
from jkd.errors import UserError
from jkd.reduction import reduce


class HighEnergySelection(NamedTuple):
    """Which examples to augment: `weights` is 1 for a chosen example and 0 for padding."""

    indices: Int[Array, " capacity"]
    weights: Float[Array, " capacity"]


def high_energy_capacity(high_rate: float, batch_size: int, *, slack: float = 1.5) -> int:
    """The static number of slots for the uncertain examples of a batch: ceil(slack rate batch), at most all.

    The share of a batch that is uncertain varies around `high_rate`; with `slack` 1.5 few batches of 64 or
    more hold more than fit, and those leave out a random few.

    Args:
      high_rate: share of the training set above the high threshold, in (0, 1].
      batch_size: of the global batch, > 0.
      slack: how many times the expected number fits, > 0.

    Raises:
      UserError: if `high_rate` is not in (0, 1], or `batch_size` or `slack` is not positive.
    """
    if not 0 < high_rate <= 1:
        raise UserError(f"high_rate must lie in (0, 1], got {high_rate}.")
    if batch_size < 1 or not 0 < slack < math.inf:
        raise UserError(f"batch_size and slack must be positive, got {batch_size} and {slack}.")
    # 1.5 * 0.2 * 10 is 3.0000000000000004 in floating point and means 3.
    return min(batch_size, math.ceil(round(slack * high_rate * batch_size, 6)))


def select_high_energy(
    key: PRNGKeyArray, energy: Float[Tensor, " batch"], e_high: Scalar, capacity: int
) -> HighEnergySelection:
    """The uncertain examples of a batch (E > e_high), in `capacity` slots.

    Uncertain examples come first, in random order; where there are more than slots, chance decides which
    stay out. The slots left over repeat the uncertain examples with weight 0, so that batch normalization sees
    uncertain examples only; with fewer than two of those they hold other examples of the batch.

    The augmentation of a batch then reads, with any `mixer(images, partners, ...)` that mixes image i with
    image partners[i] (CutMix, MixUp) and T = 4:

        index, weights = select_high_energy(key_pick, energy_score(teacher_logits), e_high, capacity)
        mixed = mixer(images[index], high_energy_partners(key_mix, weights), lam)
        loss += 0.9 * high_energy_kd_loss(student(mixed), teacher(mixed), 4.0, weights)

    Student and teacher both see the mixed image; its labels are not used.

    Args:
      key: decides the order.
      energy: of the teacher, for the views in this batch.
      e_high: the threshold, from `energy_thresholds`.
      capacity: number of slots, in 1..batch; static (see `high_energy_capacity`).

    Returns:
      indices into the batch and weights in {0, 1}. A NaN energy or threshold makes all weights NaN.

    Raises:
      UserError: if `capacity` is outside 1..batch, or the threshold is known to be NaN.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024. The authors' code has no capacity and always
      adds the first two images of a batch, so that the set is never empty; here an empty set weighs 0.
    """
    energy = as_float("energy", energy)
    if not 1 <= capacity <= energy.size:
        raise UserError(f"capacity must lie in 1..{energy.size} (the batch), got {capacity}.")
    check_threshold("e_high", e_high)
    hard = energy > e_high
    order = jax.random.permutation(key, energy.size)
    # A stable sort of the shuffled flags: hard ones first, both parts in random order.
    order = order[jnp.argsort(~hard[order])].astype(jnp.int32)
    slot, count = jnp.arange(capacity), hard.sum()
    valid = slot < count
    indices = order[jnp.where(valid | (count < 2), slot, slot % jnp.maximum(count, 1))]
    unknown = jnp.isnan(energy).any() | jnp.isnan(jnp.asarray(e_high))
    return HighEnergySelection(indices, jnp.where(unknown, jnp.nan, valid.astype(energy.dtype)))


def high_energy_partners(key: PRNGKeyArray, weights: Float[Tensor, " capacity"]) -> Int[Array, " capacity"]:
    """A random permutation of the slots that keeps valid ones (weight > 0) and padding apart.

    Slot i is mixed with slot partners[i]: a valid one with a valid one, sometimes with itself, as under any
    random permutation.

    Args:
      key: decides the order.
      weights: from `select_high_energy`; no gradient passes.

    Returns:
      Partners as int32.

    Raises:
      UserError: if the weights are no floating point vector.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024, whose code permutes the selected images alike.
    """
    weights = as_float("weights", weights)
    if weights.ndim != 1:
        raise UserError(f"weights must have the shape [capacity], got {list(weights.shape)}.")
    valid = weights > 0
    slots = jnp.argsort(~valid)
    shuffled = jax.random.permutation(key, valid.size)
    shuffled = shuffled[jnp.argsort(~valid[shuffled])].astype(jnp.int32)
    # The i-th valid slot goes to the i-th valid slot of the shuffle; likewise the padding.
    return jnp.zeros_like(shuffled).at[slots].set(shuffled)


def high_energy_kd_loss(
    student_logits: Float[Tensor, "capacity classes"],
    teacher_logits: Float[Tensor, "capacity classes"],
    temperature: Scalar | Num[Tensor, " capacity"],
    weights: Float[Tensor, " capacity"],
    *,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """`kd_loss` on the mixed images of the valid slots, and 0 where fewer than two are valid.

        L = sum_i w_i KD_i / sum_i w_i    (mean; a single valid image has no other to be mixed with)

    The sums run over the whole (global) array: under sharding the division is by the number of valid
    images of all devices. In float32 at least.

    Args:
      student_logits: raw logits of the mixed images; at least 2 classes.
      teacher_logits: raw logits of the same mixed images; no gradient passes through them.
      temperature: > 0, a scalar or one for each slot.
      weights: from `select_high_energy`; any weights >= 0 will do.
      reduction: "mean", "sum" or "none" (over the slots; all three weighted).

    Raises:
      UserError: as `kd_loss`, or if the weights' shape is not [capacity], or one is known here to be negative.

    Reference: Kim et al., Maximizing discrimination capability of knowledge distillation
      with energy function, Knowledge-Based Systems 296, 2024.
    """
    losses = kd_loss(student_logits, teacher_logits, temperature, reduction="none")
    known = concrete(weights)
    weights = jnp.asarray(weights, losses.dtype)
    if weights.shape != losses.shape:
        raise UserError(f"weights must have the shape {list(losses.shape)}, got {list(weights.shape)}.")
    if known is not None and (known < 0).any():
        raise UserError(f"weights must be >= 0, got {known.min()}.")
    # A product, not a select: NaN weights must show in the loss.
    return reduce(losses, reduction, weights * ((weights > 0).sum() >= 2))
