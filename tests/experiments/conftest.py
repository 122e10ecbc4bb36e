"""One finished smoke run, small prepared data sets, and how a command refuses."""

import fcntl
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

from experiments import cli, train
from jkd.train import loop, make_mesh

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from helpers_experiments import QUIET, SMOKE, SMOKE_ARMS, listing


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The workdir of the shipped smoke run, every kind of arm, by the command's own main; the workers share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir = shared / "smoke"
    with (shared / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "results.json").exists():
            arms = f"--config.only={','.join(SMOKE_ARMS)}"
            train.main(["--config", SMOKE, "--workdir", str(workdir), arms, *QUIET])
    return workdir


@pytest.fixture(scope="module")
def one_device():
    """The train command on a mesh of one device, where programs compile faster and any batch can be divided."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda config: make_mesh(devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A TFDS folder with the set "tiny": 480 images 8x8x1 of 4 classes, as array_record."""
    import tensorflow_datasets as tfds

    from jkd.data.records import quiet

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        code_path = None
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=4)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": ((i, {"image": np.full((8, 8, 1), i % 256, np.uint8), "label": i % 4}) for i in range(480))
            }

        def _generate_examples(self):
            return {}

    root = tmp_path_factory.mktemp("tfds")
    with quiet():
        Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command that must refuse: exit code 2, one line on stderr (returned), no stage begun."""
    monkeypatch.setattr(loop, "_StageRun", lambda *args: pytest.fail("a stage was begun"))

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.command(lambda: main([str(word) for word in argv]))
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert err.startswith("jkd: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert out == ""
        return err

    return run


@pytest.fixture
def untouched(tmp_path):
    """Checks at the end that nothing was written below `tmp_path` since the test filled it by calling this."""
    before = {}

    def mark():
        before.update(listing(tmp_path))
        return tmp_path

    mark()
    yield mark
    assert listing(tmp_path) == before
