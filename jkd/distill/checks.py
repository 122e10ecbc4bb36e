"""What every distillation loss checks at its door."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jkd.checks import as_float, check_positive, concrete
from jkd.errors import UserError


def logit_matrix(name: str, logits: ArrayLike) -> Float[Array, "batch classes"]:
    """`logits` as a matrix of at least float32 with two classes or more.

    Raises:
      UserError: if `logits` is no floating point matrix, or has fewer than two classes.
    """
    if jnp.ndim(logits) != 2:
        raise UserError(f"{name} must have the shape [batch, classes], got {list(jnp.shape(logits))}.")
    if jnp.shape(logits)[1] < 2:
        raise UserError(f"{name} must have at least 2 classes, got the shape {list(jnp.shape(logits))}.")
    return as_float(name, logits)


def logit_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> tuple[Array, Array]:
    """Both logits as matrices of one shape; no gradient passes through the teacher's.

    Raises:
      UserError: as `logit_matrix`, or if the shapes differ.
    """
    student, teacher = logit_matrix(names[0], student_logits), logit_matrix(names[1], teacher_logits)
    if student.shape != teacher.shape:
        raise UserError(
            f"{names[0]} and {names[1]} must have the same shape, got {list(student.shape)} and {list(teacher.shape)}."
        )
    return student, jax.lax.stop_gradient(teacher)


def batch_pair(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> tuple[Array, Array]:
    """`logit_pair` for what compares examples with each other.

    Raises:
      UserError: as `logit_pair`, or if there is one example only.
    """
    student, teacher = logit_pair(student_logits, teacher_logits, names)
    if len(student) < 2:
        raise UserError(
            f"{names[0]} must hold at least 2 examples, got the shape {list(student.shape)}: this compares classes "
            "over the batch, and any two vectors of one number are alike."
        )
    return student, teacher


def class_labels(labels: ArrayLike, logits: Float[Array, "batch classes"]) -> Int[Array, " batch"]:
    """`labels` as int32, one for each row of `logits`.

    Raises:
      UserError: if the labels are no integers of shape [batch], or are known here and lie outside
        [0, classes). Traced labels cannot raise: see `known_class`.
    """
    batch, classes = logits.shape
    if jnp.shape(labels) != (batch,):
        raise UserError(
            f"labels must have the shape [{batch}] (one for each row of logits), got {list(jnp.shape(labels))}."
        )
    return integer_labels(labels, classes)


def integer_labels(labels: ArrayLike, classes: int) -> Int[Array, " batch"]:
    """`labels` as an int32 vector.

    Raises:
      UserError: if the labels are no vector of integers, or are known here and lie outside [0, classes).
    """
    if jnp.ndim(labels) != 1:
        raise UserError(f"labels must have the shape [batch], got {list(jnp.shape(labels))}.")
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise UserError(f"labels must be integers, got {jnp.result_type(labels)}.")
    known = concrete(labels)
    if known is not None and known.size and (known.min() < 0 or known.max() >= classes):
        raise UserError(f"labels must lie in [0, {classes - 1}], got {known.min()} to {known.max()}.")
    return jnp.asarray(labels).astype(jnp.int32)


def known_class(labels: Int[Array, " batch"], classes: int) -> Bool[Array, " batch"]:
    """True where a label names one of the `classes`; losses turn the other rows into NaN.

    Indexing would take -1 for the last class, and a one-hot row for it would be all zeros: both hide
    the mistake.
    """
    return (labels >= 0) & (labels < classes)


def batch_temperature(temperature: ArrayLike, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
    """`temperature`, a scalar or one for each example, as one for each example.

    Raises:
      UserError: if its shape is neither [] nor [batch], or a value known here is not positive and finite.
    """
    batch = logits.shape[0]
    if jnp.shape(temperature) not in ((), (batch,)):
        raise UserError(
            f"temperature must be a scalar or have the shape [{batch}], got {list(jnp.shape(temperature))}."
        )
    check_positive("temperature", temperature)
    return jnp.broadcast_to(jnp.asarray(temperature, logits.dtype), (batch,))
