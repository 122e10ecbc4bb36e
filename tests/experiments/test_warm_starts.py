"""Runs that begin with stored variables, and runs whose sources have moved."""

import shutil

import jax
import numpy as np
import pytest
from helpers_experiments import SMOKE, listing, published, run

from experiments import cli, evaluate, predict, train
from jkd import nn
from jkd import train as jkd_train
from jkd.interop.safetensors import save_safetensors
from jkd.interop.torch import save_torch

# Steps that change nothing: what was taken is what is published.
STILL = ("arms.ce.lr=1e-30", "student.weight_decay=0", "only=ce")


def equal(first, second):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))


@pytest.fixture
def teacher(smoke):
    return f"teacher.workdir={smoke}"


def test_every_seed_starts_from_its_own(smoke, teacher, tmp_path, capsys):
    workdir = run(tmp_path / "run", *STILL, teacher, f"student.init_from={smoke}:kd")
    assert equal(published(workdir, "ce"), published(smoke, "kd"))
    assert jkd_train.load_outcome(workdir, "init_student").members == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Warm start" in line]
    assert line.startswith(f"Warm start of the student from {smoke}:kd: 4 of 4 leaves taken (0 cast), 0 left as init")


def test_a_file_starts_all_seeds_but_for_what_rules_drop_and_a_teacher_goes_on(smoke, tmp_path, capsys):
    one = jax.tree.map(lambda x: x[1], published(smoke, "kd"))
    save_safetensors(tmp_path / "kd.safetensors", {"net": one["params"]})
    rules = ("student.init_rules=head.* ->, ^net -> params", f"student.init_from={tmp_path / 'kd.safetensors'}")
    going = ("teacher.lr=1e-30", "teacher.weight_decay=0", f"teacher.init_from={smoke}:teacher")
    workdir = run(tmp_path / "run", *STILL, *going, *rules)
    assert equal(published(workdir, "teacher"), published(smoke, "teacher"))
    found, cold = published(workdir, "ce")["params"], published(smoke, "ce")["params"]
    assert list(found) == list(one["params"])
    for name, layer in found.items():
        for k in range(2):
            member = jax.tree.map(lambda x, k=k: x[k], layer)
            assert equal(member, one["params"][name]) == (name != "head")
    assert np.abs(found["head"]["kernel"] - cold["head"]["kernel"]).max() < 0.1  # two small steps apart
    says = "2 of 4 leaves taken (0 cast), 2 left as initialized, 0 of another shape, 2 of the source unused."
    out = capsys.readouterr().err
    assert says in out
    assert "net/head/kernel" in out


@pytest.fixture(scope="module")
def torch_files(smoke, tmp_path_factory):
    """The smoke run's teacher under PyTorch's names, and a student of 7 classes."""
    folder = tmp_path_factory.mktemp("torch")
    one = jax.tree.map(lambda x: x[1], published(smoke, "teacher"))
    save_torch(folder / "teacher.safetensors", nn.mlp(10, hidden=(16,)), one)
    seven = nn.mlp(7, hidden=(8,))
    start = nn.init(seven, jax.random.key(3), (8, 8, 1))
    save_torch(folder / "seven.safetensors", seven, start)
    return folder, one, start


def test_files_of_pytorch_are_the_teacher_and_the_start(torch_files, tmp_path, capsys):
    folder, teacher, start = torch_files
    sources = (f"teacher.workdir={folder / 'teacher.safetensors'}", f"student.init_from={folder / 'seven.safetensors'}")
    workdir = run(tmp_path / "run", *STILL, *sources)
    assert equal(published(workdir, "teacher"), teacher)
    hidden = published(workdir, "ce")["params"]["hidden1"]
    for k in range(2):
        assert equal(jax.tree.map(lambda x, k=k: x[k], hidden), start["params"]["hidden1"])
    assert "2 of 4 leaves taken (0 cast), 0 left as initialized, 2 of another shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["teacher.workdir=FOLDER/seven.safetensors", "teacher.hidden=8,"],
            "its head has [7] outputs, the config's [10]",
        ),
        (
            ["teacher.workdir=FOLDER/teacher.safetensors", "teacher.hidden=9,"],
            "fit this MLP by its jkd names: head.weight is [10, 16], not [10, 9]; hidden1.bias is [16], not [9]",
        ),
        (["teacher.workdir=FOLDER/none.pth"], "FOLDER/none.pth cannot be read: No such file"),
        (["student.init_from=FOLDER/none.pt"], "FOLDER/none.pt cannot be read: No such file"),
    ],
)
def test_files_of_pytorch_that_do_not_fit(changes, says, torch_files, refused, untouched):
    argv = [f"--config.{change}".replace("FOLDER", str(torch_files[0])) for change in changes]
    line = refused(train.main, "--config", SMOKE, "--workdir", untouched() / "run", "--config.only=ce", *argv)
    assert says.replace("FOLDER", str(torch_files[0])) in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["student.init_from=runs"],
            "student.init_from must be WORKDIR:STAGE or a .safetensors, .pth, .pt file, got 'runs'.",
        ),
        (["student.init_from=/nowhere:kd"], "/nowhere holds no finished stage 'kd'"),
        (["student.init_from=SMOKE:kdd"], "Did you mean 'kd'?"),
        (["student.init_from=/nowhere/x.safetensors"], "/nowhere/x.safetensors cannot be read: No such file"),
        (["student.init_from=SMOKE:kd", "seeds=3"], "SMOKE:kd has 2 seeds and the config seeds=3: set seeds=2"),
        (["student.init_from=SMOKE:kd", "student.init_rules=.* ->"], "source has nothing that fits: params/"),
        (["student.init_rules=head"], "The rule 'head' must be 'regex -> replacement'"),
        (["teacher.init_from=a:b", "teacher.workdir=SMOKE"], "takes no teacher.init_from: leave one out."),
    ],
)
def test_mistakes(changes, says, smoke, refused, untouched):
    argv = [f"--config.{change}".replace("SMOKE", str(smoke)) for change in changes]
    line = refused(train.main, "--config", SMOKE, "--workdir", untouched() / "run", "--config.only=ce", *argv)
    assert says.replace("SMOKE", str(smoke)) in line


@pytest.fixture(scope="module")
def orphan(smoke, tmp_path_factory):
    """A run whose teacher and whose student's start are gone."""
    away = tmp_path_factory.mktemp("away")
    for stage in ("00-teacher", "02-kd"):
        shutil.copytree(smoke / "stages" / stage, away / "run" / "stages" / stage)
    sources = (f"teacher.workdir={away / 'run'}", f"student.init_from={away / 'run'}:kd")
    workdir = run(tmp_path_factory.mktemp("orphan") / "run", "only=kd", *sources)
    shutil.rmtree(away)
    return workdir


def test_a_run_without_its_sources_is_evaluated_and_predicts(orphan):
    found = evaluate.evaluate(cli.load_run(str(orphan), {}), str(orphan))
    assert list(found) == ["init_student", "teacher", "kd"]
    assert all(np.abs(row["difference"]).max() < 1e-4 for row in found["kd"].values())
    for name in ("teacher", "kd"):
        assert predict.predict(cli.load_run(str(orphan), {}), str(orphan), name, "data:test[:9]")["predicted"].shape


def test_a_run_without_its_sources_goes_on(orphan, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(orphan, workdir)
    shutil.rmtree(workdir / "stages" / "02-kd")
    (workdir / "results.json").unlink()
    config = cli.load_run(str(workdir), {})
    train.run(config, str(workdir), show=False)
    assert equal(published(workdir, "kd"), published(orphan, "kd"))
    shutil.rmtree(workdir / "stages")
    before = listing(workdir)
    with pytest.raises(ValueError, match="holds no finished stage 'kd'"):
        train.run(config, str(workdir), show=False)
    assert listing(workdir) == before


MESHES = ({"data": 1}, {"data": 2}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A run whose parameters were split over 4 of 8 devices, and what it predicts there."""
    wide = ("only=teacher", "teacher.hidden=512,", "mesh.fsdp=4")
    workdir = run(tmp_path_factory.mktemp("split") / "run", *wide)
    kernel = jkd_train.load_outcome(workdir, "teacher", mesh=jkd_train.make_mesh(fsdp=4)).published["params"]
    assert "fsdp" in {axis for x in jax.tree.leaves(kernel) for axis in x.sharding.spec}
    return workdir, predict.predict(cli.load_run(str(workdir), {}), str(workdir), "teacher", "data:test[:30]")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_split_run_is_the_same_on_other_meshes(mesh, split, monkeypatch):
    workdir, expected = split
    make, sizes = jkd_train.make_mesh, {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    monkeypatch.setattr(jkd_train, "make_mesh", lambda **asked: make(**asked, devices=devices))
    config = cli.load_run(str(workdir), {f"mesh.{name}": size for name, size in sizes.items()})
    found = evaluate.evaluate(config, str(workdir))["teacher"]
    for name, row in found.items():
        # Accuracies count; the other metric is made of float32 energies.
        np.testing.assert_allclose(row["now"], row["stored"], rtol=1e-6 if "top1" in name else 1e-3, err_msg=name)
    rows = predict.predict(config, str(workdir), "teacher", "data:test[:30]")
    for name in ("logits", "pool", "probabilities"):
        np.testing.assert_allclose(rows[name], expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows["predicted"], expected["predicted"])
