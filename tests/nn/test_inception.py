"""Inception v3 against a PyTorch module with its public names: both variants, at the smallest size."""

import functools

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


@functools.cache
def peer_classes():
    torch = pytest.importorskip("torch")
    F, Module = torch.nn.functional, torch.nn.Module

    class Basic(Module):
        def __init__(self, inputs, outputs, size, stride=1, padding=0):
            super().__init__()
            self.conv = torch.nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
            self.bn = torch.nn.BatchNorm2d(outputs, eps=1e-3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def pooled(x, pool):
        if pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=pool == "mean")

    class A(Module):
        def __init__(self, inputs, w, pool):
            super().__init__()
            self.pool = pool
            self.branch1x1 = Basic(inputs, w[0], 1)
            self.branch5x5_1, self.branch5x5_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], 5, 1, 2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[3], 1), Basic(w[3], w[4], 3, 1, 1)
            self.branch3x3dbl_3, self.branch_pool = Basic(w[4], w[5], 3, 1, 1), Basic(inputs, w[6], 1)
            self.outputs = w[0] + w[2] + w[5] + w[6]

        def forward(self, x):
            five = self.branch5x5_2(self.branch5x5_1(x))
            double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return torch.cat([self.branch1x1(x), five, double, self.branch_pool(pooled(x, self.pool))], 1)

    class B(Module):
        def __init__(self, inputs, w, _):
            super().__init__()
            self.branch3x3 = Basic(inputs, w[0], 3, 2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], 3, 1, 1)
            self.branch3x3dbl_3 = Basic(w[2], w[3], 3, 2)
            self.outputs = w[0] + w[3] + inputs

        def forward(self, x):
            double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)

    class C(Module):
        def __init__(self, inputs, w, pool):
            super().__init__()
            self.pool, row, column = pool, ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
            self.branch1x1 = Basic(inputs, w[0], 1)
            self.branch7x7_1, self.branch7x7_2 = Basic(inputs, w[1], 1), Basic(w[1], w[2], *row)
            self.branch7x7_3 = Basic(w[2], w[3], *column)
            self.branch7x7dbl_1, self.branch7x7dbl_2 = Basic(inputs, w[4], 1), Basic(w[4], w[5], *column)
            self.branch7x7dbl_3, self.branch7x7dbl_4 = Basic(w[5], w[6], *row), Basic(w[6], w[7], *column)
            self.branch7x7dbl_5, self.branch_pool = Basic(w[7], w[8], *row), Basic(inputs, w[9], 1)
            self.outputs = w[0] + w[3] + w[8] + w[9]

        def forward(self, x):
            seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
            double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
            double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
            return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(pooled(x, self.pool))], 1)

    class D(Module):
        def __init__(self, inputs, w, _):
            super().__init__()
            self.branch3x3_1, self.branch3x3_2 = Basic(inputs, w[0], 1), Basic(w[0], w[1], 3, 2)
            self.branch7x7x3_1, self.branch7x7x3_2 = Basic(inputs, w[2], 1), Basic(w[2], w[3], (1, 7), 1, (0, 3))
            self.branch7x7x3_3, self.branch7x7x3_4 = Basic(w[3], w[4], (7, 1), 1, (3, 0)), Basic(w[4], w[5], 3, 2)
            self.outputs = w[1] + w[5] + inputs

        def forward(self, x):
            seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
            return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)

    class E(Module):
        def __init__(self, inputs, w, pool):
            super().__init__()
            self.pool, row, column = pool, ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
            self.branch1x1, self.branch3x3_1 = Basic(inputs, w[0], 1), Basic(inputs, w[1], 1)
            self.branch3x3_2a, self.branch3x3_2b = Basic(w[1], w[2], *row), Basic(w[1], w[3], *column)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Basic(inputs, w[4], 1), Basic(w[4], w[5], 3, 1, 1)
            self.branch3x3dbl_3a, self.branch3x3dbl_3b = Basic(w[5], w[6], *row), Basic(w[5], w[7], *column)
            self.branch_pool = Basic(inputs, w[8], 1)
            self.outputs = w[0] + w[2] + w[3] + w[6] + w[7] + w[8]

        def forward(self, x):
            y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
            parts = [self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y)]
            parts += [self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(pooled(x, self.pool))]
            return torch.cat(parts, 1)

    class Inception(Module):
        def __init__(self, model):
            super().__init__()
            first, second, third, fourth, inputs = model.stem_widths
            self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Basic(3, first, 3, 2), Basic(first, second, 3)
            self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Basic(second, third, 3, 1, 1), Basic(third, fourth, 1)
            self.Conv2d_4a_3x3 = Basic(fourth, inputs, 3)
            self.order = []
            names = ("5b", "5c", "5d"), ("6a", "6b", "6c", "6d", "6e"), ("7a", "7b", "7c")
            for block, kinds, units in zip(names, ((A, A), (B, C), (D, E)), model.widths, strict=True):
                for u, (name, widths) in enumerate(zip(block, units, strict=False)):
                    pool = ("max" if name == "7c" else "inner_mean") if model.fid else "mean"
                    unit = kinds[u > 0](inputs, widths, pool)
                    self.add_module(f"Mixed_{name}", unit)
                    self.order.append(unit)
                    inputs = unit.outputs
            self.fc = torch.nn.Linear(inputs, model.num_classes)

        def forward(self, x):
            x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
            for unit in self.order:
                x = unit(x)
            x = x.mean((2, 3))
            return self.fc(x), x

    return torch, Inception


@variants
def test_logits_and_features_equal_pytorch(fid, random_variables):
    torch, peer = peer_classes()
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


def test_the_whole_network_takes_the_whole_state_dict():
    model = nn.inception_v3(1008, fid=True)
    torch, peer = peer_classes()
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
