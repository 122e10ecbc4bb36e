"""Distillation from several teachers: the mean of the losses, never the loss of their mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num

from jkd.checks import Scalar, Tensor, as_float
from jkd.distill.losses import cross_entropy, kd_loss
from jkd.errors import UserError
from jkd.reduction import reduce


def _stacked(teacher_logits: Any) -> None:
    if jnp.ndim(teacher_logits) != 3 or jnp.shape(teacher_logits)[0] == 0:
        raise UserError(
            "teacher_logits must have the shape [teachers, batch, classes] with at least one teacher, "
            f"got {list(jnp.shape(teacher_logits))}."
        )


def _each(loss_fn: Callable, student_logits: Any, teacher_logits: Any, args: Any, kwargs: Any) -> Any:
    return jax.vmap(lambda teacher: loss_fn(student_logits, teacher, *args, **kwargs))(jnp.asarray(teacher_logits))


def over_teachers(
    loss_fn: Callable,
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "teachers batch classes"],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The plain mean over teachers of any loss of one student and one teacher.

        L = 1/M sum_m loss_fn(student_logits, teacher_logits[m], *args, **kwargs)

    Whole-batch scalars, per-example losses (`reduction="none"`) and NamedTuples of terms are averaged alike;
    a temperature that follows the teacher follows each of them.

        over_teachers(dkd_loss, student_logits, teacher_logits, labels, 4.0, beta=2.0)

    Args:
      loss_fn: `(student_logits, teacher_logits, *args, **kwargs)` -> array, or a tree of arrays.
      student_logits: raw logits.
      teacher_logits: raw logits of M >= 1 teachers; `loss_fn` decides whether gradients pass.
      *args: handed to `loss_fn`, the same for all teachers.
      **kwargs: likewise.

    Raises:
      UserError: if `teacher_logits` has no axis of teachers, or what `loss_fn` raises.
    """
    _stacked(teacher_logits)
    losses = _each(loss_fn, student_logits, teacher_logits, args, kwargs)
    return jax.tree.map(lambda loss: loss.mean(axis=0), losses)


def teacher_mean_logits(teacher_logits: Float[Tensor, "teachers batch classes"]) -> Float[Array, "batch classes"]:
    """The mean of the teachers' logits: the ensemble as measures of agreement see it, not as a target.

    In float32 at least; gradients pass.

    Raises:
      UserError: if `teacher_logits` is no floating point array of shape [teachers, batch, classes].
    """
    _stacked(teacher_logits)
    return as_float("teacher_logits", teacher_logits).mean(axis=0)


class EnsembleKDTerms(NamedTuple):
    """The parts of distillation from several teachers, for each example; T^2 is included in `kd`."""

    cross_entropy: Float[Array, " batch"]
    kd: Float[Array, "teachers batch"]


def ensemble_kd_terms(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "teachers batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: Scalar | Num[Tensor, " batch"] = 3.0,
) -> EnsembleKDTerms:
    """What `ensemble_kd_loss` adds up: for each example the cross-entropy, and `kd_loss` to each teacher.

    Arguments, dtypes, gradient stops and errors as `ensemble_kd_loss`.

    Reference: Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism,
      Expert Systems with Applications 262, 2025.
    """
    _stacked(teacher_logits)
    return EnsembleKDTerms(
        cross_entropy=cross_entropy(student_logits, labels, reduction="none"),
        kd=_each(kd_loss, student_logits, teacher_logits, (temperature,), {"reduction": "none"}),
    )


def ensemble_kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "teachers batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    ce_weight: Scalar = 0.6,
    kd_weight: Scalar = 0.4,
    temperature: Scalar | Num[Tensor, " batch"] = 3.0,
    reduction: str = "mean",
) -> Float[Array, "*reduced"]:
    """Cross-entropy and the mean over teachers of the distillation losses.

        L_b = ce_weight CE_b + kd_weight / M sum_m T_b^2 KL(softmax(z_m,b / T_b) || softmax(z_s,b / T_b))

    The gradient is that of distillation from the mean of the M softened distributions, whose loss differs by
    a constant; distillation from the mean of the logits is another method. In float32 at least.

    Args:
      student_logits: raw logits; at least 2 classes.
      teacher_logits: raw logits of M >= 1 teachers for the view that the student sees; no gradient passes
        through them.
      labels: in [0, classes). A traced label outside gives NaN.
      ce_weight: weight of the labels (the authors call it alpha: 0.6 in every run).
      kd_weight: weight of the teachers (the authors' 1 - alpha).
      temperature: > 0, a scalar or one for each example, used on both sides.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: on a wrong shape, dtype, label or reduction, or a temperature known to be <= 0 or not finite.

    Reference: Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism,
      Expert Systems with Applications 262, 2025; the authors' code.
    """
    terms = ensemble_kd_terms(student_logits, teacher_logits, labels, temperature=temperature)
    return reduce(terms.cross_entropy * ce_weight + terms.kd.mean(axis=0) * kd_weight, reduction)
