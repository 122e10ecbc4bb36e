"""A dry run checks what a run checks, and computes and writes nothing."""

import jax
import pytest
from helpers_experiments import SMOKE, SMOKE_ARMS, listing

from experiments import cli, dry_run, energy_kd, train
from jkd import train as jkd_train
from jkd.train.lower import abstract_stages


@pytest.fixture
def compiled():
    """The names of all functions that are compiled."""
    names = []

    def listen(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def rows(out):
    """The table of stages: {stage: cells}."""
    table = out[out.index("bytes on each of") :]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells if row[0]}


def test_numbers_of_a_small_run(capsys, compiled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--config", SMOKE, "--dry-run", "--workdir", "new", "--config.only=kd,ce", "--config.mesh.fsdp=2"])
    assert not {"program", "init"} & set(compiled)
    assert not any(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert "bytes on each of 8 cpu devices (slice=1 x data=4 x fsdp=2 x tensor=1)" in out
    found = rows(out)
    assert list(found) == ["teacher", "kd", "ce"]
    # Two seeds of 64-8-10, with momentum, a step count (int32) and the loop's report (8 float32 a seed, 2 int32).
    params = 2 * 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert found["kd"][:4] == ["teacher", "2", "2", "2x16x8x8x1"]
    state = float(found["kd"][4].removesuffix(" KiB")) * 1024
    assert 2 * params < state < 2 * params + 200
    # Both sets, images and labels: 1,297 and 500 rows. A batch: images, labels and row numbers, over 8 devices.
    assert found["kd"][7] == f"{1797 * (64 + 4) / 1024:.1f} KiB"
    assert found["kd"][8] == f"{2 * 16 * (64 + 4 + 4) // 8} B"
    assert found["teacher"][0] == ""
    assert found["teacher"][6] == "0 B"


def test_split_leaves_and_looped_seeds():
    config = cli.load_config(SMOKE, {"teacher.hidden": (512,), "only": ("teacher",), "data.blank": True})
    mesh = jkd_train.make_mesh(data=2, fsdp=4)
    (vmapped,) = abstract_stages(energy_kd.stages(config), mesh)
    config.ensemble = "loop"
    (looped,) = abstract_stages(energy_kd.stages(config), mesh)
    sizes = [dry_run.sizes(stage, {}, (), mesh) for stage in (vmapped, looped)]
    kernel, rest = 64 * 512 // 4, 512 + 512 * 10 + 10  # the head's kernel is split only where both seeds are in it
    reports = sizes[1]["state"] - 2 * 2 * 4 * (kernel + rest)
    assert 0 < reports < 200
    assert sizes[0]["state"] < sizes[1]["state"]
    assert (sizes[0]["batch"], sizes[0]["constants"]) == (sizes[1]["batch"], sizes[1]["constants"])
    table = dry_run.leaves(vmapped)
    assert table.title.startswith("state of teacher: ")
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("params/hidden1/kernel", "2x64x512", "float32", "-, -, fsdp", "64.0 KiB") in cells
    assert dry_run.leaves(looped).title.startswith("state of teacher (of one seed): ")


def test_the_data_need_not_be_here(capsys):
    blank = ("--config.data.blank=True", "--config.data.name=my_set", "--config.data.num_examples=400")
    train.main(["--config", SMOKE, "--dry-run", "--config.only=teacher", *blank])
    found = rows(capsys.readouterr().out)
    assert list(found) == ["teacher"]
    assert found["teacher"][3] == "2x16x8x8x1"
    assert found["teacher"][7] == f"{(400 + 96) * (64 + 4) / 1024:.1f} KiB"


def test_sizes_as_text():
    assert [dry_run.human(x) for x in (0, 1023, 1536, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch_size=12", "batch_size 12 is not divisible by the 8 devices"),
        ("mesh.data=3", "needs 3 devices, but there are 8"),
        ("log_every=0", "log_every must be >= 1 steps"),
        ("loop.keep=0", "keep must be >= 1"),
        ("only=kdd", "Unknown arm in config.only 'kdd'."),
        ("teacher.workdir=/nowhere", "/nowhere holds no finished stage 'teacher'"),
        ("arms.kd.temprature=3", "Did you mean 'arms.kd.temperature'?"),
    ],
)
def test_it_refuses_what_a_run_refuses(override, says, refused, untouched):
    untouched()
    assert says in refused(train.main, "--config", SMOKE, "--dry-run", f"--config.{override}")


def test_the_folder_is_checked_and_left_alone(smoke, refused):
    before = listing(smoke)
    arms = f"--config.only={','.join(SMOKE_ARMS)}"
    line = refused(train.main, "--config", SMOKE, arms, "--dry-run", "--workdir", smoke, "--config.arms.kd.lr=1")
    assert "belongs to another config: arms.kd.lr was 0.01 and is 1.0." in line
    train.main(["--config", SMOKE, arms, "--dry-run", "--workdir", str(smoke)])
    assert listing(smoke) == before
    assert "required: --workdir." in refused(train.main, "--config", SMOKE)
