"""Whole models with low-bit weights, the models untouched: trees of parameters whose kernels are levels and choices.

`quantize_params` splits the kernels of a trained model; `direct` is the transform that joins them again in the loss:

    params = quantize.quantize_params(params, bits=2)
    materialize = quantize.direct()
    loss = lambda params, batch, key: loss_fn(materialize(params), batch, key)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jkd.checks import Scalar, as_float, concrete
from jkd.errors import UserError, unknown
from jkd.quantize.direct import basis_moments, solve_basis
from jkd.quantize.forms import FORMS, Form, Joining, form_of
from jkd.quantize.levels import check_bits
from jkd.quantize.packing import dequantize, pack_bits, sort_codes, unpack_bits
from jkd.trees import path_name

Rules = Sequence[tuple[str, int]]  # (regex on a path such as block1/conv/kernel, bits), 0 bits: as it is
# The first and last layers of the models in jkd.nn, whose low-bit versions cost most.
ENDS: Rules = ((r"^stem/", 0), (r"^head/", 0))
PACKED = frozenset({"packed", "levels", "shape"})


def bits_of(path: str, bits: int, rules: Rules = ENDS) -> int:
    """The bits of a leaf: those of the first rule that matches its path, else `bits` for a kernel and 0 for others."""
    for pattern, given in rules:
        if re.search(pattern, path):
            return given
    return bits if path.split("/")[-1] == "kernel" else 0


def check_rules(bits: int, rules: Rules) -> None:
    """Stops bits outside 1..8 (0 in a rule: as it is) and patterns that are no regular expressions.

    Raises:
      UserError: if so.
    """
    for count in (bits, *(given for _, given in rules if given)):
        check_bits(count)
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"rules: {pattern!r} is no regular expression: {error}.") from error


def quantize_params(
    params: Any, bits: int = 2, *, rules: Rules = ENDS, form: str = "onehot", per_channel: bool | None = None
) -> Any:
    """Splits kernels into levels and choices, started at the nearest levels of the weights.

    A kernel becomes, by the form; biases and norms stay as they are:

        "onehot"  {"assignment", "levels"}, see `direct_quantize`
        "binary"  {"codes", "basis"}, see `direct_quantize_binary`
        "latent"  {"latent", "levels"}, a baseline: see `nearest_levels`
        "lq"      {"latent", "basis"}, LQ-Nets: see `nearest_sums`; the basis is to follow by `refresh_bases`

    Levels are found in the weights by k-means, the basis of "binary" by least squares; that of "lq" starts by the
    kernel's shape alone, as in its published code (`weight_basis`).

    Args:
      params: nested dicts of arrays, trained.
      bits: of all kernels that no rule names, 1..8.
      rules: (regex, bits) on paths, the first match counts; 0 leaves a leaf as it is. By default the
        layers "stem" and "head" of the models in `jkd.nn`.
      form: "onehot", "binary", "latent" or "lq".
      per_channel: whether each output channel (a kernel's last axis) has levels of its own; by default under "lq" only.

    Raises:
      UserError: if bits are outside 1..8, the form is unknown, nothing is quantized, or a kernel is known not to be
        finite.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    check_rules(bits, rules)
    given = {path: bits_of(path, bits, rules) for path, _ in _leaves(params)}
    if not any(given.values()):
        raise UserError(f"Nothing is quantized: rules leave all of {', '.join(list(given)[:5])} as they are.")
    each = FORMS[form].per_channel if per_channel is None else per_channel

    def split(path: str, leaf: Any) -> Any:
        if not given[path]:
            return leaf
        _check_finite(path, leaf, "levels cannot be found in a model that diverged")
        if each and leaf.ndim < 2:
            raise UserError(f"{path} of shape {list(leaf.shape)} has no output channels: per_channel is for kernels.")
        return FORMS[form].split(leaf, given[path], each)

    return _map_leaves(split, params)


def direct(tau: Scalar = 1.0, *, gradient: str = "softmax", learn_levels: bool = True) -> Callable[[Any], Any]:
    """The transform that makes kernels of what `quantize_params` split, of any form: params -> params.

    Trees without any pass unchanged, so it composes with other transforms in `jkd.train.chain`.

    Args:
      tau: > 0; see `direct_quantize`.
      gradient: "softmax" or "identity", of the "onehot" form.
      learn_levels: of the "latent" form: whether the levels get a gradient; see `frozen`.
    """
    how = Joining(tau, gradient, learn_levels)
    return lambda params: _map_nodes(lambda path, form, node: form.join(node, how), params)


def refresh_bases(params: Any, *, momentum: float = 0.9, delta: float = 1e-4) -> Any:
    """Moves the bases of the "lq" form towards those of least squares, `v <- momentum v + (1 - momentum) v*`.

    Once a training step, as the moving averages of LQ-Nets; v* is that of `basis_update` for each output channel. One
    system of equations for all kernels of as many bits; traceable.

    Args:
      params: of `quantize_params`; other parameters stay as they are.
      momentum: in [0, 1).
      delta: see `basis_update`.

    Raises:
      UserError: if the momentum lies outside, or no kernel has this form.
    """
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}.")
    found = {path: node for path, form, node in _nodes(params) if form is FORMS["lq"]}
    if not found:
        raise UserError('params hold no basis to refresh: quantize_params(.., form="lq") makes some.')
    moved: dict[str, Any] = {}
    for bits in {node["basis"].shape[-1] for node in found.values()}:
        moved |= _refreshed({k: v for k, v in found.items() if v["basis"].shape[-1] == bits}, momentum, delta)
    return _map_nodes(lambda path, form, node: {**node, "basis": moved[path]} if path in moved else node, params)


def _refreshed(nodes: Mapping[str, Any], momentum: float, delta: float) -> dict[str, Any]:
    rows, grams, moments = [], [], []
    for node in nodes.values():
        weights, basis = (jax.lax.stop_gradient(as_float(name, node[name])) for name in ("latent", "basis"))
        rows.append(basis.reshape(-1, basis.shape[-1]))
        gram, moment = basis_moments(weights.reshape(-1, weights.shape[-1] if basis.ndim == 2 else 1), rows[-1])
        grams.append(gram)
        moments.append(moment)
    old = jnp.concatenate(rows)
    new = momentum * old + (1 - momentum) * solve_basis(jnp.concatenate(grams), jnp.concatenate(moments), old, delta)
    parts = jnp.split(new, np.cumsum([len(row) for row in rows])[:-1])
    return {path: part.reshape(nodes[path]["basis"].shape) for path, part in zip(nodes, parts, strict=True)}


def is_choice(path: str) -> bool:
    """Whether a leaf scores or encodes choices: these take a large learning rate of their own, and no weight decay."""
    return path.split("/")[-1] in ("assignment", "codes")


def is_level(path: str) -> bool:
    """Whether a leaf holds levels or their basis: no weight decay for these."""
    return path.split("/")[-1] in ("levels", "basis")


def frozen(params: Any, *, learn_levels: bool = True) -> Any:
    """`params` with True for the leaves that an optimizer must leave alone, weight decay included, else False.

    The bases of the "lq" form; where levels are not learned, also those of the "latent" form. For `optax`:

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen(params)))

    Args:
      params: of `quantize_params`.
      learn_levels: as given to `direct`.
    """
    none = jax.tree.map(lambda leaf: False, params)

    def mark(path: str, form: Form, node: Mapping[str, Any]) -> Any:
        stays = "basis" if form is FORMS["lq"] else "levels" if form is FORMS["latent"] and not learn_levels else ""
        return {key: key == stays for key in node}

    return _map_nodes(mark, none)


def labels(params: Any, *, learn_levels: bool = True) -> Any:
    """What each leaf of low-bit parameters is to an optimizer: "choices", "levels", "frozen" or "weights".

    Choices take a large learning rate of their own; neither they nor levels take weight decay; `frozen` leaves stay.

        optax.partition({"choices": ..., "levels": ..., "weights": ..., "frozen": optax.set_to_zero()}, labels)

    Args:
      params: of `quantize_params`, or any others.
      learn_levels: as given to `direct`.
    """

    def label(path: str, stays: bool) -> str:
        if stays:
            return "frozen"
        return "choices" if is_choice(path) else "levels" if is_level(path) else "weights"

    return _map_leaves(label, frozen(params, learn_levels=learn_levels))


def choices(params: Any) -> dict[str, jax.Array]:
    """The number of each weight's level, of every quantized kernel by path: uint8.

    Of forms with latent weights that is the nearest level, by its number among the sorted ones.

    Raises:
      UserError: if params hold no quantized kernels.
    """
    found = {path: form.numbers(node).astype(jnp.uint8) for path, form, node in _nodes(params)}
    if not found:
        raise UserError("params hold no choices: quantize_params makes some.")
    return found


def flipped(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]) -> jax.Array:
    """The share of weights, over all quantized kernels, whose `choices` differ between two moments of training."""
    changed = [before[path] != after[path] for path in before]
    return sum((x.sum() for x in changed), jnp.zeros(())) / sum(x.size for x in changed)


# --- as stored ---


def pack_params(params: Any) -> Any:
    """Low-bit kernels of any form as packed codes: {"packed": uint8 bytes, "levels": sorted, "shape": int32}.

    The levels are one set, or one for each output channel. The bits are ceil(log2 of the number of levels) a weight.
    Other leaves stay. Not traceable.

    Raises:
      UserError: if a kernel is not finite, or nothing is quantized.
    """
    if not is_quantized(params):
        raise UserError("params hold no levels and choices to pack: quantize_params makes some.")

    def pack(path: str, form: Form, node: Mapping[str, Any]) -> Any:
        for name, leaf in node.items():
            _check_finite(f"{path}/{name}", leaf, "a model that diverged is not exported")
        index, levels = sort_codes(form.numbers(node), form.table(node))
        packed = pack_bits(index, _width(levels))
        return {"packed": packed, "levels": levels, "shape": jnp.asarray(index.shape, jnp.int32)}

    return _map_nodes(pack, params)


def pack_mask(mask: Any) -> dict[str, jax.Array]:
    """A mask of weights, packed like a kernel: a bit each, of the levels 0 and 1; `unpack` gives these numbers."""
    flags = jnp.asarray(mask)
    packed = pack_bits(flags.astype(jnp.uint8), 1)
    return {"packed": packed, "levels": jnp.array([0.0, 1.0]), "shape": jnp.asarray(flags.shape, jnp.int32)}


class PackedSize(NamedTuple):
    """What packed kernels take: their weights, the bytes of codes and levels, and bits x weights / 8."""

    weights: int
    bytes: int
    least: float


def packed_size(params: Any) -> PackedSize:
    """The size of all kernels that `pack_params` packed; not traceable."""
    found = [x for x in jax.tree.leaves(params, is_leaf=_is_packed) if _is_packed(x)]
    weights = [int(np.prod(np.asarray(node["shape"]))) for node in found]
    taken = sum(node["packed"].nbytes + node["levels"].nbytes for node in found)
    least = sum(n * _width(node["levels"]) for n, node in zip(weights, found, strict=True)) / 8
    return PackedSize(sum(weights), taken, least)


def is_quantized(params: Any) -> bool:
    """Whether a tree holds kernels that `quantize_params` split."""
    return any(map(_is_node, jax.tree.leaves(params, is_leaf=_is_node)))


def _width(levels: Any) -> int:
    return max(1, (levels.shape[-1] - 1).bit_length())


def unpack(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[Any], Any]:
    """The transform that makes kernels of `pack_params`'s codes, inside a jitted function: params -> params.

    Args:
      shapes: of the packed kernels by path, static: `packed_shapes(params)`.
    """

    def join(path: str, node: Any) -> Any:
        if not _is_packed(node):
            return node
        return dequantize(unpack_bits(node["packed"], _width(node["levels"]), shapes[path]), node["levels"])

    return lambda params: _map_with_names(join, params, _is_packed)


def packed_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels that `pack_params` packed, by path; not traceable."""
    return {
        path.removesuffix("/shape"): tuple(int(n) for n in np.asarray(leaf))
        for path, leaf in _leaves(params)
        if path.endswith("/shape")
    }


# --- trees ---


def _check_finite(path: str, leaf: Any, says: str) -> None:
    known = concrete(leaf)
    if known is not None and not np.isfinite(known).all():
        raise UserError(f"{path} is not finite: {says}.")


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def _is_packed(x: Any) -> bool:
    return isinstance(x, Mapping) and x.keys() == PACKED


def _is_node(x: Any) -> bool:
    return form_of(x) is not None


def _nodes(params: Any) -> list[tuple[str, Form, Mapping[str, Any]]]:
    found: list[tuple[str, Form, Mapping[str, Any]]] = []
    _map_nodes(lambda *node: found.append(node), params)
    return found


def _map_nodes(fn: Callable[[str, Form, Mapping[str, Any]], Any], params: Any) -> Any:
    """`params` with `fn(path, form, dict)` in the place of every quantized kernel."""

    def change(path: str, x: Any) -> Any:
        form = form_of(x)
        return x if form is None else fn(path, form, {key: jnp.asarray(leaf) for key, leaf in x.items()})

    return _map_with_names(change, params, _is_node)


def _map_leaves(fn: Callable[[str, Any], Any], params: Any) -> Any:
    return _map_with_names(fn, params, None)


def _map_with_names(fn: Callable[[str, Any], Any], params: Any, is_leaf: Callable[[Any], bool] | None) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: fn(path_name(path), x), params, is_leaf=is_leaf)
