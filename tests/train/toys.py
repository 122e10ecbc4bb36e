"""Small stages that the tests of the loop share, and a command that runs them (for kill tests)."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jkd import data, train


def digits(count: int = 256, classes: int = 4) -> data.Dataset:
    """Blobs: class k has a bright quarter k; noise elsewhere."""
    random = np.random.RandomState(0)
    labels = (np.arange(count) % classes).astype(np.int32)
    images = random.randint(0, 120, (count, 4, 4, 1))
    images[np.arange(count), labels, :, 0] += 100
    return data.from_arrays(images.astype(np.uint8), labels, num_classes=classes, name="blobs")


DIGITS = digits()
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def init_params(key: jax.Array, width: int = 32) -> dict:
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(first, (16, width)) / 4, "bias": jnp.zeros(width)},
        "head": {"kernel": jax.random.normal(second, (width, 4)) / 6, "bias": jnp.zeros(4)},
    }


def logits(params: dict, images: jax.Array) -> jax.Array:
    x = images.reshape(images.shape[0], -1) / 255.0
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def init(key, previous, consts):
    return train.create_state({"params": init_params(key)}, OPTIMIZER)


def step(key, state, consts, batch, t):
    def loss_fn(params, batch, key):
        noise = 5.0 * jax.random.normal(key, batch["image"].shape)
        out = logits(params, batch["image"] + noise)
        return optax.losses.softmax_cross_entropy_with_integer_labels(out, batch["label"]).mean()

    return train.make_train_step(loss_fn, OPTIMIZER)(state, batch, key)


def student_step(key, state, consts, batch, t):
    def loss_fn(params, batch, key):
        target = jax.nn.softmax(logits(consts["teacher"]["params"], batch["image"]))
        return optax.losses.softmax_cross_entropy(logits(params, batch["image"]), target).mean()

    return train.make_train_step(loss_fn, OPTIMIZER)(state, batch, key)


def collect_correct(published, consts, batch, mask):
    correct = (logits(published["params"], batch["image"]).argmax(-1) == batch["label"]) & mask
    return {"correct": correct.sum(), "total": mask.sum()}


def finish_correct(sums):
    return {"accuracy": float(sums["correct"] / sums["total"])}


def variables(state):
    return state.variables


def accuracy(every: int = 0, batch_size: int = 48) -> train.Evaluator:
    source = data.MemorySource(DIGITS, batch_size)
    return train.Evaluator(source, collect_correct, finish_correct, every=every)


def classifier(name: str = "teacher", num_steps: int = 40, **changes) -> train.Stage:
    fields = {
        "data": lambda consts: data.MemorySource(DIGITS, 16, seed=3),
        "init": init,
        "step": step,
        "publish": variables,
        "evaluators": {"train": accuracy(every=16)},
    }
    return train.Stage(name, num_steps, **(fields | changes))


def take_teacher(key, previous, sweep):
    return {"teacher": previous["teacher"].published}


def student(name: str, num_steps: int = 30, **changes) -> train.Stage:
    return classifier(name, num_steps, step=student_step, needs=("teacher",), prepare=take_teacher, **changes)


def two_stages() -> list[train.Stage]:
    return [classifier(snapshots=(8,)), student("student")]


def count_labels(key, previous, sweep):
    return {"share": np.bincount(sweep(take_label, {}, data.MemorySource(DIGITS, 16))) / len(DIGITS)}


def take_label(args, batch, key):
    return batch["label"]


def alone(num_steps: int, **changes) -> train.Stage:
    """The teacher, prepared by a sweep and evaluated at its end only."""
    fields = {"evaluators": {"train": accuracy()}, "prepare": count_labels}
    return classifier(num_steps=num_steps, **(fields | changes))


QUIET = train.LoopOptions(checkpoint_every=0, progress=False, tensorboard=False)


def go(stages, workdir, mesh=None, options=QUIET, **changes):
    """Runs stages, on one device if no mesh is given."""
    mesh = mesh or train.make_mesh(devices=jax.devices()[:1])
    changes = {"log_every": 10} | changes
    return train.run(stages, workdir=workdir, mesh=mesh, options=options, **changes)


def counter(**fields) -> train.Stage:
    """A stage without batches: its state is a number that grows by t at every step."""

    def step(key, state, consts, batch, t):
        assert batch is None
        state = state | {"x": state["x"] + t}
        return state, {"x": state["x"]}

    start = {"name": "count", "num_steps": 7, "init": lambda key, previous, consts: {"x": jnp.float32(0)}}
    return train.Stage(**(start | {"step": step} | fields))


def final(workdir: str, name: str) -> dict[str, np.ndarray]:
    """All arrays of a stage's outcome by path."""
    outcome = train.load_outcome(workdir, name)
    leaves = jax.tree.leaves_with_path((outcome.published, outcome.snapshots, outcome.consts))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def lines(workdir: pathlib.Path) -> list[dict]:
    """The records of `metrics.jsonl`."""
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def logged(workdir: pathlib.Path, name: str) -> list[float]:
    """The logged values of one metric of the steps, in order."""
    return [record["train"][name] for record in lines(workdir) if "train" in record]


@contextlib.contextmanager
def compiled():
    """Collects the names of all functions that are compiled inside."""
    names: list[str] = []

    def listen(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def x64():
    """Float64 in all threads (`jax.enable_x64` holds in one only, and checkpoints are read in others)."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def free_port() -> str:
    """A port of the loopback that nobody listens to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def kill() -> None:
    """The end without any warning."""
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    """SIGTERM, and time for other processes to hear of it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def arm(moment: str) -> None:
    """Makes this process kill itself (or ask itself to stop) at a moment of the run, `kind:where`."""
    from jkd.train import checkpoint, loop, passes

    kind, where = moment.split(":")
    if kind in ("step", "term"):
        boundary = loop._StageRun._boundary

        def at_step(self):
            if f"{self.stage.name}-{self.t}" == where:
                kill() if kind == "step" else ask_to_stop()
            boundary(self)

        loop._StageRun._boundary = at_step
    elif kind == "save":  # the write is under way in the background
        save = checkpoint.Checkpoints.save

        def in_save(self, step, *rest):
            save(self, step, *rest)
            if f"{self._directory.name[3:]}-{step}" == where:
                kill()

        checkpoint.Checkpoints.save = in_save
    elif kind in ("kill-pass", "term-pass"):  # at some batch of the sweeps and evaluations
        cross, calls = passes.cross, []

        def in_pass(*args):
            calls.append(1)
            if len(calls) == int(where):
                kill() if kind == "kill-pass" else ask_to_stop()
            return cross(*args)

        passes.cross = in_pass
    else:  # before or after a stage's consts, snapshot or outcome is stored
        store = loop.save_plain

        def in_store(directory, *args, **named):
            hit = f"{directory.parent.name[3:]}-{directory.name}".startswith(where)
            if hit and kind == "before":
                kill()
            store(directory, *args, **named)
            if hit and kind == "after":
                kill()

        loop.save_plain = in_store


def join(args: argparse.Namespace) -> None:
    """Sets up this process: its virtual devices, and the other processes where there are any."""
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_enable_x64", args.x64)
    if args.devices > 1:  # more devices than cores: see the tests' conftest
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.process)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--devices", type=int, default=1, help="in each process")
    parser.add_argument("--moment")
    parser.add_argument("--steps", type=int, help="of the teacher alone; default: teacher and student")
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--x64", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    join(args)
    if args.moment:
        arm(args.moment)
    stages = two_stages() if args.steps is None else [alone(args.steps)]
    options = dataclasses.replace(OPTIONS, checkpoint_every=args.checkpoint_every)
    results = train.run(stages, workdir=args.workdir, log_every=7, options=options)
    print(json.dumps(results))


OPTIONS = train.LoopOptions(checkpoint_every=10, progress=False)

if __name__ == "__main__":
    from experiments import cli

    cli.command(main)
