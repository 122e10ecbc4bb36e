"""Cross-modal hashing by mutual information: codes that know their input, the other side's input, or both.

Hoang et al., Multi-Modal Mutual Information Maximization: A Novel Approach for Unsupervised Deep Cross-Modal Hashing,
IEEE TNNLS 2023. An arm is an encoder for each side, trained by a weighting of the terms of `jkd.hashing.cmimh_terms`;
or a linear hash function that is fitted and not trained.
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
from experiments import hashing as judge
from experiments.networks import selected_arms
from experiments.optimizers import check_optimizer, make_optimizer
from experiments.pair_networks import PairNetworks
from experiments.pairs import SIDES, PairTask, load_pairs
from experiments.searchers import PairSearcher
from experiments.studies import Claim, Study
from jkd import hashing, nn, train
from jkd.errors import UserError, unknown
from jkd.hashing.bernoulli import ESTIMATORS, GAPS

BASELINE, MEASURE = "full", judge.MEASURE
KINDS = ("mi", *judge.LINEAR)
CRITICS = ("tied", "free")
ENCODERS = ("features", "image", "words")
WEIGHTS = ("intra", "cross", "gap", "bit")


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not be trained, before any data is read."""
    cls.member_keys(config)
    judge.check(config)
    section = config.training
    cls.check_numbers(section, "training", positive=("epochs", "clip"), nonnegative=("weight_decay", "warmup_epochs"))
    check_optimizer(section, "training", "training.milestones", section.milestones)
    if config.microbatches != 1:
        raise UserError(
            f"microbatches={config.microbatches}: codes are told from those of the whole batch, which cannot be split. "
            "Large batches need no less memory: the likelihoods are computed in groups of rows (max_pairs)."
        )
    for side in SIDES:
        if config.encoders[side].kind not in ENCODERS:
            raise unknown(f"encoders.{side}.kind", config.encoders[side].kind, ENCODERS)
    for name in selected_arms(config):
        _check_arm(config.arms[name], f"arms.{name}")


def _check_arm(arm: ConfigDict, field: str) -> None:
    for name, known in (("kind", KINDS), ("critic", CRITICS), ("estimator", ESTIMATORS), ("gap_kind", GAPS)):
        if arm[name] not in known:
            raise unknown(f"{field}.{name}", arm[name], known)
    cls.check_numbers(arm, field, positive=("lr", "samples", "start_temperature", "end_temperature"))
    cls.check_numbers(arm, field, nonnegative=WEIGHTS)


def build_encoder(config: ConfigDict, side: str) -> hashing.HashEncoder:
    """The encoder of a side: dense layers on features, behind a network for images, or behind one for words.

    Vectors of tokens are averaged by "features"; "words" are convolutions over them.
    """
    section = config.encoders[side]
    types = cls.dtypes(config.precision)
    backbone: Any = None
    if section.kind == "image":
        options = {"width": section.width} if section.model == "cnn" else {}
        backbone = nn.build(section.model, section.features, **options, **types)
    elif section.kind == "words":
        backbone = hashing.TextCNNHash(section.features, filters=section.width, dropout=section.dropout, **types)
    return hashing.HashEncoder(
        config.bits, tuple(section.hidden), section.norm, section.dropout, backbone=backbone, **types
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its pairs.
      encoders: of both sides.
    """

    config: Any
    task: PairTask
    encoders: PairNetworks

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the pairs and builds the encoders of a config."""
        task = load_pairs(config)
        return cls_(config, task, PairNetworks(task, {side: build_encoder(config, side) for side in SIDES}))

    def initialize(self, key: jax.Array, free: bool) -> dict[str, Any]:
        """The variables of the encoders, and of "critics" among the parameters where they are free."""
        variables = self.encoders.init(key)
        if free:
            keys, q = jax.random.split(jax.random.fold_in(key, 1)), jnp.zeros((1, self.config.bits))
            critic = hashing.CodeCritic(self.config.bits)
            variables["params"]["critics"] = {
                side: critic.init(own, q)["params"] for side, own in zip(SIDES, keys, strict=True)
            }
        return variables

    @functools.cached_property
    def evaluators(self) -> dict[str, train.Evaluator]:
        """Of all trained arms."""
        found = judge.evaluators(self.config, self.task, self.encoders.logits)
        if "first_private" in self.task.shapes:
            found["private"] = private_evaluator(self)
        return found


def make_step(setup: Setup, arm: ConfigDict, steps: int, per_epoch: float) -> train.ModelStep:
    """`Stage.step` of an arm."""
    config, section = setup.config, setup.config.training
    optimizer = optax.chain(optax.clip_by_global_norm(section.clip), make_optimizer(section, arm.lr, steps, per_epoch))
    critic = hashing.CodeCritic(config.bits)
    weights = {f"{name}_weight": arm[name] for name in WEIGHTS}

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        drawn, dropped = jax.random.split(key)
        logits, after = setup.encoders.train_logits(params, state.model_state, batch, dropped)
        critics: Any = None
        if arm.critic == "free":
            critics = tuple(functools.partial(critic.apply, {"params": params["critics"][side]}) for side in SIDES)
        terms = hashing.cmimh_terms(
            drawn,
            logits["first"],
            logits["second"],
            critics,
            **weights,
            gap=arm.gap_kind,
            estimator=arm.estimator,
            num_samples=arm.samples,
            temperature=hashing.concrete_temperature(t, steps, arm.start_temperature, arm.end_temperature),
            max_pairs=config.max_pairs,
        )
        return terms.loss, train.Aux({k: v for k, v in terms._asdict().items() if k != "loss"}, after)

    return train.ModelStep(loss_fn, optimizer, setup.encoders.view)


def arm_stage(setup: Setup, name: str) -> train.Stage:
    """The stage of one arm, for each seed."""
    config, task, arm = setup.config, setup.task, setup.config.arms[name]
    if arm.kind != "mi":
        return judge.linear_stage(config, task, name, arm.kind)
    steps, per_epoch = cls.steps_of(config, task, config.training.epochs)  # type: ignore[arg-type]
    step = make_step(setup, arm, steps, per_epoch)

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        return train.create_state(setup.initialize(key, arm.critic == "free"), step.optimizer)

    made = train.Stage(
        name,
        steps,
        prepare=lambda key, previous, sweep: task.draw(key),
        data=lambda consts: task.source(consts, config.batch_size),
        init=init,
        step=step,
        publish=lambda state: state.variables,
        evaluators=setup.evaluators,
    )
    made = train.remat(made) if config.remat else made
    return train.ensemble(made, keys=cls.member_keys(config), mode=config.ensemble)


def stages(config: ConfigDict) -> list[train.Stage]:
    """A stage for each arm."""
    check(config)
    setup = Setup.of(config)
    return [arm_stage(setup, name) for name in selected_arms(config)]


# --- what codes know that the other side does not ---


def private_evaluator(setup: Setup) -> train.Evaluator:
    """Linear probes from codes to the bits of a side that the other side does not have.

    `first`, `second`: the mean share of right answers on queries, in percent; 50 is chance. `private`: their mean. The
    probes are fitted to the codes of what is searched, which holds the training rows.
    """
    queries = setup.task.sizes["query"]

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        logits = setup.encoders.logits(published, consts, batch)
        found = {side: logits[side] >= 0 for side in SIDES}
        return {**found, **{f"{side}_private": batch[f"{side}_private"] for side in SIDES}}

    def finish(rows: Any) -> dict[str, float]:
        right = {side: 100 * probe(rows[side], rows[f"{side}_private"], queries) for side in SIDES}
        return {**right, "private": float(np.mean(list(right.values())))}

    source = functools.partial(setup.task.part, name="query+database", batch_size=setup.config.eval_batch_size)
    return train.Evaluator(source, collect, finish, kind="gather")


def probe(codes: np.ndarray, answers: np.ndarray, queries: int) -> float:
    """The share of bits bool[rows, answers] that ridge regression from codes gets right on the first `queries` rows."""
    x = np.concatenate([2.0 * codes - 1, np.ones((len(codes), 1))], axis=1)
    y = 2.0 * answers - 1
    fit, asked = x[queries:], x[:queries]
    weights = np.linalg.solve(fit.T @ fit + np.eye(fit.shape[1]), fit.T @ y[queries:])
    return float(((asked @ weights >= 0) == answers[:queries]).mean())


# --- claims ---


ENDS = ("gap_0", "gap_1000")


def best_interior(stages: Mapping[str, Any]) -> dict[str, Any]:
    """`interior`, `free_interior`: of gap weights between none and the largest, that of the best validation mAP."""
    found = {}
    for prefix in ("", "free_"):
        between = [name for name in stages if name.startswith(f"{prefix}gap_") and name[len(prefix) :] not in ENDS]
        if between:
            best = max(between, key=lambda name: float(np.mean(stages[name]["metrics"][MEASURE.tune])))
            found[f"{prefix}interior"] = {"metrics": stages[best]["metrics"], "history": {}}
    return found


CONFIG = "configs/cmimh.py"
RATES = (0.001, 0.003, 0.01)
PAPER = "so, on other sets"
KNOWN = ("private/private", "test/first_to_first")  # what a code knows of its own side
ORDER = (
    Claim("full beats sign(CCA)", PAPER, "full", "cca"),
    Claim("sign(CCA) beats intra-modal information alone", PAPER, "cca", "intra_only"),
    Claim("full beats intra-modal information alone", PAPER, "full", "intra_only"),
    Claim("full is not worse than cross-modal information alone", PAPER, "full", "cross_only", margin=1.0),
    Claim("codes that are forced to be equal are worse", PAPER, "gap_10", "gap_1000"),
    Claim("a tied critic beats a free one at the same gap weight", "", "full", "free"),
)
FACTORS = (
    Claim("full beats sign(CCA)", PAPER, "full", "cca"),
    Claim("sign(CCA) beats intra-modal information alone", PAPER, "cca", "intra_only"),
    Claim("an interior gap weight beats none (tied)", PAPER, "interior", "gap_0"),
    Claim("an interior gap weight beats the largest (tied)", PAPER, "interior", "gap_1000"),
    Claim("an interior gap weight beats none (free)", PAPER, "free_interior", "free_gap_0"),
    Claim("an interior gap weight beats the largest (free)", PAPER, "free_interior", "free_gap_1000"),
    Claim("codes forced to be equal know less of private factors", PAPER, ("gap_0", KNOWN[0]), ("gap_1000", KNOWN[0])),
    Claim("without I_m codes know less of private factors", "", ("gap_0", KNOWN[0]), ("cross_only", KNOWN[0])),
    Claim("... and find less within the first modality", "", ("gap_0", KNOWN[1]), ("cross_only", KNOWN[1])),
)
WITHOUT_GAPS = [claim for claim in ORDER if "gap_1000" not in (claim.better, claim.worse)]
TUNING: dict[str, Any] = {"fixed": judge.LINEAR, "widen": 1}
STUDIES = (
    Study("digits", CONFIG, RATES, 2, ORDER, **TUNING),
    Study("factors", f"{CONFIG}:factors", RATES, 2, FACTORS, derived=best_interior, **TUNING),
    Study("fashion", f"{CONFIG}:fashion", (0.003, 0.01, 0.03), 1, WITHOUT_GAPS, extra=True, **TUNING),
)


def predictor(config: ConfigDict, stage: str) -> Callable:
    """Refuses: codes are no classes."""
    raise UserError(f"Stage {stage!r} makes codes and classifies nothing.")


def searcher(config: ConfigDict, stage: str) -> PairSearcher:
    """The encoders of an arm, for `experiments.search`.

    Raises:
      UserError: if there is no such arm.
    """
    if stage not in config.arms:
        raise unknown("arm", stage, config.arms)
    setup, kind = Setup.of(config), config.arms[stage].kind
    scores = setup.encoders.logits if kind == "mi" else judge.linear_scores(setup.task, kind, config.bits)
    return PairSearcher(setup.task, scores, config.eval_batch_size)
