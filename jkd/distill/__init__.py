"""Knowledge distillation: losses, temperatures and what surrounds them."""

from jkd.distill.energy import (
    EnergyDKDTerms,
    EnergyKDTerms,
    EnergyThresholds,
    energy_dkd_loss,
    energy_dkd_terms,
    energy_kd_loss,
    energy_kd_terms,
    energy_score,
    energy_temperature,
    energy_thresholds,
)
from jkd.distill.high_energy import (
    HighEnergySelection,
    high_energy_capacity,
    high_energy_kd_loss,
    high_energy_partners,
    select_high_energy,
)
from jkd.distill.losses import (
    DKDTerms,
    cross_entropy,
    dkd_loss,
    dkd_terms,
    kd_loss,
)

__all__ = [
    "DKDTerms",
    "EnergyDKDTerms",
    "EnergyKDTerms",
    "EnergyThresholds",
    "HighEnergySelection",
    "cross_entropy",
    "dkd_loss",
    "dkd_terms",
    "energy_dkd_loss",
    "energy_dkd_terms",
    "energy_kd_loss",
    "energy_kd_terms",
    "energy_score",
    "energy_temperature",
    "energy_thresholds",
    "high_energy_capacity",
    "high_energy_kd_loss",
    "high_energy_partners",
    "kd_loss",
    "select_high_energy",
]
