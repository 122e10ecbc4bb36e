"""What adversarial losses and their networks check at their doors."""

from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jkd.checks import as_float
from jkd.errors import UserError


def some_logits(name: str, logits: ArrayLike) -> Float[Array, "*shape"]:
    """`logits` as an array of at least float32 that is not empty.

    Raises:
      UserError: if they are not floating point, or there are none: a mean over nothing is NaN.
    """
    array = as_float(name, logits)
    if array.size == 0:
        raise UserError(f"{name} must not be empty, got the shape {list(array.shape)}.")
    return array


def logit_vector(name: str, logits: ArrayLike) -> Float[Array, " count"]:
    """`some_logits` with one logit for each example.

    Raises:
      UserError: as `some_logits`, or if the shape is not [count].
    """
    array = some_logits(name, logits)
    if array.ndim != 1:
        raise UserError(f"{name} must have the shape [count], one logit an image, got {list(array.shape)}.")
    return array


def some_batch(name: str, values: ArrayLike) -> Float[Array, " batch *example"]:
    """`values` as an array of at least float32 whose examples have a shape, not empty.

    Raises:
      UserError: if they are not floating point, have fewer than two axes, or there are none.
    """
    array = as_float(name, values)
    if array.ndim < 2 or array.size == 0:
        raise UserError(f"{name} must have the shape [batch, ...] and not be empty, got {list(array.shape)}.")
    return array


def check_same_shape(**arrays: Array) -> None:
    """Stops arrays of different shapes.

    Raises:
      UserError: if so; it names the arguments and their shapes.
    """
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = " and ".join(str(list(array.shape)) for array in arrays.values())
        raise UserError(f"{' and '.join(arrays)} must have the same shape, got {shapes}.")


def check_condition(condition: Array | None, condition_dim: int) -> None:
    """Stops a condition that is missing, not asked for, or of another width.

    Raises:
      UserError: if so.
    """
    if condition_dim == 0 and condition is not None:
        raise UserError("condition is given, but the model has condition_dim=0 and takes none.")
    if condition_dim and (condition is None or condition.ndim != 2 or condition.shape[1] != condition_dim):
        got = "none" if condition is None else list(condition.shape)
        raise UserError(f"condition must be [batch, {condition_dim}], got {got}.")
