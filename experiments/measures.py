"""What is measured of every teacher and student beside their accuracy, by all distillation methods alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import distillation as dst
from experiments.distillation_setup import Setup
from jkd import distill, metrics, train


def of_teacher(setup: Setup, name: str) -> dict[str, train.Evaluator]:
    """How a teacher's energy goes with its confidence."""
    return {"energy": energy_evaluator(setup, name)}


def of_students(setup: Setup) -> dict[str, train.Evaluator]:
    """What all students share: how alike they and their teachers are, where those are at hand."""
    return {} if setup.cached else {"agreement": agreement_evaluator(setup)}


def of_arm(setup: Setup, arm: ConfigDict) -> dict[str, train.Evaluator]:
    """The shares of the groups, for an arm that uses energies."""
    return {"groups": group_evaluator(setup, arm)} if dst.uses_energy(arm) else {}


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

    return train.Evaluator(setup.rows("test"), collect, finish, kind="gather")


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

    return train.Evaluator(setup.rows("train"), collect, finish)


def agreement_evaluator(setup: Setup) -> train.Evaluator:
    """Student and teachers (the mean of their logits) on the test rows: `agreement`."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        images = setup.views["weak"].plain(batch["image"])
        student = setup.student.apply(published, images, train=False).logits
        each = [setup.teach(name, variables, images) for name, variables in consts["teachers"].items()]
        return agreement_sums(student, each, batch["label"], mask)

    return train.Evaluator(setup.rows("test"), collect, agreement)


def agreement_sums(student: Any, teachers: Sequence[Any], labels: Any, mask: Any) -> dict[str, Any]:
    """What `agreement` is made of, for the rows of one batch: add them over batches."""
    teacher = distill.teacher_mean_logits(jnp.stack(teachers))
    ours, theirs = (jnp.where(mask[:, None], jax.nn.softmax(logits), 0) for logits in (student, teacher))
    predicted = [metrics.predicted_class(logits) for logits in (student, teacher)]
    return {
        "joint": metrics.joint_histogram(predicted[0], predicted[1], student.shape[1], mask),
        "products": jnp.stack([(a * b).sum(0) for a, b in ((ours, theirs), (ours, ours), (theirs, theirs))]),
        "bins": metrics.calibration_bins(jax.nn.softmax(student), labels, mask=mask)._asdict(),
        "kl": jnp.where(mask, metrics.predictive_kl(teacher, student), 0).sum(),
        "entropy": jnp.where(mask, metrics.predictive_entropy(student), 0).sum(),
        "spread": jnp.stack([jnp.where(mask, logits.std(axis=1), 0).sum() for logits in (student, teacher)]),
        "total": mask.sum(),
    }


def agreement(sums: Any) -> dict[str, float]:
    """How alike student and teachers are.

    `fidelity`: percent of equal predictions; `mutual_information` (nats) of the predicted classes; `kl` (nats) of the
    student's probabilities from the teachers'; `class_cosine`: the mean over classes of the cosine of both networks'
    probabilities over the rows; `entropy` (nats) and `ece` of the student; `logit_scale`: the standard deviation of
    the student's logits over classes, by that of the teachers'.
    """
    dot, ours, theirs = np.asarray(sums["products"], np.float64)
    total = float(sums["total"])
    return {
        "fidelity": 100 * float(np.trace(sums["joint"])) / total,
        "mutual_information": float(metrics.mutual_information(sums["joint"])),
        "kl": float(sums["kl"]) / total,
        "class_cosine": float(np.mean(dot / np.sqrt(ours * theirs + np.finfo(np.float32).tiny))),
        "entropy": float(sums["entropy"]) / total,
        "ece": float(metrics.ece(metrics.CalibrationBins(**sums["bins"]))),
        "logit_scale": float(sums["spread"][0] / sums["spread"][1]),
    }
