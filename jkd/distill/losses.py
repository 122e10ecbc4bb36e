"""Distillation by soft targets: the classic loss and its decoupled form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.nn import log_softmax, logsumexp
from jaxtyping import Array, Bool, Float, Integer, Num

from jkd.checks import Scalar, Tensor, concrete
from jkd.distill.checks import (
    batch_temperature,
    class_labels,
    known_class,
    logit_matrix,
    logit_pair,
)
from jkd.distill.smoothing import check_smoothing, smooth_labels
from jkd.reduction import reduce


def cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    smoothing: Scalar = 0.0,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Cross-entropy of integer labels, smoothed or not, in float32 at least.

        CE_b = -(1 - s) log p_b[y_b] - s mean_k log p_b[k],    p_b = softmax(z_b), s the smoothing    (nats)

    Args:
      student_logits: raw logits; at least 2 classes.
      labels: in [0, classes). A traced label outside gives NaN.
      smoothing: s in [0, 1], as in `smooth_labels`. A logit of -inf is fine only where s is a known 0.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, label, smoothing or reduction.
    """
    logits = logit_matrix("student_logits", student_logits)
    labels = class_labels(labels, logits)
    check_smoothing(smoothing)
    if concrete(smoothing) == 0:
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        targets = smooth_labels(labels, logits.shape[1], smoothing).astype(logits.dtype)
        losses = optax.losses.softmax_cross_entropy(logits, targets)
    return reduce(jnp.where(known_class(labels, logits.shape[1]), losses, jnp.nan), reduction)


def kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Scalar | Num[Tensor, " batch"],
    *,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Knowledge distillation: the divergence of the student's softened classes from the teacher's.

        KD_b = T_b^2 KL(softmax(z_t,b / T_b) || softmax(z_s,b / T_b))    (nats, >= 0)

    The sum is over classes and T_b^2 is inside the mean over the batch, so that gradients keep their
    scale when T_b differs between examples. As T grows KD_b tends to sum_k (d_k - mean d)^2 / (2 K) for
    the logit differences d. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype or reduction, or a temperature known to be <= 0 or not finite.

    Reference: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    t = batch_temperature(temperature, student)
    divergence = optax.losses.kl_divergence_with_log_targets(
        log_softmax(student / t[:, None]), log_softmax(teacher / t[:, None])
    )
    return reduce(t**2 * divergence, reduction)


class DKDTerms(NamedTuple):
    """The two parts of decoupled distillation, one value for each example, T^2 included."""

    tckd: Float[Array, " batch"]
    nckd: Float[Array, " batch"]


def _split(logits: Float[Array, "batch classes"], target: Bool[Array, "batch classes"]) -> tuple[Array, Array]:
    """Log-probabilities [batch, 2] of (target, rest), and [batch, classes] within the rest.

    The target's own entry of the second is 0 on both sides, hence 0 in any divergence.
    """
    rest = logsumexp(logits, axis=1, where=~target)
    # 1 - p_target would cancel: log(1 - p_target) comes from the classes that make it up.
    pair = jnp.stack([jnp.sum(logits, axis=1, where=target), rest], axis=1)
    # Masked before any exp: an overflow in the entry left out would turn its zero gradient into NaN.
    return log_softmax(pair), jnp.where(target, 0, logits - rest[:, None])


def dkd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    temperature: Scalar | Num[Tensor, " batch"],
) -> DKDTerms:
    """The target-class and the non-target-class part of the distillation loss, for each example.

        TCKD_b = T_b^2 KL([p_y, 1 - p_y] || [q_y, 1 - q_y]),    p = softmax(z_t / T), q = softmax(z_s / T)
        NCKD_b = T_b^2 KL(p^ || q^),    p^, q^ = softmax over the classes other than y

    so that KD_b = TCKD_b + (1 - p_y) NCKD_b. With two classes NCKD is 0. The target class is left out of
    p^ and q^ exactly; the authors' code lowers its logit by 1000 after the division by T, which is the
    same number as long as no logit leads the others by hundreds. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      labels: in [0, classes). A traced label outside gives NaN.
      temperature: > 0, a scalar or one for each example, used on both sides.

    Raises:
      UserError: on a wrong shape, dtype or label, or a temperature known to be <= 0 or not finite.

    Reference: Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, CVPR 2022.
    """
    student, teacher = logit_pair(student_logits, teacher_logits)
    labels = class_labels(labels, student)
    t = batch_temperature(temperature, student)
    classes = student.shape[1]
    target = jax.nn.one_hot(labels, classes, dtype=bool)
    student_pair, student_rest = _split(student / t[:, None], target)
    teacher_pair, teacher_rest = _split(teacher / t[:, None], target)
    scale = jnp.where(known_class(labels, classes), t**2, jnp.nan)
    kl = optax.losses.kl_divergence_with_log_targets
    return DKDTerms(scale * kl(student_pair, teacher_pair), scale * kl(student_rest, teacher_rest))


def dkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    temperature: Scalar | Num[Tensor, " batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Decoupled knowledge distillation, without the cross-entropy.

        DKD_b = alpha TCKD_b + beta NCKD_b    (see `dkd_terms`; float32 at least)

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      labels: in [0, classes). A traced label outside gives NaN.
      temperature: > 0, a scalar or one for each example, used on both sides.
      alpha: weight of the target-class part.
      beta: weight of the non-target-class part (the authors use 6 to 8 on CIFAR-100).
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, label or reduction, or a temperature known to be <= 0 or not
        finite.

    Reference: Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, CVPR 2022.
    """
    terms = dkd_terms(student_logits, teacher_logits, labels, temperature)
    return reduce(terms.tckd * alpha + terms.nckd * beta, reduction)
