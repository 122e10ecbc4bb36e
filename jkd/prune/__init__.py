"""Pruning: which weights stay, and networks without the others."""

from jkd.prune.magnitude import (
    keep_largest,
    magnitude_prune_mask,
    prune_params,
    sparsity,
)

__all__ = [
    "keep_largest",
    "magnitude_prune_mask",
    "prune_params",
    "sparsity",
]
