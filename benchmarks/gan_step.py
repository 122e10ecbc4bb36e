"""A training step of StyleGAN2, its lazy penalties included, against the same step in PyTorch.

A step updates the discriminator, then the generator (non-saturating logistic losses, Adam, a moving average). Every
16th also penalizes the discriminator's slopes (R1), every 4th the generator's path lengths, in updates of their own.
Images, logits and both penalties must agree between the two sides before any clock starts. The kinds of steps of both
sides run in turn, forth and back, in one process.

    python -m benchmarks.gan_step [--repeats 7] [--resolution 64] [--batch 16] [--fmap-base 1024] [--no-peer]
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.distill_step import Variant, measure, measured_peak
from experiments import gan_games
from jkd import gan
from jkd.gan.players import Players
from jkd.nn import winograd
from jkd.nn.platform import tracing_for
from jkd.train.flops import count_flops
from jkd.trees import path_name

GOAL, R1_GOAL = 1.0, 2.2
AGREE = 1e-3  # relative
# A step number of each kind, and how many a period of 16 steps has. R1 never comes alone: it is what "both" adds.
KINDS = {"plain": (1, 12), "path length": (4, 3), "both": (0, 1)}
PENALTIES = {"plain": (False, False), "path length": (False, True), "both": (True, True)}
RULES = {
    "penalty": "r1",
    "penalty_weight": 5.0,
    "penalty_every": 16,
    "path_weight": 2.0,
    "path_every": 4,
    "path_shrink": 2,
    "path_decay": 0.01,
    "drift": 0.0,
    "lr": 0.002,
    "beta1": 0.0,
    "beta2": 0.99,
    "eps": 1e-8,
    "decay": 0.999,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides compute, with the weights that they start from."""

    players: Players
    generator: Any
    discriminator: Any
    images: np.ndarray
    rules: Any


def make_task(
    resolution: int, batch: int, fmap_base: int, fmap_max: int, latent_dim: int, mapping_layers: int = 8
) -> Task:
    """Networks with random weights and biases; noise counts for nothing at first."""
    sizes = {"fmap_base": fmap_base, "fmap_max": fmap_max}
    latents = {"latent_dim": latent_dim, "style_dim": latent_dim, "mapping_layers": mapping_layers}
    networks = gan.StyleGAN2Generator(resolution, **sizes, **latents), gan.StyleGAN2Discriminator(resolution, **sizes)
    players = Players(*networks, (resolution, resolution, 3), latent_dim)
    random = np.random.RandomState(0)

    def moved(path: Any, x: jax.Array) -> np.ndarray:
        name = path_name(path)
        noise = 0.1 * random.randn(*x.shape).astype(np.float32) if name.endswith("bias") else 0
        return np.asarray(x) + noise

    generator, discriminator = jax.tree.map_with_path(moved, jax.jit(players.init)(jax.random.key(0)))
    images = random.randn(batch, resolution, resolution, 3).astype(np.float32)
    return Task(players, generator, discriminator, images, ConfigDict({**RULES, "resolution": resolution}))


def make_step(task: Task, with_r1: bool = True, with_path: bool = True) -> gan.GanStep:
    """The step of a config's game; which penalties it has at all."""
    rules, game = task.rules, gan_games.Game(task.players, task.rules)
    return gan.GanStep(
        game.d_loss,
        game.g_loss,
        d_penalty=game.d_penalty if with_r1 else None,
        g_penalty=game.g_penalty if with_path else None,
        d_every=rules.penalty_every,
        g_every=rules.path_every,
        decay=rules.decay,
        **gan_games.optimizers(rules, rules.lr),
    )


def ours(task: Task, direct: bool = False) -> tuple[list[Variant], dict[str, float], str]:
    """The kinds of steps of one compiled program, their FLOPs, and what is known of the program.

    Args:
      task: what to compute.
      direct: whether all convolutions are the compiler's own, which compiles in a third of the time.
    """
    key, batch = jax.random.key(0), {"image": jnp.asarray(task.images)}

    def apply(step: gan.GanStep, state: gan.GanState, batch: Any, t: Any) -> Any:
        state, metrics = step(jax.random.fold_in(key, t), state, {}, batch, t)
        return state, metrics["d_loss"] + metrics["g_loss"]

    step = make_step(task)
    create = functools.partial(gan.create_gan_state, g_optimizer=step.g_optimizer, d_optimizer=step.d_optimizer)
    state = jax.jit(create)(task.generator, task.discriminator)
    began = time.perf_counter()
    with winograd.direct_only() if direct else contextlib.nullcontext():
        traced = jax.jit(functools.partial(apply, step), donate_argnums=0).trace(state, batch, 0)
    marks = [time.perf_counter() - began]
    compiled = traced.lower().compile()
    marks.append(time.perf_counter() - began - marks[0])
    spent = compiled.cost_analysis().get("flops", 0) / 1e9
    memory = compiled.memory_analysis()
    about = (
        f"jkd: traced in {marks[0]:.1f} s, compiled in {marks[1]:.1f} s; arguments "
        f"{memory.argument_size_in_bytes / 2**20:.0f} MiB, temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB; "
        f"the compiler counts {spent:.1f} GFLOP"
    )

    def variant(name: str, t: int) -> Variant:
        def run(steps: int) -> list[float]:
            nonlocal state
            losses = []
            for _ in range(steps):
                state, loss = compiled(state, batch, t)
                losses.append(loss)
            return [float(loss) for loss in losses]

        return Variant(name, False, run)

    def flops(name: str) -> float:
        fn = functools.partial(apply, make_step(task, *PENALTIES[name]))
        # Strided convolutions, without the zeros that a CPU's form multiplies.
        with tracing_for("tpu"), winograd.direct_only():
            return count_flops(jax.make_jaxpr(fn)(state, batch, 0))

    return [variant(name, t) for name, (t, _) in KINDS.items()], {name: flops(name) for name in KINDS}, about


def peers(task: Task, form: str, *, last: bool, compiled: bool) -> list[Variant]:
    """The kinds of steps of PyTorch."""
    import torch

    images = torch_images(task, last)
    step = torch_step(task, form, last=last, compiled=compiled)
    label = f"PyTorch {form}{', channels last' if last else ''}{', compiled' if compiled else ''}"

    def variant(name: str) -> Variant:
        def run(steps: int) -> list[float]:
            return [float(step(images, *PENALTIES[name])) for _ in range(steps)]

        return Variant(f"{label}: {name}", False, run, peer=True)

    torch.manual_seed(0)
    return [variant(name) for name in KINDS]


def torch_images(task: Task, last: bool = False) -> Any:
    """The batch as PyTorch takes it."""
    import torch

    images = torch.tensor(task.images).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def torch_step(task: Task, form: str, *, last: bool = False, compiled: bool = False) -> Any:
    """The step of PyTorch on the task's weights."""
    from benchmarks import _torch_gan

    arrays = (
        {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(variables["params"])}
        for variables in (task.generator, task.discriminator)
    )
    layers = task.players.generator.mapping_layers
    return _torch_gan.Step(*arrays, layers, task.rules, form=form, last=last, compiled=compiled)


def check(task: Task, forms: Sequence[str]) -> None:
    """Images, logits, R1 and path lengths of PyTorch, in all forms, against ours."""
    import torch

    from benchmarks import _torch_gan

    players, key = task.players, jax.random.key(2)
    latents = np.random.RandomState(1).randn(len(task.images), players.latent_dim).astype(np.float32)
    drawn = np.array(jax.random.normal(key, task.images.shape)) / task.images.shape[1]
    given = task.generator, task.discriminator, task.images  # as arguments: constants would be folded for minutes
    expected = [np.asarray(x) for x in jax.jit(functools.partial(to_agree, task))(*given, latents, key)]
    for form in forms:
        step, real = torch_step(task, form), torch_images(task)
        styles, mean = step.styles(torch.tensor(latents)), torch.zeros(())
        y = torch.tensor(drawn).permute(0, 3, 1, 2)
        found = (
            step.images(styles).permute(0, 2, 3, 1),
            _torch_gan.judge(step.d, real),
            _torch_gan.r1(functools.partial(_torch_gan.judge, step.d), real),
            _torch_gan.path_length(step.images, styles, mean, task.rules.path_decay, y)[0],
        )
        for name, one, other in zip(("images", "logits", "R1", "path lengths"), found, expected, strict=True):
            atol = AGREE * float(np.abs(other).max())
            np.testing.assert_allclose(one.detach(), other, rtol=AGREE, atol=atol, err_msg=f"{form}: {name}")


def to_agree(
    task: Task, generator: Any, discriminator: Any, images: Any, latents: Any, key: jax.Array
) -> tuple[jax.Array, ...]:
    """Images, logits, R1 and path lengths, with the compiler's convolutions."""
    players = task.players

    def judge(images: jax.Array) -> jax.Array:
        return players.judge(discriminator, images)[0].logits

    def synthesize(styles: jax.Array) -> jax.Array:
        return players.synthesize(generator, styles, latents).images

    with winograd.direct_only():
        styles = players.generator.apply(generator, latents, method="mapping")
        path = gan.path_length_penalty(synthesize, styles, key, 0.0, decay=task.rules.path_decay)
        return synthesize(styles), judge(images), gan.r1_penalty(judge, images), path.penalty


def with_derived(variants: Sequence[Variant]) -> dict[str, list[float]]:
    """Milliseconds of each kind in every repeat, with "R1" (alone) and the mean of a period."""
    times = dict(zip(KINDS, (v.times for v in variants), strict=True))
    rows = list(zip(*times.values(), strict=True))
    counts = [count for _, count in KINDS.values()]
    period = [sum(n * ms for n, ms in zip(counts, row, strict=True)) / sum(counts) for row in rows]
    return {**times, "R1": [plain + both - path for plain, path, both in rows], "mean of 16": period}


def paired(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over repeats of ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def report(mine: Sequence[Variant], peers: Sequence[Sequence[Variant]], flops: dict[str, float], peak: float) -> None:
    """A row a kind: milliseconds, rates, and the peer's time over ours; the peer is the fastest of PyTorch's forms."""
    times = with_derived(mine)
    others = [with_derived(group) for group in peers]
    best = min(others, key=lambda t: statistics.median(t["mean of 16"]), default=None)
    counts = [count for _, count in KINDS.values()]
    work = {
        **flops,
        "R1": flops["plain"] + flops["both"] - flops["path length"],
        "mean of 16": sum(n * f for n, f in zip(counts, flops.values(), strict=True)) / sum(counts),
    }
    print(f"{'step':14}{'GFLOP':>8}{'ms':>9}{'fastest':>9}{'GFLOP/s':>9}{'% peak':>8}{'PyTorch':>9}{'/ ours':>7}")
    for name, ms in times.items():
        median = statistics.median(ms)
        rate = work[name] / median / 1e6
        cells = f"{work[name] / 1e9:8.1f}{median:9.1f}{min(ms):9.1f}{rate:9.1f}{1e11 * rate / peak:8.1f}"
        told = f"{statistics.median(best[name]):9.1f}{paired(best[name], ms):7.2f}" if best else ""
        print(f"{name:14}{cells}{told}")
    for label, one in (("jkd", times), *((v[0].name.partition(":")[0], t) for v, t in zip(peers, others, strict=True))):
        mean = statistics.median(one["mean of 16"])
        print(f"{label}: R1 / plain {paired(one['R1'], one['plain']):.2f}, mean of 16 steps {mean:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--fmap-base", type=int, default=1024)
    parser.add_argument("--fmap-max", type=int, default=64)
    parser.add_argument("--latent-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--forms", nargs="*", default=["scaled", "scaled-last"], help="of PyTorch: scaled, grouped; -last, -compiled"
    )
    parser.add_argument("--direct", action="store_true", help="our side with the compiler's own convolutions")
    parser.add_argument("--no-peer", action="store_true", help="without PyTorch")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    task = make_task(args.resolution, args.batch, args.fmap_base, args.fmap_max, args.latent_dim)
    groups = []
    if not args.no_peer and importlib.util.find_spec("torch") is None:
        print("without PyTorch, which is not installed: pip install torch")
    elif not args.no_peer:
        groups = all_peers(task, args.forms)
    mine, flops, about = ours(task, args.direct)
    for v in [*mine, *(v for group in groups for v in group)]:
        assert np.isfinite(v.run(1)).all(), v.name
    measure([*mine, *(v for group in groups for v in group)], args.repeats, 1)
    peak = measured_peak("float32", 2048)
    print(f"{about}\npeak {peak / 1e9:.0f} GFLOP/s (a square product); load {os.getloadavg()[0]:.1f}")
    report(mine, groups, flops, peak)
    print(f"goals: {GOAL} x PyTorch, R1 / plain {R1_GOAL}")


def all_peers(task: Task, forms: Sequence[str]) -> list[list[Variant]]:
    """PyTorch in every form, once it is known to agree with ours."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA does
    check(task, sorted({name.split("-")[0] for name in forms}))
    groups = []
    for name in forms:
        form, *options = name.split("-")
        groups.append(peers(task, form, last="last" in options, compiled="compiled" in options))
    return groups


if __name__ == "__main__":
    main()
