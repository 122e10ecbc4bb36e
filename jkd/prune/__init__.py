"""Pruning: which weights stay, and networks without the others."""

from jkd.prune.evolution import (
    Magnitudes,
    first_generation,
    first_init,
    hypothesis_magnitude,
    knowledge_evolution,
    next_generation,
    reset_init,
)
from jkd.prune.hypotheses import build_masks, extract_slim, kels_mask, slim_indices, wels_mask
from jkd.prune.magnitude import (
    keep_largest,
    magnitude_prune_mask,
    prune_params,
    sparsity,
)

__all__ = [
    "Magnitudes",
    "build_masks",
    "extract_slim",
    "first_generation",
    "first_init",
    "hypothesis_magnitude",
    "keep_largest",
    "kels_mask",
    "knowledge_evolution",
    "magnitude_prune_mask",
    "next_generation",
    "prune_params",
    "reset_init",
    "slim_indices",
    "sparsity",
    "wels_mask",
]
