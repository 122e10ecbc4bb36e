"""The forms of a low-bit kernel in a tree of parameters: how each is made of a kernel, joined to one, and read out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jkd.checks import Scalar
from jkd.quantize.direct import (
    chosen,
    direct_quantize,
    direct_quantize_binary,
    init_assignment,
    init_binary,
    nearest_levels,
    nearest_sums,
    sums_of,
)
from jkd.quantize.levels import digit_sum, digits, init_levels, nearest_index, weight_basis

Node = Mapping[str, Any]


class Joining(NamedTuple):
    """How kernels are joined: see `jkd.quantize.direct`."""

    tau: Scalar
    gradient: str
    learn_levels: bool


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel as a dict of arrays.

    Attributes:
      keys: of the dict; no two forms have the same.
      split: (kernel, bits, whether each output channel has levels of its own) -> the dict.
      join: the dict -> the kernel, differentiable.
      numbers: the dict -> the number of each weight's level.
      table: the dict -> the levels, in the order of these numbers; [levels] or [channels, levels].
      per_channel: what a user who does not say gets.
    """

    keys: frozenset[str]
    split: Callable[[Array, int, bool], dict[str, Array]]
    join: Callable[[Node, Joining], Array]
    numbers: Callable[[Node], Array]
    table: Callable[[Node], Array]
    per_channel: bool = False


def _levels(kernel: Array, bits: int, per_channel: bool) -> Array:
    find = functools.partial(init_levels, bits=bits)
    return jax.vmap(find, in_axes=-1)(kernel) if per_channel else find(kernel)


# One program for each shape, wherever it is called: k-means in single operations are tens of them.
_compiled = functools.partial(jax.jit, static_argnums=(1, 2))


@_compiled
def _split_onehot(kernel: Array, bits: int, per_channel: bool) -> dict[str, Array]:
    levels = _levels(kernel, bits, per_channel)
    return {"assignment": init_assignment(kernel, levels), "levels": levels}


@_compiled
def _split_binary(kernel: Array, bits: int, per_channel: bool) -> dict[str, Array]:
    find = functools.partial(init_binary, bits=bits)
    codes, basis = jax.vmap(find, in_axes=-1, out_axes=(-2, 0))(kernel) if per_channel else find(kernel)
    return {"codes": codes, "basis": basis}


@_compiled
def _split_latent(kernel: Array, bits: int, per_channel: bool) -> dict[str, Array]:
    return {"latent": jnp.asarray(kernel), "levels": _levels(kernel, bits, per_channel)}


def _split_lq(kernel: Array, bits: int, per_channel: bool) -> dict[str, Array]:
    basis = jnp.asarray(weight_basis(kernel.shape, bits))
    wide = jnp.broadcast_to(basis[None], (kernel.shape[-1], bits))
    return {"latent": jnp.asarray(kernel), "basis": wide if per_channel else basis}


def _signs(node: Node) -> Array:
    # A number whose digits, the lowest first, are the signs.
    codes = node["codes"]
    weights = (1 << np.arange(codes.shape[-1])).reshape((1,) * (codes.ndim - 1) + (-1,))
    return ((codes >= 0) * weights).sum(-1)


def _all_sums(node: Node) -> Array:
    def of_one(basis: Array) -> Array:
        return digit_sum(jnp.asarray(digits(basis.size, signed=True), basis.dtype), basis)

    return jax.vmap(of_one)(node["basis"]) if node["basis"].ndim == 2 else of_one(node["basis"])


def _lq_sums(node: Node) -> Array:
    return sums_of(node["latent"].shape, node["basis"])


FORMS = {
    "onehot": Form(
        frozenset({"assignment", "levels"}),
        _split_onehot,
        lambda node, how: direct_quantize(node["assignment"], node["levels"], how.tau, gradient=how.gradient),
        lambda node: chosen(node["assignment"]),
        lambda node: node["levels"],
    ),
    "binary": Form(
        frozenset({"codes", "basis"}),
        _split_binary,
        lambda node, how: direct_quantize_binary(node["codes"], node["basis"]),
        _signs,
        _all_sums,
    ),
    "latent": Form(
        frozenset({"latent", "levels"}),
        _split_latent,
        lambda node, how: nearest_levels(node["latent"], node["levels"], learn_levels=how.learn_levels),
        lambda node: nearest_index(node["latent"], jnp.sort(node["levels"])),
        lambda node: jnp.sort(node["levels"]),
    ),
    "lq": Form(
        frozenset({"latent", "basis"}),
        _split_lq,
        lambda node, how: nearest_sums(node["latent"], node["basis"]),
        lambda node: nearest_index(node["latent"], _lq_sums(node)),
        _lq_sums,
        per_channel=True,
    ),
}


def form_of(node: Any) -> Form | None:
    """The form that a part of a tree has, if any."""
    found = (form for form in FORMS.values() if isinstance(node, Mapping) and node.keys() == form.keys)
    return next(found, None)
