"""Factorizations that several domains need."""

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


@sequential_vmap
def _eigh(matrix: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(matrix))


def eigh(matrix: Float[Array, "size size"]) -> tuple[Float[Array, " size"], Float[Array, "size size"]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix; those of a batch under vmap one after another.

    jaxlib divides a batch of large ones among the threads of a CPU, and waits for them in one of them: as many such
    batches at once as there are threads, and all wait for ever (seen on 2 cores with jaxlib 0.10.2). It cannot be
    differentiated in reverse.
    """
    return _eigh(matrix)
