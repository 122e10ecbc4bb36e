"""The benchmarks run; what they measure is not judged here."""

import functools
import importlib.util
import pathlib

import pytest

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


def test_steps_of_distillation_agree_and_are_timed(capsys):
    bench = load("distill_step")
    task = bench.make_task("cnn", "cnn", batch=2, precision="float32")
    variants = bench.our_variants(task, seeds=0)
    bench.check(variants, bench.AGREE["float32"])
    bench.measure(variants, repeats=2, steps=1)
    assert all(len(v.times) == len(v.cpu) == 2 and len(v.losses) == bench.FIRST for v in variants)
    live, cached = (v.flops for v in variants if v.flops)
    assert live > cached > 0
    bench.report(variants, batch=2, peak=1e9)
    assert "jkd, direct, cached" in capsys.readouterr().out


def test_low_bit_steps_agree_with_plain_formulas_and_are_timed(capsys, monkeypatch):
    bench = load("quantize_step")
    monkeypatch.setattr(bench, "WATCHED", ("block1", "conv", "kernel"))
    task = bench.make_task("cnn", batch=2)
    kinds = {kind.name: kind for kind in bench.KINDS}
    bench.check(task, kinds["2 bit, LQ-Nets"])
    bench.check(task, kinds["4-bit activations"])
    variants = [bench.ours(task, kinds["w4a4, binary"])]
    bench.measure(variants, repeats=2, steps=1)
    bench.report(variants)
    assert "w4a4, binary" in capsys.readouterr().out


def test_steps_of_a_gan_are_timed_and_agree_with_the_peer(capsys):
    bench = load("gan_step")
    task = bench.make_task(8, batch=4, fmap_base=16, fmap_max=4, latent_dim=4, mapping_layers=1)
    mine, flops, about = bench.ours(task)
    assert 0 < flops["plain"] < flops["path length"] < flops["both"]
    assert "compiled in" in about
    groups = []
    if importlib.util.find_spec("torch"):
        bench.check(task, ("scaled", "grouped"))
        groups = [bench.peers(task, "grouped", last=True, compiled=False)]
    variants = [*mine, *(v for group in groups for v in group)]
    bench.measure(variants, repeats=2, steps=1)
    assert all(len(v.times) == 2 for v in variants)
    bench.report(mine, groups, flops, peak=1e9)
    assert "mean of 16" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hamming_search", "mean_average_precision"])
def test_hashing_agrees_with_the_peers_and_is_timed(name, capsys, monkeypatch):
    bench = load(name)
    limits = functools.partial(bench.measured_limits, queries=8, megabytes=1, product=64)
    monkeypatch.setattr(bench, "measured_limits", limits)
    sizes = {"hamming_search": ["--k", "10", "--items", "400", "600"], "mean_average_precision": ["--items", "300"]}
    bench.main(["--queries", "20", "--repeats", "2", *sizes[name]])
    told = capsys.readouterr().out
    assert told.count("\njkd") == 1 + (name == "hamming_search")
    assert "floors, ms: counting" in told
    assert "goal" in told


def test_all_are_known_here():
    known = {"_brevitas_peer.py", "_hashing.py", "_torch_gan.py", "_torch_peer.py"}
    known |= {"distill_step.py", "gan_step.py", "loop_overhead.py", "precision.py", "quantize_step.py"}
    known |= {"hamming_search.py", "mean_average_precision.py"}
    assert {path.name for path in FOLDER.glob("*.py")} == known, "a new benchmark needs a test"


def test_a_divided_database_is_planned_without_being_there(capsys):
    load("hamming_search").main(["--topology", "cpu:8", "--items", "100003", "--queries", "4", "--k", "5"])
    told = capsys.readouterr().out
    assert "100008 codes of 64 bits, top 5, divided among cpu:8" in told
    assert "all-gather" in told
