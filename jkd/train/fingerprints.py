"""What tells stored arrays from altered ones: a sum over the bits of each leaf, and whether it holds a NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.trees import path_name

_SMALL = 1 << 20  # numbers
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _fingerprint(leaf: jax.Array) -> jax.Array:
    # Sum of all bits, each weighted by an odd number from its position, modulo 2^32: integer sums do not
    # depend on the sharding, and an odd weight cannot hide a flipped bit.
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    words = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


def _has_nan(leaf: jax.Array) -> jax.Array:
    return jnp.isnan(leaf).any() if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.zeros((), bool)


@jax.jit
def _inspect(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    return [_fingerprint(x) for x in leaves], [_has_nan(x) for x in leaves]


def _is_at_hand(leaf: Any) -> bool:
    # Small and in this host's memory: a program for its shape would be compiled for longer than numpy takes.
    here = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and leaf.size <= _SMALL
    return here and all(device.platform == "cpu" for device in leaf.devices())


def _inspect_at_hand(leaf: jax.Array) -> tuple[int, bool]:
    """What `_inspect` finds, by numpy."""
    flat = np.asarray(leaf).ravel()
    words = flat.view(f"u{min(flat.itemsize, 4)}").astype(np.uint32)
    weights = 2 * np.arange(words.size, dtype=np.uint32) + 1
    nan = jnp.issubdtype(flat.dtype, jnp.inexact) and np.isnan(flat).any()
    return int(np.sum(words * weights, dtype=np.uint32)), bool(nan)


def _inspect_all(leaves: list[Any]) -> list[tuple[Any, Any]]:
    rest = [leaf for leaf in leaves if not _is_at_hand(leaf)]
    found = zip(*jax.device_get(_inspect(rest)), strict=True) if rest else iter(())
    return [_inspect_at_hand(leaf) if _is_at_hand(leaf) else next(found) for leaf in leaves]


def inspect_tree(tree: Any) -> dict[str, dict[str, Any]]:
    """For every leaf by path: shape, dtype, a 32-bit fingerprint of its bits, and whether it holds a NaN."""
    paths, leaves = zip(*jax.tree.leaves_with_path(tree), strict=True) if jax.tree.leaves(tree) else ((), ())
    return {
        path_name(path): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "fingerprint": int(value),
            "nan": bool(nan),
        }
        for path, leaf, (value, nan) in zip(paths, leaves, _inspect_all(list(leaves)), strict=True)
    }
