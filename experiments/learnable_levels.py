"""Low-bit networks whose levels and choices are trained themselves, beside those that round latent weights.

Hoang et al., Direct Quantization for Training Highly Accurate Low Bit-width Deep Neural Networks, IJCAI 2020. Its
equations are ours, made for its aims: see `jkd/quantize`. A first stage trains the network in full precision; every arm
goes on from it with low-bit weights, activations, or both.
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
from experiments import compression
from experiments import networks as nets
from experiments.networks import Setup
from experiments.optimizers import make_optimizer
from experiments.stored import Stored, check_seeds, one_of, stored_stage
from experiments.studies import Claim, Study
from jkd import quantize, train
from jkd.errors import UserError, unknown
from jkd.quantize.activations import MODES
from jkd.quantize.direct import GRADIENTS
from jkd.quantize.forms import FORMS

BASELINE = "full"
FIRST = "float"  # the stage that trains the network in full precision


def check(config: ConfigDict) -> None:
    """Raises UserError for arms that could not be trained, before any data is read."""
    nets.check(config)
    if config.network.init_from:
        Stored.parse(config.network.init_from, "network.init_from")
    for name in nets.selected_arms(config):
        arm, field = config.arms[name], f"arms.{name}"
        rates = ("choice_scale", "level_scale", "tau")
        cls.check_numbers(arm, field, positive=rates, nonnegative=("epochs",))
        for one, known in {"form": ("", *FORMS), "gradient": GRADIENTS, "act_mode": MODES}.items():
            if arm[one] not in known:
                raise unknown(f"{field}.{one}", arm[one], known)
        for one, least in (("bits", 1), ("act_bits", 0)):
            if not least <= arm[one] <= 8:
                raise UserError(f"{field}.{one} must be an integer in {least}..8, got {arm[one]}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """What the stage of one arm is made of.

    Attributes:
      setup: of the config.
      arm: its section.
    """

    setup: Setup
    arm: Any

    @functools.cached_property
    def model(self) -> compression.Compressed:
        """The network, applied to the arm's parameters."""
        arm, apply_fn = self.arm, self.setup.model.apply
        if arm.act_bits:
            rules = [(pattern, 0) for pattern in self.setup.config.act_exempt]
            apply_fn = quantize.low_bit_activations(apply_fn, arm.act_bits, mode=arm.act_mode, rules=rules)
        materialize = quantize.direct(arm.tau, gradient=arm.gradient, learn_levels=arm.learn_levels)
        return compression.Compressed(apply_fn, materialize)

    def start(self, variables: Any) -> Any:
        """The arm's variables, made of those in full precision."""
        arm, config = self.arm, self.setup.config
        variables = scaled(variables, config.scaled.count, config.scaled.factor)
        if arm.act_bits:
            rules = [(pattern, 0) for pattern in config.act_exempt]
            stats = quantize.activation_stats(
                self.setup.model.apply, self.setup.shapes, self.setup.task.shape, arm.act_bits, rules=rules
            )
            variables = {**variables, "quant_stats": stats}
        if not arm.form:
            return variables
        split = splitter(arm.form, arm.bits, arm.per_channel, tuple(config.exempt))
        return {**variables, "params": split(variables["params"])}

    def stage(self, name: str) -> train.Stage:
        """The arm's training, or its start alone where it has no epochs."""
        setup, arm = self.setup, self.arm
        steps, per_epoch = setup.steps(arm.epochs)
        optimizer = compression.make_groups(setup.config.network, arm, max(steps, 1), per_epoch)
        if arm.form == "lq":
            optimizer = compression.following(optimizer)
        step = nets.cross_entropy_step(self.model, setup.views["weak"], optimizer, setup.config.network.smoothing)

        def init(key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> train.TrainState:
            variables = self.start(previous[FIRST].published)
            return train.create_state({**variables, **consts.get("calibrated", {})}, optimizer)

        named: dict[str, Any] = {"needs": (FIRST,), "more": self.consts}
        return nets.stage(setup, name, steps, step, init, self.evaluators(steps), **named)

    def consts(self, key: jax.Array, previous: Mapping[str, train.Outcome], consts: Any) -> dict[str, Any]:
        """The choices at the start, and the bases of activations where nothing is trained."""
        arm, found = self.arm, {}
        if not arm.form and not (arm.act_bits and not arm.epochs):
            return {}
        variables = self.start(previous[FIRST].published)
        if arm.form:
            found["start"] = jax.jit(quantize.choices)(variables["params"])
        if arm.act_bits and not arm.epochs:
            size = min(self.setup.task.sizes["train"], self.setup.config.calibration_examples)
            batch = self.setup.task.part(consts, "train", size).batch(0)
            found["calibrated"] = {"quant_stats": self.calibrate(variables, np.asarray(batch["image"]))}
        return found

    @functools.cached_property
    def calibrate(self) -> Any:
        """Bases of activations by least squares: `(variables, images) -> quant_stats`, compiled once."""

        def calibrate(variables: Any, images: Any) -> Any:
            weights = {**variables, "params": self.model.materialize(variables["params"])}
            seen = self.setup.views["weak"].plain(images)
            apply_fn = self.setup.model.apply
            return quantize.calibrate(apply_fn, weights, seen, mode=self.arm.act_mode)["quant_stats"]

        return jax.jit(calibrate)

    def evaluators(self, steps: int) -> dict[str, train.Evaluator]:
        """Accuracy, the share of choices that changed, and how well channels are met where some are scaled."""
        found = self.setup.accuracies(self.model)
        if self.arm.form and steps:
            found["choices"] = choices_evaluator(self.setup)
        if self.arm.act_bits and self.setup.config.scaled.count:
            found["channels"] = channels_evaluator(self.setup, self.model)
        return found


@functools.cache
def splitter(form: str, bits: int, per_channel: bool, exempt: tuple[str, ...]) -> Any:
    """`quantize.quantize_params` as one program, which arms share."""
    rules = [(pattern, 0) for pattern in exempt]
    how: dict[str, Any] = {"rules": rules, "form": form, "per_channel": True if per_channel else None}
    return jax.jit(lambda params: quantize.quantize_params(params, bits, **how))


def scaled(variables: Any, count: int, factor: float) -> Any:
    """The same function with `count` channels before the head multiplied by `factor`, and their weights divided.

    Raises:
      UserError: if the network is no `mlp`, or has fewer channels.
    """
    if not count:
        return variables
    params = dict(variables["params"])
    hidden = sum(name.startswith("hidden") for name in params)
    if not hidden or count > len(params["head"]["kernel"]):
        raise UserError(f"scaled.count={count} channels are those of the last hidden layer of network.model='mlp'.")
    last = f"norm{hidden}" if f"norm{hidden}" in params else f"hidden{hidden}"
    by = jnp.where(jnp.arange(len(params["head"]["kernel"])) < count, factor, 1.0)
    params[last] = {name: x * (by if x.ndim == 1 else by[None]) for name, x in params[last].items()}
    params["head"] = {**params["head"], "kernel": params["head"]["kernel"] / by[:, None]}
    return {**variables, "params": params}


def first_stage(setup: Setup) -> train.Stage:
    """The network in full precision: trained, or taken from `network.init_from`."""
    config, section = setup.config, setup.config.network
    if section.init_from:
        stored = Stored.parse(section.init_from, "network.init_from")
        stored = dataclasses.replace(stored, model=setup.model, shape=setup.task.shape)
        return stored_stage(FIRST, stored, config, functools.partial(check_network, setup))
    steps, per_epoch = setup.steps(section.epochs)
    optimizer = make_optimizer(section, section.lr, steps, per_epoch)
    step = nets.cross_entropy_step(setup.model, setup.views["weak"], optimizer, section.smoothing)

    def init(key: jax.Array, previous: Any, consts: Any) -> train.TrainState:
        return train.create_state(setup.initialize(key), optimizer)

    return nets.stage(setup, FIRST, steps, step, init, setup.accuracies(setup.model))


def check_network(setup: Setup, outcome: train.Outcome) -> None:
    """Raises UserError unless a stored network is the config's."""
    check_seeds(outcome, setup.config, setup.config.network.init_from)
    if jax.tree.map(jnp.shape, one_of(outcome)) != jax.tree.map(jnp.shape, setup.shapes):
        raise UserError(
            f"{setup.config.network.init_from} is not the {setup.config.network.model!r} of this config for this data "
            "set: set network.model and data.* to what it was trained with."
        )


def choices_evaluator(setup: Setup) -> train.Evaluator:
    """Percent of the weights whose level's number is not that of the start."""

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        changed = quantize.flipped(consts["start"], quantize.choices(published["params"]))
        return {"changed": changed, "batches": jnp.ones(())}

    def finish(sums: Any) -> dict[str, float]:
        return {"changed": 100 * float(sums["changed"] / sums["batches"])}

    return train.Evaluator(setup.rows("test"), collect, finish)


def channels_evaluator(setup: Setup, model: Any) -> train.Evaluator:
    """Errors of the low-bit inputs of the head on the test rows.

    `relative`: the median over channels of sum(error^2) / sum(x^2), channels that are always 0 left out; `mse`: the
    mean squared error over all of them.
    """

    def collect(published: Any, consts: Any, batch: Any, mask: Any) -> dict[str, Any]:
        x = model.apply(published, setup.views["weak"].plain(batch["image"]), train=False).features["pool"]
        low = quantize.quantize_activation(x, published["quant_stats"]["head"]["basis"])
        keep = mask[:, None]
        error, energy = (jnp.where(keep, y**2, 0).sum(0) for y in (x - low, x))
        return {"error": error, "energy": energy, "rows": mask.sum()}

    def finish(sums: Any) -> dict[str, float]:
        alive = sums["energy"] > 0
        relative = sums["error"][alive] / sums["energy"][alive]
        mse = sums["error"].sum() / (sums["rows"] * len(sums["error"]))
        return {"relative": float(np.median(relative)), "mse": float(mse)}

    return train.Evaluator(setup.rows("test"), collect, finish)


def stages(config: ConfigDict) -> list[train.Stage]:
    """The network in full precision, and one stage for each arm."""
    check(config)
    setup = Setup.of(config)
    return [first_stage(setup), *(Arm(setup, config.arms[name]).stage(name) for name in nets.selected_arms(config))]


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the network that a stage publishes classifies images; low-bit weights may be given as kernels."""
    setup = Setup.of(config)
    plain = cls.classifier(setup.model, setup.task, setup.views["weak"])
    if stage == FIRST or stage not in config.arms:
        return plain
    arm = Arm(setup, config.arms[stage])
    return dataclasses.replace(
        cls.classifier(arm.model, setup.task, setup.views["weak"], jax.eval_shape(arm.start, setup.shapes)),
        model=setup.model,
        plain=arm.model.plain,
    )


# --- claims ---


def compared(bits: int) -> tuple[Claim, ...]:
    """Direct quantization at so many bits, against each baseline."""
    word = f"{bits} bit{'s' * (bits > 1)}"
    return (
        Claim(f"direct beats rounding to fixed levels ({word})", "so", f"direct_{bits}", f"ste_fixed_{bits}"),
        Claim(f"direct beats rounding to learned levels ({word})", "so", f"direct_{bits}", f"ste_{bits}"),
        Claim(f"direct beats LQ-Nets ({word})", "so", f"direct_{bits}", f"lq_{bits}"),
        Claim(
            f"choices need a large rate: 100 times that of the weights beats 10 times ({word})",
            "",
            f"direct_{bits}",
            f"direct_slow_{bits}",
        ),
        Claim(f"the softmax's gradient beats the score's own ({word})", "", f"direct_slow_{bits}", f"identity_{bits}"),
        Claim(f"the binary form is as good as the one-hot one ({word})", "", f"binary_{bits}", f"direct_{bits}", 1.0),
        Claim(f"{word} are as good as full precision", "so", f"direct_{bits}", "full", 1.0),
    )


CHANNELS = (
    *(
        Claim(f"weights by {mode} beat equal ones with scaled channels", "so (in words)", mode, "uniform")
        for mode in ("variance", "energy", "robust")
    ),
    Claim(
        "the typical channel's relative error falls (variance)",
        "so (in words)",
        better=("uniform", "channels/relative"),
        worse=("variance", "channels/relative"),
    ),
    Claim("the price: the raw squared error rises", "", ("variance", "channels/mse"), ("uniform", "channels/mse")),
)
STUDIES = (
    Study("digits", "configs/learnable_levels.py", (0.001, 0.003, 0.01), 3, (*compared(2), *compared(1))),
    Study("channels", "configs/learnable_levels.py:channels", (), 0, CHANNELS),
)
