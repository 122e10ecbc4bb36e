"""Lottery tickets: sparse networks that train again from an early step of the dense run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jkd.errors import UserError, unknown
from jkd.prune.magnitude import Prunable, is_kernel
from jkd.prune.masks import apply_masks, global_magnitude_mask, keep_schedule, layerwise_magnitude_mask, ones_masks

SCOPES = {"global": global_magnitude_mask, "layerwise": layerwise_magnitude_mask}


class Ticket(NamedTuple):
    """A sparse network to be trained from step `step` on.

    Attributes:
      masks: which weights stay.
      params: of the DENSE run after `step` steps, not masked.
      opt_state: of the dense run then: momentum, and the count that schedules read.
      step: 0 is the reset to the initial weights.
    """

    masks: Any
    params: Any
    opt_state: Any
    step: int


class Round(NamedTuple):
    """One round of iterative pruning.

    Attributes:
      keep: the kept share of the prunable weights; 1 in the dense round.
      ticket: what was trained; of the dense round, with masks that keep all, and from step 0.
      params: the trained weights.
      opt_state: the optimizer's state at their end.
    """

    keep: float
    ticket: Ticket
    params: Any
    opt_state: Any


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, tree)


def rewind(ticket: Ticket) -> tuple[Any, Any]:
    """(params, opt_state) to train a ticket from: those of the dense run to the bit, pruned weights 0.

    Copies, so that a step that donates its arguments leaves the ticket as it is.
    """
    return _copied(apply_masks(ticket.params, ticket.masks)), _copied(ticket.opt_state)


def imp(
    train_fn: Callable[[Any, Any, Any, int, Any], tuple[Any, Any, Any]],
    params0: Any,
    keep: float,
    rounds: int,
    late_step: int,
    key: Any,
    *,
    tx: optax.GradientTransformation,
    scope: str = "global",
    is_prunable: Prunable = is_kernel,
) -> tuple[Round, ...]:
    """Iterative magnitude pruning with late resetting.

        round 0            dense, from `params0` at step 0; its state after `late_step` steps is kept
        round r = 1, ...   k_r = keep^(r / (rounds - 1)) of the weights that were largest at the END of round r - 1,
                           trained from the dense run's state after `late_step` steps

    Two rounds are one-shot pruning.

    Args:
      train_fn: `train_fn(params, opt_state, masks, start_step, key) -> (params, opt_state, snapshots)` trains from
        `start_step` to the end of the schedule, with pruned weights at 0 (`masked_update(tx, masks)`), and may donate
        its arguments. In the dense round, `snapshots[late_step]` is (params, opt_state) after that many steps; later
        rounds' snapshots are not read. The key is the same in all rounds: batches should depend on it and the step.
      params0: the initial weights; not donated.
      keep: the kept share of the prunable weights at the end, in (0, 1].
      rounds: in total, with the dense one; at least 2.
      late_step: >= 0; 0 resets to `params0`.
      key: handed to `train_fn`.
      tx: the optimizer that `train_fn` masks; only its `init` is used.
      scope: "global" ranks all prunable weights together, "layerwise" those of each leaf.
      is_prunable: as in `ones_masks`.

    Returns:
      All rounds, the dense one first.

    Raises:
      UserError: for the arguments; if the dense round leaves no snapshot of `late_step`; as `global_magnitude_mask`.

    Reference: Girish et al., The Lottery Ticket Hypothesis for Object Recognition, CVPR 2021. Their code for ImageNet
      ranks the weights after they were reset; here the trained weights are ranked, as the paper says.
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if late_step < 0:
        raise UserError(f"late_step must be >= 0, got {late_step}.")
    keeps, masks = keep_schedule(keep, rounds), ones_masks(params0, is_prunable)
    dense = Ticket(masks, params0, tx.init(params0), 0)
    params, opt_state, snapshots = train_fn(*rewind(dense), masks, 0, key)
    late_params, late_opt_state = _late(dense, snapshots, late_step)
    found = [Round(1.0, dense, params, opt_state)]
    for share in keeps:
        masks = SCOPES[scope](params, masks, share)
        ticket = Ticket(masks, late_params, late_opt_state, late_step)
        params, opt_state, _ = train_fn(*rewind(ticket), masks, late_step, key)
        found.append(Round(share, ticket, params, opt_state))
    return tuple(found)


def _late(dense: Ticket, snapshots: Any, step: int) -> tuple[Any, Any]:
    if step == 0:
        return dense.params, dense.opt_state
    if step not in (snapshots or {}):
        raise UserError(f"train_fn has to return a snapshot of late_step={step}; got those of {list(snapshots or {})}.")
    params, opt_state = snapshots[step]
    return _copied(params), _copied(opt_state)
