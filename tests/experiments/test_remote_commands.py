"""The commands on an object store, against a server on the loopback."""

import io
import json
import pathlib

import numpy as np
from etils import epath
from helpers_experiments import SMOKE

from experiments import evaluate, predict, train

ALONE = ("--config.only=teacher", "--config.loop.progress=false", "--config.loop.tensorboard=false")


def test_train_evaluate_and_predict(bucket, capsys):
    workdir = f"{bucket}/run"
    train.main(["--config", SMOKE, "--workdir", workdir, *ALONE])
    there = {path.name for path in epath.Path(workdir).iterdir()}
    assert there == {"config.json", "metrics.jsonl", "plot.png", "results.json", "stages"}
    assert json.loads((epath.Path(workdir) / "results.json").read_text())["method"] == "energy_kd"
    evaluate.main(["--workdir", workdir, "--json", f"{bucket}/new/again.json"])
    found = json.loads((epath.Path(bucket) / "new" / "again.json").read_text())["teacher"]
    assert set(np.ravel([row["difference"] for row in found.values()])) == {0.0}
    output = ["--input", "data:test[:96]", "--output", f"{bucket}/new/predictions.npz"]
    predict.main(["--workdir", workdir, "--stage", "teacher", *output])
    stored = np.load(io.BytesIO((epath.Path(bucket) / "new" / "predictions.npz").read_bytes()))
    assert stored["predicted"].shape == (96,)


def test_data_is_read_from_there(bucket, prepared, monkeypatch, tmp_path):
    from jkd import data

    monkeypatch.setenv("JKD_DATA_DIR", str(tmp_path))
    for file in (prepared / "tiny" / "1.0.0").iterdir():
        (epath.Path(bucket) / "data" / "tiny" / "1.0.0" / file.name).write_bytes(file.read_bytes())
    for in_memory in (True, False):
        found = data.load("tiny", "train", data_dir=f"{bucket}/data", in_memory=in_memory)
        local = data.load("tiny", "train", data_dir=str(prepared), in_memory=in_memory)
        np.testing.assert_array_equal(found.labels, local.labels)
        here, there = (data.source(one, 32, seed=0).batch(3) for one in (found, local))
        np.testing.assert_array_equal(here["image"], there["image"])
    assert pathlib.Path(tmp_path, "labels").exists()
