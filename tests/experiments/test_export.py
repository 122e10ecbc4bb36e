"""Exported models give the outputs of the runs that they come from, without jkd."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import listing

from experiments import cli, export, predict
from jkd import data
from jkd import train as jkd_train
from jkd.interop.safetensors import load_safetensors, save_safetensors

pytest.importorskip("flatbuffers")
pytest.importorskip("safetensors")

IMAGES = data.load("digits8x8", "test").arrays["image"][:7]
# What a consumer writes: jax and numpy only.
CONSUMER = """
import sys
import jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
found = {f"{name}{n}": rows for n in (1, 7) for name, rows in program.call(images[:n]).items()}
np.savez(sys.argv[3], **found)
assert not {"jkd", "flax", "optax", "orbax", "experiments"} & set(sys.modules)
"""


def run(smoke, stage, kind, output, *more):
    export.main(["--workdir", str(smoke), "--stage", stage, "--format", kind, "--output", str(output), *more])
    return output


def test_a_program_gives_the_predictions_in_a_process_without_jkd(smoke, tmp_path, capsys):
    file = run(smoke, "kd", "stablehlo", tmp_path / "kd", "--seed", "1", "--config.data.blank=True")
    assert "read back, it gives the model's outputs on 4 images (largest difference " in capsys.readouterr().err
    np.save(tmp_path / "images.npy", IMAGES)
    arguments = [str(file), str(tmp_path / "images.npy"), str(tmp_path / "found.npz")]
    subprocess.run([sys.executable, "-c", CONSUMER, *arguments], cwd=tmp_path, timeout=120, check=True)
    found = np.load(tmp_path / "found.npz")
    expected = predict.predict(cli.load_run(str(smoke), {}), str(smoke), "kd", str(tmp_path / "images.npy"))
    for n in (1, 7):
        for name in ("logits", "pool"):
            np.testing.assert_allclose(found[f"{name}{n}"], expected[name][1][:n], rtol=1e-5, atol=1e-6)
        softmax = jax.nn.softmax(expected["logits"][1][:n])
        np.testing.assert_allclose(found[f"probabilities{n}"], softmax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", ["0", "1", "all"])
def test_variables_come_back_bit_for_bit(seed, smoke, tmp_path, capsys):
    file = run(smoke, "teacher", "safetensors", tmp_path / "t.safetensors", "--seed", seed)
    assert "(largest difference 0)" in capsys.readouterr().err
    found, metadata = load_safetensors(file)
    assert metadata == {"method": "energy_kd", "stage": "teacher"} | ({"members": "2"} if seed == "all" else {})
    published = jkd_train.load_outcome(smoke, "teacher").published
    wanted = published if seed == "all" else jax.tree.map(lambda x: x[int(seed)], published)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_file_for_pytorch(smoke, tmp_path, capsys):
    file = run(smoke, "teacher", "torch", tmp_path / "t.safetensors", "--seed", "1", "--style", "jkd")
    assert "(largest difference 0)" in capsys.readouterr().err
    found, metadata = load_safetensors(file)
    assert metadata == {"format": "pt", "method": "energy_kd", "stage": "teacher"}
    wanted = jax.tree.map(lambda x: x[1], jkd_train.load_outcome(smoke, "teacher").published["params"])
    assert set(found) == {"hidden1.weight", "hidden1.bias", "head.weight", "head.bias"}
    np.testing.assert_array_equal(found["head.weight"], wanted["head"]["kernel"].T)


def test_the_platforms_are_those_asked_for(smoke, tmp_path, capsys):
    run(smoke, "kd", "stablehlo", tmp_path / "tpu", "--platforms", "tpu")
    assert "not checked: it is for tpu and this machine has cpu" in capsys.readouterr().err
    run(smoke, "kd", "stablehlo", tmp_path / "cpu", "--platforms", "cpu,cuda")
    assert jax.export.deserialize(bytearray((tmp_path / "cpu").read_bytes())).platforms == ("cpu", "cuda")


def test_a_file_that_gives_other_outputs_is_removed(smoke, tmp_path, refused, monkeypatch):
    def save(path, tree, metadata):
        save_safetensors(path, jax.tree.map(lambda x: x + jnp.ones_like(x), tree), metadata)

    monkeypatch.setattr(export.safetensors, "save_safetensors", save)
    given = ("--workdir", smoke, "--stage", "kd", "--format", "safetensors", "--output", tmp_path / "kd")
    assert "gave other logits than the model (by " in refused(export.main, *given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--stage", "kdd"], "holds no finished stage 'kdd'; finish its training first. Did you mean 'kd'?"),
        (["--seed", "2"], "--seed must be one of 0..1, got '2'."),
        (["--style", "timm"], "--style is for PyTorch's names: --format torch."),
        (
            ["--seed", "all", "--format", "torch", "--output", "new.safetensors"],
            "--seed all is for --format safetensors;",
        ),
        (["--format", "torch"], "--format torch writes a .safetensors file: --output must end so, got "),
        (["--seed", "all"], "--seed all is for --format safetensors; other files are of one seed: --seed 0."),
        (["--platforms", "cpu,gpu"], "Unknown platform 'gpu'; a program is for some of cpu, cuda, rocm, tpu."),
        (["--format", "safetensors", "--platforms", "cpu"], "--platforms is for programs: --format stablehlo."),
        (["--format", "onnx"], "invalid choice: 'onnx'"),
        (["--output", "THERE"], "exists already and is not overwritten"),
        (["--config.arms.kd.lr=1"], "decided what this run computed and cannot be changed now"),
    ],
)
def test_refusals(argv, says, smoke, refused, untouched, tmp_path):
    (tmp_path / "there").write_text("mine")
    untouched()
    given = ("--workdir", smoke, "--stage", "kd", "--format", "stablehlo", "--output", tmp_path / "new")
    line = refused(export.main, *given, *(word.replace("THERE", str(tmp_path / "there")) for word in argv))
    assert says in line


def test_the_run_is_left_as_it_is(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / "run")
    before = listing(tmp_path / "run")
    run(tmp_path / "run", "ce", "safetensors", tmp_path / "ce.safetensors")
    assert listing(tmp_path / "run") == before
