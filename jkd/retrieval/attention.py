"""Pooling by several attention heads, and how much the heads overlap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jkd.checks import Scalar, Tensor, as_float, check_positive, concrete
from jkd.errors import UserError, unknown
from jkd.nn import mixed
from jkd.reduction import reduce

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "tanh": jnp.tanh}
FULL = jax.lax.Precision.HIGHEST


class Pooled(NamedTuple):
    """What several heads make of one set of vectors: each head's mean, and its weights, which sum to 1."""

    pooled: Float[Array, "*batch heads dim"]
    attention: Float[Array, "*batch heads positions"]


def multi_head_pool(
    feats: Float[Tensor, "*batch positions dim"],
    w1: Float[Tensor, "hidden dim"],
    w2: Float[Tensor, "heads hidden"],
    mask: Bool[Tensor, "*batch positions"] | None = None,
    act: str = "relu",
    *,
    scored: Float[Tensor, "*batch positions dim"] | None = None,
) -> Pooled:
    """Several weighted means of the vectors at the positions of a map, or of the words of a text.

        A = softmax over positions of W2 act(W1 X^T),    pooled_r = sum_p A_rp X_p

    Without biases. Masked positions have weight 0, and nothing in them, not even NaN, reaches a value or a gradient.
    The products are in the dtype of `feats`, the softmax is in float32 at least, and the gradients of the weights have
    their own dtype. An example without any position has weights and means of 0 where that is not known here.

    Args:
      feats: X.
      w1: W1, of the scorer.
      w2: W2, one row a head.
      mask: False where there is nothing (padded words); None: everything counts.
      act: "relu" (the authors' images) or "tanh" (their texts); static.
      scored: what the scorer sees in place of X, such as X with dropout.

    Raises:
      UserError: if shapes or dtypes do not fit, the activation does not exist, or an example is known to be all masked.

    Reference: Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020.
    """
    _check_shapes(feats, w1, w2, mask, scored)
    if act not in ACTIVATIONS:
        raise unknown("act", act, ACTIVATIONS)
    x = jnp.asarray(feats)
    seen = x if scored is None else jnp.asarray(scored)
    if mask is not None:
        mask = jnp.asarray(mask)
        x, seen = (jnp.where(mask[..., None], one, 0) for one in (x, seen))
    hidden = ACTIVATIONS[act](_product(seen, w1))
    scores = _product(hidden, w2).swapaxes(-1, -2)
    attention = masked_softmax(scores, mask)
    pooled = jnp.einsum(
        "...rp,...pd->...rd",
        attention.astype(x.dtype),
        x,
        preferred_element_type=attention.dtype,
        precision=FULL if x.dtype == attention.dtype else None,
    )
    return Pooled(pooled.astype(x.dtype), attention)


def masked_softmax(
    scores: Float[Tensor, "*batch heads positions"], mask: Bool[Tensor, "*batch positions"] | None
) -> Float[Array, "*batch heads positions"]:
    """The softmax over the positions that `mask` leaves, in float32 at least; zeros where it leaves none.

    Raises:
      UserError: if the scores are not floating point.
    """
    scores = as_float("scores", scores)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    kept = jnp.broadcast_to(jnp.asarray(mask)[..., None, :], scores.shape)
    some = kept.any(-1, keepdims=True)
    # Where nothing is left, a softmax of anything finite, so that no NaN reaches the gradient either.
    usable = kept | ~some
    weights = jax.nn.softmax(jnp.where(usable, jnp.where(kept, scores, 0), -jnp.inf), axis=-1)
    return jnp.where(kept, weights, 0)


def attention_diversity(
    attn: Float[Tensor, "batch heads positions"], *, eps: Scalar = 1e-10, reduction: str = "mean"
) -> Float[Array, "*reduced"]:
    """How far the heads of each example are from looking at one position each, and at different ones.

        L_b = sqrt(||A_b A_b^T - I||_F^2 + eps)

    The root, not its square; >= sqrt(eps), and that only where every head has all its weight on a position of its own:
    heads with uniform weights are not free, and neither is a single head. In float32 at least, with a finite gradient
    everywhere.

    Args:
      attn: A, weights that sum to 1 over positions.
      eps: > 0; the gradient is at most that of 1 / sqrt(eps).
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: if `attn` is no floating point array [batch, heads, positions], or for another reduction.

    Reference: Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020; after
      Lin et al., A Structured Self-attentive Sentence Embedding, ICLR 2017, whose penalty is the square.
    """
    check_positive("eps", eps)
    between = _products(attn)
    apart = between - jnp.eye(between.shape[-1], dtype=between.dtype)[None]
    return reduce(jnp.sqrt(jnp.square(apart).sum((1, 2)) + eps), reduction)


def head_overlap(attn: Float[Tensor, "batch heads positions"], *, reduction: str = "mean") -> Float[Array, "*reduced"]:
    """The mean over pairs of different heads of the products of their weights, in [0, 1]; a measure, not a loss.

        O_b = mean over r != q of sum_p A_rp A_qp

    0 where no two heads look at the same position, 1 where all look at one; of uniform heads, 1 / positions.

    Args:
      attn: A, weights that sum to 1 over positions.
      reduction: "mean", "sum" or "none" (over the batch).

    Raises:
      UserError: if `attn` is no floating point array [batch, heads, positions] with at least 2 heads, or for another
        reduction.
    """
    between = _products(attn)
    heads = between.shape[-1]
    if heads < 2:
        raise UserError(f"attn must have at least 2 heads to overlap, got the shape {list(jnp.shape(attn))}.")
    total = between.sum((1, 2)) - jnp.trace(between, axis1=1, axis2=2)
    return reduce(total / (heads * (heads - 1)), reduction)


def _products(attn: Tensor) -> Float[Array, "batch heads heads"]:
    """A A^T of every example."""
    weights = as_float("attn", attn)
    if weights.ndim != 3:
        raise UserError(f"attn must have the shape [batch, heads, positions], got {list(weights.shape)}.")
    return jnp.einsum("brp,bqp->brq", weights, weights, precision=FULL)


def _product(x: Array, kernel: Tensor) -> Array:
    """X @ kernel^T in the dtype of x, with a gradient in that of the kernel."""
    return mixed.dot_general(x, jnp.asarray(kernel), (((x.ndim - 1,), (1,)), ((), ())))


def _check_shapes(feats: Tensor, w1: Tensor, w2: Tensor, mask: Tensor | None, scored: Tensor | None) -> None:
    for name, array in (("feats", feats), ("w1", w1), ("w2", w2)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise UserError(f"{name} must be floating point, got {jnp.result_type(array)}.")
    shapes = {name: jnp.shape(x) for name, x in (("feats", feats), ("w1", w1), ("w2", w2))}
    fits = len(shapes["feats"]) >= 2 and len(shapes["w1"]) == len(shapes["w2"]) == 2
    if not fits or shapes["feats"][-1] != shapes["w1"][1] or shapes["w1"][0] != shapes["w2"][1]:
        raise UserError(
            "feats, w1 and w2 must have the shapes [.., positions, dim], [hidden, dim] and [heads, hidden], got "
            f"{', '.join(str(list(shape)) for shape in shapes.values())}."
        )
    if not shapes["feats"][-2]:
        raise UserError(f"feats must have at least one position, got the shape {list(shapes['feats'])}.")
    if scored is not None and jnp.shape(scored) != shapes["feats"]:
        raise UserError(f"scored must have the shape of feats, got {list(jnp.shape(scored))}.")
    if mask is None:
        return
    if jnp.shape(mask) != shapes["feats"][:-1] or jnp.result_type(mask) != jnp.bool_:
        raise UserError(
            f"mask must be boolean {list(shapes['feats'][:-1])}, got {jnp.result_type(mask)} {list(jnp.shape(mask))}."
        )
    check_some(mask)


def check_some(mask: Tensor) -> None:
    """Stops a mask [.., positions] with an example that is known to have no position.

    Raises:
      UserError: if so; it names the first one.
    """
    known = concrete(mask)
    if known is not None and not known.any(-1).all():
        first = int(known.reshape(-1, known.shape[-1]).any(-1).argmin())
        raise UserError(f"mask leaves nothing of example {first}: a text needs at least one word.")
