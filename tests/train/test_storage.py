"""A disk that is full or read-only: one line, nothing lost, and the run goes on when it can be written again."""

import contextlib
import pathlib
import shutil
import subprocess

import jax
import pytest
import toys

from jkd import train
from jkd.errors import UserError
from jkd.train import loop

ONE = train.make_mesh(devices=jax.devices()[:1])
OPTIONS = train.LoopOptions(checkpoint_every=10, progress=False)


def stages():
    return [toys.classifier(num_steps=20, snapshots=(8,)), toys.student("student", 4)]


def go(workdir):
    return train.run(stages(), workdir=str(workdir), log_every=3, options=OPTIONS, mesh=ONE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return go(workdir), workdir


@pytest.fixture
def disk(tmp_path):
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or subprocess.run(mount("size=2m", folder), capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(options: str, folder: pathlib.Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]


def fill(disk: pathlib.Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def read_only(disk: pathlib.Path) -> None:
    # Files that are open for writing would forbid it, as they would on a disk that fails: the new mount hides them.
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)


def writable(disk: pathlib.Path) -> None:
    subprocess.run(["umount", disk], check=True)


def broken_at(moment: str, harm, disk: pathlib.Path, monkeypatch):
    """Lets `harm(disk)` happen before a step's boundary or before something is stored."""
    boundary, store = loop._StageRun._boundary, loop.save_plain

    def at_step(self):
        if f"{self.stage.name}-{self.t}" == moment:
            harm(disk)
        boundary(self)

    def at_store(directory, *args, **named):
        if f"{directory.parent.name[3:]}-{directory.name}" == moment:
            harm(disk)
        store(directory, *args, **named)

    monkeypatch.setattr(loop._StageRun, "_boundary", at_step)
    monkeypatch.setattr(loop, "save_plain", at_store)


def ends_as_whole(workdir: pathlib.Path, whole) -> None:
    assert go(workdir) == whole[0]
    assert (workdir / "metrics.jsonl").read_bytes() == (whole[1] / "metrics.jsonl").read_bytes()
    for name in ("teacher", "student"):
        found, wanted = toys.final(workdir, name), toys.final(whole[1], name)
        assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in wanted.items()}


MOMENTS = ("teacher-consts", "teacher-2", "teacher-snapshot-00000008", "teacher-10", "teacher-outcome", "student-2")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(moment, disk, whole, monkeypatch):
    workdir = disk / "run"
    with monkeypatch.context() as patch:
        broken_at(moment, fill, disk, patch)
        with pytest.raises(UserError, match=r"cannot be written: No space left on device \(0.0 MB of 2.1 MB") as error:
            go(workdir)
    assert "\n" not in str(error.value)
    assert "make room" in str(error.value)
    (disk / "filler").unlink()
    ends_as_whole(workdir, whole)


@pytest.mark.parametrize("moment", ["teacher-10", "student-consts"])
def test_a_disk_that_becomes_read_only_is_said(moment, disk, whole, monkeypatch):
    workdir = disk / "run"
    with monkeypatch.context() as patch:
        broken_at(moment, read_only, disk, patch)
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            go(workdir)
    writable(disk)
    ends_as_whole(workdir, whole)


def test_a_read_only_workdir_is_refused_before_anything_is_written(disk):
    (disk / "old").mkdir()
    read_only(disk)
    try:
        for name in ("old", "new"):
            with pytest.raises(UserError, match=f"workdir {disk / name} cannot be written: Read-only file system"):
                go(disk / name)
        assert [path.name for path in disk.rglob("*")] == ["old"]
    finally:
        writable(disk)
