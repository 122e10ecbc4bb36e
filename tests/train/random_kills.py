"""Kills a run of three stages at random moments, again and again, and compares what it ends with.

Every start is killed after a random time, or at a random moment inside a save, until the run is finished; then its
parameters, numbers, log and results must equal, bit for bit, those of a run that nothing interrupted.

    python tests/train/random_kills.py [--kills 60] [--seed 0]
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import jax.numpy as jnp
import toys

from jkd import train

ENOUGH = 200  # starts without an end: something else is wrong


def stages() -> list[train.Stage]:
    """A teacher of three seeds at once, three students one by one, and a student of one of them with snapshots."""
    keys = jax.random.split(jax.random.key(5), 3)
    teacher = train.ensemble(toys.classifier(num_steps=60), keys, "vmap")
    students = train.ensemble(toys.student("students", 45), keys, "loop")

    def take_first(key, previous, sweep):
        first = jax.tree.map(lambda x: x[0], previous["students"].published)
        labels = sweep(toys.take_label, {}, toys.data.MemorySource(toys.DIGITS, 32))
        return {"teacher": first, "count": jnp.bincount(jnp.asarray(labels), length=4)}

    last = toys.student("last", 60, snapshots=(7, 21, 44))
    return [teacher, students, dataclasses.replace(last, needs=("students",), prepare=take_first)]


def child(workdir: str, inside_save: tuple[int, float] | None, ready: int, said: int) -> None:
    """Runs to the end and says what it came to."""
    if inside_save is not None:
        arm(*inside_save)
    os.write(ready, b"r")
    options = train.LoopOptions(checkpoint_every=5, progress=False)
    results = train.run(stages(), workdir=workdir, log_every=7, options=options)
    arrays = [toys.final(workdir, stage) for stage in ("teacher", "students", "last")]
    digests = [{name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in found.items()} for found in arrays]
    log = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    left = sorted(path.name for path in (pathlib.Path(workdir) / "checkpoints").iterdir())
    os.write(said, json.dumps([results, digests, log, left]).encode())


def arm(count: int, delay: float) -> None:
    """Kills this process `delay` seconds after its `count`-th save begins."""
    from jkd.train import checkpoint, loop

    begun = []

    def counted(save):
        def saving(*args, **named):
            begun.append(1)
            if len(begun) == count:
                threading.Timer(delay, toys.kill).start()
            return save(*args, **named)

        return saving

    checkpoint.Checkpoints.save = counted(checkpoint.Checkpoints.save)
    loop.save_plain = counted(loop.save_plain)


def start(workdir: str, after: float | None = None, inside_save: tuple[int, float] | None = None) -> tuple[str, float]:
    """Starts the run in a new process; returns what it said ("" if it was killed) and how many seconds it ran.

    A fork of this process, which has imported everything and never touched a device: that saves the imports.
    """
    (ready, ready_in), (said, said_in) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(workdir, inside_save, ready_in, said_in)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(ready_in)
    os.close(said_in)
    with os.fdopen(ready, "rb") as waiting, os.fdopen(said, "rb") as result:
        waiting.read(1)
        began = time.monotonic()
        if after is not None:
            timer = threading.Timer(after, os.kill, (pid, signal.SIGKILL))
            timer.start()
        text = result.read().decode()
        if after is not None:
            timer.cancel()
            timer.join()
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run in {workdir} failed by itself")
    return text, time.monotonic() - began


def main(kills: int, seed: int) -> dict[str, float]:
    """Kills until `kills` are done, all of their runs finished; returns the figures."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = start(f"{folder}/whole")  # and compiles, so the first kills come rather late
        done = runs = same = 0
        while done < kills:
            runs += 1
            text, killed = "", 0
            while not text:
                plan = {} if done + killed >= kills else moment(draw, seconds)
                text, _ = start(f"{folder}/{runs}", **plan)
                killed += not text
                if killed > ENOUGH:
                    raise SystemExit("a run does not come to its end")
            done += killed
            same += killed if text == whole else 0
    return {"kills": done, "identical": same, "runs": runs, "seconds": round(seconds, 2)}


def moment(draw: random.Random, seconds: float) -> dict:
    """Of three kills, one falls into a save."""
    if draw.random() < 1 / 3:
        return {"inside_save": (draw.randint(1, 8), draw.uniform(0, 0.03))}
    return {"after": draw.uniform(0, seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures = main(args.kills, args.seed)
    print(json.dumps(figures))
    sys.exit(figures["kills"] != figures["identical"])
