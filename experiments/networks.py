"""One network a stage, trained on labels from whatever start: what the methods on single networks share.

A config has a `network` and `arms`; the arms of a method are stages that differ in what they do to the network. See
`experiments/distillation.py` for students that learn from teachers, too.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import classification as cls
from experiments.optimizers import check_optimizer
from jkd import distill, metrics, nn, prune, train
from jkd.errors import UserError, unknown


def selected_arms(config: ConfigDict) -> list[str]:
    """The arms to run: those in `only`, or all."""
    for name in config.only:
        if name not in config.arms:
            raise unknown("arm in config.only", name, config.arms)
    return list(config.only or config.arms)


def check(config: ConfigDict) -> None:
    """Raises UserError for numbers that no network could be trained with."""
    cls.member_keys(config)
    cls.check_numbers(config, "", nonnegative=("eval_epochs",))
    cls.check_numbers(config.network, "network", positive=("lr", "epochs"))
    cls.check_numbers(config.network, "network", nonnegative=("momentum", "weight_decay", "warmup_epochs", "smoothing"))
    check_optimizer(config.network, "network", "network.milestones", config.network.milestones)
    if config.network.smoothing > 1:
        raise UserError(f"network.smoothing must lie in [0, 1], got {config.network.smoothing}.")
    for name in selected_arms(config):
        cls.check_numbers(config.arms[name], f"arms.{name}", positive=("lr",))
    for pattern in config.get("exempt", ()):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"exempt: {pattern!r} is no regular expression: {error}.") from error


def is_kernel(path: str, exempt: Sequence[str] = ()) -> bool:
    """Whether a leaf is the kernel of a layer, and of none whose path one of the regexes finds."""
    return prune.is_kernel(path, None) and not any(re.search(pattern, path) for pattern in exempt)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What the stages of one config share.

    Attributes:
      config: the whole of it.
      task: its data.
      views: "weak" and "strong": how images are augmented.
      model: the network.
    """

    config: Any
    task: cls.Task
    views: Mapping[str, cls.Views]
    model: Any

    @classmethod
    def of(cls_, config: ConfigDict) -> "Setup":
        """Loads the data and builds the network of a config."""
        task = cls.load_task(config)
        return cls_(config, task, cls.make_views(config), cls.build_model(config.network, task, config.precision))

    def steps(self, epochs: float) -> tuple[int, float]:
        """The number of steps in so many epochs, and in one; no steps in no epochs."""
        steps, per_epoch = cls.steps_of(self.config, self.task, epochs)
        return (steps if epochs else 0), per_epoch

    def rows(self, name: str) -> Callable:
        """The source of an evaluator: the "train", "validation" or "test" rows in order."""
        return functools.partial(self.task.part, name=name, batch_size=self.config.eval_batch_size)

    def initialize(self, key: jax.Array, replica: int = 0) -> Any:
        """Variables of the network; another `replica` starts elsewhere."""
        return nn.init(self.model, cls.replica_key(key, replica), self.task.shape)

    @functools.cached_property
    def shapes(self) -> Any:
        """The shapes and dtypes of the network's variables."""
        return jax.eval_shape(lambda: self.initialize(jax.random.key(0)))

    def accuracies(self, model: Any) -> dict[str, train.Evaluator]:
        """Accuracy of what a stage publishes, applied by `model`."""
        return cls.accuracy_evaluators(self.config, self.task, model, self.views["weak"], self.steps(1)[1])


def predictor(config: ConfigDict, stage: str) -> cls.Predictor:
    """How the network that a stage publishes classifies images."""
    del stage
    setup = Setup.of(config)
    return cls.classifier(setup.model, setup.task, setup.views["weak"])


def cross_entropy_step(
    model: Any,
    views: cls.Views,
    optimizer: Any,
    smoothing: float = 0.0,
    more: Callable[[Any, Any, Any], Any] = lambda logits, consts, batch: 0.0,
) -> train.ModelStep:
    """`Stage.step` of a network trained by cross-entropy on (smoothed) labels, and `more(logits, consts, batch)`."""

    def view(key: jax.Array, consts: Any, batch: Any) -> Any:
        return {**batch, "image": views.train(key, batch["image"])}

    def loss_fn(params: Any, state: Any, consts: Any, batch: Any, key: jax.Array, t: Any) -> Any:
        out, model_state = nn.apply_train(model.apply, params, state.model_state, batch["image"])
        correct = metrics.topk_correct(out.logits, batch["label"]).mean()
        loss = distill.cross_entropy(out.logits, batch["label"], smoothing=smoothing)
        return loss + more(out.logits, consts, batch), train.Aux({"accuracy": correct}, model_state)

    return train.ModelStep(loss_fn, optimizer, view)


def stage(
    setup: Setup,
    name: str,
    num_steps: int,
    step: Callable,
    init: Callable,
    evaluators: Mapping[str, train.Evaluator],
    *,
    needs: Sequence[str] = (),
    more: Callable = lambda key, previous, consts: {},
    **fields: Any,
) -> train.Stage:
    """A stage of one network, for each seed.

    Args:
      setup: of the config.
      name: of the stage.
      num_steps: of the stage.
      step: `Stage.step`; stages that share the object share its compiled program.
      init: `Stage.init`, which returns a `TrainState`.
      evaluators: `Stage.evaluators`.
      needs: `Stage.needs`.
      more: `(key, previous, consts) -> dict`: consts beside the rows, which are drawn from equal keys in all stages.
      **fields: of `Stage`.
    """

    def prepare(key: jax.Array, previous: Mapping[str, train.Outcome], sweep: Callable) -> dict[str, Any]:
        consts: dict[str, Any] = setup.task.draw(key)
        return consts | more(jax.random.fold_in(key, 1), previous, consts)

    made = train.Stage(
        name,
        num_steps,
        needs=tuple(dict.fromkeys(needs)),
        prepare=prepare,
        data=lambda consts: setup.task.source(consts, setup.config.batch_size),
        init=init,
        step=step,
        publish=variables_of,
        evaluators=evaluators,
        **fields,
    )
    return seeds(setup, made)


def variables_of(state: train.TrainState) -> Any:
    """What a stage of one network publishes."""
    return state.variables


def seeds(setup: Any, stage: train.Stage) -> train.Stage:
    """A stage as the config executes it, as an ensemble over its paired seeds."""
    stage = cls.transformed(setup.config, setup.task, stage)
    return train.ensemble(stage, keys=cls.member_keys(setup.config), mode=setup.config.ensemble)
