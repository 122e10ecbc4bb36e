"""Inception v3 against a PyTorch module with its public names: both variants, at the smallest size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError
from jkd.interop.torch import from_torch, to_torch
from jkd.nn.inception import WIDTHS

KEY = jax.random.key(0)
NARROW = nn.inception_v3(5, multiplier=0.04)
# Every kind of unit, in each of its roles.
SMALL = NARROW.clone(widths=(NARROW.widths[0][:1], NARROW.widths[1][:2], NARROW.widths[2]))
variants = pytest.mark.parametrize("fid", [False, True], ids=["torchvision", "fid"])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peer(torch):
    from _torch_inception import Inception

    return Inception


@variants
def test_logits_and_features_equal_pytorch(fid, random_variables, torch, peer):
    model = SMALL.clone(fid=fid)
    # 107 pixels leave 2 in the last block, so that its pooling meets edges and neighbors.
    variables = random_variables(model, (75, 75, 3))
    net = peer(model)
    net.load_state_dict({name: torch.tensor(leaf) for name, leaf in to_torch(model, variables).items()}, strict=True)
    images = np.random.default_rng(0).normal(size=(2, 107, 107, 3)).astype(np.float32)
    with torch.no_grad():
        logits, pool = map(np.asarray, net.eval()(torch.tensor(images).permute(0, 3, 1, 2)))
    out = jax.jit(model.apply)(variables, images)
    assert out.features["block3"].shape[1:3] == (2, 2)
    assert pool.std() > 0.01
    np.testing.assert_allclose(out.features["pool"], pool, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-3, atol=1e-4)


def test_the_whole_network_takes_the_whole_state_dict(torch, peer):
    model = nn.inception_v3(1008, fid=True)
    with torch.device("meta"):
        names = {name: tuple(leaf.shape) for name, leaf in peer(model).state_dict().items()}
    variables = from_torch(model, {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()})
    # torchvision's 27,161,264 with 1000 classes and an auxiliary head of 3,326,696.
    assert nn.count_parameters(variables["params"]) == 27_161_264 - 3_326_696 + 8 * 2049
    out = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32))
    assert {name: leaf.shape[1:] for name, leaf in out.features.items()} == {
        "stem": (35, 35, 192),
        "block1": (35, 35, 288),
        "block2": (17, 17, 768),
        "block3": (8, 8, 2048),
        "pool": (2048,),
    }
    assert out.logits.shape == (2, 1008)


def test_widths():
    assert nn.narrow(nn.inception_v3(), 0.5) == nn.inception_v3(multiplier=0.5)
    assert nn.inception_v3(multiplier=0.5).widths[1][1] == (96, 64, 64, 96, 64, 64, 64, 64, 96, 96)


@pytest.mark.parametrize("side", [64, 320])
def test_fid_images_equal_pytorch(side):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).uniform(size=(1, side, side + 8, 3)).astype(np.float32)
    theirs = torch.tensor(images).permute(0, 3, 1, 2)
    want = 2 * torch.nn.functional.interpolate(theirs, (299, 299), mode="bilinear", align_corners=False) - 1
    np.testing.assert_allclose(jax.jit(nn.fid_images)(images), want.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match=r"sides of at least 75 pixels, got \(1, 75, 74, 3\)"):
        SMALL.apply({}, jnp.zeros((1, 75, 74, 3)))
    with pytest.raises(UserError, match="widths must name the units of one to three blocks"):
        nn.InceptionV3(10, widths=())
    with pytest.raises(UserError, match=r"widths must name 4 convolutions for unit 0 of block 2: \(1, 2\)"):
        nn.InceptionV3(10, widths=(WIDTHS[0], ((1, 2),)))
    with pytest.raises(UserError, match=r"stem_widths must name five convolutions, got \(3,\)"):
        nn.InceptionV3(10, stem_widths=(3,))
    with pytest.raises(UserError, match="multiplier must be positive and finite, got 0"):
        nn.inception_v3(multiplier=0)
    with pytest.raises(UserError, match=r"images must be \[batch, height, width, 3\], got \[1, 8, 8, 1\]"):
        nn.fid_images(np.zeros((1, 8, 8, 1), np.float32))
