"""What docs/launch.md says runs: as it stands, or as far as it can without a cluster."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import toys

from experiments import cli, plan, train

pytestmark = pytest.mark.usefixtures("alone")
ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"```sh ?(\w*)\n(.*?)```", PAGE, re.DOTALL)
RUNNABLE = [text for kind, text in BLOCKS if kind == "run"]
LIMIT = 200


def commands(text: str) -> list[list[str]]:
    """The words after `python -m experiments.` of every such command, in quotes or not."""
    found = re.findall(r"python -m experiments\.([^\n\"&]*)", text.replace("\\\n", " "))
    return [shlex.split(os.path.expandvars(line)) for line in found]


@pytest.fixture
def environment(tmp_path):
    """Where `python` is this one, and runs land in a folder of their own."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    for name in ("configs", "experiments", "jkd"):
        (tmp_path / name).symlink_to(ROOT / name)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": paths}


@pytest.mark.parametrize("text", RUNNABLE, ids=[re.search(r"runs/(\w+)", text)[1] for text in RUNNABLE])
def test_a_block_runs(text, environment, tmp_path):
    script = text.replace("9876", toys.free_port())
    done = subprocess.run(
        ["bash", "-ec", f"{script}\nwait"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    (workdir,) = (tmp_path / "runs").iterdir()
    assert (workdir / "results.json").exists()
    assert b"Stage teacher is done: " in done.stderr
    assert (workdir / "profile").exists() == ("--profile" in text)


def test_slurm_is_detected(environment, tmp_path):
    (text,) = [text for kind, text in BLOCKS if kind == "sbatch"]
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
    ((name, *words),) = commands(text)
    assert name == "train"
    words = ["--config", "configs/energy_kd.py:smoke", "--workdir", str(tmp_path / "run"), *words[-1:]]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "0", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "experiments.train", *words, "--config.only=teacher"]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    tasks = [subprocess.Popen(command, env=environment | job | {"SLURM_PROCID": str(i)}, **options) for i in range(2)]
    try:
        said = [task.communicate(timeout=LIMIT) for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], said
    finally:
        for task in tasks:
            task.kill()
    assert [b"Stage teacher is done: " in err for _, err in said] == [True, False]


def test_every_command_is_one_of_ours(monkeypatch):
    monkeypatch.setenv("BUCKET", "bucket")
    found = [command for _, text in BLOCKS for command in commands(text)]
    assert len(found) == 9
    seen = []
    monkeypatch.setattr(train, "run", lambda config, workdir, **more: seen.append(config))
    monkeypatch.setattr(plan, "plan", lambda config, *args, **more: seen.append(config) or {})
    monkeypatch.setattr(cli, "initialize", lambda args: None)
    for name, *words in found:
        {"train": train, "plan": plan}[name].main(words)
    assert len(seen) == len(found)


def test_links_and_fields_exist():
    headings = {
        re.sub(r"[^\w -]", "", line).strip().replace(" ", "-").lower() for line in re.findall(r"^#+(.*)", PAGE, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        if link.startswith("#"):
            assert link[1:] in headings, link
    config = cli.load_config("configs/energy_kd.py")
    for section, field in re.findall(r"`(loop|mesh)\.(\w+)`", PAGE):
        assert field in config[section], field
