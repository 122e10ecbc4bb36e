"""Several papers in one student: class-wise cosines, temperatures by energy, and two teachers.

    python -m experiments.train --config configs/composed_distillation.py --workdir runs/composed

An arm is a choice of terms, of how temperatures are found, of teachers and of what is seen twice, so that parts of
methods meet in a line each. Variants as in configs/cosine_kd.py.
"""

from ml_collections import ConfigDict

from experiments import distillation_settings as settings
from experiments.distillation_settings import arm

VARIANTS = settings.VARIANTS
CSKD = {"ce": 1.0, "cosine": 2.0}
BOTH = ("teacher", "second")


def all_arms() -> ConfigDict:
    """KD, then CSKD with one part more in each arm."""
    arms = ConfigDict()
    arms.kd = arm({"ce": 0.1, "kd": 0.9})
    arms.cskd = arm(CSKD)
    arms.cskd_energy = arm(CSKD, temperatures="energy")
    arms.cskd_energy_two_teachers = arm(CSKD, temperatures="energy", teachers=BOTH)
    arms.everything = arm(
        {"ce": 1.0, "kd": 0.5, "cosine": 1.0, "rank": 0.5},
        temperatures="energy",
        rank_mode="soft",
        teachers=BOTH,
        prune_rate=0.1,
        mix="all",
    )
    return arms


def get_config(variant: str = "default") -> ConfigDict:
    config = settings.base("arms")
    config.teachers.second = ConfigDict({"replica": 1})  # other initial parameters, another order
    config.arms = all_arms()
    settings.vary(config, variant)
    return config
