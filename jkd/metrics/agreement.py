"""How alike two classifiers are: agreement, mutual information and divergence of what they predict.

Per-example values and tables of counts add up over batches and devices; divide once at the end. Means of
per-batch mutual information are another number: the estimate from N examples is too high by about
(K - 1)^2 / (2 N), so that batches and the whole set do not compare.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_softmax
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from jkd.checks import Tensor, as_float
from jkd.errors import UserError


def _logits(name: str, logits: Tensor) -> Float[Array, "batch classes"]:
    if jnp.ndim(logits) != 2 or jnp.shape(logits)[1] < 1:
        raise UserError(f"{name} must have the shape [batch, classes], got {list(jnp.shape(logits))}.")
    return as_float(name, logits)


def _pair(a: Tensor, b: Tensor) -> tuple[Array, Array]:
    first, second = _logits("a", a), _logits("b", b)
    if first.shape != second.shape:
        raise UserError(f"a and b must have the same shape, got {list(first.shape)} and {list(second.shape)}.")
    return first, second


def predicted_class(logits: Float[Tensor, "batch classes"]) -> Int[Array, " batch"]:
    """The class with the largest logit, the lower one of equals, and -1 in a row with a NaN.

    argmax alone would take the first NaN for the winner. `joint_histogram` counts a -1 nowhere, so that the
    total of its table falls short of the number of examples by the rows that are missing.

    Raises:
      UserError: if `logits` is no floating point matrix.
    """
    logits = _logits("logits", logits)
    return jnp.where(jnp.isnan(logits).any(axis=1), -1, logits.argmax(axis=1)).astype(jnp.int32)


def prediction_agreement(a: Float[Tensor, "batch classes"], b: Float[Tensor, "batch classes"]) -> Bool[Array, " batch"]:
    """True where two classifiers put the same class first; its mean is the fidelity of a student.

        agree_b = 1[argmax a_b = argmax b_b]

    Ties go to the lower class. A row with a NaN on either side agrees with nothing; `agreement_counts` says
    how many there are. Against an ensemble, the authors below compare with the mean of its logits.

    Args:
      a: any order-preserving scores.
      b: likewise, for the same examples.

    Raises:
      UserError: if the two are no floating point matrices of one shape.

    Reference: Guo et al., Why does Knowledge Distillation work? Rethink its attention and fidelity mechanism,
      Expert Systems with Applications 262, 2025.
    """
    first, second = (predicted_class(logits) for logits in _pair(a, b))
    return (first == second) & (first >= 0)


class AgreementCounts(NamedTuple):
    """How many examples two classifiers agree on, how many have a NaN on either side, how many there are."""

    agree: Int[Array, ""]
    nan: Int[Array, ""]
    total: Int[Array, ""]


def agreement_counts(
    a: Float[Tensor, "batch classes"],
    b: Float[Tensor, "batch classes"],
    mask: Bool[Tensor, " batch"] | None = None,
) -> AgreementCounts:
    """`prediction_agreement` as int32 counts: add them over batches; the share is agree / total.

    Args:
      a: any order-preserving scores.
      b: likewise, for the same examples.
      mask: False for padding; None counts every row.

    Raises:
      UserError: as `prediction_agreement`, or if the mask's shape is not [batch].
    """
    agree = prediction_agreement(a, b)
    counted = _mask(mask, agree.shape)
    nan = jnp.isnan(jnp.asarray(a)).any(axis=1) | jnp.isnan(jnp.asarray(b)).any(axis=1)
    return AgreementCounts((agree & counted).sum(), (nan & counted).sum(), counted.sum())


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> Bool[Array, " batch"]:
    if mask is None:
        return jnp.ones(shape, bool)
    if jnp.shape(mask) != shape:
        raise UserError(f"mask must have the shape {list(shape)}, got {list(jnp.shape(mask))}.")
    return jnp.asarray(mask, bool)


def _expect(log_p: Array, values: Array) -> Array:
    """Sum over the last axis of p v, where p = 0 contributes 0 to value and gradient even if v is infinite."""
    possible = log_p > -jnp.inf
    terms = jnp.exp(jnp.where(possible, log_p, 0)) * jnp.where(possible, values, 0)
    # A NaN is not > -inf either: it must not count as an impossible class.
    return jnp.where(possible, terms, jnp.where(jnp.isnan(log_p), jnp.nan, 0)).sum(axis=-1)


def predictive_entropy(logits: Float[Tensor, "batch classes"]) -> Float[Array, " batch"]:
    """The entropy of each prediction, in nats; float32 at least.

        H_b = -sum_k p_k log p_k,    p = softmax(z_b),    0 <= H_b <= ln K

    A logit of -inf is a class of probability 0; a NaN gives NaN.

    Raises:
      UserError: if `logits` is no floating point matrix.
    """
    log_p = log_softmax(_logits("logits", logits))
    return -_expect(log_p, log_p)


def predictive_kl(
    p_logits: Float[Tensor, "batch classes"], q_logits: Float[Tensor, "batch classes"]
) -> Float[Array, " batch"]:
    """The divergence of the second prediction from the first, in nats; float32 at least.

        KL_b = sum_k p_k (log p_k - log q_k),    p = softmax(z_p,b), q = softmax(z_q,b)

    Infinite where q excludes what p allows; a NaN gives NaN. Gradients pass through both. (The code of Guo et
    al., 2025, reports `10 * predictive_kl(second, first)`, averaged over batches of 128.)

    Raises:
      UserError: if the two are no floating point matrices of one shape.
    """
    log_p, log_q = (log_softmax(logits) for logits in _pair(p_logits, q_logits))
    return _expect(log_p, log_p - log_q)


def joint_histogram(
    pred_a: Integer[Tensor, " batch"],
    pred_b: Integer[Tensor, " batch"],
    num_classes: int,
    mask: Bool[Tensor, " batch"] | None = None,
) -> Int[Array, "classes classes"]:
    """How often one classifier predicts i where the other predicts j: int32 counts, add them over batches.

        n_ij = #{b: mask_b, a_b = i, b_b = j}

    With true labels on one side it is a confusion matrix. A pair with a value outside [0, num_classes) is
    counted nowhere: the total then falls short of the number of examples.

    Args:
      pred_a: classes, as from `predicted_class`.
      pred_b: likewise, for the same examples.
      num_classes: K, at most 46,340; static.
      mask: False for padding; None counts every row.

    Raises:
      UserError: if the shapes differ, or `num_classes` is not in [1, 46340].
    """
    if not 1 <= num_classes <= 46340:
        raise UserError(f"num_classes must lie in [1, 46340], got {num_classes}.")
    if jnp.ndim(pred_a) != 1 or jnp.shape(pred_a) != jnp.shape(pred_b):
        raise UserError(
            "pred_a and pred_b must share one shape [batch], "
            f"got {list(jnp.shape(pred_a))} and {list(jnp.shape(pred_b))}."
        )
    first, second = (jnp.asarray(pred).astype(jnp.int32) for pred in (pred_a, pred_b))
    counted = _mask(mask, first.shape)
    for pred in (first, second):
        counted &= (pred >= 0) & (pred < num_classes)
    cell = jnp.where(counted, first * num_classes + second, 0)
    counts = jax.ops.segment_sum(counted.astype(jnp.int32), cell, num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _shares(counts: Tensor) -> Float[Array, "..."]:
    array = jnp.asarray(counts)
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array / array.sum()


def entropy(counts: Num[Tensor, "*shape"]) -> Float[Array, ""]:
    """The entropy of a table of counts or weights, in nats, with 0 log 0 = 0; NaN for an empty table.

        H = -sum_i p_i log p_i,    p = n / sum n

    Args:
      counts: n >= 0, of any shape.
    """
    p = _shares(counts).ravel()
    return -jnp.where(p == 0, 0, p * jnp.log(jnp.where(p == 0, 1, p))).sum()


def _table(joint: Tensor) -> Float[Array, "rows columns"]:
    if jnp.ndim(joint) != 2:
        raise UserError(f"joint must have the shape [rows, columns], got {list(jnp.shape(joint))}.")
    return _shares(joint)


def mutual_information(joint: Num[Tensor, "rows columns"]) -> Float[Array, ""]:
    """The mutual information of two predictions from their joint counts, in nats: the plug-in estimate.

        I = sum_ij p_ij log(p_ij / (p_i. p_.j)),    0 <= I <= min(H(A), H(B))

    0 log 0 = 0; NaN for an empty table.

    Args:
      joint: counts n_ij >= 0 of the whole set, as from `joint_histogram`.

    Raises:
      UserError: if `joint` is no matrix.
    """
    p = _table(joint)
    log = jnp.log(jnp.where(p == 0, 1, p))
    rows, columns = (jnp.log(jnp.where(p == 0, 1, p.sum(axis, keepdims=True))) for axis in (1, 0))
    # Rounding may leave a tiny negative sum where the two are independent.
    return jnp.maximum(jnp.where(p == 0, 0, p * (log - rows - columns)).sum(), 0)


def normalized_mutual_information(joint: Num[Tensor, "rows columns"]) -> Float[Array, ""]:
    """Mutual information as a share of the mean of both entropies, in [0, 1].

        NMI = 2 I(A, B) / (H(A) + H(B))

    1 where both always predict one class; NaN for an empty table.

    Args:
      joint: counts n_ij >= 0 of the whole set, as from `joint_histogram`.

    Raises:
      UserError: if `joint` is no matrix.
    """
    p = _table(joint)
    both = entropy(p.sum(axis=1)) + entropy(p.sum(axis=0))
    return jnp.where(both == 0, 1, 2 * mutual_information(p) / jnp.where(both == 0, 1, both))
