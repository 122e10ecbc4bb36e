"""Knowledge evolution: generations that inherit a part of the weights, and the slim network inside the last one.

Taha et al., Knowledge Evolution in Neural Networks, CVPR 2021. Each generation is an ordinary training with a fresh
optimizer; only its start differs: the fit-hypothesis of the generation before, and new weights elsewhere. Baselines of
as many epochs: one long training, born-again networks, dense-sparse-dense training.
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
from experiments.studies import HARD_RATES, Claim, Study
from jkd import distill, nn, prune, train
from jkd.errors import UserError, unknown

__all__ = ["BASELINE", "STUDIES", "predictor", "stages"]
BASELINE = "long"
RESETS = {"uniform": prune.reset_init, "normal": prune.first_init}


def check(config: ConfigDict) -> None:
    """Raises UserError for splits that do not exist, before any data is read."""
    nets.check(config)
    for name in nets.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        cls.check_numbers(arm, field, positive=("epochs",), nonnegative=("weight_decay",))
        for one, known in {"kind": tuple(KINDS), "reset": tuple(RESETS)}.items():
            if arm[one] not in known:
                raise unknown(f"{field}.{one}", arm[one], known)
        if not 0 < arm.split_rate < 1:
            raise UserError(f"{field}.split_rate must lie in (0, 1), got {arm.split_rate}.")
        if arm.generations < 1:
            raise UserError(f"{field}.generations must be >= 1, got {arm.generations}.")
        if arm.kind == "plain" and arm.generations > 1:
            raise UserError(f"{field}.generations={arm.generations} inherit nothing where kind is 'plain': set 1.")


@dataclasses.dataclass(frozen=True)
class Slim:
    """The slim network, applied to the variables of the dense one that it is a part of."""

    model: Any
    channels: Any

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply` on the extracted variables."""
        return self.model.apply(prune.extract_slim(variables, self.channels), *args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
    """Trainings one after another, with a fresh optimizer and schedule each; this one starts each anew.

    Attributes:
      setup: of the config.
      arm: its section.
    """

    setup: Setup
    arm: Any

    @functools.cached_property
    def optimizer(self) -> Any:
        """Of every generation."""
        section = self.setup.config.network.copy_and_resolve_references()
        section.weight_decay = self.arm.weight_decay
        return make_optimizer(section, self.arm.lr, *self.setup.steps(self.arm.epochs))

    @functools.cached_property
    def step(self) -> train.ModelStep:
        """`Stage.step` of every generation: one object, one program."""
        setup, smoothing = self.setup, self.setup.config.network.smoothing
        return nets.cross_entropy_step(setup.model, setup.views["weak"], self.optimizer, smoothing)

    @functools.cached_property
    def evaluators(self) -> dict[str, train.Evaluator]:
        """Of every generation."""
        return self.setup.accuracies(self.setup.model)

    def consts(self, g: int, before: train.Outcome | None, key: jax.Array) -> dict[str, Any]:
        """What the steps of generation `g` need beside the rows."""
        return {}

    def start(self, g: int, before: train.Outcome | None, key: jax.Array, consts: Any) -> train.TrainState:
        """What generation `g` starts from; `before` is the outcome of the one before."""
        variables = self.setup.initialize(key, g - 1)
        params = prune.first_generation(cls.replica_key(key, g - 1), variables["params"])
        return train.create_state({**variables, "params": params}, self.optimizer)

    def stages(self, name: str) -> list[train.Stage]:
        """One stage a generation; the last has the arm's name, the others end in _g1, _g2, and so on."""
        steps, _ = self.setup.steps(self.arm.epochs)
        names = [*(f"{name}_g{g}" for g in range(1, self.arm.generations)), name]
        made = []
        for g, (one, parent) in enumerate(zip(names, [None, *names], strict=False), start=1):
            init = functools.partial(self._init, g, parent)
            more = functools.partial(self._more, g, parent)
            named: dict[str, Any] = {"needs": (parent,) if parent else (), "more": more}
            made.append(nets.stage(self.setup, one, steps, self.step, init, self.evaluators, **named))
        return made

    def _init(self, g: int, parent: str | None, key: Any, previous: Mapping[str, Any], consts: Any) -> train.TrainState:
        return self.start(g, previous[parent] if parent else None, key, consts)

    def _more(self, g: int, parent: str | None, key: Any, previous: Mapping[str, Any], consts: Any) -> dict[str, Any]:
        return self.consts(g, previous[parent] if parent else None, key)


class Evolution(Generations):
    """Generations that inherit the fit hypothesis; running statistics and dense biases are never reset."""

    @functools.cached_property
    def slim(self) -> Slim:
        """The network of the leading channels."""
        narrow = nn.narrow(self.setup.model, self.arm.split_rate)
        return Slim(narrow, nn.shared_channels(self.setup.model, narrow, self.setup.task.shape))

    @functools.cached_property
    def split(self) -> Any:
        """`key -> masks` of what is inherited, compiled once for all generations."""
        shapes, rate = self.setup.shapes["params"], self.arm.split_rate
        if self.arm.kind == "kels":
            masks = prune.build_masks(shapes, mode="kels", channels=self.slim.channels)
            return lambda key: masks
        return jax.jit(lambda key: prune.build_masks(shapes, rate, "wels", key=key))

    @functools.cached_property
    def evaluators(self) -> dict[str, train.Evaluator]:
        """Accuracy of the dense and of the slim network, and how large the weights of both hypotheses are."""
        found = {**self.setup.accuracies(self.setup.model), "magnitude": magnitude_evaluator(self.setup)}
        if self.arm.kind == "kels":
            slim = self.setup.accuracies(self.slim)
            found |= {
                name: slim[of] for name, of in (("slim", "test"), ("slim_validation", "validation")) if of in slim
            }
        return found

    def consts(self, g: int, before: train.Outcome | None, key: jax.Array) -> dict[str, Any]:
        """Which weights are inherited; equal keys draw equal ones, in all generations."""
        return {"masks": self.split(key)}

    def start(self, g: int, before: train.Outcome | None, key: jax.Array, consts: Any) -> train.TrainState:
        """The generation before, with new weights outside the masks."""
        if before is None:
            return super().start(g, before, key, consts)
        inherited, init_fn = before.published["params"], RESETS[self.arm.reset]
        params = prune.next_generation(jax.random.fold_in(key, g), inherited, consts["masks"], init_fn)
        return train.create_state({**before.published, "params": params}, self.optimizer)


class BornAgain(Generations):
    """Generations that start anew and learn from the one before (Furlanello et al., ICML 2018)."""

    @functools.cached_property
    def step(self) -> train.ModelStep:
        """Cross-entropy and, from the second generation on, KL(previous || own) at T = 1."""
        setup = self.setup

        def taught(logits: Any, consts: Any, batch: Any) -> Any:
            teacher = setup.model.apply(consts["teacher"], batch["image"], train=False).logits
            return consts["taught"] * distill.kd_loss(logits, teacher, 1.0)

        smoothing = setup.config.network.smoothing
        return nets.cross_entropy_step(setup.model, setup.views["weak"], self.optimizer, smoothing, taught)

    def consts(self, g: int, before: train.Outcome | None, key: jax.Array) -> dict[str, Any]:
        """The teacher, and its weight: 0 in the first generation, whose teacher is any network."""
        teacher = before.published if before else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.setup.shapes)
        return {"teacher": teacher, "taught": jnp.asarray(float(before is not None))}


class DenseSparseDense(Generations):
    """Dense, then without its smallest weights, then dense again at a tenth of the rate (Han et al., ICLR 2017)."""

    @functools.cached_property
    def step(self) -> train.ModelStep:
        """Of masked weights."""
        return dataclasses.replace(
            super().step, optimizer=lambda consts: prune.masked_update(self.optimizer, consts["masks"])
        )

    def consts(self, g: int, before: train.Outcome | None, key: jax.Array) -> dict[str, Any]:
        """All weights, but in the even generations the smallest of each layer."""
        ones = prune.ones_masks(self.setup.shapes["params"])
        if before is None or g % 2:
            return {"masks": ones}
        return {"masks": prune.layerwise_magnitude_mask(before.published["params"], ones, self.arm.split_rate)}

    def start(self, g: int, before: train.Outcome | None, key: jax.Array, consts: Any) -> train.TrainState:
        """The generation before, masked."""
        if before is None:
            return super().start(g, before, key, consts)
        params = prune.apply_masks(before.published["params"], consts["masks"])
        state = train.create_state({**before.published, "params": params}, self.optimizer)
        rate = self.arm.lr * (0.1 if g > 2 else 1.0)
        opt_state = optax.tree.set(state.opt_state, step_size=jnp.asarray(rate, jnp.float32))
        return dataclasses.replace(state, opt_state=opt_state)


KINDS: dict[str, type[Generations]] = {
    "kels": Evolution,
    "wels": Evolution,
    "plain": Generations,
    "born_again": BornAgain,
    "dsd": DenseSparseDense,
}


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
    arms = {name: config.arms[name] for name in nets.selected_arms(config)}
    return [stage for name, arm in arms.items() for stage in KINDS[arm.kind](setup, arm).stages(name)]


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
    Claim("generations beat born-again networks of as many epochs", "so", "kels", "born_again"),
    Claim("generations beat dense-sparse-dense training of half as many epochs", "so", "kels", "dsd"),
    Claim("slim beats dense of generation 1", "58.2 and 57.0", SLIM, "kels_g1"),
)
STUDIES = (
    Study("digits", "configs/knowledge_evolution.py", (0.03, 0.1, 0.3), 8, CLAIMS, derived=shrinking),
    Study("hard", "configs/knowledge_evolution.py:hard", HARD_RATES, 2, CLAIMS, derived=shrinking),
)
