"""Arms: students of one config that differ in their loss, their temperatures, their teachers and what they see.

An arm's loss is a weighted sum of terms, each a function of the student's and one teacher's logits; with several
teachers it is the mean over them. The terms do not depend on how temperatures are chosen (fixed, or by the teacher's
energy), on the teachers (any number, with a pruned copy or without), or on a second, augmented look at the images:
whatever a paper calls a method is a choice of each.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import distillation as dst
from experiments import measures
from experiments.distillation_setup import Setup, batch_size, selected_arms
from experiments.warm_starts import warm_stages
from jkd import data, distill, metrics, nn, train
from jkd.errors import UserError, unknown

TEMPERATURES = ("fixed", "energy")
MIXES = ("none", "all", "high_energy")
MIXERS = ("cutmix", "mixup", "cutout", "strong")
STATISTICS = ("running", "batch")
RANKS = ("hard", "soft")
MASKS = ("scale", "select")
BASELINE = "kd"  # what tables compare the other arms to

predictor = dst.predictor


class Seen(NamedTuple):
    """What the terms of a loss are functions of."""

    student: jax.Array
    teacher: jax.Array
    labels: Any  # None for mixed images
    temperature: Any
    warm_up: Any = 1.0


def _kd(arm: ConfigDict, seen: Seen) -> jax.Array:
    return distill.kd_loss(seen.student, seen.teacher, seen.temperature)


def _dkd(arm: ConfigDict, seen: Seen) -> jax.Array:
    weights = {"alpha": arm.alpha, "beta": arm.beta}
    return seen.warm_up * distill.dkd_loss(seen.student, seen.teacher, seen.labels, seen.temperature, **weights)


def _cosine(arm: ConfigDict, seen: Seen) -> jax.Array:
    return distill.batch_cosine_loss(seen.student, seen.teacher, seen.temperature, weight=1.0)


def _cswt(arm: ConfigDict, seen: Seen) -> jax.Array:
    temperature = distill.cswt_temperature(seen.student, seen.teacher, t_low=arm.t_low, t_high=arm.t_high)
    return distill.batch_cosine_loss(seen.student, seen.teacher, temperature, weight=1.0)


def _value(arm: ConfigDict, seen: Seen) -> jax.Array:
    return distill.correlation_value_loss(seen.student, seen.teacher, temperature=seen.temperature, weight=1.0)


def _rank(arm: ConfigDict, seen: Seen) -> jax.Array:
    return distill.spearman_loss(seen.student, seen.teacher, weight=1.0, rank_mode=arm.rank_mode, tau=arm.tau)


# What compares a student with a teacher, by the name of its weight. Mixed images have no labels.
SOFT: dict[str, Callable[[ConfigDict, Seen], jax.Array]] = {
    "kd": _kd,
    "dkd": _dkd,
    "cosine": _cosine,
    "cswt": _cswt,
    "value": _value,
    "rank": _rank,
}
UNLABELED = tuple(name for name in SOFT if name != "dkd")


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not run, before any data is read."""
    for name in selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        choices = {"temperatures": TEMPERATURES, "mix": MIXES, "mixer": MIXERS, "pruned_statistics": STATISTICS}
        for one, known in {**choices, "rank_mode": RANKS, "mask_mode": MASKS, "view": dst.VIEWS}.items():
            if arm[one] not in known:
                raise unknown(f"{field}.{one}", arm[one], known)
        rates = ("alpha", "beta", "warmup_epochs", "low_rate", "high_rate", "prune_rate", "teacher_weight")
        temperatures = ("temperature", "t_low", "t_mid", "t_high", "tau")
        cls.check_numbers(arm, field, positive=temperatures, nonnegative=(*rates, "batch_size"))
        cls.check_numbers(arm.weights, f"{field}.weights", nonnegative=tuple(arm.weights))
        _check_shares(arm, field)
        if config.teacher.source == "cached" and arm.prune_rate:
            raise UserError(f"{field} prunes its teachers, which cached logits do not cover: set teacher.source=live.")
        _check_mix(config, arm, field)


def _check_shares(arm: ConfigDict, field: str) -> None:
    if arm.low_rate + arm.high_rate > 1:
        raise UserError(
            f"{field}.low_rate and high_rate must add up to at most 1, got {arm.low_rate} and {arm.high_rate}."
        )
    for name in ("prune_rate", "teacher_weight"):
        if arm[name] > 1:
            raise UserError(f"{field}.{name} must lie in [0, 1], got {arm[name]}.")
    if not any(arm.weights.values()):
        raise UserError(f"{field}.weights are all 0: there is no loss. Give one of {', '.join(arm.weights)} a weight.")


def _check_mix(config: ConfigDict, arm: ConfigDict, field: str) -> None:
    if arm.weights.two_view and arm.mix != "all":
        raise UserError(f"{field}.weights.two_view compares two views of all images: set {field}.mix to 'all'.")
    if arm.mix == "none":
        return
    if arm.mix == "high_energy" and not arm.high_rate > 0:
        raise UserError(f"{field}.high_rate must be > 0 where mix is 'high_energy', got {arm.high_rate}.")
    if arm.mix == "high_energy" and arm.mixer == "strong":
        raise UserError(f"{field}.mixer='strong' looks again at all images: set {field}.mix to 'all'.")
    if config.teacher.source == "cached":
        raise UserError(f"{field} mixes images, which cached logits do not cover: set teacher.source=live.")
    if arm.mix_group < 1:
        raise UserError(f"{field}.mix_group must be >= 1 images, got {arm.mix_group}.")
    allowed = ("kd",) if arm.mix == "high_energy" else (*UNLABELED, "two_view")
    if not any(arm.weights[name] for name in allowed):
        raise UserError(f"{field}.weights: mix={arm.mix!r} needs a weight > 0 for one of {', '.join(allowed)}.")


# --- losses ---


def objective(arm: ConfigDict, steps_per_epoch: float) -> Callable:
    """The arm's loss on the images of its view: `(student, {teacher: logits}, labels, consts, t) -> f32[]`."""

    def loss(student: Any, teachers: Mapping[str, Any], labels: Any, consts: Any, t: Any) -> Any:
        # min(epoch / warmup_epochs, 1), the epoch counted from 1.
        warm_up = jnp.minimum((t // steps_per_epoch + 1) / max(arm.warmup_epochs, 1.0), 1.0)
        value = arm.weights.ce * distill.cross_entropy(student, labels) if arm.weights.ce else 0.0
        return value + soft(arm, SOFT, student, teachers, labels, consts, warm_up)

    return loss


def soft(
    arm: ConfigDict, names: Any, student: Any, teachers: Mapping[str, Any], labels: Any, consts: Any, warm_up: Any = 1.0
) -> Any:
    """The weighted sum of the named terms, and its mean over the teachers."""
    used = [name for name in names if arm.weights[name]]

    def of(teacher: str, logits: Any) -> Any:
        seen = Seen(student, logits, labels, temperature(arm, logits, consts, teacher), warm_up)
        return sum(arm.weights[name] * SOFT[name](arm, seen) for name in used)

    return sum(of(name, logits) for name, logits in teachers.items()) / len(teachers) if used else 0.0


def temperature(arm: ConfigDict, teacher_logits: Any, consts: Any, teacher: str) -> Any:
    """One temperature, or one for each example by the energy of its teacher's logits."""
    if arm.temperatures == "fixed":
        return arm.temperature
    limits, energy = consts["thresholds"][teacher], distill.energy_score(teacher_logits)
    rule = {name: arm[name] for name in ("t_low", "t_mid", "t_high")}
    return distill.energy_temperature(energy, limits["low"], limits["high"], **rule)


def student_step(setup: Setup, arm: ConfigDict, optimizer: Any, steps_per_epoch: float) -> train.ModelStep:
    """`Stage.step` of an arm."""
    loss = objective(arm, steps_per_epoch)

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        seen = dst.view(setup, arm, jax.random.split(key)[0], consts, batch)
        if arm.mix == "none" or arm.mixer != "strong":
            return seen
        return {**seen, "second": setup.views["strong"].train(jax.random.split(key, 3)[2], batch["image"])}

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        images, labels = batch["image"], batch["label"]
        teachers = dst.teacher_logits(setup, arm, consts, batch)
        out, model_state = nn.apply_train(setup.student.apply, params, state.model_state, images)
        value = loss(out.logits, teachers, labels, consts, t)
        if arm.mix != "none":
            mixed, weights = mix(arm, jax.random.split(key)[1], batch, teachers, consts)
            again, model_state = nn.apply_train(setup.student.apply, params, model_state, mixed)
            targets = dst.live_logits(setup, arm, consts, mixed)
            value += mixed_loss(arm, again.logits, targets, weights, consts)
            value += two_view_loss(arm, (out.logits, again.logits), (teachers, targets), labels)
        correct = metrics.topk_correct(out.logits, labels).mean()
        return value, train.Aux({"accuracy": correct, **group_shares(arm, teachers, consts)}, model_state)

    return train.ModelStep(loss_fn, optimizer, view)


# --- energies ---


def find_thresholds(setup: Setup, arm: ConfigDict, consts: Any, key: Any, sweep: Any) -> dict[str, Any]:
    """The energy thresholds of an arm's teachers: over one pass of training views, or all cached ones."""
    if not dst.uses_energy(arm):
        return {}
    found = {}
    for name in arm.teachers:
        if setup.cached:
            energies = distill.energy_score(jnp.asarray(consts["logits"][name]).reshape(-1, setup.task.num_classes))
        else:
            source = setup.task.source(consts, batch_size(setup.config, arm))
            of, seen = teacher_energies(setup, arm, name, consts)
            energies = sweep(of, seen, source, key)
        limits = distill.energy_thresholds(jnp.asarray(energies), arm.low_rate, arm.high_rate)
        found[name] = dict(limits._asdict())
    return {"thresholds": found}


def teacher_energies(setup: Setup, arm: ConfigDict, name: str, consts: Any) -> tuple[Callable, Any]:
    """For `sweep`: the energies of the logits that an arm sees of a teacher, and what they are computed from."""
    if not arm.prune_rate:
        return setup.energies[name, arm.view], consts["teachers"][name]

    def energies(args: Any, batch: Any, key: jax.Array) -> jax.Array:
        images = setup.views[arm.view].train(key, batch["image"])
        return distill.energy_score(dst.live_logits(setup, arm, args, images)[name])

    return energies, {part: {name: consts[part][name]} for part in ("teachers", "pruned")}


def group_shares(arm: ConfigDict, teachers: Mapping[str, Any], consts: Any) -> dict[str, jax.Array]:
    """What an arm that uses energies logs of a batch: the shares of both groups, and the mean temperature."""
    if not dst.uses_energy(arm):
        return {}
    name, logits = next(iter(teachers.items()))
    energy, limits = distill.energy_score(logits), consts["thresholds"][name]
    found = {"share_low": (energy < limits["low"]).mean(), "share_high": (energy > limits["high"]).mean()}
    if arm.temperatures == "energy":
        found["temperature"] = temperature(arm, logits, consts, name).mean()
    return found


# --- the second look ---


def mix(
    arm: ConfigDict, key: jax.Array, batch: Mapping[str, Any], teachers: Mapping[str, Any], consts: Any
) -> tuple[Any, Any]:
    """The augmented images of a step, and their weights: of the uncertain examples, or of all.

    Images are picked and mixed among neighbours of the batch that one device holds, so that none has to travel:
    `mix_group` of them, or more where that does not divide the batch.
    """
    if arm.mixer == "strong":
        return batch["second"], jnp.ones(len(batch["image"]))
    name, logits = next(iter(teachers.items()))
    rows = {"image": batch["image"], "energy": distill.energy_score(logits)}
    groups = math.gcd(len(logits), max(1, len(logits) // arm.mix_group))
    parts = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), rows)
    high = consts["thresholds"][name]["high"] if arm.mix == "high_energy" else None
    mixed = jax.vmap(functools.partial(mix_neighbours, arm, high))(jax.random.split(key, groups), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mixed)


def mix_neighbours(arm: ConfigDict, e_high: Any, key: jax.Array, rows: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """`mix` for one group of images."""
    images, size = rows["image"], len(rows["image"])
    pick, pair, draw = jax.random.split(key, 3)
    if arm.mix == "high_energy":
        capacity = distill.high_energy_capacity(arm.high_rate, size)
        index, weights = distill.select_high_energy(pick, rows["energy"], e_high, capacity)
    else:
        index, weights = jnp.arange(size), jnp.ones(size)
    if arm.mixer == "cutout":  # 8 pixels of 32, one place for the whole group
        return data.cutout(draw, images[index], images.shape[1] // 4, per_example=False), weights
    partners = distill.high_energy_partners(pair, weights)
    if arm.mixer == "mixup":
        return data.mixup(images[index], partners, data.draw_mixup(draw, len(index), 0.2).lam), weights
    drawn = data.draw_cutmix(draw, len(index), images.shape[1:3], 1.0)
    return data.cutmix(images[index], partners, drawn.lam, drawn.center), weights


def mixed_loss(arm: ConfigDict, student: Any, teachers: Mapping[str, Any], weights: Any, consts: Any) -> Any:
    """The arm's terms that need no label, on the augmented images."""
    if arm.mix == "high_energy":
        each = [distill.high_energy_kd_loss(student, one, arm.temperature, weights) for one in teachers.values()]
        return arm.weights.kd * sum(each) / len(each)
    return soft(arm, UNLABELED, student, teachers, None, consts)


def two_view_loss(
    arm: ConfigDict, students: tuple[Any, Any], teachers: tuple[Mapping[str, Any], Mapping[str, Any]], labels: Any
) -> Any:
    """The loss of both views together, weak and strong, and its mean over the teachers."""
    if not arm.weights.two_view:
        return 0.0
    options = {name: arm[name] for name in ("temperature", "t_low", "t_high", "mask_mode")}

    def of(name: str) -> Any:
        return distill.cskd_two_view_loss(*students, teachers[0][name], teachers[1][name], labels, **options)

    return arm.weights.two_view * sum(of(name) for name in teachers[0]) / len(teachers[0])


# --- the run ---


def stages(
    config: ConfigDict,
    more: Callable[[Setup, ConfigDict], Mapping[str, train.Evaluator]] = lambda setup, arm: {},
    last: Callable[[Setup], list[train.Stage]] = lambda setup: [],
) -> list[train.Stage]:
    """The teachers of a config and one student for each arm, each an ensemble over the paired seeds.

    Args:
      config: as made by `experiments/distillation_settings.py`.
      more: `(setup, arm) -> {name: Evaluator}`, beside those that the students of all methods have.
      last: `setup -> stages` that follow.
    """
    dst.check(config)
    check(config)
    setup = Setup.of(config)
    shared = measures.of_students(setup)
    students = {name: {**shared, **more(setup, config.arms[name])} for name in selected_arms(config)}
    return [
        *warm_stages(setup),
        *dst.teacher_stages(setup, functools.partial(measures.of_teacher, setup)),
        *(arm_stage(setup, name, evaluators) for name, evaluators in students.items()),
        *last(setup),
    ]


def arm_stage(setup: Setup, name: str, evaluators: Mapping[str, train.Evaluator]) -> train.Stage:
    """The student of one arm; `evaluators` are those that the arms share, one object each, which compiles once."""
    arm = setup.config.arms[name]
    step = functools.partial(student_step, setup, arm)
    thresholds = functools.partial(find_thresholds, setup, arm)
    return dst.student_stage(setup, name, step, thresholds, {**evaluators, **measures.of_arm(setup, arm)})
