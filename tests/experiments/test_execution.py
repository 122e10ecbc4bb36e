"""The shipped config with less memory, another precision, or averaged parameters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_experiments import run

from jkd import train as jkd_train

ARM = "energy_kd"


@pytest.fixture
def x64():
    """Float64 in all threads."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def run_arm(workdir, *changes):
    """The published parameters of an arm, and all logged metrics of its steps."""
    run(workdir, f"only={ARM}", *changes)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [record["train"] for record in records if record["stage"] == ARM and "train" in record]
    return jkd_train.load_outcome(workdir, ARM).published, logged


def test_the_shipped_step_is_the_same_in_parts_and_with_remat(smoke, x64, tmp_path):
    # Images are normalized in float32, which two programs may round differently: not by one division.
    exact = ("precision=float64", "data.mean=0", "data.std=1", f"teacher.workdir={smoke}")
    plain = run_arm(tmp_path / "plain", *exact)
    found = run_arm(tmp_path / "changed", *exact, "microbatches=2", "remat=True")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert jnp.asarray(one).dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_bfloat16_keeps_parameters_and_metrics_float32_and_an_average_is_published(smoke, tmp_path):
    params, logged = run_arm(tmp_path / "run", "precision=bfloat16", "average.kind=mean")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    wanted = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train"]["loss"] for record in wanted if record["stage"] == ARM and "train" in record]
    found = [record["loss"] for record in logged]
    np.testing.assert_allclose(found, losses, rtol=0.02)
    assert not np.allclose(found, losses, rtol=1e-6), "computed in another precision"
    # Two steps: their mean is half a step away from the last.
    last = jkd_train.load_outcome(smoke, ARM).published
    distances = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, last))
    assert 1e-4 < max(distances) < 0.1
