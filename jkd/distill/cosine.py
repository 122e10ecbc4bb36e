"""Distillation by the cosine similarity of what the batch gives each class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from jkd.checks import Scalar, Tensor, check_positive
from jkd.distill.checks import batch_pair, batch_temperature
from jkd.distill.losses import cross_entropy
from jkd.similarity import EPS, cosine_similarity


def soft_classes(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"], t: Float[Array, " batch"]
) -> tuple[Array, Array]:
    """The probabilities of both, each row at its own temperature."""
    return jax.nn.softmax(student / t[:, None]), jax.nn.softmax(teacher / t[:, None])


def cosine_gap(
    student: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    t: Float[Array, " batch"],
    weight: Scalar,
    eps: Scalar = EPS,
) -> Float[Array, ""]:
    """`batch_cosine_loss` of what has been checked."""
    cosines = cosine_similarity(*soft_classes(student, teacher, t), axis=0, eps=eps)
    return (1 - cosines.mean()) * jnp.square(t.mean()) * weight


def class_cosine(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Scalar | Num[Tensor, " batch"] = 1.0,
    *,
    eps: Scalar = EPS,
) -> Float[Array, " classes"]:
    """How alike student and teacher spread each class over the batch, as a measure or as part of a loss.

        c_j = cos(p_s[:, j], p_t[:, j]),    p = softmax(z / T) over the CLASSES, cosine over the BATCH

    In [0, 1] up to rounding, and 1 where one column is a multiple of the other; a class that is 0 throughout gives 0,
    with a finite gradient. The batch is the global one: cosines of parts of it, averaged, are something else. NaN
    logits make all NaN. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.
      eps: > 0, added to the squared norms.

    Raises:
      UserError: on a wrong shape or dtype, one example only, or a temperature known to be <= 0 or not finite.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    student, teacher = batch_pair(student_logits, teacher_logits)
    t = batch_temperature(temperature, student)
    return cosine_similarity(*soft_classes(student, teacher, t), axis=0, eps=eps)


def batch_cosine_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Scalar | Num[Tensor, " batch"],
    *,
    weight: Scalar = 2.0,
    eps: Scalar = EPS,
) -> Float[Array, ""]:
    """One minus the mean class cosine, at any temperatures.

        L = weight (mean_b T_b)^2 (1 - mean_j c_j)    (see `class_cosine`; >= 0 up to rounding)

    The square is that of the batch's MEAN temperature, as in the authors' code. Temperatures may come from any rule:
    `cswt_temperature`, `energy_temperature`, one number. With weight 2 and T = 4 the factor is 32: tune the learning
    rate for it. The value belongs to the whole batch, and the sum of those of micro-batches is another loss. In
    float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits; no gradient passes through them.
      temperature: > 0, a scalar or one for each example, used on both sides. A gradient reaches it.
      weight: factor of the whole.
      eps: > 0, added to the squared norms.

    Raises:
      UserError: as `class_cosine`.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    student, teacher = batch_pair(student_logits, teacher_logits)
    return cosine_gap(student, teacher, batch_temperature(temperature, student), weight, eps)


def cswt_temperature(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    t_low: Scalar = 2.0,
    t_high: Scalar = 6.0,
    eps: Scalar = 1e-8,
) -> Float[Array, " batch"]:
    """Cosine similarity weighted temperature: low where student and teacher agree, high where they do not.

        T_b = t_low + (t_high - t_low) (s_max - s_b) / max(s_max - s_min, eps)

    s_b is the cosine, over classes, of the probabilities at T = 1; its extremes are those of the global batch. Both
    ends are attained unless all s_b agree to eps; where student and teacher are equal, T is t_low. No gradient passes.
    NaN logits make all temperatures NaN. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits.
      t_low: temperature of the example whose student is most like its teacher, > 0.
      t_high: temperature of the one that is least so, > 0.
      eps: the smallest range of similarities that is stretched to the whole range of temperatures.

    Raises:
      UserError: on a wrong shape or dtype, one example only, or a temperature known to be <= 0 or not finite.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    for name, value in (("t_low", t_low), ("t_high", t_high)):
        check_positive(name, value)
    student, teacher = batch_pair(student_logits, teacher_logits)
    unit = [
        p / jnp.linalg.norm(p, axis=1, keepdims=True) for p in soft_classes(student, teacher, jnp.ones(len(student)))
    ]
    # 1 - cos of unit vectors, without cancelling: equal rows then differ by 0, not by a rounding to be stretched.
    distance = jnp.square(unit[0] - unit[1]).sum(1) / 2
    nearest = distance.min()
    share = (distance - nearest) / jnp.maximum(distance.max() - nearest, eps)
    low, high = (jnp.asarray(t, student.dtype) for t in (t_low, t_high))
    return jax.lax.stop_gradient(low * (1 - share) + high * share)


class CSKDTerms(NamedTuple):
    """The parts of cosine similarity distillation; weight and T^2 are included in both losses."""

    cross_entropy: Float[Array, " batch"]
    cosine: Float[Array, ""]
    cswt: Float[Array, ""]
    class_cosine: Float[Array, " classes"]
    temperature: Float[Array, " batch"]


def cskd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    weight: Scalar = 2.0,
    t_low: Scalar = 2.0,
    t_high: Scalar = 6.0,
) -> CSKDTerms:
    """What `cskd_loss` adds up, with the class cosines and the temperatures chosen.

        CE_b,    L(T),    L(T_b),    c_j(T),    T_b    (see `batch_cosine_loss`, `class_cosine`, `cswt_temperature`)

    Arguments, dtypes, gradient stops and errors as `cskd_loss`.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    student, teacher = batch_pair(student_logits, teacher_logits)
    chosen = cswt_temperature(student, teacher, t_low=t_low, t_high=t_high)
    return CSKDTerms(
        cross_entropy=cross_entropy(student, labels, reduction="none"),
        cosine=batch_cosine_loss(student, teacher, temperature, weight=weight),
        cswt=cosine_gap(student, teacher, chosen, weight),  # NaN temperatures of NaN logits must not raise
        class_cosine=class_cosine(student, teacher, temperature),
        temperature=chosen,
    )


def cskd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 4.0,
    weight: Scalar = 2.0,
    ce_weight: Scalar = 1.0,
    kd_weight: Scalar = 1.0,
    t_low: Scalar = 2.0,
    t_high: Scalar = 6.0,
    use_cswt: bool = True,
) -> Float[Array, ""]:
    """Cosine similarity distillation, at one temperature and at those of `cswt_temperature`, with cross-entropy.

        L = ce_weight mean_b CE_b + kd_weight (L(T) + L(T_b)),    L(T) = weight (mean T)^2 (1 - mean_j c_j(T))

    No gradient reaches the teacher's logits or T_b. One value for the whole batch. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 examples and 2 classes.
      teacher_logits: raw logits of the teacher in evaluation mode, for the same views.
      labels: in [0, classes). A traced label outside gives NaN.
      temperature: T > 0 of the first term, a scalar or one for each example.
      weight: factor of both distillation terms.
      ce_weight: weight of the cross-entropy.
      kd_weight: weight of the sum of the distillation terms.
      t_low: lowest temperature of the second term.
      t_high: highest temperature of the second term.
      use_cswt: False leaves the second term out.

    Raises:
      UserError: on a wrong shape, dtype or label, one example only, or a temperature known to be <= 0 or not finite.

    Reference: Ham et al., Cosine Similarity Knowledge Distillation for Individual Class Information Transfer, 2023.
    """
    terms = cskd_terms(
        student_logits, teacher_logits, labels, temperature=temperature, weight=weight, t_low=t_low, t_high=t_high
    )
    kd = terms.cosine + terms.cswt if use_cswt else terms.cosine
    return terms.cross_entropy.mean() * ce_weight + kd * kd_weight
