"""Unsupervised spectral hashing of two modalities: codes that their graphs share, and networks that learn these codes.

Hoang et al., Unsupervised Deep Cross-modality Spectral Hashing, IEEE TIP 2020. The objective of the codes is an
instance of the method's idea and not the paper's own equations (see `jkd.hashing.dcsh`).

An arm is a kind of codes: of both graphs ("joint") or one ("first", "second"), random hyperplanes through features
("lsh"; "lsh_first", "lsh_second" of one side), all of which networks then learn; or linear functions of each side, of
which nothing is learned ("cca", "pca"), or "random" bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import dcsh_codes
from experiments import hashing as judge
from experiments import networks as nets
from experiments.dcsh_codes import GRAPHS, HYPERPLANES, SUFFIX
from experiments.optimizers import check_optimizer, make_optimizer
from experiments.pair_networks import PairNetworks
from experiments.pairs import SIDES, PairTask, load_pairs
from experiments.report import Measure
from experiments.searchers import PairSearcher
from experiments.studies import Claim, Study
from jkd import hashing, nn, train
from jkd.errors import UserError, unknown

LINEAR = ("cca", "pca", "random")
LOSSES: dict[str, Callable] = {"bce": hashing.hash_bce, "tanh": hashing.hash_regression}
BASELINE = "lsh"
MEASURE = judge.MEASURE


def check(config: ConfigDict) -> None:
    """Raises UserError for what could not be run, before any data is read."""
    cls.member_keys(config)
    judge.check(config)
    dcsh_codes.check(config)
    network = config.network
    cls.check_numbers(network, "network", positive=("hidden", "filters"), nonnegative=("epochs", "agreement"))
    check_optimizer(network, "network", "network.milestones", network.milestones)
    if network.loss not in LOSSES:
        raise unknown("network.loss", network.loss, tuple(LOSSES))
    for name in nets.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        known = (*GRAPHS, *HYPERPLANES, *LINEAR)
        if arm.codes not in known:
            raise unknown(f"{field}.codes", arm.codes, known)
        cls.check_numbers(arm, field, positive=("lr",), nonnegative=("alpha", "rho", "iters"))
        if config.codes.redraw and (network.epochs or arm.codes in LINEAR):
            raise UserError(f"codes.redraw: {field} has queries of other data; set network.epochs=0, and no {LINEAR}.")


# --- networks ---


def make_network(config: ConfigDict, task: PairTask, side: str) -> Any:
    """The hashing network of a side: a text's, where there is a mask; a backbone's for images; else of features."""
    c, bits, shape = config.network, config.bits, task.shapes[side]
    types = cls.dtypes(config.precision)
    if f"{side}_mask" in task.shapes:
        return hashing.TextCNNHash(bits, tuple(c.widths), c.filters, c.dropout, **types)
    backbone = None
    if len(shape) == 3:
        options = {"width": c.width} if c.model == "cnn" else {}
        backbone = nn.build(c.model, c.hidden, **options, **types)
    return hashing.ImageHashNet(bits, backbone, c.hidden, **types)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its pairs.
      networks: of both sides.
    """

    config: Any
    task: PairTask
    networks: PairNetworks

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the pairs and builds the networks of a config."""
        task = load_pairs(config)
        return cls_(config, task, PairNetworks(task, {side: make_network(config, task, side) for side in SIDES}))

    @functools.cached_property
    def learned(self) -> dict[str, train.Evaluator]:
        """The evaluators of networks."""
        return judge.evaluators(self.config, self.task, self.networks.logits)

    @functools.cached_property
    def loss_fn(self) -> Callable:
        """What all arms minimize: the codes' loss on both sides, and how far these are apart."""
        loss, weight = LOSSES[self.config.network.loss], self.config.network.agreement

        def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
            logits, model_state = self.networks.train_logits(params, state.model_state, batch, key)
            codes = consts["codes"][batch["index"]]
            found = {side: loss(logits[side], codes) for side in SIDES}
            right = {f"{side}_bits": ((logits[side] >= 0) == (codes > 0)).mean() for side in SIDES}
            total = found["first"] + found["second"]
            if weight:
                found["agreement"] = hashing.hash_agreement(logits["first"], logits["second"])
                total = total + weight * found["agreement"]
            return total, train.Aux({**found, **right}, model_state)

        return loss_fn

    @functools.cached_property
    def steps(self) -> tuple[int, float]:
        """The number of steps of the networks, and in an epoch."""
        per_epoch = self.task.sizes["train"] / self.config.batch_size
        return max(1, round(self.config.network.epochs * per_epoch)), per_epoch

    def optimizer(self, lr: float) -> Any:
        """The optimizer of an arm."""
        return make_optimizer(self.config.network, lr, *self.steps)

    @functools.cached_property
    def step(self) -> train.ModelStep:
        """Of all arms: the rate is in an arm's state."""
        return train.ModelStep(self.loss_fn, self.optimizer(1.0), self.networks.view)


# --- stages ---


def network_stage(setup: Setup, name: str, arm: ConfigDict) -> train.Stage:
    """The networks of an arm: both sides learn the codes of step 1, each pair's by its row."""
    config, task = setup.config, setup.task
    optimizer = setup.optimizer(arm.lr)

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        made = previous[name + SUFFIX]
        consts = task.draw(key)
        codes = np.zeros((len(task.pool.rows), config.bits), np.int8)
        codes[np.asarray(made.consts["rows"]["train"])] = np.asarray(made.published["codes"])
        return {**consts, "codes": codes}

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        return train.create_state(setup.networks.init(key), optimizer)

    made = train.Stage(
        name,
        setup.steps[0],
        needs=(name + SUFFIX,),
        prepare=prepare,
        data=lambda consts: task.source(consts, config.batch_size),
        init=init,
        step=setup.step,
        publish=nets.variables_of,
        evaluators=setup.learned,
    )
    return nets.seeds(setup, made)


def stages(config: ConfigDict) -> list[train.Stage]:
    """Step 1 and the networks of each arm, or its linear functions."""
    check(config)
    setup, found = Setup.of(config), []
    dcsh_codes.check(config, setup.task.sizes["train"])
    codes = dcsh_codes.CodeStages(config, setup.task)
    for name in nets.selected_arms(config):
        arm = config.arms[name]
        if arm.codes in LINEAR:
            found.append(judge.linear_stage(config, setup.task, name, arm.codes))
            continue
        found.append(codes.stage(name, arm))
        if config.network.epochs:
            found.append(network_stage(setup, name, arm))
    return found


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """Nothing here classifies images.

    Raises:
      UserError: always.
    """
    raise UserError(f"Stage {stage!r} makes codes of pairs and has no classes: nothing predicts them.")


def searcher(config: ConfigDict, stage: str) -> PairSearcher:
    """The networks (or linear functions) of an arm, for `experiments.search`.

    Raises:
      UserError: if there is no such arm, or it has no networks.
    """
    if stage not in config.arms:
        raise unknown("arm", stage, config.arms)
    setup, codes = Setup.of(config), config.arms[stage].codes
    if codes in LINEAR:
        return PairSearcher(setup.task, judge.linear_scores(setup.task, codes, config.bits), config.eval_batch_size)
    if not config.network.epochs:
        raise UserError(f"network.epochs=0: nothing of {stage!r} makes codes of queries.")
    return PairSearcher(setup.task, setup.networks.logits, config.eval_batch_size)


# --- claims ---

SINGLE = ["first", "second"]
CLAIMS = (
    Claim("codes of both graphs beat those of the first alone", better="joint", worse="first"),
    Claim("codes of both graphs beat those of the second alone", better="joint", worse="second"),
    Claim("codes of both graphs beat those of one, on average", better=["joint", "joint"], worse=SINGLE),
    Claim("codes of one graph, on average, beat random hyperplanes", better=SINGLE, worse=["lsh", "lsh"]),
    Claim("codes of both graphs beat random hyperplanes through both sides", better="joint", worse="lsh"),
    Claim("spectral hashing beats sign(CCA)", "better than earlier methods", better="joint", worse="cca"),
    Claim("sign(CCA) beats signs of each side's own components", better="cca", worse="pca"),
    Claim("the rounds are not worse than the start (0.5 points)", better="joint", worse="init", margin=0.5),
    Claim("codes that pull at the embeddings beat those that do not", better="joint", worse="uncoupled"),
    Claim("weighting by eigenvalues beats the plain objective", better="joint", worse="unweighted"),
)


def _codes(arm: str) -> tuple[str, str]:
    return arm + SUFFIX, "train/map"


CODE_MEASURE = Measure("train/map", "train/map", "mAP of the codes of step 1 among training pairs, %")
SINGLE_CODES = [_codes(arm) for arm in SINGLE]
CODE_CLAIMS = (
    Claim("codes of both graphs beat those of one, on average", better=2 * [_codes("joint")], worse=SINGLE_CODES),
    Claim("codes of the first graph beat random hyperplanes", better=_codes("first"), worse=_codes("lsh_first")),
    Claim("codes of the second graph beat random hyperplanes", better=_codes("second"), worse=_codes("lsh_second")),
    Claim("codes of both graphs beat random hyperplanes", better=_codes("joint"), worse=_codes("lsh")),
    Claim("the rounds improve on the start", better=_codes("joint"), worse=_codes("init")),
    Claim("weighting by eigenvalues beats the plain objective", better=_codes("joint"), worse=_codes("unweighted")),
)
CONFIG = "configs/dcsh.py"
STUDIES = (
    Study("digits", CONFIG, (0.003, 0.01, 0.03), 2, CLAIMS, fixed=LINEAR, widen=1),
    Study("clusters", f"{CONFIG}:clusters", (), 0, CODE_CLAIMS, measure=CODE_MEASURE),
    Study(
        "fashion",
        f"{CONFIG}:fashion",
        (0.003, 0.01, 0.03),
        1,
        [claim for claim in CLAIMS if claim.worse not in ("uncoupled", "unweighted")],
        arms=("joint", "init", "first", "second", "lsh", *LINEAR[:2]),
        fixed=LINEAR,
        widen=1,
        extra=True,
    ),
)
