"""Runs on an object store, against a server on the loopback."""

import errno
import os
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tensorboardX.record_writer
import toys
from etils import epath

from jkd import train
from jkd.errors import UserError
from jkd.train import checkpoint, damage, log, loop, workdir

pytestmark = [
    pytest.mark.usefixtures("alone"),
    # gcsfs hands aiohttp every file above 1 MB (a trace may be one) in a way that aiohttp warns of.
    pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning"),
]
OPTIONS = train.LoopOptions(checkpoint_every=10, progress=False, tensorboard=False)
LIMIT = 120


def go(folder, **changes):
    return toys.go(toys.two_stages(), folder, options=OPTIONS, log_every=7, **changes)


def read(folder, name="metrics.jsonl") -> bytes:
    return (epath.Path(str(folder)) / name).read_bytes()


def assert_equal(found, wanted) -> None:
    for stage in ("teacher", "student"):
        here, there = toys.final(found, stage), toys.final(wanted, stage)
        assert here.keys() == there.keys()
        for name, value in there.items():
            assert here[name].tobytes() == value.tobytes(), name
    assert read(found) == read(wanted)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    go(folder)
    return folder


def test_a_run_is_the_same_there(bucket, local):
    folder = f"{bucket}/same"
    results = go(folder)
    assert results == go(folder) == go(local)  # finished: returns at once
    assert_equal(folder, local)
    assert {path.name for path in epath.Path(folder).iterdir()} == {"config.json", "metrics.jsonl", "stages"}
    with pytest.raises(UserError, match="belongs to another config: seed was 0 and is 1"):
        go(folder, seed=1)


def test_a_killed_run_goes_on(bucket, local):
    folder = f"{bucket}/killed"
    command = [sys.executable, toys.__file__, folder, "--moment", "save:teacher-20"]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    go(folder)
    assert_equal(folder, local)


def test_half_a_folder_is_not_taken_for_a_whole_one(bucket, local):
    folder = f"{bucket}/same"
    outcome = epath.Path(folder) / "stages" / "01-student" / "outcome"
    assert checkpoint.is_stored(outcome)
    (outcome / "commit_success.txt").unlink()  # what is written last
    assert not checkpoint.is_stored(outcome)
    assert list(train.finished_stages(folder)) == ["teacher"]
    go(folder)  # trains the student again
    assert_equal(folder, local)


def stop_at(monkeypatch, step: int) -> None:
    boundary = loop._StageRun._boundary

    def ask(self):
        if self.t == step:
            os.kill(os.getpid(), signal.SIGTERM)
        boundary(self)

    monkeypatch.setattr(loop._StageRun, "_boundary", ask)


def test_a_damaged_checkpoint_is_set_aside(bucket, local, monkeypatch, capsys):
    folder = f"{bucket}/damaged"
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        with pytest.raises(train.Preempted):
            go(folder)
    newest = epath.Path(folder) / "checkpoints" / "00-teacher" / "14"
    files = list((newest / "state" / "ocdbt.process_0" / "d").iterdir())
    for file in [*files, *(newest / "state" / "d").iterdir()]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        file.write_bytes(bytes(content))
    go(folder)
    said = capsys.readouterr().err
    assert "00-teacher/14 is corrupt" in said
    assert "resuming at step 10" in said
    assert (epath.Path(folder) / "corrupt" / "00-teacher-14" / "commit_success.txt").exists()
    assert_equal(folder, local)


def test_a_store_that_does_not_answer_is_no_corruption():
    for words in ("ABORTED: All 32 retry attempts failed: CURL error", "PERMISSION_DENIED: 403"):
        assert damage.passing(ValueError(f"{words} reading gs://b/x"))
    assert damage.passing(ConnectionRefusedError(errno.ECONNREFUSED, "Cannot connect to host"))
    assert not damage.passing(ValueError("Error reading .zarray in OCDBT database at gs://b/x"))


def test_what_others_write_is_seen_at_once(bucket):
    folder = workdir.folder_of(f"{bucket}/seen")
    (folder / "mine").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["mine"]
    address = (
        f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/jkd-test/o?uploadType=media&name=seen%2Ftheirs"
    )
    urllib.request.urlopen(urllib.request.Request(address, b"2"), timeout=10).close()
    assert (folder / "theirs").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "theirs"]


def test_lines_are_not_uploaded_one_by_one(bucket, monkeypatch):
    path = workdir.folder_of(f"{bucket}/lines") / "metrics.jsonl"
    lines = log.JsonLines(path, 0)
    lines.write({"a": 1})
    assert read(path.parent) == b""
    monkeypatch.setattr(log, "REMOTE_SECONDS", -1.0)  # long ago
    lines.write({"a": 2})
    assert read(path.parent) == b'{"a": 1}\n{"a": 2}\n'
    monkeypatch.undo()
    lines.write({"a": 3})
    assert lines.flush() == 27 == path.stat().length
    again = log.JsonLines(path, 9)  # a checkpoint saw one line
    again.write({"a": 4})
    assert again.flush() == 18
    assert read(path.parent) == b'{"a": 1}\n{"a": 4}\n'


def test_buckets_that_are_not_there(bucket):
    with pytest.raises(UserError, match=r"gs://no-such-bucket/run cannot be written: there may be no such bucket"):
        toys.go([toys.counter()], "gs://no-such-bucket/run")


def test_a_bundle_of_a_step_that_is_not_finite(bucket):
    def step(key, state, consts, batch, t):
        return state, {"loss": batch["label"].sum() / (t - 2.0)}

    with pytest.raises(train.NonFiniteError):
        toys.go([toys.alone(5, step=step)], f"{bucket}/bad")
    bundle = epath.Path(f"{bucket}/bad/debug/teacher-step-2")
    with (bundle / "batch-0.npz").open("rb") as file:
        assert np.load(file)["image"].shape == (16, 4, 4, 1)


def test_events_and_a_profile_go_there_too(bucket):
    options = train.LoopOptions(progress=False, profile="2:4")
    toys.go([toys.counter()], f"{bucket}/profiled", options=options)
    run = epath.Path(f"{bucket}/profiled/profile/00-count/plugins/profile/steps-2-4")
    assert {path.name for path in run.iterdir()} == {"process-0.xplane.pb", "process-0.trace.json.gz"}
    (events,) = epath.Path(f"{bucket}/profiled/tensorboard/00-count").iterdir()
    assert b"speed/step_ms" in events.read_bytes()
    # It uploads once more when the process ends; the server is gone by then.
    tensorboardX.record_writer.GCSRecordWriter.flush = lambda self: None
