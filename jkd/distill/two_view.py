"""Cosine similarity distillation over two views of each image, with correlations of classes and of examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from jkd.checks import Scalar, Tensor
from jkd.distill.checks import batch_pair, batch_temperature
from jkd.distill.cosine import cosine_gap, cswt_temperature, soft_classes
from jkd.distill.losses import cross_entropy
from jkd.errors import UserError, unknown
from jkd.similarity import cosine_similarity

MASK_MODES = ("scale", "select")


def _gram_cosine(student: Float[Array, "rows dim"], teacher: Float[Array, "rows dim"]) -> Float[Array, " rows"]:
    highest = jax.lax.Precision.HIGHEST
    grams = [jnp.matmul(p, p.T, precision=highest) for p in (student, teacher)]
    return cosine_similarity(*grams)


def _class_correlation(student: Array, teacher: Array) -> Float[Array, " classes"]:
    return 1 - _gram_cosine(student.T, teacher.T)


def _batch_correlation(student: Array, teacher: Array) -> Float[Array, " batch"]:
    return 1 - _gram_cosine(student, teacher)


def class_correlation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Scalar | Num[Tensor, " batch"],
) -> Float[Array, ""]:
    """How much the correlations between classes differ, over a batch.

        L = 1 - mean_j cos(row j of P_s^T P_s, row j of P_t^T P_t),    P = softmax(z / T), [batch, classes]

    In [0, 1] up to rounding; no T^2. O(batch classes^2) operations, classes^2 numbers. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.

    Raises:
      UserError: on a wrong shape or dtype, one example only, or a temperature known to be <= 0 or not finite.

    Reference: Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023, with squared differences in place of
      cosines; cosines as in Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information
      Transfer, 2023.
    """
    student, teacher = batch_pair(student_logits, teacher_logits)
    return _class_correlation(*soft_classes(student, teacher, batch_temperature(temperature, student))).mean()


def batch_correlation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Scalar | Num[Tensor, " batch"],
) -> Float[Array, ""]:
    """How much the correlations between the examples of a batch differ.

        L = 1 - mean_b cos(row b of P_s P_s^T, row b of P_t P_t^T),    P = softmax(z / T), [batch, classes]

    In [0, 1] up to rounding; no T^2. O(batch^2 classes) operations, batch^2 numbers. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.

    Raises:
      UserError: on a wrong shape or dtype, one example only, or a temperature known to be <= 0 or not finite.

    Reference: as `class_correlation_loss`.
    """
    student, teacher = batch_pair(student_logits, teacher_logits)
    return _batch_correlation(*soft_classes(student, teacher, batch_temperature(temperature, student))).mean()


class CSKDTwoViewTerms(NamedTuple):
    """The parts of the two-view loss: cross-entropies for each example, masked losses for the whole batch."""

    cross_entropy_weak: Float[Array, " batch"]
    cross_entropy_strong: Float[Array, " batch"]
    cosine_weak: Float[Array, ""]
    cosine_strong: Float[Array, ""]
    class_correlation: Float[Array, ""]
    batch_correlation: Float[Array, ""]
    temperature: Float[Array, " batch"]


def _masks(teacher: Float[Array, "batch classes"]) -> tuple[Array, Array]:
    """1 for the examples of low confidence and for the classes of low total probability; the rest is 0."""
    p = jax.nn.softmax(teacher)
    lows = [x <= jnp.median(x) for x in (p.max(1), p.sum(0))]
    return lows[0].astype(p.dtype), lows[1].astype(p.dtype)


def _weak_parts(student: Array, teacher: Array, t: Array, weight: Scalar, select: bool) -> tuple[Array, Array, Array]:
    """Cosine loss, class and batch correlation of the weak view, masked."""
    examples, classes = _masks(teacher)
    soft = soft_classes(student, teacher, t)
    correlations = (_class_correlation(*soft), classes), (_batch_correlation(*soft), examples)
    if select:
        # A product, not a select: NaN probabilities must show.
        soft = soft[0] * examples[:, None], soft[1] * examples[:, None]
        by_class, by_example = ((mask * losses).mean() for losses, mask in correlations)
    else:
        by_class, by_example = (mask.mean() * losses.mean() for losses, mask in correlations)
    cosine = (1 - cosine_similarity(*soft, axis=0).mean()) * jnp.square(t.mean()) * weight
    return examples.mean() * cosine, by_class, by_example


def cskd_two_view_terms(
    student_weak: Float[Tensor, "batch classes"],
    student_strong: Float[Tensor, "batch classes"],
    teacher_weak: Float[Tensor, "batch classes"],
    teacher_strong: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    weight: Scalar = 2.0,
    t_low: Scalar = 2.0,
    t_high: Scalar = 6.0,
    mask_mode: str = "scale",
) -> CSKDTwoViewTerms:
    """What `cskd_two_view_loss` adds up, with the temperatures chosen.

    Each of the four masked parts is a sum over two temperatures: T and T_b. Arguments, dtypes, gradient stops and
    errors as `cskd_two_view_loss`.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    if mask_mode not in MASK_MODES:
        raise unknown("mask_mode", mask_mode, MASK_MODES)
    student, teacher = batch_pair(student_weak, teacher_weak, ("student_weak", "teacher_weak"))
    strong = batch_pair(student_strong, teacher_strong, ("student_strong", "teacher_strong"))
    if strong[0].shape != student.shape:
        raise UserError(
            "student_weak and student_strong must have the same shape, "
            f"got {list(student.shape)} and {list(strong[0].shape)}."
        )
    chosen = cswt_temperature(student, teacher, t_low=t_low, t_high=t_high)
    both = (batch_temperature(temperature, student), chosen)
    cosine, by_class, by_example = (
        sum(parts, jnp.zeros(()))
        for parts in zip(*(_weak_parts(student, teacher, t, weight, mask_mode == "select") for t in both), strict=True)
    )
    return CSKDTwoViewTerms(
        cross_entropy_weak=cross_entropy(student, labels, reduction="none"),
        cross_entropy_strong=cross_entropy(strong[0], labels, reduction="none"),
        cosine_weak=cosine,
        cosine_strong=sum((cosine_gap(*strong, t, weight) for t in both), jnp.zeros(())),
        class_correlation=by_class,
        batch_correlation=by_example,
        temperature=chosen,
    )


def cskd_two_view_loss(
    student_weak: Float[Tensor, "batch classes"],
    student_strong: Float[Tensor, "batch classes"],
    teacher_weak: Float[Tensor, "batch classes"],
    teacher_strong: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    weight: Scalar = 2.0,
    ce_weight: Scalar = 1.0,
    kd_weight: Scalar = 1.0,
    correlation_weight: Scalar = 1.0,
    t_low: Scalar = 2.0,
    t_high: Scalar = 6.0,
    mask_mode: str = "scale",
) -> Float[Array, ""]:
    """Cosine similarity distillation of a weakly and a strongly augmented view of the same images.

        L = ce_weight (CE_weak + CE_strong)
          + kd_weight sum_T (L_strong(T) + m L_weak(T))
          + correlation_weight sum_T (m' CC_weak(T) + m BC_weak(T)),    T in {temperature, T_b of the WEAK view}

    L, CC and BC are `batch_cosine_loss`, `class_correlation_loss` and `batch_correlation_loss`. Masks come from the
    teacher's probabilities of the weak view at T = 1: m are the examples whose highest probability is at most the
    batch's median, m' the classes whose probability summed over the batch is at most the median of the classes. In
    the authors' code a mask multiplies a loss that is already a mean, so that m and m' are the shares of 1 in them,
    about one half: mask_mode "scale". This library's "select" keeps in each mean only what the mask chooses, and in
    the sums over the batch of L_weak only the chosen examples; the parts keep their size.

    No gradient reaches the teacher's logits, T_b or the masks. One value for the whole batch; in float32 at least.

    Args:
      student_weak: raw logits of the weak view; at least 2 examples and 2 classes.
      student_strong: raw logits of the strong view of the same images.
      teacher_weak: raw logits of the teacher in evaluation mode, for the weak view.
      teacher_strong: the same, for the strong view.
      labels: in [0, classes). A traced label outside gives NaN.
      temperature: T > 0, a scalar or one for each example.
      weight: factor of the cosine losses L, not of the correlations.
      ce_weight: weight of both cross-entropies.
      kd_weight: weight of the cosine losses.
      correlation_weight: weight of the correlations.
      t_low: lowest of the temperatures T_b.
      t_high: highest of the temperatures T_b.
      mask_mode: "scale" or "select".

    Raises:
      UserError: on a wrong shape, dtype, label or mask_mode, one example only, or a temperature known to be <= 0 or
        not finite.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023,
      in the frame of Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023.
    """
    terms = cskd_two_view_terms(
        student_weak,
        student_strong,
        teacher_weak,
        teacher_strong,
        labels,
        temperature=temperature,
        weight=weight,
        t_low=t_low,
        t_high=t_high,
        mask_mode=mask_mode,
    )
    cross_entropies = terms.cross_entropy_weak.mean() + terms.cross_entropy_strong.mean()
    cosines = terms.cosine_weak + terms.cosine_strong
    correlations = terms.class_correlation + terms.batch_correlation
    return cross_entropies * ce_weight + cosines * kd_weight + correlations * correlation_weight
