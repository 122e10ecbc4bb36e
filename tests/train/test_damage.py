"""Every file of what a run stores, damaged in every way: never a wrong value, and never an error without a way out."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import toys
from etils import epath
from toys import QUIET, go

from jkd import train
from jkd.errors import UserError
from jkd.train.checkpoint import Checkpoints, load_meta, load_plain, save_plain
from jkd.train.mesh import DEFAULT_RULES

# What orbax leaves unfinished after an error is said when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ONE = train.make_mesh(devices=jax.devices()[:1])


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    for i in (len(content) // 2, len(content) // 5):
        content[i : i + 1] = bytes(x ^ 0x11 for x in content[i : i + 1])
    path.write_bytes(content)


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip, empty, pathlib.Path.unlink)


def state(step: int) -> dict:
    weights = np.arange(600, dtype=np.float32).reshape(20, 30) + step
    return {"params": {"kernel": train.place(weights, ONE), "bias": train.place(weights[0], ONE)}, "key": place_key()}


def place_key():
    return train.place(jax.random.key(3), ONE)


def damaged(folder: pathlib.Path, spare: pathlib.Path, *, harm):
    """Yields every file of a folder by name while it is damaged, and restores the folder afterwards."""
    shutil.copytree(folder, spare)
    for path in sorted(p.relative_to(spare) for p in spare.rglob("*") if p.is_file()):
        harm(folder / path)
        yield str(path)
        shutil.rmtree(folder, ignore_errors=True)  # it may have been set aside
        shutil.copytree(spare, folder)


def as_bytes(tree) -> list[bytes]:
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == place_key().dtype else x, tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_any_damaged_file_of_a_checkpoint_means_the_one_before_or_no_difference(harm, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "00-teacher"
    checkpoints = Checkpoints(epath.Path(folder))
    for step in (10, 20):
        checkpoints.save(step, state(step), {"t": step, "history": {"accuracy": step / 10}})
    checkpoints.close()
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    used = {}
    for name in damaged(folder / "20", tmp_path / "spare", harm=harm):
        said: list[str] = []
        checkpoints = Checkpoints(epath.Path(folder))
        found, meta = checkpoints.restore_newest(target, said.append)
        checkpoints.close()
        used[name] = step = meta["t"]
        assert meta["history"] == {"accuracy": step / 10}, name
        assert as_bytes(found) == as_bytes(state(step)), name
        assert len(said) == (step == 10), name
        if said:
            assert f"{folder / '20'} is corrupt" in said[0]
            shutil.rmtree(tmp_path / "run" / "corrupt")
    assert used["meta/metadata"] == 10
    assert 10 in {step for name, step in used.items() if "/d/" in name}
    assert len(used) >= 8


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_any_damaged_file_of_a_stored_result_is_said_or_makes_no_difference(harm, tmp_path):
    folder = epath.Path(tmp_path) / "outcome"
    tree = {name: state(5)[name] for name in ("params", "key")}
    save_plain(folder, tree, {"metrics": {"accuracy": 0.5}}, mesh=ONE, rules=DEFAULT_RULES)
    refused = []
    for name in damaged(tmp_path / "outcome", tmp_path / "spare", harm=harm):
        problem = ""
        try:
            found, info = load_plain(folder, mesh=ONE, rules=DEFAULT_RULES)
        except UserError as error:
            problem = str(error)
        if problem:
            refused.append(name)
            assert f"{folder} cannot be used" in problem, name
            assert "Remove the stage's folder to train that stage again" in problem, name
            assert "\n" not in problem, name
        else:
            assert as_bytes(found) == as_bytes(tree), name
            assert info["metrics"] == {"accuracy": 0.5}, name
    assert "meta/metadata" in refused
    assert any("/d/" in name for name in refused)


def test_a_number_that_was_altered_beside_the_arrays_shows(tmp_path):
    folder = epath.Path(tmp_path) / "outcome"
    save_plain(folder, {}, {"metrics": {"accuracy": 0.5}}, mesh=ONE, rules=DEFAULT_RULES)
    file = folder / "meta" / "metadata"
    file.write_text(file.read_text().replace("0.5", "0.9"))
    for read in (load_meta, lambda folder: load_plain(folder, mesh=ONE, rules=DEFAULT_RULES)):
        with pytest.raises(UserError, match="outcome cannot be used: .*meta was altered on disk"):
            read(folder)


@pytest.fixture
def stopped(tmp_path):
    """A run of two stages that ended in the second one."""

    def broken(*args):
        raise UserError("stop here")

    stages = [toys.classifier(num_steps=4), toys.student("student", 4)]
    evaluator = dataclasses.replace(toys.accuracy(), finish=broken)
    options = dataclasses.replace(QUIET, checkpoint_every=2)
    first = [stages[0], dataclasses.replace(stages[1], evaluators={"x": evaluator})]
    with pytest.raises(UserError, match="stop here"):
        go(first, tmp_path, log_every=1, options=options)
    return tmp_path, lambda: go(stages, tmp_path, log_every=1, options=options)


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (truncate, "metrics.jsonl is shorter than the checkpoint saw it"),
        (flip, "metrics.jsonl is not what the checkpoint saw"),
        (empty, "metrics.jsonl is shorter than the checkpoint saw it"),
        (pathlib.Path.unlink, "metrics.jsonl is shorter than the checkpoint saw it"),
    ],
)
def test_a_damaged_log_is_said(harm, match, stopped):
    workdir, go_on = stopped
    whole = (workdir / "metrics.jsonl").read_bytes()
    harm(workdir / "metrics.jsonl")
    with pytest.raises(UserError, match=match):
        go_on()
    (workdir / "metrics.jsonl").write_bytes(whole)
    go_on()
    assert (workdir / "metrics.jsonl").read_bytes().startswith(whole)


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("file", ["config.json", "stages/00-teacher/outcome/meta/metadata"])
def test_a_damaged_file_that_says_what_the_run_is_stops_it(file, harm, stopped):
    workdir, go_on = stopped
    harm(workdir / file)
    with pytest.raises(UserError, match=r"damaged|belongs to another config|holds no config.json|cannot be used"):
        go_on()
