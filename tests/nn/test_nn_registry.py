"""Models by name."""

import inspect

import jax.numpy as jnp
import pytest

import jkd.nn
from jkd import nn
from jkd.errors import UserError


def test_every_name_is_a_function_and_builds_the_same():
    assert len(nn.names()) >= 31
    for name in nn.names():
        assert nn.build(name, 7) == getattr(nn, name)(num_classes=7)
        assert getattr(nn, name)().num_classes in (10, 100, 1000)


def test_arguments_reach_the_model():
    assert nn.build("resnet8", 10, width=4).widths == (4, 4, 8, 16)
    assert nn.build("resnet8x4", 10, width=4).widths == (4, 8, 16, 32)
    assert nn.build("mlp", 10, hidden=[3, 4]).hidden == (3, 4)
    assert nn.build("cnn", 10, width=5).width == 5
    assert nn.build("resnet50", 10, dtype="bfloat16").dtype == jnp.bfloat16
    assert nn.build("cnn", 10, param_dtype=jnp.float16).param_dtype == jnp.float16
    assert nn.build("resnet50", 10).block == "bottleneck"


def test_faults_are_named():
    with pytest.raises(UserError, match=r"Unknown model 'resnet21'. Did you mean 'resnet2?.*Known: cnn, densenet121"):
        nn.build("resnet21", 10)
    with pytest.raises(UserError, match=r"Unknown argument of mlp 'width'.*Known: dtype, hidden, norm, param_dtype"):
        nn.build("mlp", 10, width=3)
    with pytest.raises(UserError, match="num_classes must be at least 2, got 1"):
        nn.build("resnet20", 1)
    for dtype in ("bfloat61", "int32", 3.5):
        with pytest.raises(UserError, match=r"dtype must be floating.*got"):
            nn.build("cnn", 10, dtype=dtype)


def test_public_names_exist_once():
    assert len(set(jkd.nn.__all__)) == len(jkd.nn.__all__)
    assert not [name for name in jkd.nn.__all__ if inspect.ismodule(getattr(jkd.nn, name))]
