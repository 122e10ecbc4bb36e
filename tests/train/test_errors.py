"""Mistakes stop a run before anything is compiled, with one line that says what to change."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jkd import train
from jkd.errors import UserError

ONE = train.make_mesh(devices=jax.devices()[:1])


def go(stages, workdir, mesh=ONE, **changes):
    return train.run(stages, workdir=workdir, log_every=5, options=toys.OPTIONS, mesh=mesh, **changes)


def refused(stages, workdir, match, **changes) -> None:
    """Expects a UserError, and that no stage was compiled or has left a result."""
    with toys.compiled() as names, pytest.raises(UserError, match=match):
        go(stages, workdir, **changes)
    assert not {"init", "program"} & set(names)
    assert not (workdir / "metrics.jsonl").exists()
    assert not list(workdir.glob("checkpoints/*/*"))
    assert not list(workdir.glob("stages/*/outcome*"))


# --- what a stage says of itself ---


@pytest.mark.parametrize("name", ["", "a b", "a/b", "été", "a.b"])
def test_stage_names(name):
    with pytest.raises(UserError, match=f"Stage name '{name}' may hold letters, digits"):
        toys.classifier(name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_steps": -1}, "num_steps must be >= 0, got -1"),
        ({"step": None}, "num_steps=40 but no step"),
        ({"snapshots": (0, 8)}, r"snapshots \[0\] are outside 1..40"),
        ({"snapshots": (40, 41)}, r"snapshots \[41\] are outside 1..40"),
    ],
)
def test_stage_fields(changes, match):
    with pytest.raises(UserError, match="Stage 'teacher'.*" + match):
        toys.classifier(**changes)


def test_evaluator_fields():
    with pytest.raises(UserError, match="Unknown evaluator kind 'gathr'. Did you mean 'gather'"):
        dataclasses.replace(toys.accuracy(), kind="gathr")
    with pytest.raises(UserError, match="every must be >= 0 steps, got -1"):
        toys.accuracy(every=-1)


# --- how stages fit together ---


def test_stage_lists(tmp_path):
    first, second = toys.classifier("a"), toys.classifier("b", needs=("a", "c"))
    cases = {
        "Two stages are named 'a'": [first, first],
        "Stage 'b' needs 'c', which is not an earlier stage; earlier ones: a": [first, second],
        "Stage 'student' needs 'teacher', .*: none": [toys.student("student"), toys.classifier()],
    }
    for match, stages in cases.items():
        refused(stages, tmp_path / "run", match)
    with pytest.raises(UserError, match="log_every must be >= 1 steps, got 0"):
        train.run([first], workdir=tmp_path / "run", log_every=0)
    assert not (tmp_path / "run").exists(), "these are seen before the workdir is touched"


# --- what the functions of a stage return ---


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def returning(change):
    """The toy's step with `change(state, metrics)` applied to what it returns."""

    def step(*args):
        return change(*toys.step(*args))

    return step


def with_bias(state, bias):
    head = state.params["head"] | {"bias": bias(state.params["head"]["bias"])}
    return dataclasses.replace(state, params=state.params | {"head": head})


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda state, metrics: (state, metrics["loss"]), "step must return a dict of metrics, got "),
        (lambda state, metrics: (state, metrics | {"rows": jnp.zeros(3)}), r"metric 'rows' must be a scalar, .*\(3,\)"),
        (
            lambda state, metrics: (with_bias(state, lambda x: x[None]), metrics),
            r"head'?\]?.*float32\[4\] to .*\[1, 4\]",
        ),
        (
            lambda state, metrics: (with_bias(state, lambda x: x.astype(jnp.bfloat16)), metrics),
            r"bias.*from float32\[4\] to bfloat16\[4\]",
        ),
        (lambda state, metrics: (state.params, metrics), "a state of another structure than init"),
    ],
    ids=["no dict", "rows", "shape", "dtype", "structure"],
)
def test_steps(step, match, tmp_path):
    refused([toys.classifier(step=returning(step))], tmp_path / "run", "Stage 'teacher': .*" + match)


def test_evaluations_are_tried_before_the_training(tmp_path):
    def collect(published, consts, batch, mask):
        return published["ema"]

    stage = toys.classifier(evaluators={"train": dataclasses.replace(toys.accuracy(), collect=collect)})
    with toys.compiled() as names, pytest.raises(KeyError, match="ema"):
        go([stage], tmp_path / "run")
    assert "program" not in names


def test_publish_must_be_plain(tmp_path):
    stage = toys.classifier(publish=lambda state: {"pair": Pair(jnp.zeros(2), jnp.ones(2))})
    refused([stage], tmp_path / "run", r"Stage 'teacher': publish/pair is a Pair; .*plain tree.*x._asdict\(\)")
    stage = toys.classifier(publish=lambda state: state)
    refused([stage], tmp_path / "other", r"is a TrainState; .*a TrainState: x.variables")


@pytest.mark.parametrize("consts", [{"pair": Pair(np.zeros(2), np.ones(2))}, {"name": "x"}, {1: np.zeros(2)}])
def test_prepare_must_be_plain(consts, tmp_path):
    stage = toys.classifier(prepare=lambda key, previous, sweep: consts)
    refused([stage], tmp_path / "run", "consts.*(plain tree|must be strings)")


def test_batches_must_divide(tmp_path):
    match = "batch_size 12 is not divisible by the 8 devices"
    stage = toys.classifier(data=lambda consts: toys.data.MemorySource(toys.DIGITS, 12, seed=3))
    refused([stage], tmp_path / "run", match, mesh=train.make_mesh())
    stage = toys.classifier(evaluators={"train": toys.accuracy(batch_size=12)})
    refused([stage], tmp_path / "other", match, mesh=train.make_mesh())


def test_a_sweep_needs_one_full_batch(tmp_path):
    source = toys.data.MemorySource(toys.DIGITS.take(10), 16, seed=0)
    stage = toys.classifier(prepare=lambda key, previous, sweep: sweep(lambda a, b, k: b["label"], {}, source))
    refused([stage], tmp_path / "run", "10 examples in batches of 16 has no full batch")


# --- workdirs ---


def test_workdir_of_another_config(tmp_path):
    brief = [toys.classifier(num_steps=0)]
    config = {"model": {"width": 8, "depth": 2}, "mesh": {"data": 1}}
    go(brief, tmp_path / "run", config=config)
    go(brief, tmp_path / "run", config=config | {"mesh": {"data": 8}})  # says how, not what, to compute
    with pytest.raises(UserError, match=r"another config: model.width was 8 and is 16\. Give"):
        go(brief, tmp_path / "run", config=config | {"model": {"width": 16, "depth": 2}})
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        go(brief, tmp_path / "run", config=config, seed=1)
    with pytest.raises(UserError, match="extra was absent and is 3"):
        go(brief, tmp_path / "run", config=config | {"extra": 3})


def test_workdir_that_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").write_text("")
    refusals = {
        "file": "is a file; give a folder",
        "full": "is not empty and holds no config.json",
        "file/run": "cannot be written: Not a directory",
    }
    for name, match in refusals.items():
        with pytest.raises(UserError, match=match):
            go([toys.classifier()], tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    go([toys.classifier(num_steps=0, evaluators={})], tmp_path / "hidden")


def test_outcomes_that_are_not_there(tmp_path):
    go([toys.classifier(num_steps=0, evaluators={})], tmp_path)
    with pytest.raises(UserError, match="holds no finished stage 'student'; finish its training first"):
        train.load_outcome(tmp_path, "student")
    with pytest.raises(UserError, match="no finished stage 'acher'"):
        train.load_outcome(tmp_path, "acher")
