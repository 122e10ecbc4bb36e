"""Masks over the weights of a network: which of them are trained, and which are 0 and stay so.

Masks are a tree like the parameters: a bool array of the leaf's shape for every prunable leaf (True: kept), a scalar
True for every other. They are arrays like any other: constants of a stage, sharded like the weights that they belong
to. Functions that take parameters and masks work on one network: for an ensemble, `jax.vmap` them.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jkd.checks import Scalar, concrete
from jkd.errors import UserError
from jkd.prune.magnitude import Prunable, _prunable, is_kernel, keep_largest
from jkd.trees import path_name


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as block1/conv/kernel, in the order of the tree."""
    return {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def _masked(mask: Any) -> bool:
    return np.ndim(mask) > 0


def _check_masks(params: Any, masks: Any) -> None:
    """Raises UserError unless the masks are those of such parameters."""
    weights, marks = _named(params), _named(masks)
    differ = sorted(weights.keys() ^ marks.keys())
    differ += [
        f"{name} (mask {np.shape(marks[name])}, weights {np.shape(weights[name])})"
        for name in weights.keys() & marks.keys()
        if np.shape(marks[name]) not in ((), np.shape(weights[name]))
    ]
    if differ:
        raise UserError(f"The masks do not fit the parameters: {', '.join(differ[:10])}.")
    if not any(map(_masked, marks.values())):
        raise UserError("The masks hold no prunable leaf: all of them are scalars.")


def _pairs(params: Any, masks: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, weights, mask) of every prunable leaf."""
    marks = _named(masks)
    return ((name, leaf, marks[name]) for name, leaf in _named(params).items() if _masked(marks[name]))


def _split_pairs(params: Any, masks: Any) -> tuple[list[str], list[tuple[Any, Any]]]:
    found = list(_pairs(params, masks))
    return [name for name, *_ in found], [(leaf, mask) for _, leaf, mask in found]


def _with(masks: Any, leaves: Mapping[str, Any]) -> Any:
    """`masks` with other prunable leaves."""
    return jax.tree.unflatten(
        jax.tree.structure(masks), [leaves.get(name, mask) for name, mask in _named(masks).items()]
    )


def _count(keep: float, size: int, of: str) -> int:
    if not 0 < keep <= 1:
        raise UserError(f"keep must lie in (0, 1], got {keep}.")
    n = math.floor(round(keep * size, 6))  # 0.29 * 100 is 28.999999999999996 and means 29
    if n == 0:
        raise UserError(f"keep={keep} leaves none of the {size} weights of {of}; keep must be at least {1 / size:.3g}.")
    return n


# What is checked is reduced where it lies: weights on many devices are not brought together.


def _over_leaves(fn: Callable[..., Array]) -> Callable[[Sequence[tuple[Any, ...]]], list[Array]]:
    """`fn` of each leaf as one program: each operation by itself would be compiled for each shape."""
    return jax.jit(lambda leaves: [fn(*leaf) for leaf in leaves])


_counts = _over_leaves(lambda mask: jnp.sum(mask, dtype=jnp.uint32))
_hold_nan = _over_leaves(lambda leaf, mask: (jnp.isnan(leaf) & mask).any())
_emptied = _over_leaves(lambda old, new: jnp.any(old) & ~jnp.any(new))
_magnitudes = _over_leaves(lambda leaf, mask: jnp.where(mask, jnp.abs(leaf), -1))


@functools.partial(jax.jit, static_argnums=2)
def _largest(scores: Sequence[Array], masks: Sequence[Any], n: int) -> list[Array]:
    """Masks of the `n` largest scores of all leaves, but what `masks` prune."""
    flat = jnp.concatenate([jnp.ravel(x) for x in scores])
    kept = jnp.split(keep_largest(flat, n), np.cumsum([x.size for x in scores])[:-1])
    return [part.reshape(x.shape) & mask for part, x, mask in zip(kept, scores, masks, strict=True)]


def _check_alive(n: int, masks: Sequence[Any], of: str) -> None:
    counts = [concrete(count) for count in _counts([(mask,) for mask in masks])]
    alive = sum(int(count) for count in counts if count is not None)
    if all(count is not None for count in counts) and n > alive:
        raise UserError(f"{n} weights of {of} are to be kept, but only {alive} are left: what is pruned stays pruned.")


def _check_numbers(params: Any, masks: Any) -> None:
    names, pairs = _split_pairs(params, masks)
    bad = [name for name, flag in zip(names, _hold_nan(pairs), strict=True) if concrete(flag)]
    if bad:
        raise UserError(f"NaN among the weights of {', '.join(bad)}: they have no rank by magnitude.")


def _warn_of_empty(before: Any, after: Any) -> None:
    names, pairs = _split_pairs(before, after)
    for name, flag in zip(names, _emptied(pairs), strict=True):
        if concrete(flag):
            warnings.warn(f"All weights of {name} are pruned: nothing passes through it.", stacklevel=3)


def _keep_best(scores: Mapping[str, Any], masks: Any, keep: float) -> Any:
    """Keeps floor(keep size) of the largest scores over all leaves of one tree; scores of the pruned must be < 0."""
    n = _count(keep, sum(x.size for x in scores.values()), "all prunable leaves")
    marks = _named(masks)
    before = [marks[name] for name in scores]
    _check_alive(n, before, "all prunable leaves")
    return _with(masks, dict(zip(scores, _largest(list(scores.values()), before, n), strict=True)))


def _magnitudes_of(params: Any, masks: Any) -> dict[str, Array]:
    names, pairs = _split_pairs(params, masks)
    return dict(zip(names, _magnitudes(pairs), strict=True))


def ones_masks(params: Any, is_prunable: Prunable = is_kernel) -> Any:
    """The masks of a dense network: nothing is pruned yet.

    Args:
      params: a tree of arrays.
      is_prunable: (path, leaf) -> bool, where a path is like `block1/conv/kernel`.

    Raises:
      UserError: if no leaf is prunable, or a scalar is.
    """
    chosen = _prunable(params, is_prunable)
    scalars = [name for name, mask in _named(chosen).items() if mask and np.ndim(_named(params)[name]) == 0]
    if scalars:
        raise UserError(f"Scalars cannot be pruned, but is_prunable takes {', '.join(scalars)}.")

    def ones(leaf: Any, prunable: bool) -> Array:
        # Of numpy: jnp.ones would compile a program for each shape.
        return jnp.asarray(np.broadcast_to(np.True_, np.shape(leaf) if prunable else ()))

    return jax.tree.map(ones, params, chosen)


def global_magnitude_mask(params: Any, masks: Any, keep: float) -> Any:
    """Keeps the floor(keep N) weights of largest magnitude among all N prunable ones of a network.

    `keep` is a share of all prunable weights, not of those that are left. What `masks` prune stays pruned, whatever its
    weights are; of equal magnitudes those with the lower index (leaves in the order of the tree) are kept.

    Args:
      params: the trained weights.
      masks: of the round before, or `ones_masks`.
      keep: in (0, 1]; static.

    Returns:
      The new masks. Under jit nothing is known of values: a NaN then counts as largest, and where fewer weights are
      left than are to be kept, these are kept.

    Raises:
      UserError: if `keep` leaves no weight, if more weights are to be kept than are left, if one of them is NaN.

    Warns:
      UserWarning: if a leaf loses its last weight.

    Reference: Girish et al., The Lottery Ticket Hypothesis for Object Recognition, CVPR 2021.
    """
    _check_masks(params, masks)
    _check_numbers(params, masks)
    found = _keep_best(_magnitudes_of(params, masks), masks, keep)
    _warn_of_empty(masks, found)
    return found


def layerwise_magnitude_mask(params: Any, masks: Any, keep: float) -> Any:
    """Keeps the floor(keep size) weights of largest magnitude of every prunable leaf by itself.

    Arguments, results and errors are those of `global_magnitude_mask`; no leaf is ever emptied.
    """
    _check_masks(params, masks)
    _check_numbers(params, masks)
    found, marks = {}, _named(masks)
    for name, scores in _magnitudes_of(params, masks).items():
        n = _count(keep, scores.size, name)
        _check_alive(n, [marks[name]], name)
        (found[name],) = _largest([scores], [marks[name]], n)
    return _with(masks, found)


def threshold_mask(params: Any, tau: Scalar, masks: Any) -> Any:
    """Keeps what `masks` keep and has a magnitude of at least `tau`; nothing crosses devices."""
    _check_masks(params, masks)
    return _with(masks, {name: mask & (jnp.abs(leaf) >= tau) for name, leaf, mask in _pairs(params, masks)})


def magnitude_threshold(params: Any, masks: Any, keep: float) -> Float[Array, ""]:
    """The floor(keep N)-th largest magnitude among all N prunable weights, for `threshold_mask`.

    For trees that are too large to sort, or lie on many devices: the number is found bit by bit, by 31 counts (63 for
    float64) over weights that stay where they are. It is exact; with ties at the threshold, `threshold_mask` keeps all
    of them. 0 where fewer weights are left than are to be kept.

    Args:
      params: the trained weights; leaves of up to 2^32 weights.
      masks: pruned weights do not count as large, but are among the N.
      keep: in (0, 1]; static.

    Raises:
      UserError: as `global_magnitude_mask`, except that NaN is not looked for: it counts as largest.
    """
    _check_masks(params, masks)
    pairs = list(_pairs(params, masks))
    n = _count(keep, sum(leaf.size for _, leaf, _ in pairs), "all prunable leaves")
    _check_alive(n, [mask for *_, mask in pairs], "all prunable leaves")
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for _, leaf, _ in pairs))
    kind = jnp.uint64 if dtype.itemsize == 8 else jnp.uint32
    # The bits of positive floats are ordered as the floats are.
    bits = [(jax.lax.bitcast_convert_type(jnp.abs(leaf).astype(dtype), kind), mask) for _, leaf, mask in pairs]

    def enough(least: Array) -> Array:
        counts = jnp.stack([((x >= least) & mask).sum(dtype=jnp.uint32) for x, mask in bits])
        # In words of 16 bits: a large network holds more weights than 32 bits can count.
        low = (counts & 0xFFFF).sum(dtype=jnp.uint32)
        high = (counts >> 16).sum(dtype=jnp.uint32) + (low >> 16)
        return (high > n >> 16) | ((high == n >> 16) & (low & 0xFFFF >= n & 0xFFFF))

    def one_bit(i: Array, found: Array) -> Array:
        more = found | (kind(1) << (dtype.itemsize * 8 - 2 - i).astype(kind))
        return jnp.where(enough(more), more, found)

    found = jax.lax.fori_loop(0, dtype.itemsize * 8 - 1, one_bit, kind(0))
    return jax.lax.bitcast_convert_type(found, dtype)


def random_masks(key: jax.Array, masks: Any, keep: float) -> Any:
    """Keeps floor(keep N) of the N prunable weights at random, among those that `masks` keep: a control.

    Raises:
      UserError: if `keep` leaves no weight, or more weights are to be kept than are left.
    """
    _check_masks(masks, masks)
    pairs = list(_pairs(masks, masks))
    keys = jax.random.split(key, len(pairs))
    scores = {
        name: jnp.where(mask, jax.random.uniform(k, mask.shape), -1)
        for k, (name, _, mask) in zip(keys, pairs, strict=True)
    }
    return _keep_best(scores, masks, keep)


def shuffled_masks(key: jax.Array, masks: Any) -> Any:
    """Puts the kept weights of every leaf elsewhere in this leaf, at random: a control with the same share a layer."""
    _check_masks(masks, masks)
    pairs = list(_pairs(masks, masks))
    keys = jax.random.split(key, len(pairs))
    return _with(
        masks,
        {
            name: jax.random.permutation(k, jnp.ravel(mask)).reshape(mask.shape)
            for k, (name, _, mask) in zip(keys, pairs, strict=True)
        },
    )


def keep_schedule(final_keep: float, rounds: int) -> tuple[float, ...]:
    """The kept share after each pruning of `rounds` rounds, the first of which is dense.

        k_r = final_keep^(r / (rounds - 1)), r = 1 .. rounds - 1: each keeps the same share of what was left

    Raises:
      UserError: if `final_keep` is outside (0, 1], or there are fewer than two rounds.
    """
    if not 0 < final_keep <= 1:
        raise UserError(f"final_keep must lie in (0, 1], got {final_keep}.")
    if rounds < 2:
        raise UserError(f"rounds counts the dense round too and must be >= 2, got {rounds}.")
    return tuple(float(final_keep ** (r / (rounds - 1))) for r in range(1, rounds))


def apply_masks(params: Any, masks: Any) -> Any:
    """`params` with pruned weights exactly 0, whatever they were; their gradients are 0 too."""
    _check_masks(params, masks)
    return _select(masks, params)


def _select(masks: Any, tree: Any) -> Any:
    return jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0) if _masked(mask) else leaf, masks, tree)


def apply(masks: Any) -> Callable[[Any], Any]:
    """`apply_masks` as a transform of parameters, for `jkd.train.chain`."""
    return lambda params: apply_masks(params, masks)


def masked_update(tx: optax.GradientTransformation, masks: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that leaves pruned weights where they are: at 0, if they begin there (`apply_masks`).

    Only updates are masked, after all that `tx` does, so neither momentum nor weight decay of any kind moves a pruned
    weight. The state is that of `tx` alone, which makes states of dense and pruned training interchangeable. `tx` sees
    the gradients of pruned weights: a clip by the global norm counts them.

    Args:
      tx: any optax transformation.
      masks: of the parameters; may be traced, such as constants of a stage.
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params, **extra)
        return _select(masks, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


class SparsityReport(NamedTuple):
    """How much is pruned; float32 scalars in [0, 1].

    Attributes:
      per_layer: the pruned share of every prunable leaf by path; 1 where nothing is left.
      prunable: the pruned share of all prunable weights.
      total: the pruned weights as a share of all parameters, biases and normalization included.
    """

    per_layer: dict[str, Any]
    prunable: Any
    total: Any


def sparsity_report(params: Any, masks: Any) -> SparsityReport:
    """The pruned share of every layer, of what is prunable, and of the whole network: never compare one with another.

    Args:
      params: a tree of arrays (or shapes: only sizes are read).
      masks: of these parameters.
    """
    _check_masks(params, masks)
    pruned = {name: (~mask).mean(dtype=jnp.float32) for name, _, mask in _pairs(params, masks)}
    sizes = {name: math.prod(leaf.shape) for name, leaf in _named(params).items()}

    def share(size: int) -> Array:
        # Shares, not counts: a large network holds more weights than an int32.
        return sum((x * (sizes[name] / size) for name, x in pruned.items()), jnp.zeros(()))

    return SparsityReport(pruned, share(sum(sizes[name] for name in pruned)), share(sum(sizes.values())))


def transfer_masks(source_masks: Any, params: Any, *, exclude: Sequence[str] = ()) -> Any:
    """The masks of another network's ticket on the modules that both have.

    Args:
      source_masks: the ticket's.
      params: of the network to prune; only names and shapes are read.
      exclude: regexes; leaves in whose path one is found stay dense (a scalar True) and may be missing or of other
        shape in the source, such as a classifier's head.

    Raises:
      UserError: that lists the paths that only one of the two has, or that differ in shape; or for a regex that is
        found in no path.
    """
    marks, weights = _named(source_masks), _named(params)
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in [*marks, *weights]):
            raise UserError(f"exclude={pattern!r} is found in no path, such as {', '.join(list(weights)[:5])}.")

    def shared(names: Mapping[str, Any]) -> list[str]:
        return [name for name in names if not any(re.search(pattern, name) for pattern in exclude)]

    wrong = [f"{name} (not in the source)" for name in shared(weights) if name not in marks]
    wrong += [f"{name} (only in the source)" for name in shared(marks) if name not in weights and _masked(marks[name])]
    wrong += [
        f"{name} (mask {np.shape(marks[name])}, weights {np.shape(weights[name])})"
        for name in shared(weights)
        if name in marks and np.shape(marks[name]) not in ((), np.shape(weights[name]))
    ]
    if wrong:
        raise UserError(f"Masks do not transfer: {', '.join(wrong)}. Name what is not shared in exclude.")
    taken = {name: jnp.asarray(marks[name], bool) for name in shared(weights)}
    return jax.tree.unflatten(jax.tree.structure(params), [taken.get(name, jnp.ones((), bool)) for name in weights])
