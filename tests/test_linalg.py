"""Factorizations of matrices and of batches of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jkd.linalg import eigh


def test_matrices_of_a_batch_are_factorized_one_after_another():
    x = jax.random.normal(jax.random.key(0), (3, 6, 6))
    matrices = x + x.swapaxes(1, 2)
    values, vectors = jax.vmap(eigh)(matrices)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), atol=1e-5)
    np.testing.assert_allclose(jnp.einsum("bik,bk,bjk->bij", vectors, values, vectors), matrices, atol=1e-5)
    program = jax.jit(jax.vmap(eigh)).lower(matrices).as_text()
    calls = [line for line in program.splitlines() if "custom_call" in line and "syevd" in line]
    assert calls
    assert not any("3x6x6" in line for line in calls), "a batch is divided among threads, which may wait for ever"
