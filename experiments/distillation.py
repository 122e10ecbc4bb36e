"""Teachers and students as stages: what the distillation methods share.

A config has `teachers`, `student` and `arms`; each arm is one student, with its own loss, teachers, learning rate and
epochs. A teacher's stage trains a network or takes it from a finished run; students see its logits live, or cached for
a fixed bank of views.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.compression import MASKS, make_groups
from experiments.distillation_setup import (
    Setup,
    bank_view,
    batch_size,
    needed,
    selected_arms,
    selected_teachers,
    teacher_section,
    variable_shapes,
)
from experiments.networks import cross_entropy_step, is_kernel, seeds
from experiments.optimizers import check_optimizer, make_optimizer
from experiments.stored import FILES, Stored, check_seeds, one_of, stored_stage
from experiments.warm_starts import check_warm, read_as, warm_needs, warmed
from jkd import distill, nn, prune, quantize, train
from jkd.errors import UserError, unknown

TEACHERS = ("live", "cached")
VIEWS = ("weak", "strong")
NETWORK = ("model", "hidden", "width", "norm")  # fields that say what a network is


def uses_energy(arm: ConfigDict) -> bool:
    """Whether an arm needs thresholds."""
    return arm.temperatures == "energy" or arm.mix == "high_energy"


def check(config: ConfigDict) -> None:
    """Raises UserError for names that do not exist, and for numbers that nothing could be trained with."""
    cls.member_keys(config)
    check_warm(config)
    cls.check_numbers(config, "", nonnegative=("eval_epochs",))
    for name in config.teachers:
        check_section(teacher_section(config, name), f"teachers.{name}" if config.teachers[name] else "teacher")
    cls.check_numbers(config.student, "student", nonnegative=("momentum", "weight_decay", "warmup_epochs"))
    for name in selected_arms(config):
        arm = config.arms[name]
        cls.check_numbers(arm, f"arms.{name}", positive=("lr", "epochs"))
        check_optimizer(config.student, "student", f"arms.{name}.milestones", arm.milestones)
        for teacher in arm.teachers:
            if teacher not in config.teachers:
                raise unknown(f"teacher in arms.{name}.teachers", teacher, config.teachers)
        if not arm.teachers:
            raise UserError(f"arms.{name}.teachers is empty: give one of {', '.join(config.teachers)}.")
        check_compression(config, arm, f"arms.{name}")
    if config.teacher.source == "cached" and config.data.image_size:
        raise UserError(
            "teacher.source=cached needs images of one size: those cropped to data.image_size are read in another crop "
            "each time. Set teacher.source=live."
        )


def check_section(section: ConfigDict, field: str) -> None:
    """Raises UserError for a teacher that could not be trained."""
    cls.check_numbers(section, field, positive=("lr", "epochs"))
    cls.check_numbers(section, field, nonnegative=("momentum", "weight_decay", "warmup_epochs", "smoothing", "replica"))
    check_optimizer(section, field, f"{field}.milestones", section.milestones)
    for name, known in (("source", TEACHERS), ("view", VIEWS)):
        if section[name] not in known:
            raise unknown(f"{field}.{name}", section[name], known)
    if section.smoothing > 1:
        raise UserError(f"{field}.smoothing must lie in [0, 1], got {section.smoothing}.")
    if section.bank < 1:
        raise UserError(f"{field}.bank must be >= 1 views of each image, got {section.bank}.")


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the model that a stage publishes classifies images."""
    setup = Setup.of(config)
    plain = cls.classifier(setup.model(stage), setup.task, setup.views["weak"])
    if stage not in config.arms:
        return plain
    shapes = jax.eval_shape(functools.partial(small_start, config, config.arms[stage]), plain.variables)
    small = cls.classifier(setup.student, setup.task, setup.views["weak"], shapes)
    return dataclasses.replace(small, model=plain.model, plain=setup.student.plain)


# --- the teachers ---


def teacher_stages(setup: Setup, evaluators: Callable | None = None) -> list[train.Stage]:
    """One stage a teacher: a network for each seed trained by cross-entropy, or taken from a finished run.

    `evaluators(name)` are added to the accuracies of a teacher that is trained.
    """
    stages = []
    for name in selected_teachers(setup.config):
        section = teacher_section(setup.config, name)
        if section.workdir:
            stages.append(load_teacher(setup, name, section))
        else:
            more = evaluators(name) if evaluators else {}
            stages.append(seeds(setup, train_teacher(setup, name, section, more)))
    return stages


def train_teacher(
    setup: Setup, name: str, section: ConfigDict, evaluators: Mapping[str, train.Evaluator]
) -> train.Stage:
    """A teacher trained by cross-entropy on (smoothed) labels."""
    config, model = setup.config, setup.teachers[name]
    steps, per_epoch = cls.steps_of(config, setup.task, section.epochs)
    optimizer = make_optimizer(section, section.lr, steps, per_epoch)
    return train.Stage(
        name,
        steps,
        prepare=lambda key, previous, sweep: setup.task.draw(key, section.replica),
        data=lambda consts: setup.task.source(consts, config.batch_size),
        needs=warm_needs(setup, "teacher"),
        init=initializer(setup, name, optimizer, section.replica),
        step=cross_entropy_step(model, setup.views[section.view], optimizer, section.smoothing),
        publish=lambda state: state.variables,
        evaluators={
            **cls.accuracy_evaluators(config, setup.task, model, setup.views["weak"], per_epoch),
            **evaluators,
        },
    )


def load_teacher(setup: Setup, name: str, section: ConfigDict) -> train.Stage:
    """A teacher from the finished run or file of weights `workdir`: one for all seeds, or one for each."""
    stage = "" if section.workdir.endswith(FILES) else section.stage or name
    stored = read_as(setup, name, Stored(section.workdir, stage))
    shapes = variable_shapes(setup, name)
    check = functools.partial(check_teacher, shapes=shapes, section=section, config=setup.config)
    return stored_stage(name, stored, setup.config, check)


def check_teacher(outcome: train.Outcome, shapes: Any, section: ConfigDict, config: ConfigDict) -> None:
    """Raises UserError unless a stored teacher is the model, and of the classes and seeds, that the config names."""
    check_seeds(outcome, config, f"The teacher in {section.workdir}")
    stored = jax.tree.map(lambda x: x.shape, one_of(outcome))
    wanted = jax.tree.map(lambda x: x.shape, shapes)
    if stored == wanted:
        return
    heads = [_head_sizes(shapes) for shapes in (stored, wanted)]
    raise UserError(
        f"The teacher in {section.workdir} is not the {section.model!r} of this config for this data "
        f"set (its head has {heads[0][:1]} outputs, the config's {heads[1][:1]}). Teacher and students need the same "
        "classes: set data.* and teacher.model to what the teacher was trained with."
    )


def _head_sizes(shapes: Any) -> list[int]:
    leaves = jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return [shape[-1] for path, shape in leaves if "head" in str(path)]


def initializer(setup: Setup, stage: str, optimizer: Any, replica: int = 0) -> Callable:
    """`Stage.init` of a teacher or a student; another `replica` starts elsewhere."""

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        variables = nn.init(setup.model(stage), cls.replica_key(key, replica), setup.task.shape)
        part = "teacher" if stage in setup.teachers else "student"
        return train.create_state(warmed(setup, part, variables, previous), optimizer)

    return init


# --- the students ---


def student_initializer(setup: Setup, name: str, optimizer: Any) -> Callable:
    """`Stage.init` of a student: at random, from a warm start or from one of the teachers; then made smaller."""
    arm, fresh = setup.config.arms[name], initializer(setup, name, optimizer)

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        variables = previous[arm.start].published if arm.start else fresh(key, previous, consts).variables
        return train.create_state(small_start(setup.config, arm, variables), optimizer)

    return init


def small_start(config: ConfigDict, arm: ConfigDict, variables: Any) -> Any:
    """A student's variables, of which the smallest weights are masked and the others low-bit, as the arm says."""
    exempt, params, masks = config.student.exempt, variables["params"], {}
    if arm.keep < 1:
        found = prune.ones_masks(params, lambda path, leaf: is_kernel(path, exempt))
        masks = {MASKS: prune.global_magnitude_mask(params, found, arm.keep)}
        params = params if arm.bits else prune.apply_masks(params, masks[MASKS])
    if arm.bits:
        params = quantize.quantize_params(params, arm.bits, rules=[(one, 0) for one in exempt], form=arm.form)
    return {**variables, "params": params, **masks}


def check_compression(config: ConfigDict, arm: ConfigDict, field: str) -> None:
    """Raises UserError for a student that could not be made smaller."""
    if arm.start and arm.start not in config.teachers:
        raise unknown(f"stage in {field}.start", arm.start, config.teachers)
    if arm.start:
        start = teacher_section(config, arm.start)
        ours, theirs = ({one: section[one] for one in NETWORK} for section in (config.student, start))
        if ours != theirs:
            raise UserError(f"{field}.start={arm.start!r} must be a network like the student: {theirs} is not {ours}.")
    if not 0 < arm.keep <= 1:
        raise UserError(f"{field}.keep must lie in (0, 1]: the sparsity 1 - keep in [0, 1), got {arm.keep}.")
    if not 0 <= arm.bits <= 8:
        raise UserError(f"{field}.bits must be an integer in 0..8 (0: full precision), got {arm.bits}.")
    if arm.form not in ("onehot", "binary", "latent"):
        raise unknown(f"{field}.form", arm.form, ("onehot", "binary", "latent"))
    cls.check_numbers(arm, field, positive=("choice_scale", "level_scale"))


def student_stage(
    setup: Setup,
    name: str,
    step: Callable[[Any, float], Callable],
    more_consts: Callable = lambda consts, key, sweep: {},
    evaluators: Mapping[str, train.Evaluator] | None = None,
) -> train.Stage:
    """The student of one arm, for each seed.

    Args:
      setup: of the config.
      name: of the arm.
      step: `(optimizer, steps per epoch) -> Stage.step`.
      more_consts: `(consts, key, sweep) -> dict`: what the arm's step needs besides rows, teacher or cached logits.
      evaluators: added to the accuracies.
    """
    config, arm = setup.config, setup.config.arms[name]
    size = batch_size(config, arm)
    steps, per_epoch = cls.steps_of(config, setup.task, arm.epochs, size)
    section = config.student.copy_and_resolve_references()
    section.milestones = arm.milestones
    optimizer = make_groups(section, arm, steps, per_epoch)

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        # The teachers' stages drew their rows from the same key.
        consts: dict[str, Any] = setup.task.draw(key)
        teachers, sweep_key = {name: previous[name].published for name in arm.teachers}, jax.random.fold_in(key, 1)
        if setup.cached:
            consts |= cache_logits(setup, arm, teachers, consts, sweep_key, sweep)
        else:
            consts["teachers"] = teachers
        if arm.prune_rate:
            consts["pruned"] = {name: pruned(variables, arm.prune_rate) for name, variables in teachers.items()}
        return consts | more_consts(consts, sweep_key, sweep)

    stage = train.Stage(
        name,
        steps,
        needs=(*needed(arm), *warm_needs(setup, "student")),
        prepare=prepare,
        data=lambda consts: setup.task.source(consts, size),
        init=student_initializer(setup, name, optimizer),
        step=step(optimizer, per_epoch),
        publish=lambda state: state.variables,
        evaluators={**setup.accuracies, **(evaluators or {})},
    )
    return seeds(setup, stage)


def pruned(variables: Any, rate: float) -> Any:
    """The variables with the smallest weights of every layer set to zero."""
    return {**variables, "params": prune.prune_params(variables["params"], rate)}


def cache_logits(
    setup: Setup, arm: ConfigDict, teachers: Mapping[str, Any], consts: Any, key: jax.Array, sweep: Callable
) -> dict[str, Any]:
    """The teachers' logits for a fixed bank of views of the training rows, and where each row's are.

    Returns `logits` {teacher: [views, train rows, classes]}, `slot` (row of the pool -> its place in them), `bank_key`.
    """
    source = setup.task.part(consts, "train", setup.config.eval_batch_size)

    def of(name: str, view: int) -> np.ndarray:
        args = {"teacher": teachers[name], "bank_key": key, "view": np.int32(view)}
        return sweep(setup.bank_logits[name, arm.view], args, source)

    views = range(setup.config.teacher.bank)
    logits = {name: np.stack([of(name, view) for view in views]) for name in teachers}
    slot = np.zeros(len(setup.task.pool), np.int32)
    slot[consts["rows"]["train"]] = np.arange(setup.task.sizes["train"], dtype=np.int32)
    return {"logits": logits, "slot": slot, "bank_key": key}


def view(setup: Setup, arm: ConfigDict, key: jax.Array, consts: Any, batch: Any) -> dict[str, Any]:
    """The batch with images as student and teachers see them, and with "teacher_logits" where those are cached."""
    views = setup.views[arm.view]
    if not setup.cached:
        return {**batch, "image": views.train(key, batch["image"])}
    number = jax.random.randint(key, batch["index"].shape, 0, setup.config.teacher.bank)
    images = bank_view(views, consts["bank_key"], number, batch["index"], batch["image"])
    place = consts["slot"][batch["index"]]
    logits = {name: bank[number, place] for name, bank in consts["logits"].items()}
    return {**batch, "image": images, "teacher_logits": logits}


def teacher_logits(setup: Setup, arm: ConfigDict, consts: Any, batch: Any) -> dict[str, jax.Array]:
    """The logits of the arm's teachers for a batch of `view`."""
    return batch["teacher_logits"] if setup.cached else live_logits(setup, arm, consts, batch["image"])


def live_logits(setup: Setup, arm: ConfigDict, consts: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The logits of the arm's teachers for images, mixed with those of their pruned copies where it has some."""
    found = {name: setup.teach(name, variables, images) for name, variables in consts["teachers"].items()}
    if not arm.prune_rate:
        return found

    def pruned_logits(name: str) -> jax.Array:
        variables = consts["pruned"][name]
        if arm.pruned_statistics == "running":
            return setup.teach(name, variables, images)
        rest = {part: tree for part, tree in variables.items() if part != "params"}
        out, _ = nn.apply_train(setup.teachers[name].apply, variables["params"], rest, images)
        return jax.lax.stop_gradient(out.logits)

    return {
        name: distill.mix_teacher_logits(logits, pruned_logits(name), teacher_weight=arm.teacher_weight)
        for name, logits in found.items()
    }
