"""`experiments.plan` compiles the shipped configs' own steps."""

import importlib.util
import json

import jax
import pytest
from helpers_experiments import SMOKE
from jax.experimental.compilation_cache import compilation_cache

from experiments import plan, plan_cache

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jkd[tpu]'"
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Planning turns the compilation cache off for the rest of the process; plans of other tests are not seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = jax.config.jax_enable_compilation_cache
    yield tmp_path / "jkd" / "plans"
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


def planned(capsys, *argv, topology="cpu:8"):
    plan.main(["--config", SMOKE, "--topology", topology, "--json", *argv])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_gradients_of_an_arm_cross_once(capsys):
    reports, tables = planned(capsys, "--stage", "kd")
    (found,) = reports.values()
    assert list(reports) == ["kd"]
    assert (found["num_devices"], found["batch_size"], found["programs_per_step"]) == (8, 32, 1)
    # Two seeds of a 64-8-10 perceptron; beside its gradients only the loss and other numbers of a seed cross.
    gradients = 2 * 4 * (64 * 8 + 8 + 8 * 10 + 10)
    reduced = sum(one["bytes"] for one in found["collectives"] if one["kind"] == "all-reduce")
    assert gradients <= reduced <= gradients + 1024
    assert (found["num_chips"], found["roofline"], found["images_per_second"]) == (None, None, None)
    assert "8 devices: cpu" in tables
    assert "all-reduce" in tables


STUDENT, TEACHER, BATCH = 384, 512, 2048
HAND = (
    "--stage=kd",
    "--config.seeds=1",
    "--config.ensemble=loop",
    f"--config.batch_size={BATCH}",
    f"--config.student.hidden={STUDENT},",
    f"--config.teacher.hidden={TEACHER},",
)


def check_by_hand(found, devices):
    """The student (64-384-10) goes forward and back, without a gradient of the images; the teacher forward."""
    weights, last = 64 * STUDENT + STUDENT * 10, STUDENT * 10
    flops = 2 * BATCH * (2 * weights + last + 64 * TEACHER + TEACHER * 10)
    assert found["model_flops"] == flops / devices
    assert found["flops"] == pytest.approx(flops / devices, rel=0.04)
    gradients = 4 * (weights + STUDENT + 10)
    (reduced,) = [one for one in found["collectives"] if one["kind"] == "all-reduce"]
    assert reduced["dtype"] == "f32"
    assert gradients <= reduced["bytes"] <= gradients + 64
    assert reduced["wire_bytes"] == pytest.approx(2 * (devices - 1) / devices * gradients, rel=0.01)
    assert (found["num_devices"], found["batch_size"]) == (devices, BATCH)


def test_flops_and_gradient_bytes_by_hand(capsys):
    check_by_hand(planned(capsys, *HAND)[0]["kd"], 8)


@needs_libtpu
def test_flops_and_gradient_bytes_by_hand_on_tpu(capsys):
    found = planned(capsys, *HAND, topology="v5e:2x2")[0]["kd"]
    check_by_hand(found, 4)
    times = found["roofline"]
    assert times["compute"] == pytest.approx(1e3 * found["flops"] / 197e12)
    assert times["total"] == max(times["compute"], times["memory"], times["network"])
    rates = found["images_per_second"]
    assert rates["total"] == pytest.approx(1e3 * BATCH / times["total"])
    assert rates["per_device"] == pytest.approx(rates["total"] / 4)


def test_what_fsdp_gathers_and_saves(capsys):
    wide = ("--stage", "teacher", "--config.teacher.hidden=2048,", "--config.batch_size=8")
    whole = planned(capsys, *wide)[0]["teacher"]
    split = planned(capsys, *wide, "--config.mesh.fsdp=8")[0]["teacher"]
    # Of two seeds, both kernels and their momentum are split eight ways; the biases are too small.
    assert whole["arguments"] - split["arguments"] == 2 * 2 * 4 * (64 * 2048 + 2048 * 10) * 7 // 8
    assert "all-gather" in {one["kind"] for one in split["collectives"]}
    assert "all-gather" not in {one["kind"] for one in whole["collectives"]}


def test_cached_logits_are_planned_too(capsys):
    reports, _ = planned(capsys, "--stage", "kd", "--config.teacher.source=cached", "--config.only=kd")
    assert reports["kd"]["num_devices"] == 8


# --- plans that are kept ---

TINY = ("--config.only=teacher", "--config.batch_size=8")


def test_a_kept_plan_answers_without_compiling(capsys, monkeypatch, own_caches):
    first, tables = planned(capsys, *TINY)
    assert "planned before" not in tables
    (file,) = own_caches.iterdir()  # nothing half-written is left beside it
    monkeypatch.setattr(plan, "_compile", lambda *args: pytest.fail("compiled again"))
    monkeypatch.setattr("jkd.train.lower.lower_stages", lambda *args, **options: pytest.fail("lowered again"))
    again, tables = planned(capsys, *TINY)
    assert "planned before" in tables
    assert (first["teacher"].pop("cached"), again["teacher"].pop("cached")) == (False, True)
    assert again == first
    assert file.suffix == ".json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"num_devices": 8', '"num_devices": 9'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_plan_is_made_again(damage, own_caches):
    key = "0" * 64
    plan_cache.save(key, {"report": {"num_devices": 8}, "batch_size": 4})
    assert plan_cache.load(key) == {"report": {"num_devices": 8}, "batch_size": 4}
    (file,) = own_caches.iterdir()
    file.write_text(damage(file.read_text()))
    assert plan_cache.load(key) is None


def test_no_cache_compiles_again_and_keeps_nothing(capsys, own_caches):
    for _ in range(2):
        assert not planned(capsys, *TINY, "--no-cache")[0]["teacher"]["cached"]
    assert not own_caches.exists()


def test_what_decides_a_plan(monkeypatch):
    config = plan.cli.load_config(SMOKE)
    keys = {plan_cache.key_of(config, "cpu:8", "kd"), plan_cache.key_of(config, "cpu:4", "kd")}
    keys.add(plan_cache.key_of(config, "cpu:8", "ce"))
    config.mesh.slices = 2
    keys.add(plan_cache.key_of(config, "cpu:8", "kd"))
    for name, value in (("_version", lambda package: "0"), ("_source", lambda: "other")):
        monkeypatch.setattr(plan_cache, name, value)
        keys.add(plan_cache.key_of(config, "cpu:8", "kd"))
    monkeypatch.setenv("XLA_FLAGS", "--other")
    keys.add(plan_cache.key_of(config, "cpu:8", "kd"))
    assert len(keys) == 7


def test_plans_are_made_where_they_cannot_be_kept(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert planned(capsys, *TINY)[0]["teacher"]["num_devices"] == 8


# --- the largest batch ---


@pytest.fixture
def pod_of(monkeypatch):
    """Four devices called v5e:2x2, whose memory holds a batch of so many images: no compiler decides."""

    def make(most):
        def compile_one(stage, devices):
            if stage.batch_size > most:
                return {"too_large": f"{stage.batch_size} are too many."}
            return {"report": report.to_dict(), "batch_size": stage.batch_size, "programs": 1, "model_flops": 1.0}

        from jkd.train.plan import PlanReport

        report = PlanReport(4, 4, "TPU v5 lite", 0, 0, 0, 0, 0, 0, 2**34, 1e9, 1e6, (), {})
        monkeypatch.setattr("jkd.train.topology.topology_devices", lambda spec, slices: jax.devices()[:4])
        monkeypatch.setattr(plan, "_compile", compile_one)

    return make


ONE = ("--config.seeds=1", "--config.ensemble=loop", "--config.only=teacher", "--config.data.train_examples=150")
SEARCH = ("--largest-batch", *ONE)


def test_the_largest_batch_is_found_from_above(capsys, pod_of):
    pod_of(103)
    found, lines = planned(capsys, *SEARCH, topology="v5e:2x2")
    assert found["teacher"]["batch_size"] == 100  # of a multiple of 4
    assert found["teacher"]["largest_batch"] | {"refused": ""} == {"batch_size": 100, "next": 104, "refused": ""}
    assert "104 are too many" in found["teacher"]["largest_batch"]["refused"]
    tries = [line for line in lines.splitlines() if line.startswith("batch_size ")]
    assert tries[0] == "batch_size 148: too large"  # 150 rows are trained on
    assert {"batch_size 100: fits", "batch_size 104: too large"} <= set(tries)
    again, _ = planned(capsys, *SEARCH, topology="v5e:2x2")  # tries are kept, those that do not fit too
    assert again["teacher"]["cached"]


def test_all_rows_in_one_batch(capsys, pod_of):
    pod_of(10**6)
    found, _ = planned(capsys, *SEARCH, "--config.mesh.fsdp=2", topology="v5e:2x2")
    assert found["teacher"]["largest_batch"]["batch_size"] == 148
    assert "150 training rows" in found["teacher"]["largest_batch"]["refused"]


def test_no_batch_fits(refused, pod_of):
    pod_of(3)
    argv = ["--config", SMOKE, "--topology", "v5e:2x2", *SEARCH, "--json"]
    with pytest.raises(plan.UserError, match="Not even batch_size=4"):
        plan.main(argv)


@needs_libtpu
def test_the_largest_batch_on_tpu(capsys):
    # Some 48 MB of activations an image, and 9 GB of parameters, momentum and gradients.
    argv = [*SEARCH, "--config.data.train_examples=1200", "--config.teacher.hidden=12582912,"]
    found = planned(capsys, *argv, topology="v5e:2x2")[0]["teacher"]
    assert found["total"] <= found["hbm_limit"]
    assert found["largest_batch"]["next"] == found["batch_size"] + 4
    assert "does not fit" in found["largest_batch"]["refused"]


# --- mistakes ---


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "cpu:8", "--stage", "enrgy_kd"], "Did you mean 'energy_kd'?"),
        (["--topology", "v5f:2x2"], "v5e"),
        (["--topology", "cpu:8", "--config.mesh.data=3"], "needs 3 devices, but there are 8"),
        (["--topology", "cpu:8", "--largest-batch"], "'cpu:8' has no limit of memory"),
        (["--topology", "cpu:8", "--slices", "2"], "exactly 1 for cpu"),
        (["--topology", "cpu:8", "--slices", "0"], "at least 1"),
        (["--topology", "cpu:8", "--slices", "two"], "invalid int value: 'two'"),
        (["--topology", "v5e:2x2", "--slices", "3", "--config.mesh.slices=2"], "differ: give one of them"),
        (["--topology", "cpu:8", "--config.batch_size=12"], "not divisible by the 8 devices"),
        (["--topology", "cpu:8", "--stage", "teacher", "--config.mesh.fsdp=0"], "fsdp=0"),
    ],
)
def test_mistakes(argv, says, refused):
    assert says in refused(plan.main, "--config", SMOKE, *argv)
