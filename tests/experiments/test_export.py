"""Exported models give the outputs of the runs that they come from, without jkd."""

import dataclasses
import math
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import listing

from experiments import arms, cli, energy_kd, export, predict
from jkd import data, quantize
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


@pytest.fixture
def low_bit(monkeypatch):
    """Makes the stages of any run hold low-bit kernels, and their predictor join them."""

    original = jkd_train.load_outcome

    def make(form, change=lambda params: params, **options):
        def load(*args):
            outcome = original(*args)
            each = [jax.tree.map(lambda x, k=k: x[k], outcome.published) for k in range(2)]
            for one in each:
                one["params"] = change(quantize.quantize_params(one["params"], 2, rules=(), form=form, **options))
            return dataclasses.replace(outcome, published=jax.tree.map(lambda *x: jnp.stack(x), *each))

        def predictor(config, stage):
            plain = arms.predictor(config, stage)

            def fn(published, images):
                return plain.fn({**published, "params": quantize.direct()(published["params"])}, images)

            return types.SimpleNamespace(fn=fn, shape=plain.shape, check=lambda published: None)

        monkeypatch.setattr(export.train, "load_outcome", load)
        monkeypatch.setattr(energy_kd, "predictor", predictor)

    return make


@pytest.mark.parametrize("form", ["onehot", "binary", "latent", "lq"])
def test_low_bit_weights_are_packed(form, smoke, tmp_path, capsys, low_bit):
    low_bit(form, per_channel=False)
    file = run(smoke, "teacher", "packed", tmp_path / "t.safetensors", "--seed", "1")
    says = capsys.readouterr().err
    assert "(largest difference 0)" in says
    found, metadata = load_safetensors(file)
    assert metadata == {"method": "energy_kd", "stage": "teacher"}
    shapes = quantize.packed_shapes(found)
    assert sorted(shapes) == ["params/head/kernel", "params/hidden1/kernel"]
    weights = sum(math.prod(shape) for shape in shapes.values())
    size = quantize.packed_size(found)
    assert size.weights == weights
    assert size.bytes == 2 * weights / 8 + 2 * 4 * 4  # two tables of four levels
    assert f"; {weights:,} weights in {size.bytes:,} bytes, 1.108 of their bits" in says


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        (None, {}, "Stage teacher has no low-bit weights to pack: --format safetensors takes any weights."),
        ("onehot", {"change": lambda p: jax.tree.map(lambda x: x * np.nan, p)}, "is not finite: a model that diverged"),
    ],
)
def test_what_is_not_packed(form, options, says, smoke, tmp_path, refused, low_bit):
    if form:
        low_bit(form, **options)
    given = ("--workdir", smoke, "--stage", "teacher", "--format", "packed", "--output", tmp_path / "t.safetensors")
    assert says in refused(export.main, *given)
    assert not any(tmp_path.iterdir())


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
        (["--format", "packed"], "--format packed writes a .safetensors file: --output must end so, got "),
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
