"""Knowledge evolution: generations that inherit a part of the weights, and the slim network inside the last one.

Taha et al., Knowledge Evolution in Neural Networks, CVPR 2021. Each generation is an ordinary training with a fresh
optimizer; only its start differs: the fit-hypothesis of the generation before, and new weights elsewhere.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments import networks as nets
from experiments.networks import Setup
from experiments.optimizers import make_optimizer
from experiments.studies import HARD_RATES, Claim, Study
from jkd import nn, prune, train
from jkd.errors import UserError, unknown

BASELINE = "long"
SPLITS = ("kels", "wels", "none")
RESETS = {"uniform": prune.reset_init, "normal": prune.first_init}


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the (dense) network that a stage publishes classifies images."""
    del stage
    setup = Setup.of(config)
    return cls.classifier(setup.model, setup.task, setup.views["weak"])


def check(config: ConfigDict) -> None:
    """Raises UserError for splits that do not exist, before any data is read."""
    nets.check(config)
    for name in nets.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        cls.check_numbers(arm, field, positive=("epochs",), nonnegative=("weight_decay",))
        for one, known in {"split": SPLITS, "reset": tuple(RESETS)}.items():
            if arm[one] not in known:
                raise unknown(f"{field}.{one}", arm[one], known)
        if not 0 < arm.split_rate < 1:
            raise UserError(f"{field}.split_rate must lie in (0, 1), got {arm.split_rate}.")
        if arm.generations < 1:
            raise UserError(f"{field}.generations must be >= 1, got {arm.generations}.")
        if arm.split == "none" and arm.generations > 1:
            raise UserError(f"{field}.generations={arm.generations} inherit nothing where split is 'none': set 1.")


@dataclasses.dataclass(frozen=True)
class Slim:
    """The slim network, applied to the variables of the dense one that it is a part of."""

    model: Any
    channels: Any

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply` on the extracted variables."""
        return self.model.apply(prune.extract_slim(variables, self.channels), *args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class Evolution:
    """What the generations of one arm share.

    Attributes:
      setup: of the config.
      arm: its section.
    """

    setup: Setup
    arm: Any

    @functools.cached_property
    def slim(self) -> Slim:
        """The network of the leading channels."""
        narrow = nn.narrow(self.setup.model, self.arm.split_rate)
        return Slim(narrow, nn.shared_channels(self.setup.model, narrow, self.setup.task.shape))

    @functools.cached_property
    def split(self) -> Any:
        """`key -> masks` of what is inherited, compiled once for all generations."""
        shapes, rate = self.setup.shapes["params"], self.arm.split_rate
        if self.arm.split == "kels":
            masks = prune.build_masks(shapes, mode="kels", channels=self.slim.channels)
            return lambda key: masks
        return jax.jit(lambda key: prune.build_masks(shapes, rate, "wels", key=key))

    def masks(self, key: jax.Array, previous: Any, consts: Any) -> dict[str, Any]:
        """Which weights are inherited; equal keys draw equal ones, in all generations."""
        return {} if self.arm.split == "none" else {"masks": self.split(key)}

    def stages(self, name: str) -> list[train.Stage]:
        """One stage a generation; the last has the arm's name, the others end in _g1, _g2, and so on."""
        setup, arm = self.setup, self.arm
        steps, per_epoch = setup.steps(arm.epochs)
        section = setup.config.network.copy_and_resolve_references()
        section.weight_decay = arm.weight_decay
        optimizer = make_optimizer(section, arm.lr, steps, per_epoch)
        step = nets.cross_entropy_step(setup.model, setup.views["weak"], optimizer, section.smoothing)
        evaluators = self.evaluators()
        names = [*(f"{name}_g{g}" for g in range(1, arm.generations)), name]
        made = []
        for g, (one, parent) in enumerate(zip(names, [None, *names], strict=False), start=1):
            init = functools.partial(self.start, optimizer, g, parent)
            named: dict[str, Any] = {"needs": (parent,) if parent else (), "more": self.masks}
            made.append(nets.stage(setup, one, steps, step, init, evaluators, **named))
        return made

    def start(
        self, optimizer: Any, g: int, parent: str | None, key: jax.Array, previous: Mapping[str, Any], consts: Any
    ) -> train.TrainState:
        """What generation `g` starts from: running statistics and dense biases are never reset."""
        if parent is None:
            variables = self.setup.initialize(key)
            params = prune.first_generation(key, variables["params"])
        else:
            variables, init_fn = previous[parent].published, RESETS[self.arm.reset]
            params = prune.next_generation(jax.random.fold_in(key, g), variables["params"], consts["masks"], init_fn)
        return train.create_state({**variables, "params": params}, optimizer)

    def evaluators(self) -> dict[str, train.Evaluator]:
        """Accuracy of the dense and of the slim network, and how large the weights of both hypotheses are."""
        found = self.setup.accuracies(self.setup.model)
        if self.arm.split == "none":
            return found
        if self.arm.split == "kels":
            slim = self.setup.accuracies(self.slim)
            found |= {
                name: slim[of] for name, of in (("slim", "test"), ("slim_validation", "validation")) if of in slim
            }
        return {**found, "magnitude": magnitude_evaluator(self.setup)}


def magnitude_evaluator(setup: Setup) -> train.Evaluator:
    """The mean magnitude of the reset weights by that of the fit ones: of every layer, and their mean as `ratio`."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        found = prune.hypothesis_magnitude(published["params"], consts["masks"])
        return {"ratios": {path: reset / fit for path, (fit, reset) in found.items()}, "batches": jnp.ones(())}

    def finish(sums: Any) -> dict[str, float]:
        each = {f"ratio_{path}": float(x / sums["batches"]) for path, x in sums["ratios"].items()}
        return {"ratio": float(np.mean(list(each.values()))), **each}

    return train.Evaluator(setup.rows("test"), collect, finish)


def stages(config: ConfigDict) -> list[train.Stage]:
    """The generations of every arm."""
    check(config)
    setup = Setup.of(config)
    return [stage for name in nets.selected_arms(config) for stage in Evolution(setup, config.arms[name]).stages(name)]


# --- claims ---


def shrinking(stages: Mapping[str, Any]) -> dict[str, Any]:
    """`shrinking`: the ratio of magnitudes after the second generation by that after the first, of each seed."""
    found = {}
    for name in ("kels", "wels"):
        first, second = (np.asarray(stages[f"{name}_g{g}"]["metrics"]["magnitude/ratio"], float) for g in (1, 2))
        found[name] = (second / first).tolist()
    return {"shrinking": {"metrics": found}}


SLIM = ("kels", "slim/top1")
CLAIMS = (
    Claim("the slim network of the last generation is as good as the dense one", "58.2 and 57.9", SLIM, "kels", 1.0),
    Claim("the slim network is better than that of generation 1", "58.2 and 1.1", SLIM, ("kels_g1", "slim/top1")),
    Claim("... and already in generation 2", "12.3 and 1.1", ("kels_g2", "slim/top1"), ("kels_g1", "slim/top1")),
    Claim("reset weights shrink against fit ones (KELS)", "so", value=("shrinking", "kels"), inside=(0.0, 0.7)),
    Claim("reset weights shrink against fit ones (WELS)", "so", value=("shrinking", "wels"), inside=(0.0, 0.7)),
    Claim("the last dense generation is not worse than the first", "57.9 and 57.0", "kels", "kels_g1", margin=1.0),
    Claim("the last dense generation is better than the first (KELS)", "57.9 and 57.0", "kels", "kels_g1"),
    Claim("the last dense generation is better than the first (WELS)", "so", "wels", "wels_g1"),
    Claim("generations beat one training of as many epochs", "so", "kels", "long"),
    Claim("slim beats dense of generation 1", "58.2 and 57.0", SLIM, "kels_g1"),
)
STUDIES = (
    Study("digits", "configs/knowledge_evolution.py", (0.03, 0.1, 0.3), 3, CLAIMS),
    Study("hard", "configs/knowledge_evolution.py:hard", HARD_RATES, 2, CLAIMS),
)
