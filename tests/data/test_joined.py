"""Sets that are made, read from a package, or joined of several."""

import gzip
import importlib
import pathlib
import pickle
import struct

import numpy as np
import pytest

from jkd import data
from jkd.data import silhouettes
from jkd.errors import UserError

registry = importlib.import_module("jkd.data.registry")
needs_fashion = pytest.mark.skipif(
    not registry.FASHION_MNIST_DIR.exists(),
    reason=f"{registry.FASHION_MNIST_DIR} is absent: apt install dataset-fashion-mnist",
)


def write_idx(folder, sizes, value):
    folder.mkdir(parents=True)
    for (prefix, size), shade in zip(sizes.items(), (value, value + 1), strict=True):
        for kind, array in (
            ("images-idx3", np.full((size, 28, 28), shade, np.uint8)),
            ("labels-idx1", (np.arange(size) % 10).astype(np.uint8)),
        ):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_pickles(root, images, labels):
    for path, value in zip(silhouettes.FILES.values(), (images, labels), strict=True):
        file = root / silhouettes.PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(pickle.dumps(value, protocol=4)))
    (root / silhouettes.PACKAGE / "__init__.py").write_text("raise ImportError('data is read without the code')")


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A package of 10 x 6 different images, each once more at the end."""
    images = np.repeat(np.arange(1, 61, dtype=np.uint8), 28 * 28).reshape(60, 28, 28)
    labels = np.repeat(np.arange(10), 6)
    write_pickles(tmp_path / "site", np.concatenate([images, images]), np.concatenate([labels, labels]))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def no_animals(monkeypatch):
    monkeypatch.setattr(silhouettes.importlib.util, "find_spec", lambda name: None)


def rows(dataset):
    batch = dataset.read(np.arange(len(dataset)))
    return {(int(image[0, 0, 0]), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)}


@pytest.mark.usefixtures("animals")
def test_silhouettes_have_splits_without_a_common_image():
    train, test = (data.load("animal_mnist", split) for split in ("train", "test"))
    assert (train.shape, train.num_classes) == ((28, 28, 1), 10)
    # Of 6 images a class, each kept once: 48 to train.
    assert (len(train), len(test)) == (48, 12)
    assert rows(train) | rows(test) == {(i + 1, i // 6) for i in range(60)}
    assert not rows(train) & rows(test)
    assert (np.diff(train.labels) < 0).any()
    again = data.load("animal_mnist", "train")
    np.testing.assert_array_equal(again.arrays["image"], train.arrays["image"])
    assert len(data.load("animal_mnist", "train[:10]+test")) == 22
    assert not train.overlaps(test)
    assert train.overlaps(again)


def test_three_sets_are_one(animals, tmp_path):
    sizes = {"train": 40, "t10k": 20}
    write_idx(tmp_path / "parts" / "mnist", sizes, 100)
    write_idx(tmp_path / "parts" / "fashion_mnist", sizes, 200)
    train, test = (data.load("digits_fashion_animals", split, tmp_path / "parts") for split in ("train", "test"))
    assert (train.num_classes, len(train), len(test)) == (30, 40 + 40 + 48, 20 + 20 + 12)
    assert rows(train) == {
        *((100, k) for k in range(10)),
        *((200, 10 + k) for k in range(10)),
        *((image, 20 + label) for image, label in rows(data.load("animal_mnist", "train"))),
    }
    assert {image for image, _ in rows(test)} & {image for image, _ in rows(train)} == set()
    # No part comes first.
    assert {label // 10 for label in train.labels[:20].tolist()} == {0, 1, 2}
    two = data.load("digits_fashion", "all", tmp_path / "parts")
    assert (two.num_classes, len(two)) == (20, 120)
    assert len(data.load("digits_fashion_animals", "train[:10%]", tmp_path / "parts")) == 13


def test_digits_are_the_bundled_ones_without_a_folder_of_mnist(tmp_path):
    write_idx(tmp_path / "fashion_mnist", {"train": 20, "t10k": 10}, 200)
    joined, own = data.load("digits_fashion", "train", tmp_path), data.load("mnist5k", "train")
    digits = joined.subset(np.flatnonzero(joined.labels < 10))
    assert sorted(digits.labels.tolist()) == sorted(own.labels.tolist())
    assert {image.tobytes() for image in digits.read(np.arange(1000))["image"]} == {
        image.tobytes() for image in own.arrays["image"]
    }


@pytest.mark.usefixtures("no_animals")
def test_a_missing_part_names_its_package(tmp_path, monkeypatch):
    write_idx(tmp_path / "fashion_mnist", {"train": 20, "t10k": 10}, 200)
    for name in ("animal_mnist", "digits_fashion_animals"):
        with pytest.raises(UserError, match="not installed: pip install --no-deps animal-mnist==0.4") as error:
            data.load(name, "train", tmp_path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(registry, "FASHION_MNIST_DIR", pathlib.Path("/nowhere"))
    with pytest.raises(UserError, match="Fashion-MNIST is not here: apt install dataset-fashion-mnist, or") as error:
        data.load("digits_fashion", "train", tmp_path / "empty")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="have one size"):
        data.load("digits_fashion", image_size=28)
    with pytest.raises(UserError, match=r"Unknown data set 'digits_fashions'. Did you mean 'digits_fashion'\?"):
        data.load("digits_fashions")


class Harmful:
    def __reduce__(self):
        return eval, ("__import__('sys').exit('a pickle was trusted')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(pickle.dumps(Harmful())), r"it asks for builtins\.eval"),
        (gzip.compress(pickle.dumps([1, 2])), "no pickle of a numpy array of numbers"),
        (gzip.compress(pickle.dumps(np.array([None, "x"], object))), "no pickle of a numpy array of numbers"),
        (gzip.compress(pickle.dumps(np.arange(99))[:-20]), "is damaged"),
        (gzip.compress(b""), "is damaged"),
        (gzip.compress(pickle.dumps(np.arange(99)))[:-9], "is damaged|cannot be read"),
        (pickle.dumps(np.arange(99)), "cannot be read"),
    ],
    # Names: zipped bytes hold the time.
    ids=("code", "list", "objects", "cut", "empty", "short", "plain"),
)
def test_pickles_are_not_trusted(tmp_path, content, message):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        silhouettes.read_array_pickle(path)
    assert str(path) in str(error.value)


def test_arrays_of_old_and_new_numpy_are_read(tmp_path):
    array = np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4))
    text = pickle.dumps(array, protocol=3)
    other = {b"numpy._core.multiarray": b"numpy.core.multiarray", b"numpy.core.multiarray": b"numpy._core.multiarray"}
    (name,) = (name for name in other if name in text)
    for written in (text, text.replace(name, other[name]), pickle.dumps(array, protocol=4)):
        (tmp_path / "file.gz").write_bytes(gzip.compress(written))
        np.testing.assert_array_equal(silhouettes.read_array_pickle(tmp_path / "file.gz"), array)


def test_a_package_that_changed_is_refused(animals):
    write_pickles(animals, np.zeros((4, 8, 8), np.uint8), np.arange(4))
    with pytest.raises(UserError, match=r"holds uint8\[4, 8, 8\] and \[4\] labels instead of uint8\[N, 28, 28\]"):
        data.load("animal_mnist")
    (animals / silhouettes.PACKAGE / silhouettes.FILES["data"]).unlink()
    with pytest.raises(UserError, match=r"animal_data_version_3.gz cannot be read"):
        data.load("animal_mnist")


@pytest.mark.skipif(silhouettes.silhouettes_folder() is None, reason=f"animal-mnist is absent: {silhouettes.INSTALL}")
def test_the_real_silhouettes():
    train, test = (data.load("animal_mnist", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7773, 1943)
    assert np.bincount(train.labels).tolist() == [749, 649, 794, 797, 798, 800, 800, 798, 788, 800]
    assert not {i.tobytes() for i in train.arrays["image"]} & {i.tobytes() for i in test.arrays["image"]}


@needs_fashion
def test_the_real_twenty_classes():
    test = data.load("digits_fashion", "test")
    assert np.bincount(test.labels).tolist() == [400] * 10 + [1000] * 10


def test_hierarchy_by_name():
    train, test = (data.load("hierarchy", split) for split in ("train", "test"))
    made = data.make_hierarchy()
    for loaded, own, size in ((train, made.train, 100), (test, made.test, 50)):
        assert (loaded.shape, loaded.num_classes) == ((8, 8, 1), 40)
        assert np.bincount(loaded.labels).tolist() == [size] * 40
        np.testing.assert_array_equal(loaded.arrays["image"], own.arrays["image"])
    assert made.superclass.tolist() == [k // 4 for k in range(40)]
    assert len(data.load("hierarchy", "train[:10%]+test")) == 2400


def test_hierarchy_is_deterministic_and_has_the_shape_it_says():
    made, again, other = (
        data.make_hierarchy(6, 3, noise=0.02, train_per_class=20, test_per_class=10, seed=s) for s in (1, 1, 2)
    )
    images, labels = (made.train.arrays[k] for k in ("image", "label"))
    np.testing.assert_array_equal(images, again.train.arrays["image"])
    assert (images != other.train.arrays["image"]).any()
    # The first bytes are what they were: a stored teacher depends on them.
    assert images[0].ravel()[:6].tolist() == [134, 78, 116, 135, 167, 148]
    assert np.mean((images == 0) | (images == 255)) < 0.001
    means = np.stack([images[labels == k].reshape(20, 64).mean(0) for k in range(18)])
    near = np.linalg.norm(means[:, None] - means[None], axis=-1)
    same = made.superclass[:, None] == made.superclass[None]
    siblings, strangers = near[same & ~np.eye(18, dtype=bool)], near[~same]
    assert siblings.max() < strangers.min()
    # With little noise the nearest class mean of the training set names the class of a test image.
    test = made.test.arrays["image"].reshape(-1, 64).astype(float)
    nearest = np.linalg.norm(test[:, None] - means[None], axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest, made.test.labels)


def test_hierarchies_that_cannot_be():
    for wrong in ({"num_superclasses": 0}, {"noise": -1.0}, {"offset": np.nan}, {"test_per_class": 0}):
        with pytest.raises(UserError, match="A hierarchy needs sizes of at least 1"):
            data.make_hierarchy(**wrong)
