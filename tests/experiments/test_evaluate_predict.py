"""A finished run is evaluated again, and its models used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import SMOKE, listing
from PIL import Image

from experiments import cli, evaluate, predict, train
from experiments.distillation_setup import Setup
from jkd import data
from jkd import train as jkd_train

IMAGES = data.load("digits8x8", "test").arrays["image"][:7]


@pytest.fixture(scope="module")
def run(smoke):
    """The folder of the smoke run."""
    return smoke


@pytest.fixture(scope="module")
def looped(run, tmp_path_factory):
    """The folder of a run whose seeds are looped over."""
    workdir = tmp_path_factory.mktemp("looped") / "run"
    config = cli.load_config(SMOKE, {"ensemble": "loop", "only": ("teacher",), "loop.progress": False})
    train.run(config, str(workdir), show=False)
    return workdir


def test_evaluation_repeats_the_stored_metrics_and_writes_nothing(run, capsys):
    before = listing(run)
    evaluate.main(["--workdir", str(run), "--stage", "teacher", "--stage", "energy_kd"])
    out = capsys.readouterr().out
    assert "test/top1" in out
    assert "groups/share_low" in out
    assert "difference" in out
    assert listing(run) == before


def test_evaluation_gives_every_seed_and_the_difference(run, tmp_path):
    file = tmp_path / "metrics.json"
    evaluate.main(["--workdir", str(run), "--stage", "teacher", "--json", str(file)])
    found = json.loads(file.read_text())["teacher"]
    stored = json.loads((run / "results.json").read_text())["stages"]["teacher"]["metrics"]
    assert set(found) == set(stored)
    for name, row in found.items():
        assert row["stored"] == stored[name]
        np.testing.assert_allclose(row["now"], stored[name], atol=1e-5)
        np.testing.assert_allclose(row["difference"], np.subtract(row["now"], row["stored"]))


def test_evaluation_sees_a_change(run, monkeypatch):
    config = cli.load_run(str(run), {})
    load = jkd_train.load_outcome

    def other(*args, **named):
        outcome = load(*args, **named)
        swapped = jax.tree.map(lambda x: -x, outcome.published)
        return type(outcome)(swapped, outcome.snapshots, outcome.consts, outcome.metrics, outcome.members)

    monkeypatch.setattr(jkd_train, "load_outcome", other)
    found = evaluate.evaluate(config, str(run), ["teacher"])["teacher"]
    assert np.abs(found["test/top1"]["difference"]).max() > 1


def test_evaluation_of_looped_seeds_on_another_mesh(looped):
    config = cli.load_run(str(looped), {"mesh.fsdp": "2", "eval_batch_size": "200"})
    assert dict(config.mesh) == {"data": -1, "fsdp": 2, "tensor": 1, "slices": 1}
    found = evaluate.evaluate(config, str(looped))
    assert list(found) == ["teacher"]
    for row in found["teacher"].values():
        assert row["now"].shape == (2,)
        np.testing.assert_allclose(row["now"], row["stored"], atol=1e-4)


def test_evaluation_refuses(run, refused, tmp_path):
    before = listing(run)
    assert "is not the folder of a run: it holds no config.json." in refused(evaluate.main, "--workdir", tmp_path)
    line = refused(evaluate.main, "--workdir", run, "--stage", "techer")
    assert "Unknown stage 'techer'. Did you mean 'teacher'?" in line
    line = refused(evaluate.main, "--workdir", run, "--config.arms.kd.lr=3")
    assert "'arms.kd.lr' decided what this run computed and cannot be changed now; these can: eval_batch_size, " in line
    line = refused(evaluate.main, "--workdir", run, "--config.eval_batchsize=8")
    assert "Unknown config field 'eval_batchsize'. Did you mean 'eval_batch_size'?" in line
    line = refused(evaluate.main, "--workdir", run, "--json", run / "results.json")
    assert "results.json exists already and is not overwritten" in line
    line = refused(evaluate.main, "--workdir", run, "--json", tmp_path / "no" / "metrics.json")
    assert "there is no folder" in line
    line = refused(evaluate.main, "--workdir", run, "--config.mesh.data=3")
    assert "needs 3 devices, but there are 8" in line
    line = refused(evaluate.main, "--workdir", run, "--config.eval_batch_size=100")
    assert "eval_batch_size 100 is not divisible by the 8 devices" in line
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert "is not a run of `python -m experiments.train`" in refused(evaluate.main, "--workdir", tmp_path)
    assert listing(run) == before


def test_unfinished_stages_are_named(run, refused, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(run, part, ignore=lambda folder, names: [n for n in names if n.endswith("-energy_dkd")])
    line = refused(evaluate.main, "--workdir", part, "--stage", "energy_dkd")
    assert "holds no finished stage 'energy_dkd'; finish its training first." in line
    shutil.rmtree(part / "stages")
    assert "holds no finished stage; finish its training first." in refused(evaluate.main, "--workdir", part)


@pytest.fixture(scope="module")
def predictions(run, tmp_path_factory):
    """What the command writes for seven images."""
    folder = tmp_path_factory.mktemp("predictions")
    np.save(folder / "images.npy", IMAGES)
    to = folder / "predictions.npz"
    given = ("--input", str(folder / "images.npy"), "--output", str(to))
    predict.main(["--workdir", str(run), "--stage", "kd", *given])
    return dict(np.load(to))


def test_predictions_are_the_mean_of_the_seeds(run, predictions):
    assert {name: array.shape for name, array in predictions.items()} == {
        "logits": (2, 7, 10),
        "probabilities": (7, 10),
        "predicted": (7,),
        "pool": (2, 7, 8),
    }
    setup = Setup.of(cli.load_run(str(run), {}))
    outcome = jkd_train.load_outcome(run, "kd")
    for k in range(2):
        variables = jax.tree.map(lambda x, k=k: np.asarray(x[k]), outcome.published)
        out = setup.student.apply(variables, setup.views["weak"].plain(jnp.asarray(IMAGES)), train=False)
        np.testing.assert_allclose(predictions["logits"][k], out.logits, atol=1e-5)
        np.testing.assert_allclose(predictions["pool"][k], out.features["pool"], atol=1e-5)
    expected = np.mean(jax.nn.softmax(predictions["logits"]), axis=0)
    np.testing.assert_allclose(predictions["probabilities"], expected, atol=1e-6)
    np.testing.assert_array_equal(predictions["predicted"], expected.argmax(-1))


def test_predictions_from_files_and_from_the_data(run, predictions, tmp_path):
    for i, image in enumerate(IMAGES):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{6 - i}.png")  # by name: in reverse
    (tmp_path / "notes.txt").write_text("not an image")
    config = cli.load_run(str(run), {})
    files = predict.predict(config, str(run), "kd", str(tmp_path))
    assert files["file"].tolist() == [f"{i}.png" for i in range(7)]
    np.testing.assert_allclose(files["logits"][:, ::-1], predictions["logits"], atol=1e-5)
    split = predict.predict(config, str(run), "kd", "data:test[:107]")  # more than one batch of 96
    assert split["label"].tolist() == data.load("digits8x8", "test").labels[:107].tolist()
    np.testing.assert_allclose(split["logits"][:, :7], predictions["logits"], atol=1e-5)
    assert split["pool"].shape == (2, 107, 8)


def test_one_program_predicts_all_seeds_and_batches(run):
    config, compiled = cli.load_run(str(run), {}), []

    def note(name, seconds, **named):
        if "backend_compile" in name:
            compiled.append(named.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    predict.predict(config, str(run), "teacher", "data:test[:300]")
    jax.monitoring.unregister_event_duration_listener(note)
    assert len([name for name in compiled if "program" in str(name)]) == 1


def test_predictions_without_the_data_set(run, predictions, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    config = cli.load_run(str(run), {"data.blank": "true"}, ("data.blank",))
    found = predict.predict(config, str(run), "kd", str(tmp_path / "images.npy"))
    np.testing.assert_allclose(found["logits"], predictions["logits"], atol=1e-5)
    config.data.shape = (28, 28, 1)
    with pytest.raises(ValueError, match="does not take images of shape"):
        predict.predict(config, str(run), "kd", str(tmp_path / "images.npy"))


def test_prediction_refuses(run, refused, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "floats.npy", IMAGES / 255.0)
    np.save(tmp_path / "large.npy", np.zeros((2, 28, 28, 1), np.uint8))
    np.save(tmp_path / "none.npy", IMAGES[:0])
    (tmp_path / "text.npy").write_text("1, 2, 3")
    (tmp_path / "there.npz").write_bytes(b"mine")
    for name in ("empty", "sizes", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "sizes" / "a.png")
    (tmp_path / "broken" / "b.jpg").write_bytes(b"no image")
    wanted = "must be an .npy file of uint8[N, 8, 8, 1], values 0 to 255"
    cases = {
        "floats.npy": f"{wanted}, got float64[7, 8, 8, 1].",
        "large.npy": f"{wanted}, got uint8[2, 28, 28, 1].",
        "none.npy": f"{wanted}, got uint8[0, 8, 8, 1].",
        "text.npy": f"cannot be read as a numpy array; the input {wanted}",
        "absent.npy": "absent.npy: give an .npy file of uint8[N, 8, 8, 1]",
        "empty": "holds no .png or .jpg file.",
        "sizes": "a.png is 9x8; the model takes 8x8 images.",
        "broken": "b.jpg cannot be read as an image.",
    }
    before = listing(tmp_path)
    to = ("--workdir", run, "--output", tmp_path / "new.npz")
    for name, says in cases.items():
        assert says in refused(predict.main, *to, "--stage", "kd", "--input", tmp_path / name)
    line = refused(predict.main, *to, "--stage", "kd", "--input", "data:tset")
    assert "Unknown split 'tset'. Did you mean 'test'?" in line
    line = refused(predict.main, *to, "--stage", "kdd", "--input", tmp_path / "images.npy")
    assert "holds no finished stage 'kdd'; finish its training first. Did you mean 'kd'?" in line
    again = ("--workdir", run, "--stage", "kd", "--input", tmp_path / "images.npy", "--output", tmp_path / "there.npz")
    assert "there.npz exists already and is not overwritten" in refused(predict.main, *again)
    assert listing(tmp_path) == before
