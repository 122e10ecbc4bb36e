"""Energy KD: temperatures by the teacher's certainty, and augmentation of the uncertain examples.

Kim et al., Maximizing discrimination capability of knowledge distillation with energy function, Knowledge-Based
Systems 296, 2024. One teacher for each seed; every arm of the config is a student of it, paired by seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import studies
from jkd import data, distill, metrics, nn, train
from jkd.errors import UserError, unknown
from jkd.train.ensemble import member

LOSSES = ("ce", "kd", "energy_kd", "dkd", "energy_dkd")
MIXES = ("none", "high_energy", "all")
MIXERS = ("cutmix", "mixup")
TEACHERS = ("live", "cached")


def stages(config: ConfigDict) -> list[train.Stage]:
    """The teacher and one student for each arm, each an ensemble over the paired seeds."""
    check(config)
    keys = cls.member_keys(config)
    setup = Setup.of(config)
    seeds = functools.partial(train.ensemble, keys=keys, mode=config.ensemble)
    teacher = load_teacher(setup) if config.teacher.workdir else seeds(train_teacher(setup))
    return [teacher, *(seeds(student(setup, name)) for name in selected_arms(config))]


def selected_arms(config: ConfigDict) -> list[str]:
    """The arms to run: `only`, or all; "teacher" alone trains no student."""
    for name in config.only:
        if name not in (*config.arms, "teacher"):
            raise unknown("arm in config.only", name, (*config.arms, "teacher"))
    return [name for name in config.only or config.arms if name != "teacher"]


def check(config: ConfigDict) -> None:
    """Raises UserError for settings that no arm could run with, before any data is read."""
    if config.teacher.source not in TEACHERS:
        raise unknown("teacher.source", config.teacher.source, TEACHERS)
    for name in selected_arms(config):
        arm = config.arms[name]
        if arm.loss not in LOSSES:
            raise unknown(f"arms.{name}.loss", arm.loss, LOSSES)
        if arm.mix not in MIXES:
            raise unknown(f"arms.{name}.mix", arm.mix, MIXES)
        if arm.mixer not in MIXERS:
            raise unknown(f"arms.{name}.mixer", arm.mixer, MIXERS)
        for field in ("temperature", "t_low", "t_mid", "t_high"):
            if not arm[field] > 0:
                raise UserError(f"arms.{name}.{field} must be > 0, got {arm[field]}.")
        if min(arm.low_rate, arm.high_rate) < 0 or arm.low_rate + arm.high_rate > 1:
            raise UserError(
                f"arms.{name}.low_rate and high_rate must be >= 0 and add up to at most 1, "
                f"got {arm.low_rate} and {arm.high_rate}."
            )
        if arm.mix != "none" and config.teacher.source == "cached":
            raise UserError(f"arms.{name} mixes images, which cached logits do not cover: set teacher.source=live.")


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share."""

    config: Any
    task: cls.Task
    views: cls.Views
    teacher: Any
    student: Any

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the data and builds the models of a config."""
        task = cls.load_task(config)
        teacher, student = (cls.build_model(section, task) for section in (config.teacher, config.student))
        return cls_(config, task, cls.make_views(config), teacher, student)

    def teach(self, variables: Any, images: jax.Array) -> jax.Array:
        """The teacher's logits, in evaluation mode and without gradient."""
        return jax.lax.stop_gradient(self.teacher.apply(variables, images, train=False).logits)

    # One function object for all arms: equal programs then compile once.

    @functools.cached_property
    def energies(self) -> Callable:
        """For `sweep`: the teacher's energy for random views."""
        return lambda teacher, batch, key: distill.energy_score(
            self.teach(teacher, self.views.train(key, batch["image"]))
        )

    @functools.cached_property
    def bank_logits(self) -> Callable:
        """For `sweep`: the teacher's logits for one view of a bank."""
        return lambda args, batch, key: self.teach(
            args["teacher"], bank_view(self.views, args["bank_key"], args["view"], batch["index"], batch["image"])
        )

    @functools.cached_property
    def student_evaluators(self) -> dict[str, train.Evaluator]:
        """Accuracies, and the shares of the energy groups."""
        _, per_epoch = cls.steps_of(self.config, self.task, 1)
        accuracies = cls.accuracy_evaluators(self.config, self.task, self.student, self.views, per_epoch)
        return {**accuracies, "groups": group_evaluator(self)}


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the model that a stage publishes classifies images."""
    setup = Setup.of(config)
    return cls.classifier(setup.teacher if stage == "teacher" else setup.student, setup.task, setup.views)


# --- the teacher ---


def train_teacher(setup: Setup) -> train.Stage:
    """A teacher trained by cross-entropy."""
    config, section = setup.config, setup.config.teacher
    steps, per_epoch = cls.steps_of(config, setup.task, section.epochs)
    optimizer = cls.make_optimizer(section, section.lr, steps, per_epoch)

    def step(key: jax.Array, state: Any, consts: Any, batch: Any, t: Any) -> Any:
        images = setup.views.train(key, batch["image"])

        def loss_fn(params: Any, batch: Any, key: Any) -> Any:
            out, model_state = nn.apply_train(setup.teacher.apply, params, state.model_state, images)
            correct = metrics.topk_correct(out.logits, batch["label"]).mean()
            return distill.cross_entropy(out.logits, batch["label"]), train.Aux({"accuracy": correct}, model_state)

        return train.make_train_step(loss_fn, optimizer)(state, batch, key)

    return train.Stage(
        "teacher",
        steps,
        prepare=lambda key, previous, sweep: setup.task.draw(key),
        data=lambda consts: setup.task.source(consts, config.batch_size),
        init=initializer(setup, setup.teacher, optimizer),
        step=step,
        publish=lambda state: state.variables,
        evaluators={
            **cls.accuracy_evaluators(config, setup.task, setup.teacher, setup.views, per_epoch),
            "energy": energy_evaluator(setup),
        },
    )


def load_teacher(setup: Setup) -> train.Stage:
    """A teacher from the finished run in `teacher.workdir`: one for all seeds, or one for each."""
    config = setup.config
    outcome = train.load_outcome(config.teacher.workdir, config.teacher.stage)
    if outcome.members == 1:
        outcome = dataclasses.replace(member(outcome, 0), members=0)
    shapes = jax.eval_shape(lambda: nn.init(setup.teacher, jax.random.key(0), setup.task.shape))
    check_teacher(outcome, shapes, config)
    return train.Stage(
        "teacher",
        0,
        prepare=lambda key, previous, sweep: {"variables": outcome.published},
        init=lambda key, previous, consts: consts["variables"],
        members=outcome.members,
        key=cls.member_keys(config) if outcome.members else jax.random.key(config.seed),
    )


def check_teacher(outcome: train.Outcome, shapes: Any, config: ConfigDict) -> None:
    """Raises UserError unless a stored teacher is the model, and of the classes and seeds, that the config names."""
    if outcome.members not in (0, config.seeds):
        raise UserError(
            f"The teacher in {config.teacher.workdir} has {outcome.members} seeds and the config seeds="
            f"{config.seeds}: set seeds={outcome.members}, or give a teacher that was trained with seeds=1."
        )
    stored = jax.tree.map(lambda x: x.shape[1:] if outcome.members else x.shape, outcome.published)
    wanted = jax.tree.map(lambda x: x.shape, shapes)
    if stored == wanted:
        return
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    heads = [[s[-1] for p, s in jax.tree.leaves_with_path(t, **is_shape) if "head" in str(p)] for t in (stored, wanted)]
    raise UserError(
        f"The teacher in {config.teacher.workdir} is not the {config.teacher.model!r} of this config for this data "
        f"set (its head has {heads[0][:1]} outputs, the config's {heads[1][:1]}). Teacher and students need the same "
        "classes: set data.* and teacher.model to what the teacher was trained with."
    )


def initializer(setup: Setup, model: Any, optimizer: Any) -> Callable:
    """`Stage.init` of one model."""

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        return train.create_state(nn.init(model, key, setup.task.shape), optimizer)

    return init


def energy_evaluator(setup: Setup) -> train.Evaluator:
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


# --- the students ---


def student(setup: Setup, name: str) -> train.Stage:
    """The student of one arm."""
    config, arm = setup.config, setup.config.arms[name]
    steps, per_epoch = cls.steps_of(config, setup.task, arm.epochs)
    section = config.student.copy_and_resolve_references()
    section.milestones = arm.milestones
    optimizer = cls.make_optimizer(section, arm.lr, steps, per_epoch)
    evaluators = {n: e for n, e in setup.student_evaluators.items() if n != "groups" or uses_energy(arm)}
    return train.Stage(
        name,
        steps,
        needs=("teacher",),
        prepare=preparer(setup, arm),
        data=lambda consts: setup.task.source(consts, config.batch_size),
        init=initializer(setup, setup.student, optimizer),
        step=student_step(setup, arm, optimizer, per_epoch),
        publish=lambda state: state.variables,
        evaluators=evaluators,
    )


def uses_energy(arm: ConfigDict) -> bool:
    """Whether an arm needs thresholds."""
    return arm.loss in ("energy_kd", "energy_dkd") or arm.mix == "high_energy"


def preparer(setup: Setup, arm: ConfigDict) -> Callable:
    """`Stage.prepare` of an arm: rows, the teacher or its cached logits, and energy thresholds."""

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        # The teacher's stage drew its rows from the same key.
        consts: dict[str, Any] = setup.task.draw(key)
        teacher, sweep_key = previous["teacher"].published, jax.random.fold_in(key, 1)
        if setup.config.teacher.source == "cached":
            consts |= cache_logits(setup, teacher, consts, sweep_key, sweep)
        else:
            consts["teacher"] = teacher
        if uses_energy(arm):
            if setup.config.teacher.source == "cached":
                found = distill.energy_score(jnp.asarray(consts["logits"]).reshape(-1, setup.task.num_classes))
            else:
                source = setup.task.source(consts, setup.config.batch_size)
                found = sweep(setup.energies, teacher, source, sweep_key)
            thresholds = distill.energy_thresholds(jnp.asarray(found), arm.low_rate, arm.high_rate)
            consts["thresholds"] = dict(thresholds._asdict())
        return consts

    return prepare


def bank_view(views: cls.Views, key: Any, view: Any, index: jax.Array, images: jax.Array) -> jax.Array:
    """View `view` of each image: decided by the view's and the image's number alone, whatever the batch."""
    view = jnp.broadcast_to(view, index.shape)

    def one(number: Any, row: Any, image: jax.Array) -> jax.Array:
        return views.train(jax.random.fold_in(jax.random.fold_in(key, number), row), image[None])[0]

    return jax.vmap(one)(view, index, images)


def cache_logits(setup: Setup, teacher: Any, consts: Any, key: jax.Array, sweep: Callable) -> dict[str, Any]:
    """The teacher's logits for a fixed bank of views of the training rows, and where each row's are.

    Returns `logits` [views, train rows, classes], `slot` (row of the pool -> its place in them), `bank_key`.
    """
    source = setup.task.part(consts, "train", setup.config.eval_batch_size)
    logits = [
        sweep(setup.bank_logits, {"teacher": teacher, "bank_key": key, "view": np.int32(v)}, source)
        for v in range(setup.config.teacher.bank)
    ]
    slot = np.zeros(len(setup.task.pool), np.int32)
    slot[consts["rows"]["train"]] = np.arange(setup.task.sizes["train"], dtype=np.int32)
    return {"logits": np.stack(logits), "slot": slot, "bank_key": key}


def look(setup: Setup, key: jax.Array, consts: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The images of a step as the student sees them, and the teacher's logits for them."""
    if setup.config.teacher.source == "cached":
        number = jax.random.randint(key, batch["index"].shape, 0, setup.config.teacher.bank)
        images = bank_view(setup.views, consts["bank_key"], number, batch["index"], batch["image"])
        return images, consts["logits"][number, consts["slot"][batch["index"]]]
    images = setup.views.train(key, batch["image"])
    return images, setup.teach(consts["teacher"], images)


def student_step(setup: Setup, arm: ConfigDict, optimizer: Any, steps_per_epoch: float) -> Callable:
    """`Stage.step` of an arm."""
    loss = arm_loss(arm, steps_per_epoch)

    def step(key: jax.Array, state: Any, consts: Any, batch: Any, t: Any) -> Any:
        key_view, key_mix = jax.random.split(key)
        images, teacher_logits = look(setup, key_view, consts, batch)

        def loss_fn(params: Any, batch: Any, key: Any) -> Any:
            out, model_state = nn.apply_train(setup.student.apply, params, state.model_state, images)
            value = loss(out.logits, teacher_logits, batch["label"], consts, t)
            if arm.mix != "none":
                mixed, weights = mix(arm, key, images, teacher_logits, consts)
                again, model_state = nn.apply_train(setup.student.apply, params, model_state, mixed)
                target = setup.teach(consts["teacher"], mixed)
                value += arm.kd_weight * distill.high_energy_kd_loss(again.logits, target, arm.temperature, weights)
            correct = metrics.topk_correct(out.logits, batch["label"]).mean()
            return value, train.Aux({"accuracy": correct}, model_state)

        return train.make_train_step(loss_fn, optimizer)(state, batch, key_mix)

    return step


def arm_loss(arm: ConfigDict, steps_per_epoch: float) -> Callable:
    """The arm's loss on the original images: `(student, teacher, labels, consts, t) -> f32[]`."""
    temperatures = {"t_low": arm.t_low, "t_mid": arm.t_mid, "t_high": arm.t_high}
    warm_up = optax.linear_schedule(0.0, 1.0, max(1, round(arm.warmup_epochs * steps_per_epoch)))

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
        options = {"alpha": arm.alpha, "beta": arm.beta, "kd_scale": warm_up(t), **temperatures, **limits(consts)}
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


def group_evaluator(setup: Setup) -> train.Evaluator:
    """The measured shares of the low- and high-energy groups among augmented training views."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, jax.Array]:
        # A fixed key for each batch: the first row's number.
        key = jax.random.fold_in(jax.random.key(0), batch["index"][0])
        _, logits = look(setup, key, consts, batch)
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
    studies.Claim("KD beats training on labels alone", better="kd", worse="ce"),
    studies.Claim(
        "Energy KD beats KD (same epochs)", "better on CIFAR-100, -LT and ImageNet", better="energy_kd", worse="kd"
    ),
    studies.Claim(
        "Energy KD beats KD at 1.5 times the epochs, both", "not compared", better="energy_kd_long", worse="kd_long"
    ),
    studies.Claim(
        "high temperature for certain samples beats the reverse", better="energy_kd", worse="energy_kd_reversed"
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
        "low energy goes with high confidence (rank correlation)",
        value=("teacher", "energy/rank_correlation_confidence"),
        inside=(-1.0, -0.5),
    ),
    studies.Claim(
        "the low-energy group has the asked share of the views",
        value=("energy_kd", "groups/share_low"),
        inside=(0.28, 0.32),
    ),
)
STUDIES = (
    studies.Study("digits", "configs/energy_kd.py", (0.001, 0.003, 0.01, 0.02, 0.05), 4, CLAIMS),
    studies.Study("fashion_lt", "configs/energy_kd.py:fashion_lt", (0.02, 0.05, 0.15), 2, CLAIMS),
)
