"""Images and captions in one space, by several attention heads each.

Park et al., MHSAN: Multi-Head Self-Attention Network for Visual Semantic Embedding, WACV 2020. Every arm is a pair of
encoders of its own, trained by a ranking loss: what differs is how many heads pool, how wide they are, whether heads
are kept apart, and which negatives count. All are compared by the sum of recalls at 1, 5 and 10, both ways.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import captions, embedding_measures
from experiments import classification as cls
from experiments import networks as nets
from experiments.caption_searcher import CaptionSearcher
from experiments.report import Measure
from experiments.studies import Claim, Study
from jkd import nn, retrieval, train
from jkd.errors import UserError, unknown
from jkd.retrieval.ranking import NEGATIVES
from jkd.retrieval.staging import PARTS

BASELINE = "heads1"
MEASURE = Measure("test/total", "validation/total", "sum of recalls at 1, 5 and 10 both ways, %")
SCHEDULES = ("cosine", "factors")


def check(config: ConfigDict) -> None:
    """Raises UserError for numbers that nothing could be trained with."""
    cls.member_keys(config)
    captions.check(config)
    cls.check_numbers(config, "", nonnegative=("eval_every", "gallery"), positive=("steps", "folds"))
    network, rules = config.network, config.train
    cls.check_numbers(network, "network", positive=("dim", "hidden", "layers", "word_dim"))
    for name in ("dropout", "cell_dropout"):
        if not 0 <= network[name] < 1:
            raise UserError(f"network.{name} must lie in [0, 1), got {network[name]}.")
    if network.cell not in retrieval.models.CELLS:
        raise unknown("network.cell", network.cell, retrieval.models.CELLS)
    cls.check_numbers(rules, "train", positive=("margin",), nonnegative=("text_from", "image_from", "clip"))
    if rules.schedule not in SCHEDULES:
        raise unknown("train.schedule", rules.schedule, SCHEDULES)
    retrieval.rate_factors(1.0, rules.epochs, rules.factors)
    for name in nets.selected_arms(config):
        _check_arm(config, name)


def _check_arm(config: ConfigDict, name: str) -> None:
    arm, field = config.arms[name], f"arms.{name}"
    cls.check_numbers(arm, field, positive=("lr", "heads", "width"), nonnegative=("diversity", "warmup", "batch_size"))
    if arm.pool not in retrieval.models.POOLS:
        raise unknown(f"{field}.pool", arm.pool, retrieval.models.POOLS)
    if not str(arm.negatives).isdigit() and arm.negatives not in NEGATIVES:
        raise unknown(f"{field}.negatives", arm.negatives, (*NEGATIVES, "a number"))
    batch = arm.batch_size or config.batch_size
    if batch < 2 or (str(arm.negatives).isdigit() and not 1 <= int(arm.negatives) < batch):
        raise UserError(
            f"{field} needs a batch of at least 2, and negatives in [1, batch - 1]; got {batch} and {arm.negatives}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its data.
      inputs: how batches come to the encoders.
    """

    config: Any
    task: captions.CaptionTask
    inputs: captions.Inputs

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the data of a config."""
        return cls_(config, captions.load_task(config), captions.Inputs.of(config))

    def model(self, arm: ConfigDict) -> retrieval.MHSAN:
        """The encoders of an arm."""
        section, types = self.config.network, cls.dtypes(self.config.precision)
        both = {"dim": section.dim, "width": arm.width, "heads": arm.heads, "hidden": section.hidden, "pool": arm.pool}
        both |= {"dropout": section.dropout, **types}
        backbone = {}
        if section.backbone:
            options = {"width": section.backbone_width} if section.backbone_width else {}
            network = nn.build(section.backbone, 2, **options, **types)
            backbone = {"backbone": network, "tap": section.tap, "train_statistics": not section.pretrained}
        words = 0 if self.task.table is not None else self.task.words
        cell = {name: section[name] for name in ("cell", "layers", "peephole", "cell_dropout", "word_dim")}
        text = retrieval.TextEncoder(**both, **cell, vocabulary=words)
        return retrieval.MHSAN(retrieval.ImageEncoder(**both, **backbone), text)

    def example(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One picture and its first caption, of the right shapes."""
        shapes = self.task.shapes
        kind = jnp.uint8 if len(shapes["image"]) == 3 and not self.config.data.features_given else jnp.float32
        image = self.inputs.images(jnp.zeros((1, *shapes["image"]), kind))
        words = jnp.zeros((1, *shapes["words"][1:]), jnp.int32 if len(shapes["words"]) == 2 else jnp.float32)
        if self.task.table is not None:
            words = jnp.zeros((*words.shape, self.task.table.shape[1]))
        return image, words, jnp.ones((1, shapes["mask"][1]), bool)

    def steps_per_epoch(self, batch_size: int) -> float:
        """An epoch sees every caption once, as the paper counts."""
        return self.task.sizes["train"] * self.task.captions / batch_size


def make_optimizer(config: ConfigDict, lr: float, per_epoch: float, num_steps: int) -> Any:
    """Adam in stages: the projection of the images from the start, texts and images from epochs of their own."""
    rules = config.train
    first = {"text": round(rules.text_from * per_epoch), "image": round(rules.image_from * per_epoch)}
    parts = PARTS if config.network.pretrained else PARTS[1:]
    rate = optax.cosine_decay_schedule(1.0, num_steps)
    if rules.schedule == "factors":
        rate = retrieval.rate_factors(per_epoch, rules.epochs, rules.factors)
    return optax.chain(
        retrieval.staged(optax.scale_by_adam(), first, parts=parts, clip=rules.clip),
        optax.scale_by_schedule(lambda t: -rate(t)),
        # The rate is part of the state: one compiled step serves all that are tried.
        optax.inject_hyperparams(optax.scale)(step_size=lr),
    )


def make_step(setup: Setup, arm: ConfigDict) -> train.ModelStep:
    """`Stage.step` of an arm."""
    config, model, rules = setup.config, setup.model(arm), setup.config.train
    batch_size = arm.batch_size or config.batch_size
    per_epoch, inputs = setup.steps_per_epoch(batch_size), setup.inputs
    warmup = 0 if arm.negatives == "all" else round(arm.warmup * config.steps)

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        """One of the captions of each picture."""
        rows = jnp.arange(len(batch["index"]))
        chosen = jax.random.randint(jax.random.fold_in(key, 1), rows.shape, 0, setup.task.captions)
        words = inputs.words(batch["words"][rows, chosen], consts)
        return {**batch, "image": inputs.images(batch["image"]), "words": words, "mask": batch["mask"][rows, chosen]}

    def apply_fn(variables: Any, batch: Any, train: bool, **named: Any) -> Any:
        return model.apply(variables, batch["image"], batch["words"], batch["mask"], train, **named)

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        out, model_state = nn.apply_train(apply_fn, params, state.model_state, batch, {"dropout": key})
        ranking = functools.partial(_ranking, out, batch["index"], rules)
        if warmup:
            loss = jax.lax.cond(t < warmup, lambda: ranking("all"), lambda: ranking(arm.negatives))
        else:
            loss = ranking(arm.negatives)
        gates = retrieval.epoch_gates(t / per_epoch, text_from=rules.text_from, image_from=rules.image_from)
        apart = {name: retrieval.attention_diversity(getattr(out, name).attention) for name in ("image", "text")}
        diversity = gates.image_diversity * apart["image"] + gates.text_diversity * apart["text"]
        found = {"ranking": loss, "image_diversity": apart["image"], "text_diversity": apart["text"]}
        return loss + arm.diversity * diversity, train.Aux(found, model_state)

    return train.ModelStep(loss_fn, make_optimizer(config, arm.lr, per_epoch, config.steps), view)


def _ranking(out: retrieval.MatchedPairs, ids: jax.Array, rules: ConfigDict, negatives: str) -> jax.Array:
    return retrieval.vse_hard_negative_loss(
        out.image.vector,
        out.text.vector,
        margin=rules.margin,
        negatives=int(negatives) if negatives.isdigit() else negatives,
        same_image_ids=ids,  # a batch may cross into the next epoch, and hold a picture twice
        chunk_size=rules.chunk_size or None,
        reduction=rules.reduction,
    )


def arm_stage(setup: Setup, name: str) -> train.Stage:
    """The stage of one arm."""
    config, arm = setup.config, setup.config.arms[name]
    model, step = setup.model(arm), make_step(setup, arm)
    batch_size = arm.batch_size or config.batch_size

    def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> train.TrainState:
        return train.create_state(dict(model.init(key, *setup.example())), step.optimizer)  # type: ignore[arg-type]

    named = {"batch_size": config.eval_batch_size, "every": config.eval_every}
    evaluators = embedding_measures.evaluators(
        setup.task, model, setup.inputs, **named, folds=config.folds, gallery=config.gallery
    )
    made = train.Stage(
        name,
        config.steps,
        prepare=lambda key, previous, sweep: setup.task.draw(key),
        data=lambda consts: setup.task.source(consts, batch_size),
        init=init,
        step=step,
        publish=nets.variables_of,
        evaluators=evaluators,
    )
    made = train.remat(made) if config.remat else made
    return train.ensemble(made, keys=cls.member_keys(config), mode=config.ensemble)


def stages(config: ConfigDict) -> list[train.Stage]:
    """One stage for each arm."""
    check(config)
    setup = Setup.of(config)
    return [arm_stage(setup, name) for name in nets.selected_arms(config)]


def predictor(config: ConfigDict, stage: str) -> Any:
    """Nothing of this method classifies.

    Raises:
      UserError: always.
    """
    raise UserError(f"Stage {stage!r} embeds pictures and captions; it does not classify.")


def searcher(config: ConfigDict, stage: str) -> CaptionSearcher:
    """What `experiments.search` searches a stage's vectors by.

    Raises:
      UserError: for a stage that is no arm.
    """
    if stage not in config.arms:
        raise unknown("stage that embeds", stage, config.arms)
    setup = Setup.of(config)
    return CaptionSearcher(setup.task, setup.model(config.arms[stage]), setup.inputs, config.eval_batch_size)


# --- claims ---


def best(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Of every arm the test measure after the step that is best on validation rows, as a stage of its own."""
    found = {}
    for name, stage in stages.items():
        curves = [stage["history"].get(metric) for metric in (MEASURE.tune, MEASURE.metric)]
        if not all(curves):
            continue
        tune, test = (np.asarray(curve["values"], float) for curve in curves)
        tune, test = (x.reshape(len(x), -1) for x in (tune, test))
        values = np.take_along_axis(test, tune.argmax(0)[None], 0)[0]
        found[f"{name}_best"] = {"metrics": {MEASURE.metric: values.tolist()}, "history": {}}
    return found


def compared(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The arms at their best steps, and the worst of those with attention, seed by seed, as a stage of its own."""
    attentive = [np.atleast_1d(of["metrics"][MEASURE.metric]) for name, of in stages.items() if name != "mean"]
    worst = {"metrics": {MEASURE.metric: np.min(attentive, 0).tolist()}, "history": {}}
    return best(stages) | {"worst_attention": worst}


CONFIG = "configs/mhsan.py"
RATES = (0.003, 0.01, 0.03)
SLACK = 12.0  # points of the sum of six recalls, two of each, that count as no loss
OVERLAP = "test/image_overlap"
SEVERAL = (
    Claim("four heads find more than one", "R=10 over R=1 (no figure)", "heads4", "heads1"),
    Claim("four heads find more than one of as many parameters", "", "heads4", "wide1"),
    Claim("eight heads find more than one", "R=10 over R=1 (no figure)", "heads8", "heads1"),
)
WORST = (Claim("mean pooling finds less than any attention", "", "worst_attention", "mean"),)
COLLAGES = (
    *SEVERAL,
    Claim("the diversity penalty lowers the overlap of heads", "", ("undiverse", OVERLAP), ("heads4", OVERLAP)),
    Claim("the diversity penalty costs no recall", "", "heads4", "undiverse", margin=SLACK),
    Claim("a penalty a hundred times as large lowers it", "", ("undiverse", OVERLAP), ("diverse", OVERLAP)),
    Claim("... and costs no recall", "", "diverse", "undiverse", margin=SLACK),
    Claim("hard negatives find more than all of them", "VSE++", "heads4", "all_negatives"),
    *WORST,
)
SINGLE = (
    Claim("one head finds as much as four where there is one object", "", "heads1", "heads4", margin=SLACK),
    Claim("one head finds as much as eight where there is one object", "", "heads1", "heads8", margin=SLACK),
)
ARMS = ("heads1", "wide1", "heads4", "heads8", "undiverse", "diverse", "all_negatives", "mean")
STUDIES = (
    Study("collages", CONFIG, RATES, 2, COLLAGES, arms=ARMS, derived=compared, widen=1),
    Study("scenes", f"{CONFIG}:scenes", RATES, 2, (*SEVERAL, *WORST), derived=compared, widen=1),
    Study("single", f"{CONFIG}:single", RATES, 2, SINGLE, arms=("heads1", "heads4", "heads8"), derived=best, widen=1),
)
