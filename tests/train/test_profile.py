"""Traces of some steps."""

import dataclasses
import gzip
import json
import os
import signal

import jax
import pytest
import toys

from jkd import train
from jkd.errors import UserError
from jkd.train import loop
from jkd.train.profile import parse_span


def profiled(text: str, **changes) -> train.LoopOptions:
    return dataclasses.replace(toys.QUIET, profile=text, **changes)


def steps_in(folder) -> list[int]:
    """The steps that a trace for Perfetto marks."""
    trace = json.loads(gzip.decompress((folder / "process-0.trace.json.gz").read_bytes()))
    marked = [event["args"]["step_num"] for event in trace["traceEvents"] if event.get("name") == "train"]
    return sorted(int(step) for step in marked)


def traces(workdir, stage: str) -> list:
    return sorted((workdir / "profile" / stage / "plugins" / "profile").glob("*"))


def test_the_steps_asked_for_are_traced_and_nothing_else_changes(tmp_path):
    toys.go([toys.counter(num_steps=9)], tmp_path / "plain")
    toys.go([toys.counter(num_steps=9)], tmp_path / "run", options=profiled("3:6"))
    (folder,) = traces(tmp_path / "run", "00-count")
    assert folder.name == "steps-3-6"
    assert steps_in(folder) == [3, 4, 5]
    assert (folder / "process-0.xplane.pb").stat().st_size > 1000
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    # No part of what is computed: the same folder takes another span, or none.
    assert toys.go([toys.counter(num_steps=9)], tmp_path / "run")["count"]["steps"] == 9


def test_a_stage_by_name_up_to_its_last_step(tmp_path):
    stages = [toys.counter(num_steps=2), toys.counter(name="next", num_steps=4)]
    toys.go(stages, tmp_path, options=profiled("next:2:4"))
    (folder,) = traces(tmp_path, "01-next")
    assert steps_in(folder) == [2, 3]
    assert not traces(tmp_path, "00-count")


def interrupted(monkeypatch, at: int) -> None:
    boundary = loop._StageRun._boundary

    def ask(self):
        if self.t == at:
            monkeypatch.setattr(loop._StageRun, "_boundary", boundary)
            os.kill(os.getpid(), signal.SIGTERM)
        boundary(self)

    monkeypatch.setattr(loop._StageRun, "_boundary", ask)


def test_an_interrupted_trace_is_whole_and_a_resumed_run_traces_what_is_left(tmp_path, monkeypatch):
    interrupted(monkeypatch, 4)
    with pytest.raises(train.Preempted):
        toys.go([toys.counter(num_steps=9)], tmp_path, options=profiled("2:6"))
    (folder,) = traces(tmp_path, "00-count")
    assert steps_in(folder) == [2, 3]
    toys.go([toys.counter(num_steps=9)], tmp_path, options=profiled("2:6"))
    first, rest = traces(tmp_path, "00-count")
    assert (first.name, rest.name) == ("steps-2-6", "steps-4-6")
    assert steps_in(rest) == [4, 5]
    jax.profiler.start_trace(str(tmp_path / "free"))  # none is left running
    jax.profiler.stop_trace()


def test_a_run_that_resumes_past_the_span_traces_nothing(tmp_path, monkeypatch):
    interrupted(monkeypatch, 6)
    with pytest.raises(train.Preempted):
        toys.go([toys.counter(num_steps=9)], tmp_path)
    toys.go([toys.counter(num_steps=9)], tmp_path, options=profiled("2:6"))
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "profile must be START:STOP or STAGE:START:STOP, such as 10:20 or kd:10:20, got '5'"),
        ("-1:5", "profile must be START:STOP"),
        ("3:3", "START must be below STOP, and STOP at most 7, the steps of 'count'"),
        ("3:8", "STOP at most 7"),
        ("cont:3:5", "Unknown stage with steps in profile 'cont'. Did you mean 'count'?"),
        ("none:0:1", "Unknown stage with steps in profile 'none'"),
    ],
)
def test_spans_that_are_not_there(text, says, tmp_path):
    stages = [toys.counter(name="none", num_steps=0), toys.counter()]
    with pytest.raises(UserError) as error:
        toys.go(stages, tmp_path / "run", options=profiled(text))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()
    assert parse_span("0:7", stages) == ("count", 0, 7)
