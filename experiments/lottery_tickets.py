"""Winning tickets: networks that are pruned, taken back to an early step, and trained again.

Girish et al., The Lottery Ticket Hypothesis for Object Recognition, CVPR 2021 (its pruning; the networks here are
classifiers). A first stage trains the whole network and keeps its state at the late-resetting step. A ticket is a mask
found in trained weights, one-shot or over several rounds, and what it starts from: that state, the initial weights, or
fresh ones. A ticket of another run can be transferred: its mask alone, or with its weights.
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

from experiments import classification as cls
from experiments import networks as nets
from experiments.networks import Setup, predictor
from experiments.optimizers import make_optimizer
from experiments.stored import Stored, check_seeds, stored_stage
from experiments.studies import Claim, Study
from jkd import prune, train
from jkd.errors import UserError, unknown
from jkd.prune.tickets import SCOPES
from jkd.train.warm import parse_rules

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]
BASELINE = "dense"
FIRST = "whole"  # the stage that trains the whole network
SOURCE = "source"  # the stage that holds another run's ticket
STARTS = ("late", "init", "fresh", SOURCE)
MASKS = ("magnitude", "shuffled", "random", SOURCE)


def check(config: ConfigDict) -> None:
    """Raises UserError for tickets that could not be found, before any data is read."""
    nets.check(config)
    cls.check_numbers(config, "", positive=("late_epoch",))
    if not config.late_epoch < config.network.epochs:
        raise UserError(f"late_epoch must be < network.epochs={config.network.epochs}, got {config.late_epoch}.")
    for name in nets.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        for one, known in {"start": STARTS, "mask": MASKS, "scope": tuple(SCOPES)}.items():
            if arm[one] not in known:
                raise unknown(f"{field}.{one}", arm[one], known)
        if not 0 < arm.keep <= 1:
            raise UserError(f"{field}.keep must lie in (0, 1]: the sparsity 1 - keep in [0, 1), got {arm.keep}.")
        if arm.rounds < 2:
            raise UserError(f"{field}.rounds must be >= 2, the first of the whole network, got {arm.rounds}.")
        if SOURCE in (arm.start, arm.mask) and not config.source:
            raise UserError(f"{field} is of another run's ticket: set source to WORKDIR:STAGE or a file of weights.")
    if config.source:
        Stored.parse(config.source, "source")
    parse_rules(config.source_rules)


@dataclasses.dataclass(frozen=True, eq=False)
class Tickets:
    """What the stages of one config share: one program serves the whole network, every round and every ticket.

    Attributes:
      setup: of the config.
      steps: of every training.
      late: the late-resetting step.
      optimizer: without masks.
      step: `Stage.step`, with the masks of its consts.
      evaluators: of every stage.
    """

    setup: Setup
    steps: int
    late: int
    optimizer: optax.GradientTransformation
    step: train.ModelStep
    evaluators: Mapping[str, train.Evaluator]

    @classmethod
    def of(cls_, config: ConfigDict) -> "Tickets":
        """Loads the data and builds the network of a config."""
        setup, section = Setup.of(config), config.network
        steps, per_epoch = setup.steps(section.epochs)
        optimizer = make_optimizer(section, section.lr, steps, per_epoch)
        plain = nets.cross_entropy_step(setup.model, setup.views["weak"], optimizer, section.smoothing)
        step = dataclasses.replace(plain, optimizer=lambda consts: prune.masked_update(optimizer, consts["masks"]))
        late = min(max(1, round(config.late_epoch * per_epoch)), steps)
        evaluators = {**setup.accuracies(setup.model), "weights": weights_evaluator(setup)}
        return cls_(setup, steps, late, optimizer, step, evaluators)

    def is_prunable(self, path: str, leaf: Any) -> bool:
        """Kernels, but those that `config.exempt` names."""
        return nets.is_kernel(path, self.setup.config.exempt)

    def whole(self) -> train.Stage:
        """The stage that trains the whole network."""

        def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
            return train.create_state(self.setup.initialize(key), self.optimizer)

        def masks(key: Any, previous: Any, consts: Any) -> dict[str, Any]:
            return {"masks": prune.ones_masks(self.setup.shapes["params"], self.is_prunable)}

        kept: dict[str, Any] = {"snapshots": (self.late,), "snapshot": train.plain_state}
        return nets.stage(self.setup, FIRST, self.steps, self.step, init, self.evaluators, more=masks, **kept)

    def ticket(
        self, name: str, parent: str, keep: float, start: str, scope: str, lr: float, mask: str = "magnitude"
    ) -> train.Stage:
        """A ticket whose mask is found in the weights that `parent` ends with, or in another run's."""

        def masks(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> dict[str, Any]:
            if mask == SOURCE:
                return {"masks": self.transferred(previous[SOURCE].published)}
            trained, before = previous[parent].published["params"], previous[parent].consts["masks"]
            if mask == "random":
                return {"masks": prune.random_masks(key, prune.ones_masks(trained, self.is_prunable), keep)}
            found = SCOPES[scope](trained, before, keep)
            return {"masks": prune.shuffled_masks(key, found) if mask == "shuffled" else found}

        def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> train.TrainState:
            if start == "late":
                state = train.restore_state(previous[FIRST].snapshots[self.late], self.optimizer)
            else:
                variables = self.setup.initialize(key, int(start == "fresh"))
                if start == SOURCE:
                    rules = parse_rules(self.setup.config.source_rules)
                    variables, _ = train.warm_start(variables, previous[SOURCE].published, rules)
                state = train.create_state(variables, self.optimizer)
            params = prune.apply_masks(state.params, consts["masks"])
            opt_state = optax.tree.set(state.opt_state, step_size=jnp.asarray(lr, jnp.float32))
            return dataclasses.replace(state, params=params, opt_state=opt_state)

        first = self.late if start == "late" else 0
        needs = (FIRST, parent, *((SOURCE,) if SOURCE in (start, mask) else ()))
        named: dict[str, Any] = {"needs": needs, "more": masks, "first_step": first}
        return nets.stage(self.setup, name, self.steps, self.step, init, self.evaluators, **named)

    def transferred(self, variables: Any) -> Any:
        """The masks of another run's ticket, by its zeros; what its rules drop, or has another shape there, is whole.

        Raises:
          UserError: if it has nothing in common with the network, or no zeros there.
        """
        masks = prune.ones_masks(self.setup.shapes["params"], self.is_prunable)
        kept = jax.tree.map(lambda x: np.asarray(x) != 0, variables["params"])
        target = {"params": jax.tree.map(lambda mask: np.ones(mask.shape, bool), masks)}
        found, _ = train.warm_start(target, {"params": kept}, parse_rules(self.setup.config.source_rules))
        found = jax.tree.map(lambda mask, new: new if mask.ndim else mask, masks, found["params"])
        if all(leaf.all() for leaf in jax.tree.leaves(found)):
            raise UserError(f"{self.setup.config.source} has no zeros in the kernels of this network: it is no ticket.")
        return jax.tree.map(jnp.asarray, found)

    def source(self) -> train.Stage:
        """Another run's ticket."""
        setup = self.setup
        stored = Stored.parse(setup.config.source, "source")
        stored = dataclasses.replace(stored, model=setup.model, shape=setup.task.shape)
        check = functools.partial(check_seeds, config=setup.config, what=setup.config.source)
        return stored_stage(SOURCE, stored, setup.config, check)

    def rounds(self, arm: ConfigDict) -> dict[str, train.Stage]:
        """The trainings between the first and an arm's own, by name: the rounds of iterative pruning."""
        start = arm.start if arm.start in ("late", "init") else "late"
        schedule = prune.keep_schedule(arm.keep, arm.rounds)[:-1]
        prefix = f"{arm.scope}_{start}_{arm.rounds}_{100 * arm.keep:g}".replace(".", "_")
        names = [f"{prefix}_round{r}" for r in range(1, arm.rounds - 1)]
        lr = self.setup.config.network.lr
        parents = [FIRST, *names]
        return {
            name: self.ticket(name, parent, float(keep), start, arm.scope, lr)
            for name, parent, keep in zip(names, parents, schedule, strict=False)
        }


def stages(config: ConfigDict) -> list[train.Stage]:
    """The whole network, the rounds that the arms share, and one ticket for each arm."""
    check(config)
    tickets = Tickets.of(config)
    made = {FIRST: tickets.whole()}
    if any(SOURCE in (config.arms[name].start, config.arms[name].mask) for name in nets.selected_arms(config)):
        made[SOURCE] = tickets.source()
    for name in nets.selected_arms(config):
        arm = config.arms[name]
        rounds = {} if arm.mask == SOURCE else tickets.rounds(arm)
        made |= {one: stage for one, stage in rounds.items() if one not in made}
        parent = next(reversed(rounds), FIRST)
        made[name] = tickets.ticket(name, parent, arm.keep, arm.start, arm.scope, arm.lr, arm.mask)
    return list(made.values())


def weights_evaluator(setup: Setup) -> train.Evaluator:
    """Percent of weights that are 0: of each prunable kernel, of all these, and of the whole network."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        report = prune.sparsity_report(published["params"], consts["masks"])
        return {"shares": report._asdict(), "batches": jnp.ones(())}

    def finish(sums: Any) -> dict[str, float]:
        shares = {**sums["shares"]["per_layer"], **{k: sums["shares"][k] for k in ("prunable", "total")}}
        return {f"zero_{name}": 100 * float(x / sums["batches"]) for name, x in shares.items()}

    return train.Evaluator(setup.rows("test"), collect, finish)


# --- claims ---

KEPT = (20, 5, 2, 1)  # percent
PAPER = "so for detection on COCO"
CLAIMS = (
    Claim("one-shot tickets of 20 % are as good as the whole network", PAPER, "late_20", "dense", margin=1.0),
    Claim("iterative tickets of 20 % are as good as the whole network", "", "imp_20", "dense", margin=1.0),
    *(
        Claim(f"iterative tickets of {k} % beat their masks on fresh weights", "", f"imp_{k}", f"imp_fresh_{k}")
        for k in KEPT[1:]
    ),
    *(
        Claim(f"iterative tickets of {k} % beat masks shuffled in each layer", "", f"imp_{k}", f"imp_shuffled_{k}")
        for k in KEPT[1:]
    ),
    *(Claim(f"several rounds beat one at {k} %", "", f"imp_{k}", f"late_{k}") for k in KEPT),
    *(
        Claim(f"late resetting beats going back to the start at {k} % (one-shot)", "yes", f"late_{k}", f"init_{k}")
        for k in KEPT
    ),
    Claim("ranking all layers together beats each by itself (5 %)", "yes", "imp_5", "imp_layerwise_5"),
)
STUDIES = (Study("digits", "configs/lottery_tickets.py", (0.03, 0.1, 0.3), 3, CLAIMS),)
