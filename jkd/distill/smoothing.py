"""Smoothed labels, and how far apart they pull the logits."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from jkd.checks import Scalar, Tensor, check_share
from jkd.distill.checks import integer_labels, known_class
from jkd.errors import UserError


def check_smoothing(smoothing: ArrayLike) -> None:
    """Stops a smoothing that is no scalar, or is known here and not in [0, 1].

    Raises:
      UserError: if so.
    """
    if jnp.shape(smoothing) != ():
        raise UserError(f"smoothing must be a scalar, got the shape {list(jnp.shape(smoothing))}.")
    check_share("smoothing", smoothing)


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, got {num_classes}.")


def smooth_labels(
    labels: Integer[Tensor, " batch"], num_classes: int, smoothing: Scalar
) -> Float[Array, "batch classes"]:
    """Labels as distributions that share a part of their mass evenly among all classes.

        t_b[k] = (1 - s) 1[k = y_b] + s / K

    The true class has its share of s too, so that it holds 1 - s + s / K. Sharing s among the K - 1 wrong
    classes only is another convention.

    Args:
      labels: in [0, num_classes). A traced label outside gives a row of NaN.
      num_classes: K >= 2; static.
      smoothing: s in [0, 1]; 0 gives one-hot rows.

    Raises:
      UserError: on a wrong shape, dtype or label, K < 2, or a smoothing known to be outside [0, 1].

    Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016.
    """
    _check_classes(num_classes)
    check_smoothing(smoothing)
    labels = integer_labels(labels, num_classes)
    smoothed = optax.losses.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)
    return jnp.where(known_class(labels, num_classes)[:, None], smoothed, jnp.nan)


def optimal_gap(num_classes: int, smoothing: Scalar) -> Float[Array, ""]:
    """By how much the true logit leads all others where the smoothed cross-entropy is least.

        g = log(1 + K (1 - s) / s)

    All wrong logits are then equal. Infinite for s = 0, and 0 for s = 1.

    Args:
      num_classes: K >= 2; static.
      smoothing: s in [0, 1].

    Raises:
      UserError: if K < 2, or the smoothing is known to be outside [0, 1].
    """
    _check_classes(num_classes)
    check_smoothing(smoothing)
    s = jnp.asarray(smoothing, float)
    return jnp.log1p(num_classes * (1 - s) / s)
