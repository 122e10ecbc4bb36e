"""The generator of docs/pods.md: its counts by hand, and the page it writes."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.plan import StagePlan
from jkd import nn
from jkd.train.collectives import Collective
from jkd.train.plan import PlanReport

FILE = pathlib.Path(__file__).parents[2] / "docs" / "pods.py"


@pytest.fixture(scope="module")
def pods():
    spec = importlib.util.spec_from_file_location("pods", FILE)
    sys.modules["pods"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convolutions_by_hand(pods):
    # 7x7 on 224 with stride 2: 112 windows of 7, less 3 + 1 values before the image and 2 behind it.
    assert pods.products(224, 7, 2) == 112 * 7 - 3 - 1 - 2
    assert pods.products(7, 3, 1) == 7 * 3 - 2
    # The stem, 16 convolutions of 3x3, 3 shortcuts, the head. The well-known 1.8 G count products with padding too.
    found = pods.forward_flops((2, 2, 2, 2))
    assert len(found) == 1 + 16 + 3 + 1
    assert sum(found) / 2 == pytest.approx(1.82e9, rel=0.1)


def test_a_network_is_what_is_counted_by_hand(pods):
    model = nn.resnet18(1000)
    variables = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), (224, 224, 3)))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    lowered = jax.jit(lambda variables, x: model.apply(variables, x).logits).lower(variables, images)
    # What is not counted by hand, batch normalization above all, is below 2 %.
    assert 1 <= lowered.cost_analysis()["flops"] / sum(pods.forward_flops((2, 2, 2, 2))) <= 1.02


def test_the_page(pods, monkeypatch, tmp_path):
    def plan(row):
        sent = 2 * (row.chips - 1) * 46758048 // row.chips
        found = (Collective("all-reduce", "f32", 35, 46758048, sent, row.chips),)
        numbers = (0, 0, 2**30, 0, 0, 2**30, 2**34, 16.6e9 * 64, 2e10)
        return StagePlan(
            PlanReport(row.chips, row.chips, "TPU v5 lite", *numbers, found, {}), 64 * row.chips, 1, 1e12, True
        )

    monkeypatch.setattr(pods.Row, "plan", plan)
    monkeypatch.setattr(pods, "ROOT", tmp_path)
    monkeypatch.setattr(pods.importlib.metadata, "version", lambda name: "1")
    (tmp_path / "docs").mkdir()
    pods.main()
    page = (tmp_path / "docs" / "pods.md").read_text()
    assert "| v5e:16x16 | data=256 | 16,384 | 1,024 (6%) |" in page
    assert "| v5e:16x16 | data=64 fsdp=4 | 16,384 |" in page
    assert "| v5e:8x8 x 2 | slice=2 data=64 | 8,192 |" in page
    assert "all-reduce f32 88.8" in page  # 2 x 255/256 of 44.6 MiB
    assert "(+0.0%) |" in page
    assert "What is reduced is f32" in page
