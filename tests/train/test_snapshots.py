"""Stages that go on from another's snapshot end with its bits."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jkd import train
from jkd.errors import UserError
from jkd.train import loop
from jkd.train.lower import abstract_stages
from jkd.train.profile import parse_span

KEYS = jax.random.split(jax.random.key(3), 2)
STEPS, RESET = 12, 5  # RESET lies inside a log window of 4 steps


def scaled(masks):
    """An optimizer that depends on arrays: its updates are multiplied by `masks`."""
    inner = optax.sgd(optax.linear_schedule(0.2, 0.02, STEPS), momentum=0.9)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(lambda m, u: u * m, masks, updates), state

    return optax.GradientTransformation(inner.init, update)


def optimizer(consts):
    return scaled(consts["masks"])


def loss_fn(params, state, consts, batch, key, t):
    noise = 5.0 * jax.random.normal(key, batch["image"].shape)
    out = toys.logits(params, batch["image"] + noise)
    return optax.losses.softmax_cross_entropy_with_integer_labels(out, batch["label"]).mean()


def ones(key, previous, sweep):
    return {"masks": jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(toys.init_params, key))}


def head_only(key, previous, sweep):
    masks = ones(key, previous, sweep)["masks"]
    return {"masks": masks | {"hidden": jax.tree.map(np.zeros_like, masks["hidden"])}}


def init(key, previous, consts):
    return train.create_state({"params": toys.init_params(key)}, optimizer(consts))


def restore(key, previous, consts):
    return train.restore_state(previous["dense"].snapshots[RESET], optimizer(consts))


MODEL_STEP = train.ModelStep(loss_fn, optimizer)


def stage(name="dense", **changes) -> train.Stage:
    fields = {"step": MODEL_STEP, "init": init, "prepare": ones, "evaluators": {}, "publish": train.plain_state}
    return toys.classifier(name, STEPS, **(fields | changes))


def dense(**changes):
    return stage(snapshots=(RESET,), snapshot=train.plain_state, **changes)


def ticket(name="ticket", **changes):
    return stage(name, init=restore, needs=("dense",), first_step=RESET, **changes)


def go(stages, workdir, **options):
    return toys.go(stages, workdir, log_every=4, options=dataclasses.replace(toys.QUIET, **options))


def published(workdir, name):
    return {name: leaf for name, leaf in toys.final(workdir, name).items() if name.startswith("[0]")}


def same_end(workdir):
    found, wanted = published(workdir, "ticket"), published(workdir, "dense")
    assert found.keys() == wanted.keys()
    assert sum("opt_state" in name for name in found) == 5, "four velocities and a count"
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].tobytes()) == (value.dtype, value.tobytes()), name


# --- the same bits ---


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_stage_from_a_snapshot_ends_bit_identical(mode, tmp_path):
    stages = [dense(), ticket(), ticket("frozen", prepare=head_only)]
    with toys.compiled() as names:
        go([train.ensemble(one, KEYS, mode) for one in stages], tmp_path)
    assert names.count("program") == 1, "stages that differ in their consts alone share one program"
    same_end(tmp_path)
    snapshot = train.load_outcome(tmp_path, "dense").snapshots[RESET]
    assert snapshot["opt_state"]["0/trace/head/bias"].shape == (2, 4)
    frozen, trained = (published(tmp_path, name) for name in ("frozen", "ticket"))
    name = "[0]['params']['hidden']['kernel']"
    np.testing.assert_array_equal(frozen[name], snapshot["params"]["hidden"]["kernel"])
    assert np.abs(frozen[name] - trained[name]).max() > 0
    logged = [(r["stage"], r["step"]) for r in toys.lines(tmp_path) if r["stage"] != "frozen"]
    assert logged == [("dense", 4), ("dense", 8), ("dense", 12), ("ticket", 8), ("ticket", 12)]
    losses = np.array(toys.logged(tmp_path, "loss"))
    np.testing.assert_array_equal(losses[4], losses[2])


def test_a_stopped_stage_from_a_snapshot_goes_on(tmp_path, monkeypatch):
    key = {"key": jax.random.key(5)}
    evaluators = {"evaluators": {"train": toys.accuracy(every=2)}, "publish": toys.variables}
    stages = [dense(**key, **evaluators), ticket(**key, **evaluators)]
    go(stages, tmp_path / "whole")
    boundary = loop._StageRun._steps, loop._StageRun._boundary
    for at in (RESET, 9):  # before its first step, and inside of a log window

        def ask(self, at=at):
            if self.stage.name == "ticket" and self.t == at:
                monkeypatch.setattr(loop._StageRun, "_steps", boundary[0])
                monkeypatch.setattr(loop._StageRun, "_boundary", boundary[1])
                os.kill(os.getpid(), signal.SIGTERM)
            boundary[at != RESET](self)

        monkeypatch.setattr(loop._StageRun, "_steps" if at == RESET else "_boundary", ask)
        with pytest.raises(train.Preempted, match=f"at step {at} of stage 'ticket'"):
            go(stages, tmp_path / "run")
    results = [go(stages, tmp_path / name) for name in ("run", "whole")]
    assert results[0] == results[1]
    assert results[0]["ticket"]["steps"] == STEPS
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]
    for name, value in published(tmp_path / "whole", "dense").items():
        assert published(tmp_path / "run", "ticket")[name].tobytes() == value.tobytes(), name


# --- the loop's counter ---


def test_the_counter_begins_at_the_first_step(tmp_path):
    results = toys.go([toys.counter(num_steps=7, first_step=4, snapshots=(5, 7))], tmp_path)
    outcome = train.load_outcome(tmp_path, "count")
    assert float(outcome.published["x"]) == 4 + 5 + 6
    assert {t: float(tree["x"]) for t, tree in outcome.snapshots.items()} == {5: 4, 7: 15}
    assert results["count"]["steps"] == 7
    assert [r["step"] for r in toys.lines(tmp_path)] == [7]
    assert toys.logged(tmp_path, "x") == [pytest.approx((4 + 9 + 15) / 3)]


def test_a_stage_may_begin_at_its_end(tmp_path):
    toys.go([toys.counter(num_steps=3, first_step=3, step=None)], tmp_path)
    assert float(train.load_outcome(tmp_path, "count").published["x"]) == 0


def test_an_average_begins_with_its_stage_and_snapshots_are_of_the_state(tmp_path):
    def snapshot(state):
        return {"twice": 2 * state["x"]}

    stage = toys.counter(num_steps=4, first_step=2, snapshots=(3, 4), snapshot=snapshot)
    toys.go([train.average(stage, "mean")], tmp_path)
    outcome = train.load_outcome(tmp_path, "count")
    assert float(outcome.published["x"]) == 3.5, "the mean of 2 and 5"
    assert {t: float(tree["twice"]) for t, tree in outcome.snapshots.items()} == {3: 4, 4: 10}


def test_plans_know_snapshots_and_first_steps():
    stages = [train.ensemble(one, KEYS, "loop") for one in (dense(), ticket())]
    found = list(abstract_stages(stages, train.make_mesh(devices=jax.devices()[:1])))
    kept = found[1].previous["dense"].snapshots[RESET]
    assert kept["opt_state"]["0/trace/head/kernel"].shape == (32, 4)
    assert parse_span("5:9", [stages[1]]).start == 5
    with pytest.raises(UserError, match=r"START must be at least 5, the first step of 'ticket'"):
        parse_span("4:9", [stages[1]])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"first_step": 8}, r"first_step must lie in 0..7 \(num_steps\), got 8"),
        ({"first_step": -1}, "got -1"),
        ({"first_step": 4, "snapshots": (4, 5)}, r"snapshots \[4\] are outside 5..7"),
    ],
)
def test_mistakes_in_steps(fields, says):
    with pytest.raises(UserError, match=says):
        toys.counter(**fields)


def test_a_snapshot_is_a_plain_tree(tmp_path):
    stage = toys.counter(snapshots=(2,), snapshot=lambda state: train.TrainState(state, (), {}))
    with pytest.raises(UserError, match="Stage 'count': snapshot"):
        toys.go([stage], tmp_path)


# --- states as plain trees ---


@jax.jit
@jax.vmap
def there_and_back(key):
    state = train.create_state({"params": toys.init_params(key), "stats": {"n": jnp.int32(3)}}, optax.adam(0.1))
    return state, train.restore_state(train.plain_state(state), optax.adam(0.1))


def test_a_state_is_restored_whole():
    before, after = there_and_back(KEYS)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert after.opt_state[0].count.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_state_of_another_optimizer_is_refused():
    params = {"w": jnp.ones(3)}
    plain = train.plain_state(train.create_state({"params": params}, optax.sgd(0.1, momentum=0.9)))
    with pytest.raises(UserError, match=r"0/count \(none stored, int32\[\] needed\).*0/trace/w \(float32\[3\] stored"):
        train.restore_state(plain, optax.adam(0.1))
    plain["opt_state"]["0/trace/w"] = jnp.ones(4)
    with pytest.raises(UserError, match=r"0/trace/w \(float32\[4\] stored, float32\[3\] needed\)"):
        train.restore_state(plain, optax.sgd(0.1, momentum=0.9))
