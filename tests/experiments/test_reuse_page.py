"""Every command and program of docs/reuse.md runs."""

import importlib
import pathlib
import re
import shlex

import pytest
from helpers_experiments import QUIET, SMOKE

from jkd import train as jkd_train

pytest.importorskip("flatbuffers")
pytest.importorskip("safetensors")

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reuse.md").read_text()


def commands():
    """The page's commands as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]


def test_the_page_runs(smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    ran = []
    for python, dash_m, module, *argv in commands():
        assert (python, dash_m) == ("python", "-m")
        argv = [word.replace("runs/energy_kd", str(smoke)).replace("configs/energy_kd.py", SMOKE) for word in argv]
        argv = [str(ROOT / word) if word.startswith("configs/sweeps") else word for word in argv]
        if module.endswith("train"):
            known = any("teacher.workdir" in word for word in argv)
            argv += [*QUIET, *(() if known else (f"--config.teacher.workdir={smoke}",))]
        importlib.import_module(module).main(argv)
        ran.append(module.rpartition(".")[2])
    assert set(ran) == {"train", "evaluate", "export", "sweep"}
    err = capsys.readouterr().err
    for name, says in (("warm", "4 of 4 leaves taken"), ("new_head", "2 of 4 leaves taken")):
        assert list(jkd_train.finished_stages(tmp_path / "runs" / name)) == ["init_student", "teacher", "kd"]
        assert says in err
    assert list(jkd_train.finished_stages(tmp_path / "runs" / "taught")) == ["teacher", "kd"]
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        code = code.replace("(5, 28, 28, 1)", "(5, 8, 8, 1)")  # the smoke run's images
        names: dict = {}
        exec(compile(code, "docs/reuse.md", "exec"), names)
        if "rows" in names:
            assert names["rows"]["logits"].shape == (5, 10)
        elif "report" in names:
            assert names["report"].summary() in code
        else:
            assert set(names["variables"]) == {"params", "batch_stats"}
