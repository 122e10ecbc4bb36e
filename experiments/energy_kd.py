"""Energy KD: temperatures by the teacher's certainty, and augmentation of the uncertain examples.

Kim et al., Maximizing discrimination capability of knowledge distillation with energy function, Knowledge-Based
Systems 296, 2024. One teacher for each seed; every arm of the config is a student of it, paired by seed.

The paper gives certain (low-energy) examples the high temperature; the authors' published code does the opposite, which
is the arm `energy_kd_reversed`.
"""

from experiments import studies
from experiments.arms import BASELINE, predictor, stages

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]

# --- claims ---

CLAIMS = (
    studies.Claim("the teacher beats its student by KD", better="teacher", worse="kd"),
    studies.Claim("KD beats training on labels alone", better="kd", worse="ce"),
    studies.Claim(
        "Energy KD beats KD (same epochs)", "better on CIFAR-100, -LT and ImageNet", better="energy_kd", worse="kd"
    ),
    studies.Claim(
        "Energy KD is not worse than KD (0.25 points)", "better", better="energy_kd", worse="kd", margin=0.25
    ),
    studies.Claim(
        "Energy KD beats KD at 1.5 times the epochs, both", "not compared", better="energy_kd_long", worse="kd_long"
    ),
    studies.Claim(
        "high temperature for certain examples (the paper) beats low (the authors' code)",
        better="energy_kd",
        worse="energy_kd_reversed",
    ),
    studies.Claim("Energy DKD beats DKD", "better on CIFAR-100", better="energy_dkd", worse="dkd"),
    studies.Claim(
        "augmenting the uncertain half is as good as augmenting all (0.25 points)",
        "as good or better",
        better="kd_he_da",
        worse="kd_cutmix",
        margin=0.25,
    ),
    studies.Claim("HE-DA beats KD without it", better="kd_he_da", worse="kd"),
    studies.Claim(
        "HE-DA beats KD at 1.5 times the epochs (its own images a step: 1.75)", better="kd_he_da", worse="kd_long"
    ),
    studies.Claim(
        "the teacher is right more often on low energies than on high ones",
        better=("teacher", "energy/accuracy_low_energy"),
        worse=("teacher", "energy/accuracy_high_energy"),
    ),
    studies.Claim(
        "low energy goes with high confidence (rank correlation)",
        value=("teacher", "energy/rank_correlation_confidence"),
        inside=(-1.0, -0.5),
    ),
    studies.Claim(
        "the low-energy group has the asked share of the views",
        value=("energy_kd", "groups/share_low"),
        inside=(0.28, 0.32),
    ),
    studies.Claim(
        "the high-energy group has the asked share of the views",
        value=("energy_kd", "groups/share_high"),
        inside=(0.28, 0.32),
    ),
)
# Without training for longer, by KD or Energy KD, and what is compared with it.
HARD = ("ce", "kd", "energy_kd", "energy_kd_reversed", "dkd", "energy_dkd", "kd_cutmix", "kd_he_da")
HARD_CLAIMS = tuple(claim for claim in CLAIMS if not {claim.better, claim.worse} & {"kd_long", "energy_kd_long"})
STUDIES = (
    studies.Study("digits", "configs/energy_kd.py", studies.RATES, 4, CLAIMS),
    studies.Study("hard", "configs/energy_kd.py:hard", studies.HARD_RATES, 2, HARD_CLAIMS, HARD),
)
