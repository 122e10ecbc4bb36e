"""Rewinding is exact, and iterative pruning ranks what was trained."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import prune
from jkd.errors import UserError

STEPS, LATE = 8, 3
TX = optax.sgd(optax.linear_schedule(0.1, 0.01, STEPS), momentum=0.9)
DRAW = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": DRAW.normal(size=(6, 5)).astype(np.float32), "bias": np.zeros(5, np.float32)},
    "head": {"kernel": DRAW.normal(size=(5, 4)).astype(np.float32)},
}
TARGET = DRAW.normal(size=(6, 4)).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, masks, key, t):
    x = jax.random.normal(jax.random.fold_in(key, t), (16, 6))

    def loss(params):
        hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
        return ((hidden @ params["head"]["kernel"] - x @ TARGET) ** 2).mean()

    updates, opt_state = prune.masked_update(TX, masks).update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class Trainer:
    """Trains with donated arguments, takes its snapshots away in the next round, and notes what it began with."""

    def __init__(self):
        self.starts, self.lost = [], []

    def __call__(self, params, opt_state, masks, start_step, key):
        self.starts.append(jax.device_get((params, opt_state, masks)) + (start_step,))
        jax.tree.map(lambda x: x.delete(), self.lost)
        snapshots = {}
        for t in range(start_step, STEPS):
            params, opt_state = step(params, opt_state, masks, key, np.int32(t))
            jax.tree.map(np.testing.assert_array_equal, params, prune.apply_masks(params, masks))
            if t + 1 == LATE:
                snapshots[LATE] = jax.tree.map(jnp.copy, (params, opt_state))
        self.lost = snapshots
        return params, opt_state, snapshots


def run(keep=0.25, rounds=4, late_step=LATE, **options):
    trainer = Trainer()
    found = prune.imp(trainer, PARAMS, keep, rounds, late_step, jax.random.key(4), tx=TX, **options)
    return trainer, found


@pytest.fixture(scope="module")
def rounds():
    return run()


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_every_round_begins_at_the_dense_snapshot(rounds):
    trainer, found = rounds
    late = found[1].ticket
    count = late.opt_state[1].count
    assert (int(count), count.dtype) == (LATE, jnp.int32), (
        "the first step of a ticket has the dense run's learning rate"
    )
    assert (np.abs(late.opt_state[0].trace["head"]["kernel"]) > 0).any()
    for one, start in zip(found[1:], trainer.starts[1:], strict=True):
        same((one.ticket.params, one.ticket.opt_state), (late.params, late.opt_state))
        params = jax.tree.map(lambda m, x: np.where(m, x, np.float32(0)), one.ticket.masks, late.params)
        same(start, (params, jax.device_get(late.opt_state), jax.device_get(one.ticket.masks), LATE))
        assert int(one.opt_state[1].count) == STEPS
    assert trainer.starts[0][3] == 0
    same(trainer.starts[0][0], PARAMS)


def test_masks_rank_the_weights_that_the_round_before_trained(rounds):
    _, found = rounds
    keeps = [one.keep for one in found]
    assert keeps == [1.0, *prune.keep_schedule(0.25, 4)]
    for before, after in itertools.pairwise(found):
        wanted = prune.global_magnitude_mask(before.params, before.ticket.masks, after.keep)
        same(after.ticket.masks, wanted)
        old, new = (
            np.concatenate([np.ravel(m) for m in jax.tree.leaves(r.ticket.masks) if m.ndim]) for r in (before, after)
        )
        assert not (new & ~old).any()
        assert new.sum() == int(after.keep * 50 + 1e-9)
    late = found[1].ticket
    reset_first = prune.global_magnitude_mask(late.params, found[0].ticket.masks, found[1].keep)
    assert (reset_first["dense"]["kernel"] != late.masks["dense"]["kernel"]).any(), "the snapshot ranks otherwise"


def test_a_ticket_outlives_its_training(rounds):
    ticket = rounds[1][-1].ticket
    first = prune.rewind(ticket)
    wanted = jax.device_get(first)
    trained = [Trainer()(*prune.rewind(ticket), ticket.masks, LATE, jax.random.key(4))[0] for _ in range(2)]
    same(trained[0], trained[1])
    same(trained[0], rounds[1][-1].params)
    same(prune.rewind(ticket), wanted)


def test_keeping_all_goes_on_as_the_dense_run():
    _, (dense, ticket) = run(keep=1.0, rounds=2)
    same((ticket.params, ticket.opt_state), (dense.params, dense.opt_state))


def test_one_shot_layerwise_reset_to_the_initial_weights():
    trainer, (dense, ticket) = run(keep=0.5, rounds=2, late_step=0, scope="layerwise")
    same(ticket.ticket.masks, prune.layerwise_magnitude_mask(dense.params, dense.ticket.masks, 0.5))
    same(trainer.starts[1][0], prune.apply_masks(PARAMS, ticket.ticket.masks))
    assert int(trainer.starts[1][1][1].count) == trainer.starts[1][3] == 0


def test_mistakes():
    with pytest.raises(UserError, match="Unknown scope 'globl'. Did you mean 'global'"):
        run(scope="globl")
    with pytest.raises(UserError, match="late_step must be >= 0, got -1"):
        run(late_step=-1)
    with pytest.raises(UserError, match=r"has to return a snapshot of late_step=5; got those of \[3\]"):
        run(late_step=5)
    with pytest.raises(UserError, match="rounds counts the dense round too"):
        run(rounds=1)
