"""Cosine similarity KD: students follow, class by class, what the teacher says of a batch, whatever its scale.

Ham et al., Cosine similarity knowledge distillation for individual class information transfer, 2023. The arms are
made of the terms "cosine" (one temperature), "cswt" (temperatures by the similarity of student and teacher) and
"two_view" (weak and strong views, with correlations between classes and between examples).
"""

from experiments.arms import BASELINE, predictor, stages
from experiments.studies import HARD_RATES, RATES, Claim, Study

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]
COSINE = "agreement/class_cosine"
CORE = (
    Claim("CSKD beats KD", "better on CIFAR-100 and ImageNet", better="cskd", worse="kd"),
    Claim("CSKD with similarity-weighted temperatures beats KD", "better", better="cskd_cswt", worse="kd"),
    Claim("similarity-weighted temperatures add to CSKD", "better", better="cskd_cswt", worse="cskd"),
    Claim(
        "held-out class cosines are higher by CSKD than by labels alone", better=("cskd", COSINE), worse=("ce", COSINE)
    ),
    Claim("held-out class cosines are higher by CSKD than by KD", better=("cskd", COSINE), worse=("kd", COSINE)),
)
CLAIMS = (
    *CORE,
    Claim("a batch of 64 beats 16", "a referee: sensitive", better="cskd_cswt", worse="cskd_cswt_b16"),
    Claim("a batch of 64 beats 256", "a referee: sensitive", better="cskd_cswt", worse="cskd_cswt_b256"),
    Claim("the two-view recipe beats one view (it sees twice the images)", better="cskd_two_view", worse="cskd_cswt"),
)
STUDIES = (
    Study("digits", "configs/cosine_kd.py", RATES, 4, CLAIMS),
    Study("hard", "configs/cosine_kd.py:hard", HARD_RATES, 2, CORE, ("ce", "kd", "cskd", "cskd_cswt")),
)
