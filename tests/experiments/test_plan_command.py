"""`experiments.plan` compiles the shipped configs' own steps."""

import json

import jax
import pytest
from helpers_experiments import SMOKE

from experiments import plan


@pytest.fixture(autouse=True)
def same_cache():
    """Planning turns the compilation cache off for the rest of the process."""
    kept = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


def planned(capsys, *argv):
    plan.main(["--config", SMOKE, "--topology", "cpu:8", "--json", *argv])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_gradients_of_an_arm_cross_once(capsys):
    reports, tables = planned(capsys, "--stage", "kd")
    (found,) = reports.values()
    assert list(reports) == ["kd"]
    assert (found["num_devices"], found["batch_size"], found["programs_per_step"]) == (8, 32, 1)
    # Two seeds of a 64-8-10 perceptron; beside its gradients only the loss and other numbers of a seed cross.
    gradients = 2 * 4 * (64 * 8 + 8 + 8 * 10 + 10)
    reduced = sum(one["bytes"] for one in found["collectives"] if one["kind"] == "all-reduce")
    assert gradients <= reduced <= gradients + 1024
    assert "8 x cpu" in tables
    assert "all-reduce" in tables


def test_what_fsdp_gathers_and_saves(capsys):
    wide = ("--stage", "teacher", "--config.teacher.hidden=2048,", "--config.batch_size=8")
    whole = planned(capsys, *wide)[0]["teacher"]
    split = planned(capsys, *wide, "--config.mesh.fsdp=8")[0]["teacher"]
    assert split["arguments"] < whole["arguments"] / 2
    assert "all-gather" in {one["kind"] for one in split["collectives"]}
    assert "all-gather" not in {one["kind"] for one in whole["collectives"]}


def test_cached_logits_are_planned_too(capsys):
    reports, _ = planned(capsys, "--stage", "kd", "--config.teacher.source=cached", "--config.only=kd")
    assert reports["kd"]["num_devices"] == 8


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "cpu:8", "--stage", "enrgy_kd"], "Did you mean 'energy_kd'?"),
        (["--topology", "v5f:2x2"], "v5e"),
        (["--topology", "cpu:8", "--config.mesh.data=3"], "needs 3 devices, but there are 8"),
    ],
)
def test_mistakes(argv, says, refused):
    assert says in refused(plan.main, "--config", SMOKE, *argv)
