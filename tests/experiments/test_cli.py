"""Mistakes end a command with one line that names the fix, before anything is compiled or written."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers_experiments import QUIET, SMOKE, SMOKE_ARMS, listing

from experiments import cli, evaluate, train

ROOT = pathlib.Path(__file__).parent.parent.parent

# What follows --config FILE --workdir DIR, and what the line must say.
MISTAKES = [
    ("arms.kd.temprature=3", "Unknown config field 'arms.kd.temprature'. Did you mean 'arms.kd.temperature'?"),
    ("batchsize=8", "Unknown config field 'batchsize'. Did you mean 'batch_size'?"),
    ("seeds=two", "Config field 'seeds' takes int values like 2, got 'two'."),
    ("seeds=None", "Config field 'seeds' takes int values like 2, got 'None'."),
    ("batch_size=True", "Config field 'batch_size' takes int values like 16, got 'True'."),
    ("mesh.fsdp=0", "The mesh slice=1 x data=-1 x fsdp=0 x tensor=1 needs"),
    ("mesh.slices=2", "mesh.slices=2 does not fit these devices: "),
    ("loop.keep=0", "keep must be >= 1 and checkpoint_every >= 0"),
    ("seeds=2.5", "Config field 'seeds' takes int values like 2, got '2.5'."),
    ("data.weak.flip=maybe", "Config field 'data.weak.flip' takes bool values like False, got 'maybe'."),
    ("arms.kd.lr=fast", "Config field 'arms.kd.lr' takes float values like 0.01, got 'fast'."),
    ("student.hidden=8,x", "Config field 'student.hidden' takes tuple values like (8,), got '8,x'."),
    ("seeds=0", "seeds must be >= 1"),
    ("seed=-1", "seed in [0, 2^31), got seeds=2, seed=-1."),
    ("only=kd,enrgy_kd", "Unknown arm in config.only 'enrgy_kd'. Did you mean 'energy_kd'?"),
    ("arms.kd.temperatures=enrgy", "Unknown arms.kd.temperatures 'enrgy'. Did you mean 'energy'?"),
    ("arms.kd.mix=high_energ", "Unknown arms.kd.mix 'high_energ'. Did you mean 'high_energy'?"),
    ("arms.kd.mixer=cutmixup", "Unknown arms.kd.mixer 'cutmixup'. Did you mean 'cutmix'?"),
    ("arms.kd.temperature=0", "arms.kd.temperature must be finite and > 0, got 0.0."),
    ("arms.kd.temperature=1e999", "arms.kd.temperature must be finite and > 0, got inf."),
    ("arms.energy_kd.t_low=-1", "arms.energy_kd.t_low must be finite and > 0, got -1.0."),
    ("arms.energy_kd.low_rate=0.8", "low_rate and high_rate must add up to at most 1, got 0.8 and 0.3."),
    ("arms.energy_kd.low_rate=-0.1", "arms.energy_kd.low_rate must be finite and >= 0, got -0.1."),
    ("arms.kd.weights.kd=-1", "arms.kd.weights.kd must be finite and >= 0, got -1.0."),
    ("arms.dkd.beta=-1e999", "arms.dkd.beta must be finite and >= 0, got -inf."),
    ("arms.dkd.warmup_epochs=-3", "arms.dkd.warmup_epochs must be finite and >= 0, got -3.0."),
    ("arms.ce.lr=0", "arms.ce.lr must be finite and > 0, got 0.0."),
    ("arms.ce.epochs=-1", "arms.ce.epochs must be finite and > 0, got -1.0."),
    ("teacher.lr=-1", "teacher.lr must be finite and > 0, got -1.0."),
    ("student.weight_decay=-1", "student.weight_decay must be finite and >= 0, got -1.0."),
    ("teacher.source=cache", "Unknown teacher.source 'cache'. Did you mean 'cached'?"),
    ("teacher.source=cached", "arms.kd_cutmix mixes images, which cached logits do not cover"),
    ("teacher.workdir=/nowhere", "/nowhere holds no finished stage 'teacher'"),
    ("teacher.schedule=cosin", "Unknown teacher.schedule 'cosin'. Did you mean 'cosine'?"),
    ("student.schedule=steps", "arms.ce.milestones must be epochs > 0 where student.schedule is 'steps', got (0,)."),
    ("student.hidden=0", "hidden must be widths >= 1, got (0,)."),
    ("precision=float64", "precision=float64 needs 64-bit JAX: set the environment variable JAX_ENABLE_X64=1."),
    ("eval_epochs=-1", "error: eval_epochs must be finite and >= 0, got -1.0."),
    ("data.std=0", "data.std must be finite and > 0, got (0.0,)."),
    ("data.weak.shift=-1", "data.weak.shift must be >= 0, got -1."),
    ("data.weak.pad_crop=-1", "data.weak.pad_crop must be >= 0, got -1."),
    ("data.train_split=train[500:100]", "The split 'train[500:100]' has an empty slice"),
    ("method=cli", "There is no method 'cli': experiments/cli.py has no stages(config)."),
    ("only=((", "Config field 'only' takes tuple values like (), got '(('."),
    ("student.model=resnet21", "Unknown model 'resnet21'. Did you mean 'resnet"),
    ("precision=float31", "Unknown precision 'float31'. Did you mean 'float32'?"),
    ("microbatches=5", "microbatches must be >= 1 and divide batch_size=16, got 5."),
    ("microbatches=4", "batch_size / microbatches 4 is not divisible by the 8 devices"),
    ("average.kind=emma", "Unknown average.kind 'emma'. Did you mean 'ema'?"),
    ("average.decay=-0.1", "average.decay must be finite and >= 0, got -0.1."),
    ("ensemble=vmapp", "Unknown ensemble mode 'vmapp'. Did you mean 'vmap'?"),
    ("batch_size=12", "batch_size 12 is not divisible by the 8 devices that share a batch"),
    ("eval_batch_size=100", "eval_batch_size 100 is not divisible by the 8 devices"),
    ("batch_size=0", "batch_size 0 is not divisible by the 8 devices"),
    ("mesh.data=3", "The mesh slice=1 x data=3 x fsdp=1 x tensor=1 needs 3 devices, but there are 8."),
    ("log_every=0", "log_every must be >= 1 steps, got 0."),
    ("data.name=digits8x9", "Unknown data set 'digits8x9'. Did you mean 'digits8x8'?"),
    ("data.train_split=tran", "Unknown split 'tran'. Did you mean 'train'?"),
    ("data.train_examples=2000", "data.train_examples=2000 and data.validation_examples=48 must be >= 0 and together"),
    ("data.train_examples=12", "There are 12 training rows, less than a batch: batch_size is 16."),
    ("data.test_split=train[:9]", "data.train_split='train' and data.test_split='train[:9]' of 'digits8x8' share rows"),
    ("data.imbalance=0.02", "data.imbalance must be >= 1 (1: no long tail), got 0.02."),
    ("data.name=digits-8x8", "Data set 'digits-8x8' cannot be opened: "),
    ("data.mean=0.5,0.5,0.5", "data.mean must be one number or one a channel (1), got 3."),
    ("teacher.bank=0", "teacher.bank must be >= 1 views of each image, got 0."),
    ("arms.kd_he_da.high_rate=0", "arms.kd_he_da.high_rate must be > 0 where mix is 'high_energy', got 0.0."),
    ("teacher.schedule=steps", "teacher.milestones must be epochs > 0 where teacher.schedule is 'steps', got (0,)."),
    ("data.blank=true", "data.blank stands in for the data in plans only"),
]


@pytest.mark.parametrize(("override", "says"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistaken_field_is_one_line(override, says, refused, untouched):
    workdir = untouched() / "new" / "run"
    assert says in refused(train.main, "--config", SMOKE, "--workdir", workdir, f"--config.{override}")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("configs/enrgy_kd.py", "Unknown config 'configs/enrgy_kd.py'. Did you mean 'configs/energy_kd.py'?"),
        (f"{SMOKE}y", "Unknown variant of configs/energy_kd.py 'smokey'. Did you mean 'smoke'?"),
    ],
)
def test_unknown_configs(config, says, refused, untouched):
    assert says in refused(train.main, "--config", config, "--workdir", untouched() / "run")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--workdirs=x"], "Unknown argument '--workdirs=x'."),
        (["--config.seeds"], "Unknown argument '--config.seeds'."),
        (["seeds=3"], "Fields are set as --config.NAME=VALUE."),
        (["--num-processes=2"], "--num-processes and --process-id need --coordinator HOST:PORT"),
        (["--profile=5"], "profile must be START:STOP or STAGE:START:STOP, such as 10:20 or kd:10:20, got '5'"),
        (["--profile=dk:0:1"], "Unknown stage with steps in profile 'dk'. Did you mean 'dkd'?"),
        (["--num-processes=two"], "Argument --num-processes: invalid int value: 'two'."),
    ],
)
def test_unknown_arguments(argv, says, refused, untouched):
    assert says in refused(train.main, "--config", SMOKE, "--workdir", untouched() / "run", *argv)


def test_missing_arguments(refused):
    assert "The following arguments are required: --config, --workdir." in refused(train.main)


def test_workdirs_that_cannot_be_used(refused, untouched, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    untouched()
    cases = {
        tmp_path / "file" / "run": f"The workdir {tmp_path / 'file' / 'run'} cannot be written: ",
        tmp_path / "file": f"The workdir {tmp_path / 'file'} is a file; give a folder.",
        tmp_path / "full": f"The workdir {tmp_path / 'full'} is not empty and holds no config.json of a run",
    }
    for workdir, says in cases.items():
        assert says in refused(train.main, "--config", SMOKE, "--workdir", workdir)


def test_a_workdir_of_another_config(smoke, refused):
    workdir = smoke
    before = listing(workdir)
    same = f"--config.only={','.join(SMOKE_ARMS)}"
    line = refused(train.main, "--config", SMOKE, "--workdir", workdir, same, "--config.arms.kd.lr=0.02")
    assert f"The workdir {workdir} belongs to another config: arms.kd.lr was 0.01 and is 0.02. Give the config" in line
    assert listing(workdir) == before


def test_data_that_is_not_array_record(prepared, refused, untouched, tmp_path):
    at = ("--config.data.train_split=train", f"--config.data.data_dir={tmp_path}")
    line = refused(train.main, "--config", SMOKE, "--workdir", tmp_path / "run", *at, "--config.data.name=cifar10")
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in line
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (prepared / "tiny" / "1.0.0").iterdir():
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    untouched()
    line = refused(train.main, "--config", SMOKE, "--workdir", tmp_path / "run", *at, "--config.data.name=tiny")
    assert "is stored as tfrecord only, which needs TensorFlow to read. Convert it once" in line
    assert f"convert_format --dataset_version_dir={folder} --out_file_format=array_record" in line


def test_a_teacher_of_other_classes_or_seeds(smoke, prepared, refused, untouched):
    taken = ("--config", SMOKE, "--workdir", untouched() / "run", f"--config.teacher.workdir={smoke}")
    other = (f"--config.data.data_dir={prepared}", "--config.data.name=tiny")
    other += ("--config.data.train_split=train[:400]", "--config.data.test_split=train[400:]")
    line = refused(train.main, *taken, *other)
    assert (
        "(its head has [10] outputs, the config's [4]). Teacher and students need the same classes: set data.*" in line
    )
    line = refused(train.main, *taken, "--config.seeds=3")
    assert "has 2 seeds and the config seeds=3: set seeds=2" in line
    line = refused(train.main, *taken, "--config.teacher.stage=techer")
    assert "holds no finished stage 'techer'; finish its training first. Did you mean 'teacher'? Finished: " in line


def test_a_loss_that_is_not_finite(smoke, tmp_path, capsys):
    workdir = tmp_path / "run"
    changes = ("only=ce", "arms.ce.lr=1e30", f"teacher.workdir={smoke}")
    argv = ["--config", SMOKE, "--workdir", str(workdir), *QUIET, *(f"--config.{change}" for change in changes)]
    with pytest.raises(SystemExit) as stop:
        cli.command(lambda: train.main(argv))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "jkd:" in line]
    bundle = workdir / "debug" / "ce-step-1"
    assert len(errors) == 1
    assert errors[0].startswith("jkd: error: Stage 'ce', step 1: ")
    assert "loss" in errors[0].split(" is not finite. ")[0]
    assert f"batch and metrics of the step are in {bundle}. Try a lower learning rate." in errors[0]
    assert json.loads((bundle / "info.json").read_text())["stage"] == "ce"
    assert (bundle / "batch-0.npz").exists()
    assert not (workdir / "results.json").exists()


def test_a_real_process_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.train", "--config", SMOKE, "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--config.batchsize=8"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    expected = "jkd: error: Unknown config field 'batchsize'. Did you mean 'batch_size'? See the config file for all.\n"
    assert done.stderr == expected
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())


COMMANDS = [p.stem for p in sorted((ROOT / "experiments").glob("*.py")) if "cli.command(main)" in p.read_text()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(f"experiments.{command}", fromlist=["main"]).main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m experiments.{command} " in out
    alone = ("plan", "reproduce", "export", "sweep", "projection", "sample", "search", "fingerprints")  # one process
    assert ("--coordinator HOST:PORT" in out) == (command not in alone)
    assert "--config.NAME=VALUE" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = (", "is no config: '(' was never closed (line 1)."),
        ("x = 1", "it has no get_config(variant) or no VARIANTS"),
    ],
)
def test_files_that_are_no_config(text, says, refused, untouched, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(text)
    assert says in refused(train.main, "--config", str(file), "--workdir", untouched() / "run")
    page = ROOT / "README.md"
    assert "it is not a Python file" in refused(train.main, "--config", page, "--workdir", untouched() / "run")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_config_of_a_run(text, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    says = f"{tmp_path / 'run' / 'config.json'} is damaged: it holds no JSON object."
    assert says in refused(train.main, "--config", SMOKE, "--workdir", tmp_path / "run")
    assert says in refused(evaluate.main, "--workdir", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_remote_folders_without_their_package(refused, tmp_path):
    assert "is on no file system that is known" in refused(
        train.main, "--config", SMOKE, "--workdir", "nosuch://bucket/run"
    )
    changes = ("--config.data.data_dir=gs://bucket/data",)
    line = refused(train.main, "--config", SMOKE, "--workdir", tmp_path / "run", *changes)
    assert "'digits8x8' is kept in a local folder, not in gs://bucket/data: leave data_dir out" in line


def test_the_fixed_commands_are_there():
    assert {"train", "evaluate", "predict", "export", "plan", "sweep", "reproduce"} <= set(COMMANDS)
