"""Models that another run or a file holds, as stages: a teacher to learn from, or where training starts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import classification as cls
from jkd import train
from jkd.errors import UserError
from jkd.interop import torch
from jkd.interop.safetensors import load_safetensors
from jkd.train.ensemble import member

FILES = (".safetensors", *torch.PICKLES)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a model is: in a finished stage of the run in `place`, or, without a stage, in the file `place`.

    A file under PyTorch's names is read as `model` for images of `shape`, with as many classes as the file has.
    """

    place: str
    stage: str = ""
    model: Any = None
    shape: tuple[int, ...] = ()

    @classmethod
    def parse(cls_, spec: str, field: str) -> "Stored":
        """`WORKDIR:STAGE`, or a file of weights.

        Raises:
          UserError: for anything else, naming the config's `field`.
        """
        if spec.endswith(FILES):
            return cls_(spec)
        place, _, stage = spec.rpartition(":")
        if not place or not stage or stage.startswith("/"):
            raise UserError(f"{field} must be WORKDIR:STAGE or a {', '.join(FILES)} file, got {spec!r}.")
        return cls_(place, stage)

    def __str__(self) -> str:
        return f"{self.place}:{self.stage}" if self.stage else self.place

    def shapes(self) -> train.Outcome:
        """What is stored, as shapes and dtypes; of an ensemble of one seed, that seed."""
        if not self.stage:
            outcome = self.read()
            return dataclasses.replace(outcome, published=jax.eval_shape(lambda: outcome.published))
        outcome = train.outcome_shapes(self.place, self.stage)
        if outcome.members != 1:
            return outcome
        return dataclasses.replace(outcome, published=one_of(outcome), members=0)

    def read(self) -> train.Outcome:
        """What is stored, with its arrays; of an ensemble of one seed, that seed."""
        if self.stage:
            outcome = train.load_outcome(self.place, self.stage)
        else:
            outcome = self._file()
        return dataclasses.replace(member(outcome, 0), members=0) if outcome.members == 1 else outcome

    def _file(self) -> train.Outcome:
        if not self.place.endswith(torch.PICKLES):
            tree, metadata = load_safetensors(self.place)
            if self.model is None or any(isinstance(leaf, dict) for leaf in tree.values()):
                return train.Outcome(tree, {}, {}, {}, int(metadata.get("members", 0)))
        weights = torch.read_state_dict(self.place)
        classes = torch.num_classes(self.model, weights) or self.model.num_classes
        try:
            tree = torch.from_torch(self.model.clone(num_classes=classes), weights, image_shape=self.shape)
        except UserError as error:
            raise UserError(f"{self.place}: {error}") from error
        return train.Outcome(tree, {}, {}, {}, 0)


def one_of(outcome: train.Outcome) -> Any:
    """The shapes of one member of what an outcome published."""
    if not outcome.members:
        return outcome.published
    return jax.eval_shape(lambda tree: member(tree, 0), outcome.published)


def stored_stage(name: str, stored: Stored, config: ConfigDict, check: Callable[[train.Outcome], None]) -> train.Stage:
    """A stage of no steps that publishes a stored model: one for all seeds, or one for each.

    It is read when the stage runs; from then on the run's own copy serves, and `stored` may be gone.

    Args:
      name: of the stage.
      stored: the model.
      config: of the run.
      check: raises UserError unless it can be used; takes shapes or arrays.
    """
    try:
        members = stored.shapes().members
    except UserError:
        members = 0  # only a finished stage passes the check without its source, and that one is not run

    def prepare(key: Any, previous: Any, sweep: Any) -> dict[str, Any]:
        outcome = stored.read()
        check(outcome)
        return {"variables": outcome.published}

    return train.Stage(
        name,
        0,
        prepare=prepare,
        init=lambda key, previous, consts: consts["variables"],
        members=members,
        key=cls.member_keys(config) if members else jax.random.key(config.seed),
        check=lambda: check(stored.shapes()),
    )


def check_seeds(outcome: train.Outcome, config: ConfigDict, what: str) -> None:
    """Raises UserError unless `what` is one model for all seeds, or one for each."""
    if outcome.members not in (0, config.seeds):
        raise UserError(
            f"{what} has {outcome.members} seeds and the config seeds={config.seeds}: set seeds={outcome.members}, or "
            "give one that was trained with seeds=1."
        )
