"""Whose folder it is."""

import jax
import jax.numpy as jnp
import pytest
import toys
from toys import QUIET

from jkd import train
from jkd.errors import UserError

ONE = train.make_mesh(devices=jax.devices()[:1])


def go(workdir, config, **changes):
    return train.run([toys.classifier(num_steps=2, **changes)], workdir=workdir, mesh=ONE, config=config, options=QUIET)


def refuse(key, state, consts, batch, t):
    raise UserError("the shift is negative")


def test_a_corrected_config_may_have_the_folder_of_a_run_that_never_began(tmp_path):
    with pytest.raises(UserError, match="the shift is negative"):
        go(tmp_path / "run", {"shift": -1}, step=refuse, prepare=lambda key, previous, sweep: {"x": jnp.ones(3)})
    assert not list((tmp_path / "run").iterdir())
    assert go(tmp_path / "run", {"shift": 1})["teacher"]["steps"] == 2


def test_a_folder_keeps_its_config_once_steps_were_taken(tmp_path):
    go(tmp_path / "run", {"shift": 1})
    before = toys.final(tmp_path / "run", "teacher")
    with pytest.raises(UserError, match="belongs to another config: shift was 1 and is 2"):
        go(tmp_path / "run", {"shift": 2})
    # A later mistake of the same config takes nothing back.
    stages = [toys.classifier(num_steps=2), toys.classifier("next", 2, step=refuse)]
    for _ in range(2):
        with pytest.raises(UserError, match="the shift is negative"):
            train.run(stages, workdir=tmp_path / "run", mesh=ONE, config={"shift": 1}, options=QUIET)
    after = toys.final(tmp_path / "run", "teacher")
    assert all((before[name] == after[name]).all() for name in before)


def test_a_first_stage_that_is_finished_counts_as_begun(tmp_path):
    stages = [toys.classifier(num_steps=0), toys.classifier("next", 2, step=refuse)]
    with pytest.raises(UserError, match="the shift is negative"):
        train.run(stages, workdir=tmp_path / "run", mesh=ONE, config={}, options=QUIET)
    assert (tmp_path / "run" / "stages" / "00-teacher" / "outcome").exists()
    assert (tmp_path / "run" / "config.json").exists()


def test_another_machine_may_have_its_data_elsewhere(tmp_path):
    def config(data_dir, name="digits"):
        return {"data": {"name": name, "data_dir": data_dir}, "mesh": {"fsdp": 1}}

    go(tmp_path / "run", config("/here"))
    assert go(tmp_path / "run", config("/there"))["teacher"]["steps"] == 2
    assert '"data_dir": "/there"' in (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="another config: data.name was digits and is letters. Give the config"):
        go(tmp_path / "run", config("/there", "letters"))


def test_what_a_stage_reads_elsewhere_is_checked_before_anything_is_written(tmp_path):
    def gone():
        raise UserError("the teacher is gone")

    with pytest.raises(UserError, match="the teacher is gone"):
        go(tmp_path / "run", {}, check=gone)
    assert not (tmp_path / "run").exists()
    go(tmp_path / "run", {})
    assert go(tmp_path / "run", {}, check=gone)["teacher"]["steps"] == 2  # finished: it needs nothing more
