"""One distillation step, resnet32x4 -> resnet8x4 on 32x32 images, against the same step in PyTorch.

A step is the teacher's forward pass (evaluation mode), the student's (training mode), cross-entropy plus KD with T = 4,
the gradient, and SGD with momentum 0.9 and weight decay 5e-4. "cached" steps read the teacher's logits instead. Both
sides start from equal weights and must agree on the losses of their first steps before any clock starts. All variants
run in turn, forth and back, in one process; the ratio is to the fastest PyTorch of the same kind of step.

    python -m benchmarks.distill_step [--repeats 9] [--batch 64] [--precision float32] [--seeds 8] [--no-peer]
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jkd import distill, nn, train
from jkd.interop.torch import to_torch
from jkd.nn import winograd
from jkd.train.flops import count_flops

TEMPERATURE, RATE, MOMENTUM, DECAY = 4.0, 0.05, 0.9, 5e-4
AGREE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the first losses, relative
FIRST = 3
OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))
EPOCH, EPOCHS, VIEWS = 50_000, 240, 8  # CIFAR-100 under the protocol, and a bank of teacher.source=cached


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides compute, with the weights that they start from."""

    teacher: Any
    student: Any
    teacher_variables: Any
    student_variables: Any
    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass
class Variant:
    """A step in a loop: `run(n)` takes n steps and returns their losses."""

    name: str
    cached: bool
    run: Callable[[int], list[float]]
    flops: float = 0.0
    peer: bool = False
    first_call: float = 0.0
    losses: Sequence[float] = ()
    times: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)


def make_task(teacher: str, student: str, batch: int, precision: str, num_classes: int = 100) -> Task:
    """Networks with random weights; the compute precision is that of the convolutions."""
    models = [nn.build(name, num_classes=num_classes, dtype=jnp.dtype(precision)) for name in (teacher, student)]
    variables = [nn.init(model, jax.random.key(i), (32, 32, 3)) for i, model in enumerate(models)]
    random = np.random.RandomState(0)
    images = random.randn(batch, 32, 32, 3).astype(np.float32)
    return Task(*models, *variables, images, random.randint(0, num_classes, batch))


def teach(task: Task, variables: Any, images: jax.Array) -> jax.Array:
    """The teacher's logits."""
    _, rest = nn.split(variables)
    return nn.apply_eval(task.teacher.apply, variables["params"], rest, images).logits


def step(task: Task, cached: bool, state: train.TrainState, consts: Any, batch: Any) -> Any:
    """One step of the student; `consts` are the teacher's variables, or its logits."""
    told = consts if cached else teach(task, consts, batch["image"])

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        out, model_state = nn.apply_train(task.student.apply, params, state.model_state, batch["image"])
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"]).mean()
        return loss + distill.kd_loss(out.logits, told, TEMPERATURE), train.Aux({}, model_state)

    return train.make_train_step(loss_fn, OPTIMIZER)(state, batch, jax.random.key(0))


def ours(task: Task, name: str, *, cached: bool = False, seeds: int = 0, direct: bool = False) -> Variant:
    """A jitted step of jkd.

    Args:
      task: what to compute.
      name: for the table.
      cached: whether the teacher's logits are given.
      seeds: > 0 trains so many students, on the same batches and hence with one forward pass of the teacher.
      direct: whether convolutions are the compiler's own.
    """
    fn = functools.partial(step, task, cached)
    batch = {"image": jnp.asarray(task.images), "label": jnp.asarray(task.labels)}
    consts = jax.jit(functools.partial(teach, task))(task.teacher_variables, batch["image"]) if cached else None
    consts = task.teacher_variables if consts is None else consts
    state = train.create_state(jax.tree.map(jnp.copy, task.student_variables), OPTIMIZER)
    if seeds:
        state = jax.tree.map(lambda x: jnp.stack([x] * seeds), state)
        fn = jax.vmap(fn, in_axes=(0, None, None))
    with mock.patch.object(winograd, "fits", return_value=False) if direct else contextlib.nullcontext():
        traced = jax.jit(fn, donate_argnums=0).trace(state, consts, batch)
    compiled = []  # at the first call, whose time is told apart

    def run(steps: int) -> list[float]:
        nonlocal state
        if not compiled:
            compiled.append(traced.lower().compile())
        losses = []
        for _ in range(steps):
            state, metrics = compiled[0](state, consts, batch)
            losses.append(metrics["loss"])
        return [float(np.mean(loss)) for loss in losses]

    return Variant(name, cached, run, count_flops(traced.jaxpr) if direct else 0.0)


def our_variants(task: Task, seeds: int) -> list[Variant]:
    """The steps of jkd: as they are, with the compiler's own convolutions, and with several seeds."""
    found = []
    for cached in (False, True):
        found += [ours(task, "jkd", cached=cached), ours(task, "jkd, direct", cached=cached, direct=True)]
        found += [ours(task, f"jkd, {seeds} seeds", cached=cached, seeds=seeds)] if seeds else []
    return found


def peers(task: Task, device: str, narrow: bool) -> list[Variant]:
    """The same steps in PyTorch, eager and compiled, channels last, weights and optimizer fused as far as it goes."""
    import torch

    from benchmarks import _torch_peer as torch_peer

    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does
    images = torch.tensor(task.images).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    labels = torch.tensor(task.labels).to(device)
    logits = jax.jit(functools.partial(teach, task))(task.teacher_variables, task.images)

    def variant(compiled: bool, cached: bool) -> Variant:
        networks = (task.teacher, task.teacher_variables), (task.student, task.student_variables)
        teacher, student = (torch_peer.load(m, to_torch(m, v), device) for m, v in networks)
        settings = {"momentum": MOMENTUM, "weight_decay": DECAY, "fused": True}
        optimizer = torch.optim.SGD(student.parameters(), RATE, **settings)
        options = {"compiled": compiled, "narrow": narrow}
        step = torch_peer.make_step(teacher.eval(), student.train(), optimizer, TEMPERATURE, **options)
        told = torch.tensor(np.asarray(logits)).to(device) if cached else None

        def run(steps: int) -> list[float]:
            return [float(loss) for loss in [step(images, labels, told) for _ in range(steps)]]

        return Variant(f"PyTorch {'compiled' if compiled else 'eager'}", cached, run, peer=True)

    return [variant(compiled, cached) for cached in (False, True) for compiled in (False, True)]


def check(variants: Sequence[Variant], tolerance: float) -> None:
    """Takes the first steps of all (and compiles them); their losses must agree."""
    for v in variants:
        began = time.perf_counter()
        v.losses = v.run(1)
        v.first_call = time.perf_counter() - began
        v.losses = [*v.losses, *v.run(FIRST - 1)]
        np.testing.assert_allclose(v.losses, variants[0].losses, rtol=tolerance, err_msg=v.name)


def measure(variants: Sequence[Variant], repeats: int, steps: int) -> None:
    """Milliseconds a step, interleaved; those of all cores together say more where others use them too."""
    for repeat in range(repeats):
        for v in variants[:: 1 if repeat % 2 else -1]:
            began, used = time.perf_counter(), time.process_time()
            v.run(steps)
            v.times.append(1000 * (time.perf_counter() - began) / steps)
            v.cpu.append(1000 * (time.process_time() - used) / steps)


def measured_peak(precision: str, size: int) -> float:
    """FLOP/s of a square product: the best of 10."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(precision)
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def report(variants: Sequence[Variant], batch: int, peak: float) -> None:
    """Prints a row a variant, then what an epoch costs."""
    flops = {v.cached: v.flops for v in variants if v.flops}
    heads = ("variant", "GFLOP", "ms", "fastest", "CPU ms", "floor", "% of it", "PyTorch/it", "1st s")
    widths = (32, 6, 9, 9, 9, 8, 8, 11, 7)
    print(heads[0].ljust(widths[0]) + "".join(head.rjust(n) for head, n in zip(heads[1:], widths[1:], strict=True)))
    for v in variants:
        ms, floor = statistics.median(v.times), 1000 * flops[v.cached] / peak
        best = min((statistics.median(p.times) for p in variants if p.peer and p.cached == v.cached), default=np.nan)
        cells = (flops[v.cached] / 1e9, ms, min(v.times), statistics.median(v.cpu), floor, 100 * floor / ms)
        row = "".join(f"{cell:{n}.1f}" for cell, n in zip(cells, widths[1:], strict=False))
        print(f"{named(v):32}{row}{best / ms:11.2f}{v.first_call:7.1f}")
    epochs = ", ".join(f"{named(v)} {EPOCH / batch * statistics.median(v.times) / 1000:.0f}" for v in variants)
    print(f"\nan epoch of {EPOCH} images, s: {epochs}")
    print(f"(cached: and {VIEWS} passes of the teacher once, {100 * VIEWS / EPOCHS:.1f} % of those of {EPOCHS} epochs)")


def named(v: Variant) -> str:
    """The variant's name in the table."""
    return v.name + (", cached" if v.cached else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, help="in a repeat; one on a CPU, else 20")
    parser.add_argument("--precision", choices=AGREE, default="float32")
    parser.add_argument("--seeds", type=int, help="students of the vmapped variant; 8 on an accelerator, else none")
    parser.add_argument("--no-peer", action="store_true", help="without PyTorch")
    args = parser.parse_args()
    device, cpu = jax.devices()[0], jax.default_backend() == "cpu"
    seeds = args.seeds if args.seeds is not None else 0 if cpu else 8
    print(f"jax {jax.__version__}, {device.device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    task = make_task(args.teacher, args.student, args.batch, args.precision)
    variants = our_variants(task, seeds)
    if not args.no_peer and importlib.util.find_spec("torch") is None:
        print("without PyTorch, which is not installed: pip install torch")
    elif not args.no_peer:
        variants += peers(task, "cpu" if cpu else "cuda", args.precision == "bfloat16")
    check(variants, AGREE[args.precision])
    measure(variants, args.repeats, args.steps or (1 if cpu else 20))
    peak = measured_peak(args.precision, 2048 if cpu else 8192)
    print(f"losses agree; peak {peak / 1e9:.0f} GFLOP/s (a square product); load {os.getloadavg()[0]:.1f}")
    report(variants, args.batch, peak)


if __name__ == "__main__":
    main()
