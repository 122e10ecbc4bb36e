"""Two processes over the loopback compute what one does, write once, and stop together."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import toys

from jkd.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR

pytestmark = pytest.mark.usefixtures("alone")
STEPS = 40  # test_mesh.py takes 300
LIMIT = 120  # seconds


def launch(
    workdir: pathlib.Path, *extra: list[str], devices: int, steps: int = STEPS, first: int = 0, within: int = LIMIT
) -> list[tuple[int, str]]:
    """Runs one process for each list of arguments and returns their exit codes and standard errors.

    Once the `first` has ended, the others have so many seconds.
    """
    common = [sys.executable, toys.__file__, str(workdir), "--x64", "--steps", str(steps)]
    common += ["--checkpoint-every", "200", "--devices", str(devices)]
    if len(extra) > 1:
        common += ["--processes", str(len(extra)), "--port", toys.free_port()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*common, "--process", str(i), *args], **quiet) for i, args in enumerate(extra)]
    try:
        said = {first: started[first].communicate(timeout=LIMIT)[1]}
        said |= {i: one.communicate(timeout=within)[1] for i, one in enumerate(started) if i != first}
        return [(process.returncode, said[i].decode()) for i, process in enumerate(started)]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stderr.close()


def final(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    with toys.x64():
        return toys.final(workdir, "teacher")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    done = launch(workdir, [], [], devices=2)
    assert [code for code, _ in done] == [0, 0], done
    return workdir


def test_two_processes_agree_with_one(two, tmp_path):
    done = launch(tmp_path / "run", [], devices=4)
    assert done[0][0] == 0, done
    found, wanted = final(two), final(tmp_path / "run")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    lines = [(workdir / "metrics.jsonl").read_text().splitlines() for workdir in (two, tmp_path / "run")]
    for here, there in zip(*lines, strict=True):
        here, there = json.loads(here), json.loads(there)
        assert here["step"] == there["step"]
        if "train" in here:
            np.testing.assert_allclose(here["train"]["loss"], there["train"]["loss"], rtol=1e-9)


def test_only_the_first_process_writes_and_speaks(two):
    steps = [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(7, STEPS, 7), STEPS, STEPS], "every window once, then the last one and the evaluation"
    assert len(list((two / "tensorboard/00-teacher").iterdir())) == 1


def test_sigterm_to_one_stops_both_and_the_restart_is_exact(two, tmp_path):
    workdir = tmp_path / "run"
    for code, said in launch(workdir, [], ["--moment", "term:teacher-10"], devices=2):
        assert code == EXIT_STOPPED, said
        assert "Run the same command again to go on" in said
    saved = max(int(path.name) for path in (workdir / "checkpoints/00-teacher").iterdir() if path.name.isdigit())
    assert 10 <= saved < STEPS, "asked at step 10"
    chief, other = launch(workdir, [], [], devices=2)
    assert (chief[0], other[0]) == (0, 0), chief + other
    assert f"resuming at step {saved}" in chief[1]
    assert "resuming" not in other[1]
    found, wanted = final(workdir), final(two)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name
    assert (workdir / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_sigterm_to_the_first_in_a_sweep_stops_both(tmp_path):
    for code, said in launch(tmp_path / "run", ["--moment", "term-pass:3"], [], devices=1, steps=5):
        assert code == EXIT_STOPPED, said
        assert "before the end of a sweep" in said
    assert not list((tmp_path / "run").glob("stages/*/consts"))


MOMENTS = ("before:teacher-consts", "kill-pass:2", "kill-pass:20", "step:teacher-30", "save:teacher-200")
MOMENTS = (*MOMENTS, "before:teacher-outcome", "after:teacher-outcome")
SOME = [(0, "step:teacher-30"), (1, "before:teacher-consts")]
EVERY = [(killed, moment) for moment in MOMENTS for killed in (0, 1)]


@pytest.mark.parametrize(("killed", "moment"), EVERY if os.environ.get("JKD_ALL_FAULTS") else SOME)
def test_when_one_is_killed_the_other_says_so_and_ends(killed, moment, tmp_path):
    args = [["--moment", moment] if process == killed else [] for process in (0, 1)]
    done = launch(tmp_path / "run", *args, devices=1, steps=210, first=killed, within=60)
    assert done[killed][0] == -9
    code, said = done[1 - killed]
    assert code == EXIT_LOST, said
    lines = [line for line in said.splitlines() if line.startswith("jkd: ")]
    assert len(lines) == 1, "after what JAX may have to say"
    assert f"process {killed} ({socket.gethostname()}) is gone" in lines[0]
    assert "run the same command again on all hosts to go on from " in lines[0]


def test_rows_keep_their_places_whatever_the_order_of_the_mesh():
    script = pathlib.Path(toys.__file__).parent / "rows_on_meshes.py"
    port = toys.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err.decode()
            for mesh, kinds in json.loads(out.splitlines()[-1]).items():
                for kind, found in kinds.items():
                    wanted = {"swept": [*range(10)], "pixel": [*range(10)], "index": [*range(10)], "total": 45}
                    assert found == wanted, (mesh, kind)
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_what_stops_the_first_process_stops_both(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("mine")
    for code, said in launch(workdir, [], [], devices=1, steps=5):
        assert code == EXIT_USER_ERROR
        assert said.startswith("jkd: error: ")
        assert "is not empty and holds no config.json of a run" in said
    assert [path.name for path in workdir.iterdir()] == ["thesis.tex"]
