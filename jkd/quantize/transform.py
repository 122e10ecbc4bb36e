"""Whole models with low-bit weights, the models untouched: trees of parameters whose kernels are levels and choices.

`quantize_params` splits the kernels of a trained model; `direct` is the transform that joins them again in the loss:

    params = quantize.quantize_params(params, bits=2)
    materialize = quantize.direct()
    loss = lambda params, batch, key: loss_fn(materialize(params), batch, key)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.checks import Scalar, concrete
from jkd.errors import UserError
from jkd.quantize.direct import chosen, direct_quantize, direct_quantize_binary, init_assignment, init_binary
from jkd.quantize.levels import check_bits, init_levels, levels_from_basis
from jkd.quantize.packing import dequantize, export_codes, pack_bits, unpack_bits
from jkd.trees import path_name

Rules = Sequence[tuple[str, int]]  # (regex on a path such as block1/conv/kernel, bits), 0 bits: as it is
# The first and last layers of the models in jkd.nn, whose low-bit versions cost most.
ENDS: Rules = ((r"^stem/", 0), (r"^head/", 0))
ONEHOT, BINARY = frozenset({"assignment", "levels"}), frozenset({"codes", "basis"})
PACKED = frozenset({"packed", "levels", "shape"})
FORMS = ("onehot", "binary")


def bits_of(path: str, bits: int, rules: Rules = ENDS) -> int:
    """The bits of a leaf: those of the first rule that matches its path, else `bits` for a kernel and 0 for others."""
    for pattern, given in rules:
        if re.search(pattern, path):
            return given
    return bits if path.split("/")[-1] == "kernel" else 0


def quantize_params(params: Any, bits: int = 2, *, rules: Rules = ENDS, form: str = "onehot") -> Any:
    """Splits kernels into levels and choices, started at the nearest levels of the weights.

    A kernel becomes {"assignment", "levels"} ("onehot", see `direct_quantize`) or {"codes", "basis"} ("binary", see
    `direct_quantize_binary`); biases and norms stay as they are.

    Args:
      params: nested dicts of arrays, trained: levels are found in the weights by k-means.
      bits: of all kernels that no rule names, 1..8.
      rules: (regex, bits) on paths, the first match counts; 0 leaves a leaf as it is. By default the
        layers "stem" and "head" of the models in `jkd.nn`.
      form: "onehot" or "binary".

    Raises:
      UserError: if bits are outside 1..8, nothing is quantized, or a kernel is known not to be finite.
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    for count in (bits, *(of for _, of in rules if of)):
        check_bits(count)
    given = {path: bits_of(path, bits, rules) for path, _ in _leaves(params)}
    if not any(given.values()):
        raise UserError(f"Nothing is quantized: rules leave all of {', '.join(list(given)[:5])} as they are.")

    def split(path: str, leaf: Any) -> Any:
        if not given[path]:
            return leaf
        known = concrete(leaf)
        if known is not None and not np.isfinite(known).all():
            raise UserError(f"{path} is not finite: levels cannot be found in a model that diverged.")
        if form == "binary":
            return dict(zip(("codes", "basis"), init_binary(leaf, given[path]), strict=True))
        levels = init_levels(leaf, given[path])
        return {"assignment": init_assignment(leaf, levels), "levels": levels}

    return _map_leaves(split, params)


def direct(tau: Scalar = 1.0, *, gradient: str = "softmax") -> Callable[[Any], Any]:
    """The transform that makes kernels of `quantize_params`'s levels and choices: params -> params.

    Trees without any pass unchanged, so it composes with other transforms in `jkd.train.chain`.

    Args:
      tau: > 0; see `direct_quantize`.
      gradient: "softmax" or "identity", of the "onehot" form.
    """

    def join(node: Mapping[str, Any]) -> Any:
        if node.keys() == ONEHOT:
            return direct_quantize(node["assignment"], node["levels"], tau, gradient=gradient)
        return direct_quantize_binary(node["codes"], node["basis"])

    return lambda params: _map_nodes(join, params, lambda node: node.keys() in (ONEHOT, BINARY))


def is_choice(path: str) -> bool:
    """Whether a leaf scores or encodes choices: these take a large learning rate of their own, and no weight decay."""
    return path.split("/")[-1] in ("assignment", "codes")


def is_level(path: str) -> bool:
    """Whether a leaf holds levels or their basis: no weight decay for these."""
    return path.split("/")[-1] in ("levels", "basis")


def flipped(before: Any, after: Any) -> jax.Array:
    """The share of weights, over all quantized kernels, whose choice differs between two trees of parameters."""
    changed = [
        _choice(path, a) != _choice(path, b)
        for (path, a), (_, b) in zip(_leaves(before), _leaves(after), strict=True)
        if is_choice(path)
    ]
    if not changed:
        raise UserError("before and after hold no choices: quantize_params makes some.")
    return sum((x.sum() for x in changed), jnp.zeros(())) / sum(x.size for x in changed)


def _choice(path: str, leaf: jax.Array) -> jax.Array:
    if path.endswith("assignment"):
        return chosen(leaf)
    return _number(leaf >= 0)


def _number(bits: jax.Array) -> jax.Array:
    # Whose digits, the lowest first, lie along the last axis.
    return (bits * (1 << np.arange(bits.shape[-1])).reshape((1,) * (bits.ndim - 1) + (-1,))).sum(-1)


# --- as stored ---


def pack_params(params: Any) -> Any:
    """Kernels of levels and choices as packed codes: {"packed": uint8 bytes, "levels": sorted, "shape": int32}.

    The bits are ceil(log2 of the number of levels) a weight. Other leaves stay. Not traceable.

    Raises:
      UserError: if a kernel is not finite, or nothing is quantized.
    """
    found = []

    def pack(node: Mapping[str, Any]) -> Any:
        found.append(node)
        if node.keys() == BINARY:
            levels, index = _binary_codes(node["codes"], node["basis"])
        else:
            index, levels = export_codes(node["assignment"], node["levels"])
        bits = max(1, (levels.size - 1).bit_length())
        return {"packed": pack_bits(index, bits), "levels": levels, "shape": jnp.asarray(index.shape, jnp.int32)}

    packed = _map_nodes(pack, params, lambda node: node.keys() in (ONEHOT, BINARY))
    if not found:
        raise UserError("params hold no levels and choices to pack: quantize_params makes some.")
    return packed


def _binary_codes(codes: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    for name, x in (("codes", codes), ("basis", basis)):
        known = concrete(x)
        if known is not None and not np.isfinite(known).all():
            raise UserError(f"{name} is not finite: a model that diverged is not exported.")
    levels, digits = levels_from_basis(basis, signed=True)
    place = jnp.argsort(_number(digits > 0))  # of a code's number among the sorted levels
    return levels, place[_choice("codes", codes)].astype(jnp.uint8)


def unpack(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[Any], Any]:
    """The transform that makes kernels of `pack_params`'s codes, inside a jitted function: params -> params.

    Args:
      shapes: of the packed kernels by path, static: `packed_shapes(params)`.
    """

    def join(path: str, node: Mapping[str, Any]) -> Any:
        bits = max(1, (node["levels"].size - 1).bit_length())
        return dequantize(unpack_bits(node["packed"], bits, shapes[path]), node["levels"])

    return lambda params: _map_nodes(join, params, lambda node: node.keys() == PACKED, with_path=True)


def packed_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels that `pack_params` packed, by path; not traceable."""
    return {
        path.removesuffix("/shape"): tuple(int(n) for n in np.asarray(leaf))
        for path, leaf in _leaves(params)
        if path.endswith("/shape")
    }


# --- trees ---


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def _map_leaves(fn: Callable[[str, Any], Any], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), params)


def _map_nodes(fn: Callable, params: Any, taken: Callable[[Mapping], bool], with_path: bool = False) -> Any:
    """`params` with `fn` of every dict that is `taken` in its place."""

    def is_node(x: Any) -> bool:
        return isinstance(x, Mapping) and taken(x)

    def change(path: Any, x: Any) -> Any:
        return x if not is_node(x) else fn(path_name(path), x) if with_path else fn(x)

    return jax.tree_util.tree_map_with_path(change, params, is_leaf=is_node)
