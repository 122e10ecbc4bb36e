"""Measures: of classifiers, and of whether a difference is one."""

from jkd.metrics.agreement import (
    AgreementCounts,
    agreement_counts,
    entropy,
    joint_histogram,
    mutual_information,
    normalized_mutual_information,
    predicted_class,
    prediction_agreement,
    predictive_entropy,
    predictive_kl,
)
from jkd.metrics.attention import (
    AttentionCounts,
    attention_counts,
    attention_iou,
    binarize_attention,
    class_sum_attention,
)
from jkd.metrics.calibration import CalibrationBins, calibration_bins, ece, ece_unweighted, expected_calibration_error
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
    "AgreementCounts",
    "AttentionCounts",
    "CalibrationBins",
    "Interval",
    "PairedDifference",
    "PerClassCounts",
    "agreement_counts",
    "attention_counts",
    "attention_iou",
    "binarize_attention",
    "calibration_bins",
    "class_sum_attention",
    "ece",
    "ece_unweighted",
    "entropy",
    "expected_calibration_error",
    "holm",
    "joint_histogram",
    "mean_interval",
    "mutual_information",
    "normalized_mutual_information",
    "paired_difference",
    "per_class_counts",
    "predicted_class",
    "prediction_agreement",
    "predictive_entropy",
    "predictive_kl",
    "spearman",
    "topk_correct",
]
