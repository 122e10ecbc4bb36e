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

__all__ = [
    "Projection",
    "cca_projections",
    "fix_signs",
    "itq_projection",
    "itq_rotation",
    "lsh_projection",
    "pca_projection",
    "project",
    "to_bits",
    "to_signs",
]
