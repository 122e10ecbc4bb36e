"""The two hypotheses of knowledge evolution: weights that a generation inherits (fit), and weights drawn anew (reset).

The fit hypothesis is whole channels (KELS), which are a narrower network that can be cut out, or weights at random
(WELS).

Taha, Shrivastava and Davis, "Knowledge evolution in neural networks", CVPR 2021.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jkd.channels import Channels, narrowed
from jkd.errors import UserError, unknown
from jkd.prune.magnitude import is_kernel
from jkd.trees import path_name

MODES = ("kels", "wels")


def slim_indices(width_blocks: Sequence[int], split_rate: float) -> Int[np.ndarray, " kept"]:
    """The channels of a concatenation that a network of `split_rate` of the widths has: the leading ones of each part.

        ceil(split_rate * c) of every c in `width_blocks`; for (4, 6) at 0.5: 0, 1, 4, 5, 6

    Args:
      width_blocks: channels of each part, all positive; one part where nothing is concatenated.
      split_rate: in (0, 1].

    Raises:
      UserError: where an argument is not as above.
    """
    if not 0 < split_rate <= 1:
        raise UserError(f"split_rate must lie in (0, 1], got {split_rate}.")
    if not width_blocks or min(width_blocks) < 1:
        raise UserError(f"width_blocks must be positive numbers of channels, got {tuple(width_blocks)}.")
    starts = np.cumsum((0, *width_blocks[:-1]))
    return np.concatenate(
        [start + np.arange(narrowed(width, split_rate)) for start, width in zip(starts, width_blocks, strict=True)]
    )


def kels_mask(
    shape: Sequence[int],
    split_rate: float,
    *,
    keep_in: bool = False,
    keep_out: bool = False,
    in_blocks: Sequence[int] | None = None,
) -> Bool[np.ndarray, "..."]:
    """True at the weights of a kernel between channels that both belong to the fit hypothesis.

        M[..., i, o] = (i < ceil(split_rate * inputs)) and (o < ceil(split_rate * outputs))

    Of one kernel whose place in the network is told by hand; `build_masks` finds the places. Not for grouped
    convolutions.

    Args:
      shape: [*window, inputs, outputs].
      split_rate: the share of channels, in (0, 1).
      keep_in: whether all inputs belong: in the first layer, whose inputs are those of the images.
      keep_out: whether all outputs belong: in the last layer, whose outputs are the classes.
      in_blocks: how many of the inputs come from each part of a concatenation: the leading ones of each part belong.

    Raises:
      UserError: if `split_rate` is outside (0, 1), `in_blocks` do not sum to the inputs, or the shape has less than
        two axes.
    """
    _check_split_rate(split_rate)
    if len(shape) < 2:
        raise UserError(f"A kernel is [*window, inputs, outputs], got the shape {tuple(shape)}.")
    inputs, outputs = shape[-2:]
    if in_blocks is not None and sum(in_blocks) != inputs:
        raise UserError(f"in_blocks must sum to the {inputs} inputs of the kernel, got {tuple(in_blocks)}.")
    rows = np.arange(inputs) if keep_in else slim_indices(in_blocks or (inputs,), split_rate)
    columns = np.arange(outputs) if keep_out else slim_indices((outputs,), split_rate)
    return np.array(_mask_of(tuple(shape), Channels(rows, columns), np))


def wels_mask(key: Key[Array, ""], shape: Sequence[int], split_rate: float) -> Bool[Array, "..."]:
    """True at every weight with the probability `split_rate`, independently.

        M = (u >= 1 - split_rate), u ~ U(0, 1)

    Args:
      key: a typed key, which determines the mask.
      shape: of the kernel.
      split_rate: in (0, 1).

    Raises:
      UserError: if `split_rate` is outside (0, 1).
    """
    _check_split_rate(split_rate)
    return jax.random.uniform(key, tuple(shape)) >= 1 - split_rate


def build_masks(
    params: Any,
    split_rate: float | None = None,
    mode: str = "kels",
    *,
    channels: Mapping[str, Channels] | None = None,
    key: Key[Array, ""] | None = None,
) -> Any:
    """The fit hypothesis of a network: a tree like `params`, True where a generation inherits from the one before.

    Kernels are split. With "kels" the bias of a convolution goes with its output channel. Everything else is inherited:
    normalizations, biases of dense layers, and with "wels" all biases. Under `jax.jit` they are computed, not
    constants of the program, and sharded like any other output.

    Args:
      params: of the network; only paths and shapes count.
      split_rate: for "wels", the share of weights, in (0, 1). "kels" has it in `channels`, and only checks it.
      mode: "kels" (whole channels) or "wels" (single weights).
      channels: for "kels": `jkd.nn.shared_channels(model, narrower, image_shape)`.
      key: for "wels": determines the masks.

    Raises:
      UserError: for an unknown mode, without what it needs, or where `channels` do not fit `params`.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if split_rate is not None:
        _check_split_rate(split_rate)
    # One program for all masks, not some for each shape.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), bool), params)
    if mode == "wels":
        if key is None or split_rate is None:
            raise UserError("build_masks needs key and split_rate for the mode 'wels'.")
        return jax.jit(lambda key: _wels_masks(key, shapes, split_rate))(key)
    if channels is None:
        raise UserError("build_masks needs channels for the mode 'kels': jkd.nn.shared_channels finds them.")
    return jax.jit(lambda: _kels_masks(shapes, channels))()


def extract_slim(variables: Mapping[str, Any], channels: Mapping[str, Channels] | None) -> dict[str, Any]:
    """Cuts the narrower network out of the wide one.

    Args:
      variables: {"params": ..., "batch_stats": ...} of the wide network.
      channels: `jkd.nn.shared_channels(model, narrower, image_shape)`.

    Returns:
      The variables of `narrower`.

    Raises:
      UserError: if `channels` is None (single weights, WELS, make no narrower network), or does not fit `variables`.
    """
    if channels is None:
        raise UserError("Only whole channels (KELS) make a slim network: WELS keeps single weights, which do not.")

    def cut(path: Any, leaf: Array) -> Array:
        name = path_name(path[1:])  # without the collection
        shared = _channels_of(name, leaf.shape, channels, "kernel" if is_kernel(name, leaf) else "kept")
        if shared.inputs is not None and is_kernel(name, leaf):
            leaf = leaf.take(shared.inputs, axis=-2)
        return leaf.take(shared.outputs, axis=-1)

    return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(cut, tree))(dict(variables))


def _wels_masks(key: Key[Array, ""], params: Any, split_rate: float) -> Any:
    def mask(index: int, role: str, path: str, leaf: Any) -> Array:
        if role == "kernel":
            return wels_mask(jax.random.fold_in(key, index), np.shape(leaf), split_rate)
        return jnp.ones(np.shape(leaf), bool)

    return map_leaves(mask, roles_of(params), params)


def _kels_masks(params: Any, channels: Mapping[str, Channels]) -> Any:
    def mask(index: int, role: str, path: str, leaf: Any) -> Array:
        shape = np.shape(leaf)
        if role == "kept":
            return jnp.ones(shape, bool)
        return _mask_of(shape, _channels_of(path, shape, channels, role), jnp)

    return map_leaves(mask, roles_of(params), params)


# --- trees ---


def roles_of(params: Any) -> dict[str, str]:
    """What becomes of the leaf of each path: "kernel" and "bias" (of a convolution) are split, "kept" are not."""
    shapes = {path_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}

    def role(path: str, shape: tuple[int, ...]) -> str:
        layer, _, name = path.rpartition("/")
        if name == "kernel":
            return "kernel"
        beside = shapes.get(f"{layer}/kernel".lstrip("/"), ())
        return "bias" if name == "bias" and len(beside) > 2 else "kept"

    return {path: role(path, shape) for path, shape in shapes.items()}


def map_leaves(fn: Callable[..., Array], roles: Mapping[str, str], params: Any, *rest: Any) -> Any:
    """Maps (index among the sorted paths, role, path, leaf, ...) over a tree."""
    places = {path: index for index, path in enumerate(sorted(roles))}

    def at(path: Any, *leaves: Any) -> Array:
        name = path_name(path)
        return fn(places[name], roles[name], name, *leaves)

    return jax.tree_util.tree_map_with_path(at, params, *rest)


def _mask_of(shape: tuple[int, ...], shared: Channels, xp: Any) -> Any:
    """True between shared channels: rows and columns only, so that a traced mask is computed, not a constant."""
    columns = np.isin(np.arange(shape[-1]), shared.outputs)
    if shared.inputs is None or len(shape) < 2:
        return xp.broadcast_to(columns, shape)
    rows = np.isin(np.arange(shape[-2]), shared.inputs)
    return xp.broadcast_to(xp.asarray(rows)[:, None] & xp.asarray(columns)[None, :], shape)


def _channels_of(path: str, shape: Sequence[int], channels: Mapping[str, Channels] | None, role: str) -> Channels:
    """The shared channels of the layer that a leaf belongs to."""
    layer, shared = path.rpartition("/")[0], (channels or {})
    if layer not in shared:
        raise UserError(f"channels know nothing of the layer {layer!r}: they are those of another network.")
    found = shared[layer]
    needed = [(found.outputs, shape[-1]), *([(found.inputs, shape[-2])] if role == "kernel" and len(shape) > 1 else [])]
    if any(indices is not None and len(indices) and indices.max() >= size for indices, size in needed):
        raise UserError(
            f"channels do not fit {path}, whose shape is {tuple(shape)}: they are those of another network."
        )
    return found


def _check_split_rate(split_rate: float) -> None:
    if not 0 < split_rate < 1:
        raise UserError(f"split_rate must lie in (0, 1), both ends left out, got {split_rate}.")
