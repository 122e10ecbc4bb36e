"""Measures: of classifiers, and of whether a difference is one."""

from jkd.metrics.classification import (
    PerClassCounts,
    per_class_counts,
    topk_correct,
)
from jkd.metrics.statistics import (
    Interval,
    PairedDifference,
    holm,
    mean_interval,
    paired_difference,
    spearman,
)

__all__ = [
    "Interval",
    "PairedDifference",
    "PerClassCounts",
    "holm",
    "mean_interval",
    "paired_difference",
    "per_class_counts",
    "spearman",
    "topk_correct",
]
