"""What a run says while it goes."""

import io
import os
import signal
import time
import types

import jax
import numpy as np
import pytest
import rich.console
import toys
from etils import epath

from jkd import data, train
from jkd.errors import UserError
from jkd.train import chips, flops, log


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    made = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(log.time, "perf_counter", lambda: made.now)
    return made


def said(monkeypatch, *, terminal: bool) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(text, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(log.sys, "stderr", text)
    options = {"force_terminal": True, "width": 120} if terminal else {"width": 120}
    monkeypatch.setattr(log, "console", rich.console.Console(file=text, highlight=False, **options))
    return text


def test_lines_hold_the_rates_of_the_last_seconds_and_the_time_left(clock, monkeypatch):
    text = said(monkeypatch, terminal=False)
    meter = log.Meter("kd", 10, 110, 64, show=True)
    clock.now += 5  # the first step compiles: it is in no rate
    meter.stall(4.0)
    meter.update(11)
    assert text.getvalue() == ""
    clock.now += 10
    meter.stall(2.5)
    meter.update(31)  # 20 steps in 10 s, 79 to go
    line = "kd: step 31/110, 500 ms a step, 128 images/s, 25.0 % waiting for data, ETA 40 s\n"
    assert text.getvalue() == line
    assert meter.rates() == {"step_ms": 500.0, "images_per_second": 128.0, "data_stall": 0.25}
    clock.now += 9
    meter.update(49)
    assert text.getvalue() == line  # one every ten seconds
    clock.now += 1
    meter.update(71)  # 40 steps in 10 s, 60 in 20 s: 39 steps are left
    line = "kd: step 71/110, 250 ms a step, 256 images/s, 0.0 % waiting for data, ETA 13 s"
    assert text.getvalue().splitlines()[1] == line
    meter.close(71)
    line = "kd: 71/110 steps in 20.0 s, 333.3 ms a step, 192 images/s, 12.5 % waiting for data"
    assert text.getvalue().splitlines()[2] == line


def test_the_share_of_the_peak(clock, monkeypatch):
    text = said(monkeypatch, terminal=False)
    meter = log.Meter("kd", 0, 40, 8, show=True)
    meter.account(3e12, 100e12)
    meter.update(1)
    clock.now += 2
    meter.update(21)  # 20 steps of 3 TFLOP in 2 s: 30 of 100 TFLOP/s
    assert meter.rates()["mfu"] == pytest.approx(0.3)
    meter.close(21)
    assert text.getvalue().endswith("100 ms a step, 80 images/s, 0.0 % waiting for data, 30.0 % MFU\n")


def test_windows_and_what_is_no_part_of_a_step(clock):
    meter = log.Meter("kd", 0, 40, 8, show=False)
    meter.update(1)
    clock.now += 1
    meter.update(11)
    assert meter.window()["step_ms"] == 100.0
    with meter.aside():  # an evaluation
        clock.now += 50
    clock.now += 2
    meter.stall(0.5)
    meter.update(21)
    assert meter.window() == {"step_ms": 200.0, "images_per_second": 40.0, "data_stall": 0.25}
    assert meter.rates()["step_ms"] == 150.0


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    text = said(monkeypatch, terminal=True)
    meter = log.Meter("kd", 0, 40, 8, show=True)
    for step in (1, 21):
        clock.now += 10
        meter.update(step)
    meter.close(40)
    assert "kd" in text.getvalue()
    assert "40/40" in text.getvalue()
    assert "images/s" in text.getvalue()


def test_who_does_not_show_says_nothing(clock, monkeypatch):
    text = said(monkeypatch, terminal=False)
    meter = log.Meter("kd", 0, 40, 8, show=False)
    clock.now += 60
    meter.update(40)
    meter.close(40)
    assert text.getvalue() == ""


def test_a_run_shows_its_progress(tmp_path, monkeypatch):
    text = said(monkeypatch, terminal=False)
    mesh = train.make_mesh(devices=jax.devices()[:1])
    options = train.LoopOptions(checkpoint_every=0, tensorboard=False)
    train.run([toys.classifier(num_steps=3)], workdir=tmp_path, mesh=mesh, options=options)
    assert text.getvalue().startswith("teacher: 3/3 steps in ")
    assert " images/s, " in text.getvalue()
    assert "MFU" not in text.getvalue()  # nobody knows the peak of a CPU


@pytest.mark.parametrize("looped", [False, True])
def test_flops_are_counted_without_another_compilation(looped, tmp_path, monkeypatch):
    said(monkeypatch, terminal=False)
    found = []
    monkeypatch.setattr(flops, "chip_of", lambda kind: chips.Chip("fake", 1e12, 1.0, 1.0))
    monkeypatch.setattr(log.Meter, "account", lambda self, *seen: found.append(seen))
    mesh = train.make_mesh(devices=jax.devices()[:2])
    keys = jax.random.split(jax.random.key(0), 3)
    stage = train.ensemble(toys.classifier(num_steps=5), keys, "loop" if looped else "vmap")
    options = train.LoopOptions(checkpoint_every=0, tensorboard=False)
    with toys.compiled() as names:
        train.run([stage], workdir=tmp_path, mesh=mesh, options=options)
    assert names.count("program") == 1
    # Batch 16, 16 -> 32 -> 4: forward, the gradients of both layers' weights, and of the head's input; three members.
    products = 2 * 16 * (16 * 32 + 32 * 4)
    assert found == [(3 * (2 * products + 2 * 16 * 32 * 4), 2e12)]


def test_a_log_that_was_cut_is_not_continued(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    log.JsonLines(path, 0).write({"a": 1})
    with pytest.raises(
        UserError, match=r"metrics.jsonl is shorter than the checkpoint saw it \(9 < 20 bytes\): restore"
    ):
        log.JsonLines(path, 20)
    assert path.read_text() == '{"a": 1}\n'


def test_events_past_the_resumed_step_are_purged(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for start, steps in ((1, range(1, 6)), (4, range(4, 6))):
        events = log.Events(epath.Path(tmp_path), start)
        for step in steps:
            events.write(step, {"loss": [start, start + 1.0]})
        events.close()
        time.sleep(1.1)  # files are named by the second
    found = []
    for file in tmp_path.iterdir():
        raw = file.read_bytes()
        while raw:
            length = int.from_bytes(raw[:8], "little")
            found.append(Event.FromString(raw[12 : 12 + length]))
            raw = raw[16 + length :]
    begun = {event.step for event in found if event.session_log.status == SessionLog.START}
    assert begun == {1, 4}  # TensorBoard drops what an earlier file holds from there on
    written = [(event.step, value.simple_value) for event in found for value in event.summary.value]
    assert sorted(written) == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 1.5), (4, 4.5), (5, 1.5), (5, 4.5)]


class Terminated(data.StreamSource):
    """Asks the run to stop while batch 13 is read, once."""

    def iterate(self, start, stop, rows=None):
        for t, batch in enumerate(super().iterate(start, stop, rows), start):
            if t == 13 and start == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_streamed_and_resident_runs_are_equal_and_go_on_where_they_stopped(tmp_path):
    def run(name, source):
        stage = toys.classifier(num_steps=24, data=lambda consts: source(toys.DIGITS, 16, seed=3))
        options = train.LoopOptions(checkpoint_every=10, progress=False, tensorboard=False)
        mesh = train.make_mesh(devices=jax.devices()[:2])
        train.run([stage], workdir=tmp_path / name, mesh=mesh, options=options)
        return toys.final(tmp_path / name, "teacher")

    with pytest.raises(train.Preempted, match="at step 14"):
        run("stopped", Terminated)
    resident, streamed = run("resident", data.MemorySource), run("streamed", data.StreamSource)
    stopped = run("stopped", Terminated)
    for name in resident:
        np.testing.assert_array_equal(streamed[name], resident[name])
        np.testing.assert_array_equal(stopped[name], resident[name])
