"""R2KD: a correlation distance, and a teacher mixed with a pruned copy of itself, meant to be robust to augmentation.

Kim et al., Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning, IEEE TKDE 2024.
The arms are made of the terms "value" (cosines of probabilities, for each example and for each class over the batch)
and "rank" (rank correlation; with hard ranks it has no gradient, which is what the published code does).
"""

from experiments.arms import BASELINE, predictor, stages
from experiments.studies import HARD_RATES, RATES, Claim, Study

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]


def interaction(mix: str) -> Claim:
    """(R2KD with augmentation - R2KD) - (KD with augmentation - KD)."""
    text = f"{mix} does more for R2KD than for KD"
    return Claim(text, "KD with augmentation no better, R2KD better", [f"r2kd_{mix}", "kd"], ["r2kd", f"kd_{mix}"])


CORE = (
    Claim("R2KD's value loss alone beats KD", better="r2kd_value", worse="kd"),
    Claim("R2KD beats KD", "better on four sets", better="r2kd", worse="kd"),
    Claim("the pruned copy adds to the value loss", "better", better="r2kd", worse="r2kd_value"),
    Claim("R2KD with CutMix beats R2KD", "better", better="r2kd_cutmix", worse="r2kd"),
    Claim("KD with CutMix beats KD", "no better", better="kd_cutmix", worse="kd"),
    interaction("cutmix"),
)
CLAIMS = (
    *CORE,
    Claim("soft ranks add to R2KD", "not said", better="r2kd_soft", worse="r2kd"),
    Claim("R2KD with mixup beats R2KD", "better", better="r2kd_mixup", worse="r2kd"),
    interaction("mixup"),
)
DIGITS = ("ce", "kd", "kd_mixup", "kd_cutmix", "r2kd_value", "r2kd", "r2kd_soft", "r2kd_mixup", "r2kd_cutmix")
BATCH = Claim("batch statistics in the pruned copy add to R2KD", "used, not compared", "r2kd_batch_statistics", "r2kd")
HARD = ("ce", "kd", "kd_cutmix", "r2kd_value", "r2kd", "r2kd_batch_statistics", "r2kd_cutmix")
STUDIES = (
    Study("digits", "configs/r2kd.py", RATES, 4, CLAIMS, DIGITS),
    Study("hard", "configs/r2kd.py:hard", HARD_RATES, 2, (*CORE, BATCH), HARD),
)
