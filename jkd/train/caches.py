"""What is kept by the functions it was made of, so that equal stages share one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
_CACHES: list[Any] = []


def cached(fn: F) -> F:
    """`functools.lru_cache` of 256 entries that `forget_programs` empties."""
    made = functools.lru_cache(maxsize=256)(fn)
    _CACHES.append(made)
    return made  # type: ignore[return-value]


def forget_programs() -> None:
    """Frees the compiled programs of all finished runs of this process, and all that JAX itself has compiled.

    For a process of many runs: every program takes memory mappings, of which a process may have 65,530 on Linux.
    """
    for made in _CACHES:
        made.cache_clear()
    jax.clear_caches()
