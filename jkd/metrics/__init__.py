"""Measures: of classifiers, of generators, and of whether a difference is one."""

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
from jkd.metrics.binomial import bit_accuracy, detection_threshold, match_log_pvalue, matching_bits
from jkd.metrics.calibration import CalibrationBins, calibration_bins, ece, ece_unweighted, expected_calibration_error
from jkd.metrics.classification import (
    PerClassCounts,
    per_class_counts,
    topk_correct,
)
from jkd.metrics.distances import euclidean_distances
from jkd.metrics.diversity import (
    IntraClusterDistance,
    intra_cluster_distance,
    intra_cluster_distance_of_matrices,
    nearest_reference,
)
from jkd.metrics.frechet import MomentSums, frechet_distance, moment_sums, moments
from jkd.metrics.hamming import hamming_distance, pack_bits, packed_hamming_distance, unpack_bits
from jkd.metrics.kid import SubsetKid, kid, kid_over_subsets
from jkd.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, manifold_precision_recall
from jkd.metrics.perceptual import pairwise_perceptual_distances, perceptual_distance
from jkd.metrics.retrieval import (
    MeanAveragePrecision,
    Precision,
    PrecisionRecallCurve,
    hamming_mean_average_precision,
    mean_average_precision,
    precision_at_k,
    precision_at_radius,
    precision_recall,
    share_label,
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
    "DensityCoverage",
    "Interval",
    "IntraClusterDistance",
    "MeanAveragePrecision",
    "MomentSums",
    "PairedDifference",
    "PerClassCounts",
    "Precision",
    "PrecisionRecall",
    "PrecisionRecallCurve",
    "SubsetKid",
    "agreement_counts",
    "attention_counts",
    "attention_iou",
    "binarize_attention",
    "bit_accuracy",
    "calibration_bins",
    "class_sum_attention",
    "density_coverage",
    "detection_threshold",
    "ece",
    "ece_unweighted",
    "entropy",
    "euclidean_distances",
    "expected_calibration_error",
    "frechet_distance",
    "hamming_distance",
    "hamming_mean_average_precision",
    "holm",
    "intra_cluster_distance",
    "intra_cluster_distance_of_matrices",
    "joint_histogram",
    "kid",
    "kid_over_subsets",
    "manifold_precision_recall",
    "match_log_pvalue",
    "matching_bits",
    "mean_average_precision",
    "mean_interval",
    "moment_sums",
    "moments",
    "mutual_information",
    "nearest_reference",
    "normalized_mutual_information",
    "pack_bits",
    "packed_hamming_distance",
    "paired_difference",
    "pairwise_perceptual_distances",
    "per_class_counts",
    "perceptual_distance",
    "precision_at_k",
    "precision_at_radius",
    "precision_recall",
    "predicted_class",
    "prediction_agreement",
    "predictive_entropy",
    "predictive_kl",
    "share_label",
    "spearman",
    "topk_correct",
    "unpack_bits",
]
