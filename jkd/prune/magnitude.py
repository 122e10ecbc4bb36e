"""Pruning by magnitude: the smallest weights of every kernel become 0."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

from jkd.checks import Tensor, check_share, concrete
from jkd.errors import UserError
from jkd.trees import path_name

Prunable = Callable[[str, Any], bool]  # (the path of a leaf, such as block1/conv/kernel, and the leaf)


def is_kernel(name: str, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a dense or convolutional layer: the last part of its path is `kernel`."""
    return name.split("/")[-1] == "kernel"


def keep_largest(scores: Num[Tensor, "*shape"], n: int | Integer[Tensor, ""]) -> Bool[Array, "*shape"]:
    """True at the `n` largest scores of the whole array, exactly.

    Of equal scores those with the lower index (in row-major order) are kept first, as in `jax.lax.top_k`. A NaN
    counts as largest: it is kept, so that it shows in what is pruned. O(size log size).

    Args:
      scores: of any shape.
      n: how many, in 0..size; may be traced.

    Raises:
      UserError: if `n` is known to be outside 0..size.
    """
    scores = jnp.asarray(scores)
    known = concrete(n)
    if known is not None and not 0 <= known <= scores.size:
        raise UserError(f"n must lie in 0..{scores.size} (the number of scores), got {n}.")
    order = jnp.argsort(scores.ravel(), stable=True, descending=True)
    kept = jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < n)
    return kept.reshape(scores.shape)


def magnitude_prune_mask(kernel: Float[Tensor, "*shape"], rate: float) -> Bool[Array, "*shape"]:
    """False at the weights of smallest magnitude, True at those that stay.

        round(rate size) are pruned, a half going to the even number; ties as in `keep_largest`

    Args:
      kernel: the weights of one layer.
      rate: the share to prune, in [0, 1]; static.

    Raises:
      UserError: if `rate` is outside [0, 1].
    """
    check_share("rate", rate)
    size = int(np.prod(jnp.shape(kernel)))
    # 0.145 * 100 is 14.499999999999998 in floating point and means 14.5.
    return keep_largest(jnp.abs(jnp.asarray(kernel)), size - round(round(rate * size, 6)))


def _prunable(params: Any, is_prunable: Prunable) -> Any:
    """A tree of True for the leaves that `is_prunable` takes."""
    chosen = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(is_prunable(path_name(path), leaf)), params)
    if not any(jax.tree.leaves(chosen)):
        names = [path_name(p) for p, _ in jax.tree.leaves_with_path(params)]
        raise UserError(
            f"Nothing in params is prunable: is_prunable must take at least one of {names[:5]} (by default those "
            "named kernel)."
        )
    return chosen


def prune_params(params: Any, rate: float, *, is_prunable: Prunable = is_kernel) -> Any:
    """`params` with the smallest weights of every prunable leaf set to 0, each leaf by itself.

    One shot, unstructured, nothing is trained again. Biases and the parameters of normalization stay as they are. For
    an ensemble whose leaves have a leading member axis, `jax.vmap` this function, else members share one ranking.

    Args:
      params: a tree of arrays; a whole tree of variables will do.
      rate: the share of each leaf to prune, in [0, 1]; static. 0 changes nothing, 1 leaves no weight.
      is_prunable: (path, leaf) -> bool, where a path is like `block1/conv/kernel`.

    Raises:
      UserError: if `rate` is outside [0, 1], or no leaf is prunable.

    Reference: Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning,
      IEEE TKDE 2024, with rate 0.1.
    """
    check_share("rate", rate)

    def prune(leaf: Tensor, prunable: bool) -> Tensor:
        return jnp.where(magnitude_prune_mask(leaf, rate), leaf, 0) if prunable else leaf

    return jax.tree.map(prune, params, _prunable(params, is_prunable))


def sparsity(params: Any, *, is_prunable: Prunable = is_kernel) -> Float[Array, ""]:
    """The share of zeros among all prunable weights, in [0, 1]; float32.

    Args:
      params: a tree of arrays.
      is_prunable: as in `prune_params`; other leaves do not count.

    Raises:
      UserError: if no leaf is prunable.
    """
    chosen = jax.tree.leaves(_prunable(params, is_prunable))
    leaves = [jnp.asarray(leaf) for leaf, prunable in zip(jax.tree.leaves(params), chosen, strict=True) if prunable]
    total = sum(leaf.size for leaf in leaves)
    # Shares, not counts: a large network holds more weights than an int32.
    shares = [(leaf == 0).mean(dtype=jnp.float32) * (leaf.size / total) for leaf in leaves]
    return sum(shares, jnp.zeros(()))
