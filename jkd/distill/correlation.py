"""Distillation by correlation: of values and of ranks, from a teacher mixed with its pruned copy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Num

from jkd.checks import Scalar, Tensor, check_share
from jkd.distill.checks import batch_temperature, logit_matrix, logit_pair
from jkd.distill.cosine import soft_classes
from jkd.distill.losses import cross_entropy
from jkd.errors import UserError, unknown
from jkd.ranks import hard_ranks, soft_ranks
from jkd.reduction import reduce
from jkd.similarity import cosine_similarity

RANK_MODES = ("hard", "soft")


def mix_teacher_logits(
    full: Float[Tensor, "batch classes"], pruned: Float[Tensor, "batch classes"], teacher_weight: Scalar = 0.7
) -> Float[Array, "batch classes"]:
    """The logits of a teacher and of its pruned copy as those of one teacher.

        z = g z_full + (1 - g) z_pruned    (mixed before any softmax)

    No gradient passes. In float32 at least. `jkd.prune.prune_params` makes the pruned copy.

    Args:
      full: raw logits of the teacher; at least 2 classes.
      pruned: raw logits of its pruned copy, for the same views.
      teacher_weight: g in [0, 1], the weight of the full teacher.

    Raises:
      UserError: on a wrong shape or dtype, or a weight known to be outside [0, 1].

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    check_share("teacher_weight", teacher_weight)
    full, pruned = logit_pair(full, pruned, ("full", "pruned"))
    return jax.lax.stop_gradient(full * teacher_weight + pruned * (1 - teacher_weight))


def _value_cosines(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"], t: Float[Array, " batch"]
) -> tuple[Float[Array, " batch"], Float[Array, " classes"]]:
    soft = soft_classes(student, teacher, t)
    return cosine_similarity(*soft, axis=1), cosine_similarity(*soft, axis=0)


def correlation_value_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    weight: Scalar = 2.0,
) -> Float[Array, ""]:
    """One minus the uncentered correlation of probabilities, of each example and of each class over the batch.

        L = w T^2 (1 - mean_b cos(p_s[b, :], p_t[b, :])) + w T^2 (1 - mean_j cos(p_s[:, j], p_t[:, j])),
        p = softmax(z / T)

    In [0, 2 w T^2] up to rounding; with one example the second part is 0. Each of the parts has the factor w T^2, 32
    by default: tune the learning rate for it. Where temperatures differ between examples T^2 is the square of their
    mean, as in `batch_cosine_loss`. One value for the whole (global) batch; in float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits, perhaps of `mix_teacher_logits`; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.
      weight: w.

    Raises:
      UserError: on a wrong shape or dtype, or a temperature known to be <= 0 or not finite.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    t = batch_temperature(temperature, student)
    by_example, by_class = _value_cosines(student, teacher, t)
    return (2 - by_example.mean() - by_class.mean()) * jnp.square(t.mean()) * weight


def _unit_variance(logits: Float[Array, "batch classes"]) -> Float[Array, "batch classes"]:
    """Rows of mean 0 and variance 1; rows of equal logits become 0 and pass no gradient."""
    tied = logits.max(1, keepdims=True) == logits.min(1, keepdims=True)
    spread = jnp.where(tied, 0, logits - logits.mean(1, keepdims=True))
    return spread / jnp.sqrt(jnp.square(spread).mean(1, keepdims=True) + 1e-12)


def rank_correlation(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    rank_mode: str = "hard",
    tau: Scalar = 1.0,
    chunk: int | None = None,
) -> Float[Array, " batch"]:
    """Spearman's correlation between the orders in which student and teacher put the classes of each example.

        rho_b = centered cosine of rank(z_s,b) and hard_rank(z_t,b)

    In [-1, 1] up to rounding; 0 where one side has equal logits throughout. Arguments, dtypes, gradient stops and
    errors as `spearman_loss`.
    """
    if rank_mode not in RANK_MODES:
        raise unknown("rank_mode", rank_mode, RANK_MODES)
    student, teacher = logit_pair(student_logits, teacher_logits)
    if rank_mode == "hard":
        ranks = hard_ranks(student)
    else:
        ranks = soft_ranks(_unit_variance(student), tau, chunk=chunk)
    middle = (student.shape[1] + 1) / 2
    # NaN is not equal to itself, so a row of NaN stays NaN here.
    tied = ranks.max(1, keepdims=True) == ranks.min(1, keepdims=True)
    return cosine_similarity(jnp.where(tied, 0, ranks - middle), hard_ranks(teacher) - middle)


def spearman_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    weight: Scalar = 2.0,
    rank_mode: str = "hard",
    tau: Scalar = 1.0,
    chunk: int | None = None,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """One minus the rank correlation of each example's logits.

        L_b = w (1 - rho_b),    in [0, 2 w]    (see `rank_correlation`; no temperature, which cannot change an order)

    rank_mode "hard" takes the student's exact ranks, as the authors' code does. They are piecewise constant: the term
    then has NO gradient and only shows in the loss. "soft" is this library's differentiable form: `soft_ranks` of the
    student's logits, scaled to unit variance in each row. Ties share their mean rank, where the authors' code goes by
    index. A row of equal student logits has rho = 0 and passes no gradient. NaN logits give NaN. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      weight: w.
      rank_mode: "hard" or "soft".
      tau: width of the soft ranks, > 0, in standard deviations of a row; not used by "hard".
      chunk: how many rows the soft ranks take at a time (see `soft_ranks`); not used by "hard".
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, rank_mode, chunk or reduction, or a tau known not to be positive.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    rho = rank_correlation(student_logits, teacher_logits, rank_mode=rank_mode, tau=tau, chunk=chunk)
    return reduce((1 - rho) * weight, reduction)


def correlation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    value_weight: Scalar = 2.0,
    rank_weight: Scalar = 2.0,
    rank_mode: str = "hard",
    tau: Scalar = 1.0,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The value and the rank loss together: all that an augmented view adds, and `r2kd_loss` without cross-entropy.

        L = correlation_value_loss + spearman_loss

    Arguments, dtypes, gradient stops and errors as `r2kd_loss`; no labels, since those of mixed images are not used.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    value = correlation_value_loss(student_logits, teacher_logits, temperature=temperature, weight=value_weight)
    rank = spearman_loss(student_logits, teacher_logits, weight=rank_weight, rank_mode=rank_mode, tau=tau, chunk=chunk)
    return value + rank


class R2KDTerms(NamedTuple):
    """What correlation distillation compares; cosines and rank correlations without weights or T^2."""

    cross_entropy: Float[Array, " batch"]
    sample_cosine: Float[Array, " batch"]
    class_cosine: Float[Array, " classes"]
    rank_correlation: Float[Array, " batch"]


def r2kd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    rank_mode: str = "hard",
    tau: Scalar = 1.0,
    chunk: int | None = None,
) -> R2KDTerms:
    """What `r2kd_loss` is made of.

        CE_b,    cos(p_s[b, :], p_t[b, :]),    cos(p_s[:, j], p_t[:, j]),    rho_b

    Arguments, dtypes, gradient stops and errors as `r2kd_loss`.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    by_example, by_class = _value_cosines(student, teacher, batch_temperature(temperature, student))
    return R2KDTerms(
        cross_entropy=cross_entropy(student, labels, reduction="none"),
        sample_cosine=by_example,
        class_cosine=by_class,
        rank_correlation=rank_correlation(student, teacher, rank_mode=rank_mode, tau=tau, chunk=chunk),
    )


def r2kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    ce_weight: Scalar = 1.0,
    value_weight: Scalar = 2.0,
    rank_weight: Scalar = 2.0,
    rank_mode: str = "hard",
    tau: Scalar = 1.0,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Robustness-reinforced distillation: cross-entropy, and correlations of values and of ranks.

        L = ce_weight mean_b CE_b + correlation_value_loss + spearman_loss

    The whole method mixes two teachers, and adds the correlations of an augmented view that all networks see:

        teacher = mix_teacher_logits(full(images), pruned(images))
        loss = r2kd_loss(student(images), teacher, labels)
        loss += correlation_loss(student(augmented), mix_teacher_logits(full(augmented), pruned(augmented)))

    One value for the whole batch; in float32 at least. No gradient reaches the teacher's logits, and none comes from
    the ranks in mode "hard" (see `spearman_loss`).

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits, perhaps of `mix_teacher_logits`.
      labels: in [0, classes). A traced label outside gives NaN.
      temperature: T > 0 of the value loss, a scalar or one for each example.
      ce_weight: weight of the cross-entropy.
      value_weight: w of `correlation_value_loss`.
      rank_weight: w of `spearman_loss`.
      rank_mode: "hard" (the authors' code; no gradient) or "soft".
      tau: width of the soft ranks, > 0.
      chunk: how many rows the soft ranks take at a time.

    Raises:
      UserError: on a wrong shape, dtype, label, rank_mode or chunk, or a temperature or tau known not to be positive.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024.
    """
    correlation = correlation_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        value_weight=value_weight,
        rank_weight=rank_weight,
        rank_mode=rank_mode,
        tau=tau,
        chunk=chunk,
    )
    return cross_entropy(student_logits, labels) * ce_weight + correlation


def keep_most_uncertain(teacher_logits: Float[Tensor, "batch classes"], share: float) -> Int[Array, " kept"]:
    """Indices of the examples whose teacher is least certain, the most uncertain first.

        H_b = -sum_k p_k ln p_k,    p = softmax(z_b);    n = max(1, round(share batch)) examples of highest H

    For mixed images ("CutMixPick") give the teacher's logits of the MIXED images, and train on what is kept:

        kept = keep_most_uncertain(teacher(mixed), 0.5)
        loss += correlation_loss(student(mixed[kept]), teacher(mixed)[kept])

    Ties go by index. NaN logits count as most uncertain, so that they show. No gradient passes.

    Args:
      teacher_logits: raw logits; at least 2 classes.
      share: of the examples to keep, in (0, 1]; static, so that the number of indices is.

    Raises:
      UserError: on a wrong shape or dtype, or a share outside (0, 1].

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024. The authors' code takes the entropy of the unmixed images and keeps as many as the batch holds.
    """
    logits = logit_matrix("teacher_logits", teacher_logits)
    if not 0 < share <= 1:
        raise UserError(f"share must lie in (0, 1], got {share}.")
    log_p = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_p) * log_p).sum(1)
    # 0.29 * 50 is 14.499999999999998 in floating point and means 14.5.
    count = max(1, round(round(share * len(logits), 6)))
    # Not top_k: to it the negative NaN that comes out of a minus sign is the smallest number.
    return jnp.argsort(entropy, stable=True, descending=True)[:count]
