"""A network for each side of pairs: what methods that learn a hash function of both sides share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.pairs import SIDES, PairTask
from jkd import nn


@dataclasses.dataclass(frozen=True, eq=False)
class PairNetworks:
    """The networks of both sides of a task, whose variables are kept together: {collection: {side: tree}}.

    Attributes:
      task: its pairs.
      of: the network of each side, which returns `jkd.nn.Outputs`, from its input and, where texts are padded, `mask`.
    """

    task: PairTask
    of: Mapping[str, Any]

    def init(self, key: jax.Array) -> dict[str, dict[str, Any]]:
        """The variables of both."""
        shapes = self.task.shapes
        empty = {name: jnp.zeros((1, *shapes[name])) for name in SIDES}
        empty |= {name: jnp.ones((1, *shape), bool) for name, shape in shapes.items() if name.endswith("_mask")}
        variables: dict[str, dict[str, Any]] = {}
        for side, own in zip(SIDES, jax.random.split(key, len(SIDES)), strict=True):
            for collection, tree in self.of[side].init(own, empty[side], **_mask(empty, side)).items():
                variables.setdefault(collection, {})[side] = tree
        return variables

    def train_logits(self, params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """The logits of both sides in training, of a batch as networks see it, and the new model state."""
        logits, after = {}, {collection: dict(of) for collection, of in state.items()}
        for side, own in zip(SIDES, jax.random.split(key, len(SIDES)), strict=True):
            before = _of_side(state, side)
            apply: Callable = functools.partial(self.of[side].apply, **_mask(batch, side))
            out, changed = nn.apply_train(apply, params[side], before, batch[side], {"dropout": own})
            logits[side] = out.logits
            for collection, tree in changed.items():
                after[collection][side] = tree
        return logits, after

    def logits(self, published: Any, consts: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The logits of both sides by the variables that a stage published, of a batch as it is stored."""
        seen = self.task.view(consts, batch)
        return {
            side: self.of[side].apply(_of_side(published, side), seen[side], **_mask(seen, side)).logits
            for side in SIDES
        }

    def view(self, key: jax.Array, consts: Any, batch: Any) -> Any:
        """A batch as networks see it."""
        return self.task.view(consts, batch)


def _mask(batch: Mapping[str, Any], side: str) -> dict[str, Any]:
    name = f"{side}_mask"
    return {"mask": batch[name]} if name in batch else {}


def _of_side(variables: Mapping[str, Any], side: str) -> dict[str, Any]:
    return {collection: of[side] for collection, of in variables.items() if side in of}
