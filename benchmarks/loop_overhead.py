"""What the loop costs: `train.run` against the same jitted step called in a bare Python loop.

The loop's time includes its input (batches are made and sent), logs every 50 steps and TensorBoard events; the bare
loop calls the very same compiled program on inputs made before, and waits once, at its end. All variants run in turn,
forth and back, in one process; what is extra is the mean of the paired differences, and
the goal is met or missed only where their 95 % interval lies on one side of it.

    python -m benchmarks.loop_overhead [--repeats 9]
"""

import argparse
import contextlib
import logging
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jkd import data, metrics, train
from jkd.train.member import Member
from jkd.train.passes import Residents
from jkd.train.program import step_program

LOG_EVERY = 50
WARM = LOG_EVERY  # steps before the clock starts; the measured span holds whole log windows
GOAL_SHARE, GOAL_MS = 0.03, 0.15  # of steps from 20 ms on, and of shorter ones
SIZES = {  # batch, width, steps
    "tiny": (8, 16, 2000),
    "small": (64, 128, 1000),
    "medium": (128, 448, 400),
    "large": (256, 704, 150),
    "huge": (640, 704, 100),
}

RULES = train.mesh.DEFAULT_RULES
OPTIMIZER = optax.sgd(0.01, momentum=0.9)


class TimedSource(data.MemorySource):
    """Notes when the loop asks for a batch: the step before the last one is complete then."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "times", [])

    def iterate(self, start, stop, rows=None):
        """Yields what crosses, and notes the time before each."""
        self.times.clear()
        for t in range(start, stop):
            self.times.append(time.perf_counter())
            yield self.local(t, rows)


def make_stage(batch: int, width: int, num_steps: int) -> tuple[train.Stage, TimedSource]:
    """A perceptron with two square layers, on noise."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (4096, 8, 8, 1)).astype(np.uint8)
    noise = data.from_arrays(images, random.randint(0, 10, 4096), num_classes=10, name="noise")
    source = TimedSource(noise, batch, seed=0)
    shapes = {"in": (64, width), "a": (width, width), "b": (width, width), "out": (width, 10)}

    def init(key, previous, consts):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        params = {name: jax.random.normal(keys[name], shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
        return train.create_state({"params": params}, OPTIMIZER)

    def loss_fn(params, batch, key):
        x = batch["image"].reshape(batch["image"].shape[0], -1) / 255.0
        for name in ("in", "a", "b"):
            x = jax.nn.relu(x @ params[name])
        logits = x @ params["out"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def step(key, state, consts, batch, t):
        return train.make_train_step(loss_fn, OPTIMIZER)(state, batch, key)

    stage = train.Stage("bench", num_steps, init, step, data=lambda consts: source, publish=lambda s: s.variables)
    return stage, source


def bare(stage: train.Stage, source: TimedSource, mesh) -> float:
    """Seconds a step of the loop's own program in a bare loop."""
    ctx = types.SimpleNamespace(mesh=mesh, rules=RULES, residents=Residents(mesh))
    member = Member(ctx, stage, jax.random.key(0), {}, {})
    member.create(member.initializer(stage))
    program = step_program(stage.step, source.assemble, 0, LOG_EVERY, mesh, tuple(RULES))
    inputs = [(jax.device_put(source.local(t)), jnp.int32(t)) for t in range(stage.num_steps)]
    carry, rest = member.carry, ({}, member.resident, member.step_key)
    jitted = program.jitted(carry, inputs[0][0], *rest, inputs[0][1])
    for i, (rows, t) in enumerate(inputs):
        if i == WARM:
            jax.block_until_ready(carry)
            began = time.perf_counter()
        carry, _ = jitted(carry, rows, *rest, t)
    jax.block_until_ready(carry)
    return (time.perf_counter() - began) / (stage.num_steps - WARM)


def looped(stage: train.Stage, source: TimedSource, mesh, *, progress: bool) -> float:
    """Seconds a step of `train.run`, between two of its steps."""
    options = train.LoopOptions(checkpoint_every=0, progress=progress)
    with tempfile.TemporaryDirectory() as folder, terminal():
        train.run([stage], workdir=folder, mesh=mesh, log_every=LOG_EVERY, options=options)
    return (source.times[-1] - source.times[WARM - 1]) / (len(source.times) - WARM)


@contextlib.contextmanager
def terminal():
    """Makes standard error a terminal that is read and dropped, so that the bar is drawn in any case."""
    reader, writer = pty.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while os.read(reader, 65536):
                pass

    thread, old = threading.Thread(target=drain), sys.stderr
    thread.start()
    try:
        with os.fdopen(writer, "w") as sys.stderr:
            yield
    finally:
        sys.stderr = old
        thread.join()
        os.close(reader)


def measure(size: str, repeats: int) -> bool:
    """Prints one row for each variant; returns whether the goal is met."""
    batch, width, steps = SIZES[size]
    stage, source = make_stage(batch, width, steps + WARM)
    mesh = train.make_mesh(devices=jax.devices()[:1])
    variants = {
        "bare loop": lambda: bare(stage, source, mesh),
        "train.run": lambda: looped(stage, source, mesh, progress=False),
        "train.run with bar": lambda: looped(stage, source, mesh, progress=True),
    }
    for run in variants.values():
        run()  # compiles
    times = {name: [] for name in variants}
    for repeat in range(repeats):
        # Forth and back: a machine that slows down or speeds up then does so for every variant alike.
        for name in list(variants)[:: 1 if repeat % 2 else -1]:
            times[name].append(1000 * variants[name]())
    base, met = statistics.median(times["bare loop"]), True
    for name, values in times.items():
        pair = metrics.paired_difference(values, times["bare loop"])
        goal = GOAL_SHARE * base if base >= 20 else GOAL_MS
        said = "met" if pair.high < goal else "MISSED" if pair.low > goal else "not resolved"
        met &= said != "MISSED"
        row = f"{size:7} {name:19} {statistics.median(values):9.3f}"
        if name != "bare loop":
            interval = f"[{pair.low:.3f}, {pair.high:.3f}]"
            row += f" {pair.mean:+9.3f} {interval:>18} {100 * pair.mean / base:+8.2f} %   {said}"
        print(row)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats")
    print(f"goal: under {100 * GOAL_SHARE:.0f} % of a step from 20 ms on, under {GOAL_MS} ms of a shorter one")
    print(f"{'step':7} {'variant':19} {'ms':>9} {'extra ms':>9} {'95 % interval':>18} {'extra':>10}")
    met = [measure(size, args.repeats) for size in args.sizes]
    sys.exit(0 if all(met) else "the goal was missed")


if __name__ == "__main__":
    main()
