"""Killed at any moment and started again, a run ends with the bits of an uninterrupted one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import toys

from jkd import train
from jkd.errors import EXIT_STOPPED, UserError

pytestmark = pytest.mark.usefixtures("alone")
ALL_MOMENTS = (
    "after:teacher-consts",
    "step:teacher-5",
    "after:teacher-snapshot",
    "save:teacher-10",
    "step:teacher-13",
    "kill-pass:2",
    "save:teacher-30",
    "before:teacher-outcome",
    "after:teacher-outcome",
    "before:student-consts",
    "save:student-20",
    "kill-pass:8",
    "before:student-outcome",
    "after:student-outcome",
)
# One of each kind, unless all are asked for: every start of a process takes seconds.
SOME_MOMENTS = ("save:teacher-10", "kill-pass:2", "before:student-consts", "save:student-20")
MOMENTS = ALL_MOMENTS if os.environ.get("JKD_ALL_FAULTS") else SOME_MOMENTS


def start(workdir: pathlib.Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, toys.__file__, str(workdir), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_killed_again_and_again_ends_bit_identical(uninterrupted, tmp_path):
    whole, numbers = uninterrupted
    workdir = tmp_path / "run"
    for moment in MOMENTS:
        killed = start(workdir, "--moment", moment)
        assert killed.returncode == -9, f"{moment} was not reached: {killed.stderr}"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout == numbers
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("teacher", "student"):
        same(toys.final(whole, name), toys.final(workdir, name))
    assert not list((workdir / "checkpoints").iterdir()), "checkpoints of finished stages are removed"


def test_sigterm_saves_and_says_how_to_resume(uninterrupted, tmp_path):
    whole, numbers = uninterrupted
    stopped = start(tmp_path / "run", "--moment", "term:student-13")
    assert stopped.returncode == EXIT_STOPPED
    assert "step 13 of stage 'student'" in stopped.stderr
    assert "Run the same command again" in stopped.stderr
    done = start(tmp_path / "run")
    assert "resuming at step 13" in done.stderr
    assert done.stdout == numbers
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    same(toys.final(whole, "student"), toys.final(tmp_path / "run", "student"))


@pytest.mark.skipif(not os.environ.get("JKD_ALL_FAULTS"), reason="takes minutes: JKD_ALL_FAULTS=1")
def test_randomly_killed_runs_end_bit_identical():
    """Kills over three stages; `random_kills.py --kills 60` takes more of them."""
    script = pathlib.Path(toys.__file__).with_name("random_kills.py")
    command = [sys.executable, str(script), "--kills", "10", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == found["identical"] >= 10


# --- damage on disk: in one process, the interruption is an exception ---


class Interrupted(Exception):
    pass


def interrupted_run(workdir: pathlib.Path, monkeypatch, *, at: int = 25, mesh=None) -> None:
    from jkd.train import loop

    boundary = loop._StageRun._boundary

    def stop(self):
        boundary(self)
        if self.t == at:
            self.checkpoints.wait()
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(loop._StageRun, "_boundary", stop)
        with pytest.raises(Interrupted):
            go(workdir, mesh)


def go(workdir: pathlib.Path, mesh=None) -> dict:
    mesh = mesh or train.make_mesh(devices=jax.devices()[:1])
    return train.run([toys.classifier()], workdir=str(workdir), log_every=7, options=toys.OPTIONS, mesh=mesh)


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    go(workdir)
    return toys.final(workdir, "teacher"), (workdir / "metrics.jsonl").read_bytes()


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: pathlib.Path) -> None:
    path = largest(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_state(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "state")


def garble_meta(folder: pathlib.Path) -> None:
    (folder / "meta" / "metadata").write_text("{")


def flip_bit(folder: pathlib.Path) -> None:
    # Rewritten through the checkpoint library itself, so that every checksum on the way agrees.
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "state")
        leaves, treedef = jax.tree.flatten(state)
        index = max(range(len(leaves)), key=lambda i: np.size(leaves[i]))
        words = np.asarray(leaves[index]).copy()
        words.reshape(-1).view(np.uint32)[7] ^= 1 << 3
        leaves[index] = words
        shutil.rmtree(folder / "state")
        checkpointer.save(folder / "state", jax.tree.unflatten(treedef, leaves))


@pytest.mark.parametrize("damage", [truncate, flip_bit, remove_state, garble_meta])
def test_a_damaged_newest_checkpoint_is_said_and_the_previous_one_used(
    damage, whole_teacher, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    interrupted_run(workdir, monkeypatch)
    damage(workdir / "checkpoints/00-teacher/20")
    go(workdir)
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoints/00-teacher/20 is corrupt" in said
    assert "resuming at step 10" in said
    assert (workdir / "corrupt/00-teacher-20").exists(), "nothing is thrown away"
    same(whole_teacher[0], toys.final(workdir, "teacher"))
    assert (workdir / "metrics.jsonl").read_bytes() == whole_teacher[1]


def test_all_checkpoints_damaged_stops_with_the_way_out(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    interrupted_run(workdir, monkeypatch)
    for step in (10, 20):
        truncate(workdir / f"checkpoints/00-teacher/{step}")
    with pytest.raises(UserError, match="All checkpoints in .* were corrupt"):
        go(workdir)


def test_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    interrupted_run(workdir, monkeypatch)

    def wider(key, previous, consts):
        return train.create_state({"params": toys.init_params(key, width=40)}, toys.OPTIMIZER)

    with pytest.raises(UserError, match="does not fit this run: .*kernel is "):
        train.run([toys.classifier(init=wider)], workdir=str(workdir), log_every=7, options=toys.OPTIONS)


@pytest.mark.parametrize(("first", "then"), [(8, 1), (1, 8)])
def test_continues_on_another_mesh(first, then, whole_teacher, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    meshes = {n: train.make_mesh(devices=jax.devices()[:n]) for n in (1, 8)}
    interrupted_run(workdir, monkeypatch, mesh=meshes[first])
    go(workdir, meshes[then])
    found = toys.final(workdir, "teacher")
    for name, value in whole_teacher[0].items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
