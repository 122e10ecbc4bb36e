"""A teacher and students as stages: what the distillation methods share.

A config has `teacher`, `student` and `arms`; each arm is one student, with its own loss, learning rate and epochs.
The teacher's stage trains a network or takes it from a finished run; a student sees its logits live, or cached for a
fixed bank of views.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.stored import FILES, Stored, check_seeds, one_of, stored_stage
from jkd import distill, metrics, nn, train
from jkd.errors import UserError, unknown
from jkd.train.log import console
from jkd.train.warm import parse_rules

TEACHERS = ("live", "cached")


def selected_arms(config: ConfigDict) -> list[str]:
    """The arms to run: `only`, or all; "teacher" alone trains no student."""
    for name in config.only:
        if name not in (*config.arms, "teacher"):
            raise unknown("arm in config.only", name, (*config.arms, "teacher"))
    return [name for name in config.only or config.arms if name != "teacher"]


def check(config: ConfigDict) -> None:
    """Raises UserError for names that do not exist, and for numbers that nothing could be trained with."""
    cls.member_keys(config)
    check_warm(config)
    cls.check_numbers(config, "", nonnegative=("eval_epochs",))
    cls.check_numbers(config.teacher, "teacher", positive=("lr", "epochs"))
    cls.check_schedule(config.teacher, "teacher", "teacher.milestones", config.teacher.milestones)
    for name in ("teacher", "student"):
        cls.check_numbers(config[name], name, nonnegative=("momentum", "weight_decay"))
    for name in selected_arms(config):
        arm = config.arms[name]
        cls.check_numbers(arm, f"arms.{name}", positive=("lr", "epochs"))
        cls.check_schedule(config.student, "student", f"arms.{name}.milestones", arm.milestones)
    if config.teacher.source not in TEACHERS:
        raise unknown("teacher.source", config.teacher.source, TEACHERS)
    if config.teacher.source == "cached" and config.data.image_size:
        raise UserError(
            "teacher.source=cached needs images of one size: those cropped to data.image_size are read in another crop "
            "each time. Set teacher.source=live."
        )
    if config.teacher.bank < 1:
        raise UserError(f"teacher.bank must be >= 1 views of each image, got {config.teacher.bank}.")


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
        teacher, student = (
            cls.build_model(section, task, config.precision) for section in (config.teacher, config.student)
        )
        return cls_(config, task, cls.make_views(config), teacher, student)

    @property
    def cached(self) -> bool:
        """Whether students see cached logits of the teacher."""
        return self.config.teacher.source == "cached"

    def teach(self, variables: Any, images: jax.Array) -> jax.Array:
        """The teacher's logits, in evaluation mode and without gradient."""
        return jax.lax.stop_gradient(self.teacher.apply(variables, images, train=False).logits)

    # One function object for all arms: equal programs then compile once.

    @functools.cached_property
    def bank_logits(self) -> Callable:
        """For `sweep`: the teacher's logits for one view of a bank."""
        return lambda args, batch, key: self.teach(
            args["teacher"], bank_view(self.views, args["bank_key"], args["view"], batch["index"], batch["image"])
        )

    @functools.cached_property
    def accuracies(self) -> dict[str, train.Evaluator]:
        """The accuracies of a student."""
        _, per_epoch = cls.steps_of(self.config, self.task, 1)
        return cls.accuracy_evaluators(self.config, self.task, self.student, self.views, per_epoch)


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the model that a stage publishes classifies images."""
    setup = Setup.of(config)
    return cls.classifier(setup.teacher if stage == "teacher" else setup.student, setup.task, setup.views)


# --- the teacher ---


def teacher_stage(setup: Setup, evaluators: Mapping[str, train.Evaluator] | None = None) -> train.Stage:
    """The stage "teacher": a network for each seed trained by cross-entropy, or taken from `teacher.workdir`.

    `evaluators` are added to the accuracies of a teacher that is trained.
    """
    if setup.config.teacher.workdir:
        return load_teacher(setup)
    return seeds(setup, train_teacher(setup, evaluators or {}))


def seeds(setup: Setup, stage: train.Stage) -> train.Stage:
    """A stage as the config executes it, as an ensemble over its paired seeds."""
    stage = cls.transformed(setup.config, setup.task, stage)
    return train.ensemble(stage, keys=cls.member_keys(setup.config), mode=setup.config.ensemble)


def train_teacher(setup: Setup, evaluators: Mapping[str, train.Evaluator]) -> train.Stage:
    """A teacher trained by cross-entropy."""
    config, section = setup.config, setup.config.teacher
    steps, per_epoch = cls.steps_of(config, setup.task, section.epochs)
    optimizer = cls.make_optimizer(section, section.lr, steps, per_epoch)

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        return {**batch, "image": setup.views.train(key, batch["image"])}

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        out, model_state = nn.apply_train(setup.teacher.apply, params, state.model_state, batch["image"])
        correct = metrics.topk_correct(out.logits, batch["label"]).mean()
        return distill.cross_entropy(out.logits, batch["label"]), train.Aux({"accuracy": correct}, model_state)

    return train.Stage(
        "teacher",
        steps,
        prepare=lambda key, previous, sweep: setup.task.draw(key),
        data=lambda consts: setup.task.source(consts, config.batch_size),
        needs=warm_needs(setup, "teacher"),
        init=initializer(setup, "teacher", optimizer),
        step=train.ModelStep(loss_fn, optimizer, view),
        publish=lambda state: state.variables,
        evaluators={
            **cls.accuracy_evaluators(config, setup.task, setup.teacher, setup.views, per_epoch),
            **evaluators,
        },
    )


def load_teacher(setup: Setup) -> train.Stage:
    """A teacher from the finished run or file of weights `teacher.workdir`: one for all seeds, or one for each."""
    section = setup.config.teacher
    stage = "" if section.workdir.endswith(FILES) else section.stage
    stored = of_part(setup, "teacher", Stored(section.workdir, stage))
    check = functools.partial(check_teacher, shapes=variable_shapes(setup, "teacher"), config=setup.config)
    return stored_stage("teacher", stored, setup.config, check)


def of_part(setup: Setup, part: str, stored: Stored) -> Stored:
    """A stored model, read as the "teacher" or "student" where a file has PyTorch's names."""
    return dataclasses.replace(stored, model=getattr(setup, part), shape=setup.task.shape)


def variable_shapes(setup: Setup, part: str) -> Any:
    """The shapes and dtypes of the variables of the config's "teacher" or "student"."""
    return jax.eval_shape(lambda: nn.init(getattr(setup, part), jax.random.key(0), setup.task.shape))


def check_teacher(outcome: train.Outcome, shapes: Any, config: ConfigDict) -> None:
    """Raises UserError unless a stored teacher is the model, and of the classes and seeds, that the config names."""
    check_seeds(outcome, config, f"The teacher in {config.teacher.workdir}")
    stored = jax.tree.map(lambda x: x.shape, one_of(outcome))
    wanted = jax.tree.map(lambda x: x.shape, shapes)
    if stored == wanted:
        return
    heads = [_head_sizes(shapes) for shapes in (stored, wanted)]
    raise UserError(
        f"The teacher in {config.teacher.workdir} is not the {config.teacher.model!r} of this config for this data "
        f"set (its head has {heads[0][:1]} outputs, the config's {heads[1][:1]}). Teacher and students need the same "
        "classes: set data.* and teacher.model to what the teacher was trained with."
    )


def _head_sizes(shapes: Any) -> list[int]:
    leaves = jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return [shape[-1] for path, shape in leaves if "head" in str(path)]


def initializer(setup: Setup, part: str, optimizer: Any) -> Callable:
    """`Stage.init` of the "teacher" or a "student"."""

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        variables = nn.init(getattr(setup, part), key, setup.task.shape)
        return train.create_state(warmed(setup, part, variables, previous), optimizer)

    return init


# --- warm starts ---


def warm_parts(config: ConfigDict) -> list[str]:
    """Those of "teacher" and "student" that start from stored variables, `init_from`."""
    trained = {"teacher": not config.teacher.workdir, "student": bool(selected_arms(config))}
    return [part for part, trains in trained.items() if trains and config[part].init_from]


def warm_stages(setup: Setup) -> list[train.Stage]:
    """The stages "init_teacher" and "init_student", where the config asks for them: they hold what to start from."""
    return [_warm_stage(setup, part) for part in warm_parts(setup.config)]


def warm_needs(setup: Setup, part: str) -> tuple[str, ...]:
    """What a stage that trains the "teacher" or a "student" needs for its start."""
    return (f"init_{part}",) if part in warm_parts(setup.config) else ()


def warmed(setup: Setup, part: str, variables: Any, previous: Mapping[str, train.Outcome]) -> Any:
    """Initialized variables, or what they are after the warm start."""
    for name in warm_needs(setup, part):
        rules = parse_rules(setup.config[part].init_rules)
        variables, _ = train.warm_start(variables, previous[name].published, rules)
    return variables


def check_warm(config: ConfigDict) -> None:
    """Raises UserError for warm starts that cannot be read, before any data is."""
    for part in ("teacher", "student"):
        parse_rules(config[part].init_rules)
        if config[part].init_from:
            Stored.parse(config[part].init_from, f"{part}.init_from")
    if config.teacher.workdir and config.teacher.init_from:
        raise UserError("teacher.workdir gives a finished teacher, which takes no teacher.init_from: leave one out.")


def _warm_stage(setup: Setup, part: str) -> train.Stage:
    section, shapes = setup.config[part], variable_shapes(setup, part)
    stored = of_part(setup, part, Stored.parse(section.init_from, f"{part}.init_from"))

    def check(outcome: train.Outcome) -> Any:
        check_seeds(outcome, setup.config, str(stored))
        return train.warm_start(shapes, one_of(outcome), parse_rules(section.init_rules))[1]

    def say(outcome: train.Outcome) -> None:
        report = check(outcome)
        if jax.process_index() == 0:
            console.print(f"Warm start of the {part} from {stored}: {report.summary()}.", soft_wrap=True)
            if report.table().row_count:
                console.print(report.table())

    stage = stored_stage(f"init_{part}", stored, setup.config, say)
    return dataclasses.replace(stage, check=lambda: check(stored.shapes()) and None)


# --- the students ---


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
    steps, per_epoch = cls.steps_of(config, setup.task, arm.epochs)
    section = config.student.copy_and_resolve_references()
    section.milestones = arm.milestones
    optimizer = cls.make_optimizer(section, arm.lr, steps, per_epoch)

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        # The teacher's stage drew its rows from the same key.
        consts: dict[str, Any] = setup.task.draw(key)
        teacher, sweep_key = previous["teacher"].published, jax.random.fold_in(key, 1)
        if setup.cached:
            consts |= cache_logits(setup, teacher, consts, sweep_key, sweep)
        else:
            consts["teacher"] = teacher
        return consts | more_consts(consts, sweep_key, sweep)

    stage = train.Stage(
        name,
        steps,
        needs=("teacher", *warm_needs(setup, "student")),
        prepare=prepare,
        data=lambda consts: setup.task.source(consts, config.batch_size),
        init=initializer(setup, "student", optimizer),
        step=step(optimizer, per_epoch),
        publish=lambda state: state.variables,
        evaluators={**setup.accuracies, **(evaluators or {})},
    )
    return seeds(setup, stage)


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


def view(setup: Setup, key: jax.Array, consts: Any, batch: Any) -> dict[str, Any]:
    """The batch with images as the student sees them, and with "teacher_logits" where those are cached."""
    if not setup.cached:
        return {**batch, "image": setup.views.train(key, batch["image"])}
    number = jax.random.randint(key, batch["index"].shape, 0, setup.config.teacher.bank)
    images = bank_view(setup.views, consts["bank_key"], number, batch["index"], batch["image"])
    return {**batch, "image": images, "teacher_logits": consts["logits"][number, consts["slot"][batch["index"]]]}


def teacher_logits(setup: Setup, consts: Any, batch: Any) -> jax.Array:
    """The teacher's logits for a batch of `view`."""
    return batch["teacher_logits"] if setup.cached else setup.teach(consts["teacher"], batch["image"])
