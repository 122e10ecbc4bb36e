"""Label smoothing and distillation: whether a smoothed teacher helps depends on the temperature.

Chandrasegaran et al., Revisiting Label Smoothing and Knowledge Distillation Compatibility: What was Missing?, ICML
2022. At T = 1 a smoothed teacher is said to help; at a raised T the features of its students are said to diffuse
towards similar classes, and to lose what was gained. All arms have the term "kd" alone.
"""

import numpy as np
from ml_collections import ConfigDict

from experiments import arms, diffusion
from experiments import classification as cls
from experiments.studies import Claim, Study
from jkd import train
from jkd.errors import UserError

BASELINE = "t1"


def stages(config: ConfigDict) -> list[train.Stage]:
    """The teachers, the students, and the stage that compares the students' features."""
    return arms.stages(config, last=diffusion.stages)


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the model that a stage publishes classifies images."""
    if stage == diffusion.STAGE:
        raise UserError(f"Stage {stage!r} compares features and holds no model: name a teacher or a student.")
    return arms.predictor(config, stage)


# --- claims ---


def interaction(name: str, paper: str) -> Claim:
    """(T - T=1) of the plain teacher's students - (T - T=1) of the smoothed teacher's."""
    text = f"going from T = 1 to T = {name[1:]} costs more with the smoothed teacher"
    return Claim(text, paper, better=[name, "smooth_t1"], worse=["t1", f"smooth_{name}"])


def sign(name: str, split: str, group: str) -> Claim:
    """One sign of systematic diffusion with the smoothed teacher."""
    inside, verb = {"similar": ((0.0, np.inf), "closer"), "dissimilar": ((-np.inf, 0.0), "apart")}[group]
    text = f"smoothed teacher, T = {name[1:]}, {split} rows: {group} classes move {verb} (%)"
    return Claim(text, "so on ImageNet", value=(diffusion.STAGE, f"{split}/smooth_{name}_{group}"), inside=inside)


def stronger(name: str) -> Claim:
    """More diffusion with the smoothed teacher than with the plain one."""
    better, worse = ((diffusion.STAGE, f"test/{prefix}{name}_similar") for prefix in ("smooth_", ""))
    return Claim(f"T = {name[1:]}: similar classes move closer with the smoothed teacher", "", better, worse)


ACCURACY = (
    interaction("t64", "+2.01 (ImageNet, ResNet-50 -> 18)"),
    interaction("t8", "not tried"),
    interaction("t3", "+2.10"),
    interaction("t2", "+2.68"),
    Claim("the smoothed teacher's student is better at T = 1", "+0.18", better="smooth_t1", worse="t1"),
    Claim("the smoothed teacher is better", "+0.07", better="smooth", worse="teacher"),
)
RAISED = ("t2", "t3", "t64")  # the paper's
DIFFUSION = (
    *(sign(name, split, group) for split in diffusion.SPLITS for name in RAISED for group in diffusion.GROUPS),
    *(stronger(name) for name in RAISED),
)
COMPARED = tuple(f"{prefix}{name}" for prefix in ("", "smooth_") for name in ("t1", *RAISED))
STUDIES = (
    Study("digits", "configs/label_smoothing_kd.py", (0.01, 0.03, 0.1, 0.3), 3, ACCURACY),
    Study("hierarchy", "configs/label_smoothing_kd.py:hierarchy", (), 0, DIFFUSION, COMPARED),
)
