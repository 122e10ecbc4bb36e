"""Small students that learn from teachers: low-bit, pruned, and distilled by any of the losses.

No paper's claim: it shows that the methods compose, and whether distillation helps a compressed student. Every student
starts from one dense network, trained on labels, whose smallest weights are masked and whose others become levels and
choices; then it learns by the loss of its arm.
"""

from experiments.arms import predictor, stages
from experiments.studies import Claim, Study

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]
BASELINE = "ce"
DISTILLED = ("kd", "dkd", "energy_kd", "cskd", "r2kd")

CLAIMS = (
    *(Claim(f"{name} helps the compressed student", "", name, "ce") for name in DISTILLED),
    Claim("the compressed student is as good as the dense one it started from", "", "ce", "dense", margin=1.0),
    Claim("and so is the one distilled by kd", "", "kd", "dense", margin=1.0),
)
STUDIES = (Study("clothes", "configs/quantized_distillation.py", (0.003, 0.01, 0.03, 0.1), 3, CLAIMS),)
