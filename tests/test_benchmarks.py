"""The benchmarks run; what they measure is not judged here."""

import importlib.util
import pathlib

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_and_a_bare_loop_take_the_same_steps():
    bench = load("loop_overhead")
    mesh = bench.train.make_mesh(devices=bench.jax.devices()[:1])
    stage, source = bench.make_stage(batch=8, width=16, num_steps=bench.WARM + 10)
    assert bench.bare(stage, source, mesh) > 0
    for progress in (False, True):
        assert bench.looped(stage, source, mesh, progress=progress) > 0
    assert len(source.times) == stage.num_steps


def test_precisions_are_compared_seed_by_seed(tmp_path):
    changes = {"loop.progress": False, "loop.tensorboard": False, "only": ("ce",)}
    table = load("precision").compare("configs/energy_kd.py:smoke", str(tmp_path), changes)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["teacher", "ce"]
    assert cells[-1] == ["2", "2"]


def test_all_are_known_here():
    known = {"loop_overhead.py", "precision.py"}
    assert {path.name for path in FOLDER.glob("*.py")} == known, "a new benchmark needs a test"
