"""Sweep files become commands that run."""

import pathlib
import shlex

import pytest
from helpers_experiments import QUIET, SMOKE

from experiments import cli, sweep, train
from jkd import train as jkd_train

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.toml"))
HEAD = f'config = "{SMOKE}"\nworkdir = "runs/{{line}}"\n'


def write(tmp_path, text):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return str(file)


def test_every_combination_in_order(tmp_path, capsys):
    text = f'''config = "{SMOKE}"
workdir = "my runs/{{arms.kd.lr}}-{{only}}-{{seed}}"
[set]
"loop.progress" = false
[grid]
"arms.kd.lr" = [0.01, 0.02]
seed = [7]
[[zip]]
only = [["kd"], ["kd", "ce"]]
"student.hidden" = [[4, 4], [8]]
'''
    file = write(tmp_path, text)
    lines = sweep.expand(file)
    words = [shlex.split(line) for line in lines]
    assert words[0] == [
        *("python", "-m", "experiments.train", "--config", SMOKE, "--workdir", "my runs/0.01-kd-7"),
        *("--config.loop.progress=false", "--config.arms.kd.lr=0.01", "--config.seed=7"),
        *("--config.only=kd,", "--config.student.hidden=4,4"),
    ]
    assert [word[6] for word in words] == [
        f"my runs/{end}" for end in ("0.01-kd-7", "0.01-kd,ce-7", "0.02-kd-7", "0.02-kd,ce-7")
    ]
    sweep.main([file])
    assert capsys.readouterr().out.splitlines() == lines
    sweep.main([file, "--line", "3", "--config.log_every=2"])
    assert capsys.readouterr().out == lines[2].replace("progress=false", "progress=false --config.log_every=2") + "\n"
    sweep.main([file, "--count"])
    assert capsys.readouterr().out == "4\n"


def test_a_printed_line_runs(tmp_path):
    text = (
        f'config = "{SMOKE}"\nworkdir = "{tmp_path}/a run/{{seed}}"\n[set]\nonly = ["teacher"]\n[grid]\nseed = [3, 4]\n'
    )
    line = sweep.expand(write(tmp_path, text))[1]
    program, *argv = shlex.split(line)
    assert (program, argv[:2]) == ("python", ["-m", "experiments.train"])
    (tmp_path / "a run").mkdir()
    train.main([*argv[2:], *QUIET])
    assert list(jkd_train.finished_stages(tmp_path / "a run" / "4")) == ["teacher"]
    assert cli.load_run(str(tmp_path / "a run" / "4"), {}).seed == 4


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files(file):
    lines = sweep.expand(str(file))
    assert len(lines) == len(set(lines)) > 1


def test_no_axis_is_one_line(tmp_path):
    assert len(sweep.expand(write(tmp_path, HEAD))) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "[grid]\nsedes = [1]", "Unknown config field 'sedes'. Did you mean 'seeds'?"),
        (HEAD + "[grid]\nseeds = [1, 2.5]", "Config field 'seeds' takes int values like 2, got '2.5'."),
        (
            HEAD + "[grid]\narms.kd.lr = [1]",
            "arms must be a list of values, got {'kd': {'lr': [1]}} (dotted names need",
        ),
        (HEAD + "[grid]\nseed = 3", "seed must be a list of values, got 3"),
        (HEAD + "[grid]\nseed = []", "seed must be a list of values, got []"),
        (HEAD + "[gird]\nseed = [1]", "Unknown entry of FILE 'gird'. Did you mean 'grid'?"),
        (HEAD + "[zip]\nseed = [1]", "zip is one or more [[zip]]."),
        (
            HEAD + "[[zip]]\nseed = [1]\nseeds = [1, 2]",
            "the lists of one [[zip]] must have one length, got seed 1, seeds 2",
        ),
        (HEAD + "[set]\nseed = 1\n[grid]\nseed = [2]", "FILE sets seed more than once; a field has one place."),
        (
            HEAD.replace("line", "sede") + "[grid]\nseed = [2]",
            "Unknown field in the workdir of FILE 'sede'. Did you mean",
        ),
        (HEAD.replace("{line}", "x") + "[grid]\nseed = [2, 3]", "lines 1 and 2 have one workdir, runs/x: name in it"),
        (HEAD.replace("smoke", "smok"), "Unknown variant of configs/energy_kd.py 'smok'. Did you mean 'smoke'?"),
        ('config = "x"', "FILE must name its workdir, as text."),
        ("config = ", "FILE is no TOML: "),
    ],
)
def test_mistakes(text, says, refused, tmp_path):
    file = write(tmp_path, text)
    assert says.replace("FILE", file) in refused(sweep.main, file)


def test_mistaken_arguments(refused, tmp_path):
    assert "cannot be read: No such file" in refused(sweep.main, tmp_path / "none.toml")
    assert "--line must be one of 1..1, got 2." in refused(sweep.main, write(tmp_path, HEAD), "--line", "2")
