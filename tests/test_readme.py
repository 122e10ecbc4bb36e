"""The code in README.md runs as it stands, and what it names exists."""

import pathlib
import re

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_train():
    code, smaller = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    first = jax.jit(names["loss_fn"])(
        names["nn"].init(names["student"], names["jax"].random.key(1), (28, 28, 1))["params"],
        names["source"].batch(0),
        names["jax"].random.key(0),
    )
    assert float(names["metrics"]["loss"]) < float(first)
    assert np.isfinite(float(names["metrics"]["grad_norm"]))
    exec(compile(smaller, "README.md", "exec"), names)
    assert float(names["metrics"]["loss"]) < float(first)
    kernel = np.asarray(jax.jit(names["materialize"])(names["state"].params)["hidden1"]["kernel"])
    assert len(np.unique(kernel[kernel != 0])) <= 4
    assert (kernel == 0).mean() > 0.8


def test_links_and_commands_exist():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for module in re.findall(r"python -m experiments\.(\w+)", README):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module
    for config in re.findall(r"configs/\w+\.py", README):
        assert (ROOT / config).exists(), config
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def run_page(name):
    """What the code of a page leaves behind."""
    page = (ROOT / "docs" / name).read_text()
    for module in re.findall(r"python -m experiments\.(\w+)", page):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module
    names: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), name, "exec"), names)
    return names


def test_the_page_on_generators_trains_one():
    names = run_page("generators.md")
    assert np.isfinite([float(value) for value in names["metrics"].values()]).all()


def test_the_page_on_retrieval_makes_codes_and_searches_them():
    names = run_page("retrieval.md")
    assert names["precision"].map > 0.2  # of 10 classes; a hundred steps
    assert names["codes"].shape == (1400, 16)
    batch = names["source"].batch(0)
    for loss in (names["both"], names["learn"]):
        slopes = jax.grad(loss)(names["state"].params, batch, jax.random.key(0))
        assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(slopes))
