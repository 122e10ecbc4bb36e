"""Energy KD: temperatures by the teacher's certainty, and augmentation of the uncertain examples.

Kim et al., Maximizing discrimination capability of knowledge distillation with energy function, Knowledge-Based
Systems 296, 2024. One teacher for each seed; every arm of the config is a student of it, paired by seed.

The paper gives certain (low-energy) examples the high temperature; the authors' published code does the opposite, which
is the arm `energy_kd_reversed`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import distillation as dst
from experiments import studies
from jkd import data, distill, metrics, nn, train
from jkd.errors import UserError, unknown

LOSSES = ("ce", "kd", "energy_kd", "dkd", "energy_dkd")
MIXES = ("none", "high_energy", "all")
MIXERS = ("cutmix", "mixup")
BASELINE = "kd"  # what tables compare the other arms to

predictor = dst.predictor


def stages(config: ConfigDict) -> list[train.Stage]:
    """The teacher and one student for each arm, each an ensemble over the paired seeds."""
    check(config)
    setup = dst.Setup.of(config)
    energies, groups = energy_sweep(setup), {"groups": group_evaluator(setup)}
    students = []
    for name in dst.selected_arms(config):
        arm = config.arms[name]
        step = functools.partial(student_step, setup, arm)
        if uses_energy(arm):
            thresholds = functools.partial(find_thresholds, setup, arm, energies)
            students.append(dst.student_stage(setup, name, step, thresholds, groups))
        else:
            students.append(dst.student_stage(setup, name, step))
    return [*dst.warm_stages(setup), dst.teacher_stage(setup, {"energy": energy_evaluator(setup)}), *students]


def check(config: ConfigDict) -> None:
    """Raises UserError for settings that no arm could run with, before any data is read."""
    dst.check(config)
    for name in dst.selected_arms(config):
        arm = config.arms[name]
        if arm.loss not in LOSSES:
            raise unknown(f"arms.{name}.loss", arm.loss, LOSSES)
        if arm.mix not in MIXES:
            raise unknown(f"arms.{name}.mix", arm.mix, MIXES)
        if arm.mixer not in MIXERS:
            raise unknown(f"arms.{name}.mixer", arm.mixer, MIXERS)
        weights = ("ce_weight", "kd_weight", "alpha", "beta", "warmup_epochs", "low_rate", "high_rate")
        temperatures = ("temperature", "t_low", "t_mid", "t_high")
        cls.check_numbers(arm, f"arms.{name}", positive=temperatures, nonnegative=weights)
        if arm.low_rate + arm.high_rate > 1:
            raise UserError(
                f"arms.{name}.low_rate and high_rate must add up to at most 1, got {arm.low_rate} and {arm.high_rate}."
            )
        if arm.mix == "high_energy" and not arm.high_rate > 0:
            raise UserError(f"arms.{name}.high_rate must be > 0 where mix is 'high_energy', got {arm.high_rate}.")
        if arm.mix != "none" and config.teacher.source == "cached":
            raise UserError(f"arms.{name} mixes images, which cached logits do not cover: set teacher.source=live.")


def energy_evaluator(setup: dst.Setup) -> train.Evaluator:
    """How the teacher's energy goes with its confidence and correctness, on the test rows."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        logits = setup.teach(published, setup.views.plain(batch["image"]))
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


def uses_energy(arm: ConfigDict) -> bool:
    """Whether an arm needs thresholds."""
    return arm.loss in ("energy_kd", "energy_dkd") or arm.mix == "high_energy"


def energy_sweep(setup: dst.Setup) -> Callable:
    """For `sweep`: the teacher's energy for random views. One function for all arms, so that it compiles once."""

    def energies(teacher: Any, batch: Any, key: jax.Array) -> jax.Array:
        return distill.energy_score(setup.teach(teacher, setup.views.train(key, batch["image"])))

    return energies


def find_thresholds(setup: dst.Setup, arm: ConfigDict, energies: Callable, consts: Any, key: Any, sweep: Any) -> dict:
    """The energy thresholds of an arm over one pass of training views, or over the whole bank of cached ones."""
    if setup.cached:
        found = distill.energy_score(jnp.asarray(consts["logits"]).reshape(-1, setup.task.num_classes))
    else:
        found = sweep(energies, consts["teacher"], setup.task.source(consts, setup.config.batch_size), key)
    thresholds = distill.energy_thresholds(jnp.asarray(found), arm.low_rate, arm.high_rate)
    return {"thresholds": dict(thresholds._asdict())}


def student_step(setup: dst.Setup, arm: ConfigDict, optimizer: Any, steps_per_epoch: float) -> train.ModelStep:
    """`Stage.step` of an arm."""
    loss = arm_loss(arm, steps_per_epoch)

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        return dst.view(setup, jax.random.split(key)[0], consts, batch)

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        images, labels, teacher_logits = batch["image"], batch["label"], dst.teacher_logits(setup, consts, batch)
        out, model_state = nn.apply_train(setup.student.apply, params, state.model_state, images)
        value = loss(out.logits, teacher_logits, labels, consts, t)
        if arm.mix != "none":
            mixed, weights = mix(arm, jax.random.split(key)[1], images, teacher_logits, consts)
            again, model_state = nn.apply_train(setup.student.apply, params, model_state, mixed)
            target = setup.teach(consts["teacher"], mixed)
            value += arm.kd_weight * distill.high_energy_kd_loss(again.logits, target, arm.temperature, weights)
        correct = metrics.topk_correct(out.logits, labels).mean()
        return value, train.Aux({"accuracy": correct, **group_shares(arm, teacher_logits, consts)}, model_state)

    return train.ModelStep(loss_fn, optimizer, view)


def temperatures_of(arm: ConfigDict) -> dict[str, float]:
    """The temperatures of an arm's three groups, as the losses take them."""
    return {name: arm[name] for name in ("t_low", "t_mid", "t_high")}


def group_shares(arm: ConfigDict, teacher_logits: Any, consts: Any) -> dict[str, jax.Array]:
    """What an arm that uses energies logs of a batch: the shares of both groups, and the mean temperature."""
    if not uses_energy(arm):
        return {}
    energy, limits = distill.energy_score(teacher_logits), consts["thresholds"]
    found = {"share_low": (energy < limits["low"]).mean(), "share_high": (energy > limits["high"]).mean()}
    if arm.loss in ("energy_kd", "energy_dkd"):
        rule = distill.energy_temperature(energy, limits["low"], limits["high"], **temperatures_of(arm))
        found["temperature"] = rule.mean()
    return found


def arm_loss(arm: ConfigDict, steps_per_epoch: float) -> Callable:
    """The arm's loss on the original images: `(student, teacher, labels, consts, t) -> f32[]`."""
    temperatures = temperatures_of(arm)

    def warm_up(t: Any) -> jax.Array:
        """min(epoch / warmup_epochs, 1), the epoch counted from 1."""
        return jnp.minimum((t // steps_per_epoch + 1) / max(arm.warmup_epochs, 1.0), 1.0)

    def limits(consts: Any) -> dict[str, Any]:
        return {"e_low": consts["thresholds"]["low"], "e_high": consts["thresholds"]["high"]}

    def ce(student: Any, teacher: Any, labels: Any, consts: Any, t: Any) -> Any:
        return distill.cross_entropy(student, labels)

    def kd(student: Any, teacher: Any, labels: Any, consts: Any, t: Any) -> Any:
        soft = distill.kd_loss(student, teacher, arm.temperature)
        return arm.ce_weight * distill.cross_entropy(student, labels) + arm.kd_weight * soft

    def energy_kd(student: Any, teacher: Any, labels: Any, consts: Any, t: Any) -> Any:
        options = {"ce_weight": arm.ce_weight, "kd_weight": arm.kd_weight, **temperatures, **limits(consts)}
        return distill.energy_kd_loss(student, teacher, labels, **options)

    def dkd(student: Any, teacher: Any, labels: Any, consts: Any, t: Any) -> Any:
        soft = distill.dkd_loss(student, teacher, labels, arm.temperature, alpha=arm.alpha, beta=arm.beta)
        return distill.cross_entropy(student, labels) + warm_up(t) * soft

    def energy_dkd(student: Any, teacher: Any, labels: Any, consts: Any, t: Any) -> Any:
        options = {"alpha": arm.alpha, "beta": arm.beta, "kd_weight": warm_up(t), **temperatures, **limits(consts)}
        return distill.energy_dkd_loss(student, teacher, labels, **options)

    return {"ce": ce, "kd": kd, "energy_kd": energy_kd, "dkd": dkd, "energy_dkd": energy_dkd}[arm.loss]


def mix(arm: ConfigDict, key: jax.Array, images: Any, teacher_logits: Any, consts: Any) -> tuple[Any, Any]:
    """The CutMix or MixUp images of a step, and their weights: of the uncertain examples, or of all."""
    pick, pair, draw = jax.random.split(key, 3)
    size = len(images)
    if arm.mix == "high_energy":
        capacity = distill.high_energy_capacity(arm.high_rate, size)
        energy = distill.energy_score(teacher_logits)
        index, weights = distill.select_high_energy(pick, energy, consts["thresholds"]["high"], capacity)
    else:
        index, weights = jnp.arange(size), jnp.ones(size)
    partners = distill.high_energy_partners(pair, weights)
    if arm.mixer == "mixup":
        return data.mixup(images[index], partners, data.draw_mixup(draw, len(index), 0.2).lam), weights
    drawn = data.draw_cutmix(draw, len(index), images.shape[1:3], 1.0)
    return data.cutmix(images[index], partners, drawn.lam, drawn.center), weights


def group_evaluator(setup: dst.Setup) -> train.Evaluator:
    """The measured shares of the low- and high-energy groups among augmented views of the training rows.

    Images of variable size are read as central crops here, as in every pass in order.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        # A fixed key for each batch: the first row's number.
        key = jax.random.fold_in(jax.random.key(0), batch["index"][0])
        logits = dst.teacher_logits(setup, consts, dst.view(setup, key, consts, batch))
        energy, limits = distill.energy_score(logits), consts["thresholds"]
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
