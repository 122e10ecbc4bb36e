"""Pruning: which weights stay, and networks without the others."""

from jkd.prune.magnitude import (
    is_kernel,
    keep_largest,
    magnitude_prune_mask,
    prune_params,
    sparsity,
)
from jkd.prune.masks import (
    SparsityReport,
    apply,
    apply_masks,
    global_magnitude_mask,
    keep_schedule,
    layerwise_magnitude_mask,
    magnitude_threshold,
    masked_update,
    ones_masks,
    random_masks,
    shuffled_masks,
    sparsity_report,
    threshold_mask,
    transfer_masks,
)
from jkd.prune.tickets import Round, Ticket, imp, rewind

__all__ = [
    "Round",
    "SparsityReport",
    "Ticket",
    "apply",
    "apply_masks",
    "global_magnitude_mask",
    "imp",
    "is_kernel",
    "keep_largest",
    "keep_schedule",
    "layerwise_magnitude_mask",
    "magnitude_prune_mask",
    "magnitude_threshold",
    "masked_update",
    "ones_masks",
    "prune_params",
    "random_masks",
    "rewind",
    "shuffled_masks",
    "sparsity",
    "sparsity_report",
    "threshold_mask",
    "transfer_masks",
]
