"""Binary codes: how scores become bits, linear hash functions, and exact search."""

from jkd.hashing.baselines import (
    Projection,
    cca_projections,
    fix_signs,
    itq_projection,
    itq_rotation,
    lsh_projection,
    pca_projection,
    project,
)
from jkd.hashing.codes import to_bits, to_signs
from jkd.hashing.search import Neighbors, hamming_search, sharded_hamming_search

__all__ = [
    "Neighbors",
    "Projection",
    "cca_projections",
    "fix_signs",
    "hamming_search",
    "itq_projection",
    "itq_rotation",
    "lsh_projection",
    "pca_projection",
    "project",
    "sharded_hamming_search",
    "to_bits",
    "to_signs",
]
