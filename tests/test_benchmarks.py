"""The benchmarks run; what they measure is not judged here."""

import importlib.util
import pathlib

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def test_the_loop_and_a_bare_loop_take_the_same_steps():
    spec = importlib.util.spec_from_file_location("loop_overhead", FOLDER / "loop_overhead.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    mesh = bench.train.make_mesh(devices=bench.jax.devices()[:1])
    stage, source = bench.make_stage(batch=8, width=16, num_steps=bench.WARM + 10)
    assert bench.bare(stage, source, mesh) > 0
    for progress in (False, True):
        assert bench.looped(stage, source, mesh, progress=progress) > 0
    assert len(source.times) == stage.num_steps


def test_all_are_known_here():
    assert [path.name for path in FOLDER.glob("*.py")] == ["loop_overhead.py"], "a new benchmark needs a test"
