"""Energy KD: temperatures by the teacher's certainty, and augmentation of the uncertain examples.

Kim et al., Maximizing discrimination capability of knowledge distillation with energy function, Knowledge-Based
Systems 296, 2024. One teacher for each seed; every arm of the config is a student of it, paired by seed.

The paper gives certain (low-energy) examples the high temperature; the authors' published code does the opposite, which
is the arm `energy_kd_reversed`.
"""

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import arms, studies
from experiments import distillation as dst
from experiments.distillation_setup import Setup
from jkd import distill, metrics, train

BASELINE = "kd"  # what tables compare the other arms to

predictor = dst.predictor


def stages(config: ConfigDict) -> list[train.Stage]:
    """The teacher and one student for each arm, each an ensemble over the paired seeds."""
    return arms.stages(config, student_evaluators, teacher_evaluators)


def student_evaluators(setup: Setup, arm: ConfigDict) -> dict[str, train.Evaluator]:
    """The shares of the groups, for an arm that uses energies."""
    return {"groups": group_evaluator(setup, arm)} if arms.uses_energy(arm) else {}


def teacher_evaluators(setup: Setup, name: str) -> dict[str, train.Evaluator]:
    """How the teacher's energy goes with its confidence."""
    return {"energy": energy_evaluator(setup, name)}


def energy_evaluator(setup: Setup, name: str) -> train.Evaluator:
    """How a teacher's energy goes with its confidence and correctness, on the test rows."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        logits = setup.teach(name, published, setup.views["weak"].plain(batch["image"]))
        return {
            "energy": distill.energy_score(logits),
            "confidence": jax.nn.softmax(logits).max(-1),
            "correct": metrics.topk_correct(logits, batch["label"]),
        }

    def finish(rows: Any) -> dict[str, float]:
        order = np.argsort(rows["energy"], kind="stable")
        third = max(1, len(order) // 3)
        return {
            "rank_correlation_confidence": metrics.spearman(rows["energy"], rows["confidence"]),
            "accuracy_low_energy": 100 * float(rows["correct"][order[:third]].mean()),
            "accuracy_high_energy": 100 * float(rows["correct"][order[-third:]].mean()),
        }

    source = functools.partial(setup.task.part, name="test", batch_size=setup.config.eval_batch_size)
    return train.Evaluator(source, collect, finish, kind="gather")


def group_evaluator(setup: Setup, arm: ConfigDict) -> train.Evaluator:
    """The measured shares of the low- and high-energy groups among augmented views of the training rows.

    Images of variable size are read as central crops here, as in every pass in order.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        # A fixed key for each batch: the first row's number.
        key = jax.random.fold_in(jax.random.key(0), batch["index"][0])
        teachers = dst.teacher_logits(setup, arm, consts, dst.view(setup, arm, key, consts, batch))
        name, logits = next(iter(teachers.items()))
        energy, limits = distill.energy_score(logits), consts["thresholds"][name]
        return {
            "low": ((energy < limits["low"]) & mask).sum(),
            "high": ((energy > limits["high"]) & mask).sum(),
            "total": mask.sum(),
        }

    def finish(sums: Any) -> dict[str, float]:
        return {f"share_{name}": float(sums[name] / sums["total"]) for name in ("low", "high")}

    source = functools.partial(setup.task.part, name="train", batch_size=setup.config.eval_batch_size)
    return train.Evaluator(source, collect, finish)


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
STUDIES = (
    studies.Study("digits", "configs/energy_kd.py", (0.001, 0.003, 0.01, 0.02, 0.05, 0.1), 4, CLAIMS),
    studies.Study("fashion_lt", "configs/energy_kd.py:fashion_lt", (0.05, 0.15, 0.4, 1.0), 2, CLAIMS),
)
