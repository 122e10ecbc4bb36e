"""What the loop leaves behind: records, outcomes, bundles."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import struct
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from toys import QUIET, counter, go

from jkd import data, train
from jkd.train.passes import Residents

ONE = train.make_mesh(devices=jax.devices()[:1])


# --- what is written ---


def test_json_lines_hold_the_means_of_each_window(tmp_path):
    stage = counter(num_steps=7, evaluators={"train": sized(every=4)})
    go([stage, counter(name="again", num_steps=2)], tmp_path, log_every=3)
    x = np.cumsum(np.arange(7.0))
    assert toys.lines(tmp_path) == [
        {"stage": "count", "step": 3, "train": {"x": x[:3].mean()}},
        {"stage": "count", "step": 4, "evaluation": {"train/size": 256}},
        {"stage": "count", "step": 6, "train": {"x": x[3:6].mean()}},
        {"stage": "count", "step": 7, "train": {"x": x[6]}},
        {"stage": "count", "step": 7, "evaluation": {"train/size": 256}},
        {"stage": "again", "step": 2, "train": {"x": 0.5}},
    ]


def sized(every: int = 0) -> train.Evaluator:
    source = data.MemorySource(toys.DIGITS, 64)
    return train.Evaluator(source, count_rows, lambda total: {"size": int(total)}, every=every)


def count_rows(published, consts, batch, mask):
    return mask.sum()


def test_results_hold_last_best_and_worst(tmp_path):
    evaluator = train.Evaluator(
        data.MemorySource(toys.DIGITS, 64),
        lambda published, consts, batch, mask: published["x"] * mask.sum() / 256,
        lambda total: {"x": float(total)},
        every=1,
    )

    def step(key, state, consts, batch, t):
        return {"x": jnp.float32([3, -1, 5, 2])[t]}, {}

    results = go([counter(step=step, num_steps=4, evaluators={"seen": evaluator})], tmp_path)
    assert results["count"] == {
        "steps": 4,
        "metrics": {"seen/x": 2},
        "history": {"seen/x": {"last": 2, "max": 5, "min": -1, "steps": [1, 2, 3, 4], "values": [3, -1, 5, 2]}},
    }


def test_a_finished_run_returns_at_once(tmp_path):
    first = go([toys.classifier(num_steps=5), toys.student("student", 3)], tmp_path)
    written = (tmp_path / "metrics.jsonl").read_bytes()

    def never(*args):
        raise AssertionError("nothing is left to do")

    nothing = {"init": never, "step": never, "prepare": never, "data": never, "publish": never}
    stages = [toys.classifier(num_steps=5), toys.student("student", 3)]
    with toys.compiled() as names:
        again = go([dataclasses.replace(stage, **nothing) for stage in stages], tmp_path)
    assert again == first
    assert not {"init", "program", "one"} & set(names)
    assert (tmp_path / "metrics.jsonl").read_bytes() == written


def test_tensorboard_events_hold_the_scalars(tmp_path):
    options = train.LoopOptions(checkpoint_every=0, progress=False)
    results = go([toys.classifier(num_steps=20)], tmp_path, options=options)
    scalars = events(tmp_path / "tensorboard/00-teacher")
    assert scalars["train/loss"] == {
        r["step"]: np.float32(r["train"]["loss"]) for r in toys.lines(tmp_path) if "train" in r
    }
    assert set(scalars["train/loss"]) == {10, 20}
    assert set(scalars["evaluation/train/accuracy"]) == {16, 20}
    assert scalars["evaluation/train/accuracy"][20] == np.float32(results["teacher"]["metrics"]["train/accuracy"])
    assert scalars["speed/images_per_second"][20] > 0


def events(folder) -> dict[str, dict[int, float]]:
    """Reads TensorBoard event files: records of a length (8 bytes), its checksum (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, dict[int, float]] = {}
    for path in folder.iterdir():
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event, raw = Event.FromString(raw[12 : 12 + length]), raw[16 + length :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


# --- numbers that are not finite ---


def exploding(key, state, consts, batch, t):
    state, metrics = toys.step(key, state, consts, batch, t)
    return state, metrics | {"penalty": jnp.where(t < 13, 1.0, jnp.nan), "late": jnp.where(t < 14, 1.0, jnp.inf)}


@pytest.mark.parametrize(("log_every", "every"), [(10, 5), (4, 5), (20, 7)])
def test_a_metric_that_is_not_finite_stops_the_run(log_every, every, tmp_path):
    options = dataclasses.replace(QUIET, checkpoint_every=every)
    stage = toys.classifier(num_steps=20, step=exploding)
    with pytest.raises(train.NonFiniteError, match=r"Stage 'teacher', step 13: penalty is not finite") as caught:
        go([stage], tmp_path, log_every=log_every, options=options)
    last = 13 // every * every
    assert f"last good checkpoint is of step {last}" in str(caught.value)
    bundle = tmp_path / "debug/teacher-step-13"
    info = json.loads((bundle / "info.json").read_text())
    assert (info["stage"], info["step"], info["last_good_step"]) == ("teacher", 13, last)
    assert info["metrics"]["penalty"] == "nan", "JSON has no NaN"
    assert np.isfinite(info["metrics"]["loss"])
    assert info["metrics"]["late"] == 1
    with np.load(bundle / "batch-0.npz") as saved:
        wanted = data.MemorySource(toys.DIGITS, 16, seed=3).batch(13)
        assert set(saved) == set(wanted)
        for name in saved:
            np.testing.assert_array_equal(saved[name], wanted[name])
    steps = [int(path.name) for path in (tmp_path / "checkpoints/00-teacher").iterdir()]
    assert max(steps) == last, "no checkpoint is made of a state that came after"
    assert all(np.isfinite(record["train"]["loss"]) for record in toys.lines(tmp_path))


def test_a_run_goes_on_from_before_the_step_that_was_not_finite(tmp_path):
    options = dataclasses.replace(QUIET, checkpoint_every=5)
    with pytest.raises(train.NonFiniteError):
        go([toys.classifier(num_steps=20, step=exploding)], tmp_path / "a", options=options)

    def mended(*args):
        state, metrics = toys.step(*args)
        return state, metrics | {"penalty": jnp.float32(1), "late": jnp.float32(1)}

    for name in ("a", "b"):
        go([toys.classifier(num_steps=20, step=mended)], tmp_path / name, options=options)
    found, wanted = toys.final(tmp_path / "a", "teacher"), toys.final(tmp_path / "b", "teacher")
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_state_with_nan_is_never_saved(tmp_path):
    optimizer = optax.sgd(1.0)

    def init(key, previous, consts):
        return train.create_state({"params": {"w": jnp.ones(2)}}, optimizer)

    def step(key, state, consts, batch, t):  # the metrics look fine
        params = {"w": jnp.where(t == 7, jnp.nan, state.params["w"])}
        return dataclasses.replace(state, params=params), {"loss": jnp.float32(0)}

    stage = counter(init=init, step=step, num_steps=20, publish=toys.variables)
    with pytest.raises(ValueError, match="Step 10: the state holds NaN in .*params/w"):
        go([stage], tmp_path, options=dataclasses.replace(QUIET, checkpoint_every=5))
    assert [path.name for path in (tmp_path / "checkpoints/00-count").iterdir()] == ["5"]


def test_a_state_that_ends_with_nan_is_never_published(tmp_path):
    def step(key, state, consts, batch, t):  # the metrics look fine
        return {"x": jnp.where(t == 6, jnp.nan, state["x"])}, {"loss": jnp.float32(0)}

    with pytest.raises(ValueError, match="After the last step of stage 'count': the state holds NaN in x"):
        go([counter(step=step)], tmp_path)
    assert not (tmp_path / "stages/00-count/outcome").exists()


# --- what else may happen around stages ---


def test_a_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = go([toys.classifier(num_steps=5)], "runs/here", options=train.LoopOptions(3, progress=False))
    assert list(results) == ["teacher"]
    assert "params" in train.load_outcome("runs/here", "teacher").published
    assert list(train.finished_stages("runs/here")) == ["teacher"]
    assert (tmp_path / "runs/here/stages").is_dir()


@pytest.mark.parametrize("moment", ["prepare", "finish"])
def test_sigterm_between_stages_stops_before_the_next(moment, tmp_path):
    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    evaluator = train.Evaluator(data.MemorySource(toys.DIGITS, 64), count_rows, stop)
    hooks = {"prepare": stop} if moment == "prepare" else {"evaluators": {"stop": evaluator}}
    stages = [counter(name="first", num_steps=0, **hooks), counter(name="second", num_steps=0)]
    before = "init of stage 'first'" if moment == "prepare" else "prepare of stage 'second'"
    with pytest.raises(train.Preempted, match=f"before {before}.*Run the same command again"):
        go(stages, tmp_path)
    go([dataclasses.replace(stages[0], prepare=lambda *args: {}, evaluators={}), stages[1]], tmp_path)
    assert list(train.finished_stages(tmp_path)) == ["first", "second"]


def test_sigterm_in_a_sweep_does_not_wait_for_its_end(tmp_path):
    read = []

    class Terminated(data.MemorySource):
        def iterate(self, start, stop, rows=None):
            for t, batch in enumerate(super().iterate(start, stop, rows), start):
                read.append(t)
                if t == 3 and len(read) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    def prepare(key, previous, sweep):
        return {"sum": sweep(lambda args, batch, key: batch["label"], {}, Terminated(toys.DIGITS, 16)).sum()}

    stages = [counter(name="first", num_steps=2), counter(name="second", num_steps=0, prepare=prepare)]
    with pytest.raises(train.Preempted, match="before the end of a sweep; .* Run the same command again"):
        go(stages, tmp_path)
    assert read == [0, 1, 2, 3]
    assert list(train.finished_stages(tmp_path)) == ["first"]
    go(stages, tmp_path)
    assert read[4:] == list(range(16))


@pytest.mark.parametrize("field", [{"keep": 0}, {"checkpoint_every": -1}])
def test_options_that_would_lose_checkpoints_are_refused(field):
    with pytest.raises(ValueError, match="keep must be >= 1 and checkpoint_every >= 0"):
        train.LoopOptions(**field)


def test_a_rule_for_parameters_leaves_metrics_of_a_similar_name_whole(tmp_path):
    def step(key, state, consts, batch, t):
        state, metrics = toys.step(key, state, consts, batch, t)
        return state, metrics | {"kernel_norm": jnp.float32(t)}

    mesh = train.make_mesh(fsdp=4, devices=jax.devices()[:4])
    rules = (("kernel", train.shard(0, "fsdp")),)
    go([toys.classifier(num_steps=10, step=step)], tmp_path, mesh=mesh, rules=rules)
    assert toys.logged(tmp_path, "kernel_norm") == [4.5]


def test_stages_are_found_by_number_beyond_a_hundred(tmp_path):
    go([counter(name="a-b", num_steps=1)], tmp_path)
    folder = tmp_path / "stages/00-a-b"
    shutil.copytree(folder, tmp_path / "stages/100-c")
    shutil.copytree(folder, tmp_path / "stages/20-d")
    assert list(train.finished_stages(tmp_path)) == ["a-b", "d", "c"]


def test_data_that_no_stage_uses_any_more_leave_the_device():
    residents = Residents(ONE)
    sources = [data.MemorySource(data.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4)), 2) for _ in "ab"]
    first = residents(sources[0])
    residents.next_stage()
    assert residents(sources[0]) is first
    residents(sources[1])
    residents.next_stage()
    residents(sources[1])
    residents.next_stage()
    assert residents(sources[0]) is not first


def test_programs_of_finished_runs_can_be_forgotten(tmp_path):
    def step(*args):
        return toys.step(*args)

    alive = weakref.ref(step)
    results = go([toys.classifier(num_steps=3, step=step)], tmp_path / "a")
    del step
    gc.collect()
    assert alive() is not None  # its program is kept, for another stage with this step
    train.forget_programs()
    gc.collect()
    assert alive() is None
    assert go([toys.classifier(num_steps=3)], tmp_path / "b") == results
