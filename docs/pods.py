"""Writes docs/pods.md: what one shipped config needs on pods of growing size, by their own compiler.

    python docs/pods.py

Needs the `tpu` extra; compiling a row takes one to three minutes. Finished rows are kept with all other plans, so the
command can be stopped and given again. To add rows, extend TABLES.
"""

import dataclasses
import importlib.metadata
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import cli  # noqa: E402
from experiments import plan as planner  # noqa: E402
from jkd import nn  # noqa: E402

CONFIG, STAGE, IMAGES = "configs/energy_kd.py:imagenet", "energy_kd", 64  # images a chip
CHIPS = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
EXECUTION = ("precision", "remat", "microbatches")
MIB = 1024**2


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan: the shipped config with some fields changed; `batch_size` is IMAGES a chip unless they set it."""

    topology: str
    slices: int = 1
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * CHIPS[self.topology]

    def plan(self) -> planner.StagePlan:
        """The plan, from the compiler or from what was planned before."""
        changes = {"data.blank": True, "batch_size": IMAGES * self.chips, "mesh.slices": self.slices, **self.changes}
        config = cli.load_config(f"{ROOT}/{CONFIG}", changes)
        return dict(planner.plan(config, self.topology, only=STAGE))[STAGE]


TABLES = {
    "Data parallelism": [Row(topology) for topology in CHIPS],
    "FSDP: parameters, optimizer state and teacher split over 4 chips": [
        Row(topology, changes={"mesh.fsdp": 4}) for topology in ("v5e:2x2", "v5e:16x16")
    ],
    "bfloat16, and less memory": [
        Row("v5e:2x2", changes={"precision": "bfloat16", **changes})
        for changes in ({}, {"remat": True}, {"microbatches": 4})
    ],
    "Two slices, joined by the data-center network": [Row("v5e:8x8", slices=2)],
    "The shipped batch of 512 on 256 chips": [Row("v5e:16x16", changes={"batch_size": 512})],
}
HEADER = (
    "topology", "mesh, changes", "batch", "HBM", "arguments", "temporaries", "GFLOPs", "wire by dtype",
    "between slices", "compute", "memory", "network", "slices", "bound", "images/s a chip", "images/s",
)  # fmt: skip


def line(row: Row, one: planner.StagePlan) -> list[str]:
    """The cells of one row; see the page for what they mean."""
    report, times = one.report, one.report.roofline()
    slices = f" x {row.slices}" if row.slices > 1 else ""
    split = {name.removeprefix("mesh."): size for name, size in row.changes.items() if name.startswith("mesh.")}
    others = [f"{name}={value}" for name, value in row.changes.items() if name in EXECUTION]
    ways = {"slice": row.slices, "data": row.chips // row.slices, **split}
    ways["data"] //= split.get("fsdp", 1) * split.get("tensor", 1)
    rate = one.images_per_second() or 0.0
    return [
        row.topology + slices,
        " ".join([*(f"{name}={size}" for name, size in ways.items() if size > 1), *others]),
        f"{one.batch_size:,}",
        f"{report.total / MIB:,.0f} ({report.total / report.hbm_limit:.0%})",
        f"{report.arguments / MIB:,.1f}",
        f"{report.temporaries / MIB:,.0f}",
        f"{report.flops / 1e9:,.1f}",
        wire(report, across_slices=False),
        wire(report, across_slices=True),
        *(f"{time:.2f}" for time in (times.compute, times.memory, times.network, times.between_slices)),
        times.bound.replace("_", " "),
        f"{rate / report.num_chips:,.0f}",
        f"{rate:,.0f}",
    ]


def wire(report: Any, *, across_slices: bool) -> str:
    """What a device sends: `all-reduce f32 89.2, all-gather bf16 3.1`, in MiB."""
    sums: dict[tuple[str, str], int] = {}
    for one in report.collectives:
        if one.across_slices == across_slices:
            sums[one.kind, one.dtype] = sums.get((one.kind, one.dtype), 0) + one.wire_bytes
    return ", ".join(f"{kind} {dtype} {sent / MIB:,.1f}" for (kind, dtype), sent in sums.items() if sent >= 2**15)


# --- by hand ---


def convolutions(units: tuple[int, ...]) -> Iterator[tuple[int, int, int, int, int]]:
    """(size of the image, channels in, channels out, size of the kernel, stride) of a ResNet of basic blocks."""
    yield 224, 3, 64, 7, 2
    size, channels = 56, 64  # after 3x3 max pooling with stride 2
    for block, count in enumerate(units):
        width = 64 * 2**block
        for unit in range(count):
            stride = 2 if block and not unit else 1
            yield size, channels, width, 3, stride
            if stride > 1:
                yield size, channels, width, 1, stride
            size //= stride
            yield size, width, width, 3, 1
            channels = width


def products(size: int, kernel: int, stride: int) -> int:
    """Products of one row of an image with a row of the kernel: those with padding are none."""
    pad = kernel // 2
    starts = range(-pad, size + 2 * pad - kernel - pad + 1, stride)
    return sum(0 <= start + tap < size for start in starts for tap in range(kernel))


def forward_flops(units: tuple[int, ...]) -> list[int]:
    """Of each convolution for one image, the stem first, then of the linear head."""
    layers = convolutions(units)
    found = [
        2 * inside * outside * products(size, kernel, stride) ** 2 for size, inside, outside, kernel, stride in layers
    ]
    return [*found, 2 * 512 * 1000]


def flops_by_hand() -> int:
    """Per image: ResNet-34 forward; ResNet-18 forward, and twice that back, without a gradient of the images."""
    teacher, student = forward_flops((3, 4, 6, 3)), forward_flops((2, 2, 2, 2))
    return sum(teacher) + 3 * sum(student) - student[0]


def parameters(model: Any) -> Any:
    """The shapes of a model's variables."""
    return jax.eval_shape(lambda: nn.init(model, jax.random.key(0), (224, 224, 3)))


def size_of(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def split_bytes(tree: Any, ways: int) -> int:
    """Bytes of the leaves that FSDP splits: from 16,384 numbers on, with a dimension that `ways` divides."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size >= 2**14 and any(n % ways == 0 for n in x.shape)]
    return size_of(leaves)


def checks(plans: Mapping[str, list[tuple[Row, planner.StagePlan]]]) -> list[str]:
    """What the tables should show, and what they do."""
    whole = {row.topology: one for row, one in plans["Data parallelism"]}
    lines = []
    for row, one in [*plans["Data parallelism"], *plans["The shipped batch of 512 on 256 chips"]]:
        expected = flops_by_hand() * one.batch_size / row.chips
        ring = 2 * (row.chips - 1) / row.chips * size_of(parameters(nn.resnet18(1000))["params"])
        sent = one.report.wire_bytes()
        lines.append(
            f"| {row.topology}, batch {one.batch_size:,} | {expected / 1e9:,.1f} | {one.report.flops / 1e9:,.1f} "
            f"({one.report.flops / expected - 1:+.1%}) | {ring / MIB:.2f} | {sent / MIB:.2f} ({sent / ring - 1:+.1%}) |"
        )
    split = 2 * split_bytes(parameters(nn.resnet18(1000))["params"], 4) + split_bytes(parameters(nn.resnet34(1000)), 4)
    saved = [
        f"{(whole[row.topology].report.arguments - one.report.arguments) / MIB:.1f} on {row.topology}"
        for row, one in plans["FSDP: parameters, optimizer state and teacher split over 4 chips"]
        if row.topology in whole
    ]
    return [
        "| plan | GFLOPs a chip by hand | by the compiler | gradients on the wire by hand, MiB | all collectives |",
        "| --- | --- | --- | --- | --- |",
        *lines,
        "",
        f"FSDP over 4 chips splits arrays of {split / MIB:.1f} MiB: those of 16,384 numbers or more of the student's",
        "parameters, their momentum and the teacher. The arguments of a chip should shrink by three quarters of that,",
        f"{3 / 4 * split / MIB:.1f} MiB. They shrink by {', '.join(saved)}.",
    ]


def reduced_dtypes(plans: Mapping[str, list[tuple[Row, planner.StagePlan]]]) -> set[str]:
    """The dtypes of everything that is added up over chips."""
    found = (one for made in plans.values() for _, plan in made for one in plan.report.collectives)
    return {one.dtype for one in found if one.kind in ("all-reduce", "reduce-scatter")}


PAGE = """# Pods: one step on 4 to 512 chips

Made by `python docs/pods.py` with {versions}; not to be edited.

Nothing here was run: these are the programs of `{config}`, stage `{stage}` (a ResNet-34
teacher forward, a ResNet-18 student forward and back, 224x224 images), compiled for TPUs that are not there, at
{images} images a chip but for the last table. One row is

    python -m experiments.plan --config {config} --stage {stage} --topology v5e:16x16 \\
      --config.batch_size={example} [--slices 2] [--config.mesh.fsdp=4]

All sizes are MiB a chip and all times ms a step. *HBM* is arguments + outputs - aliased + temporaries + code, and its
share of the chip's memory. *Wire* is what a chip sends to its slice, by ring algorithms, and *between slices* what it
sends over the data-center network. *compute*, *memory*, *network* and *slices* are the least times that the chip's
peaks allow (bfloat16 FLOP/s, HBM, all links to the slice, data-center network); the largest is the *bound*. A real
step takes longer: nothing reaches its peak, not all of it overlaps, and a small slice has fewer links than its chips
have ports. *memory* is the compiler's own count, in which on-chip memory counts too.

{tables}
## What the tables show

{checks}

- **Weak scaling is flat**: a chip computes the same on any number of chips ({flops}), and sends
  2 (n - 1) / n times the gradients: {ring} MiB on 4 chips and never more than {limit} MiB, with some KiB of batch
  statistics.
- **What is reduced is {reduced}**: the dtypes of all all-reduces and reduce-scatters. Gradients are reduced in
  float32, also where models compute in bfloat16; the integers are no gradients.
- **Two images a chip are too few**: the compiler cuts them into strips with a margin to fill its units, and its
  convolutions compute 39.4 GFLOPs instead of 33.2.
- **bfloat16 moves fewer bytes.** Micro-batches save temporary memory; XLA sums their gradients over the chips once a
  step. Rematerialization saves nothing here: with 64 images of ResNet-18, what is kept is not the peak.
- **FSDP splits what it should, and that is not always worth it.** With all chips in one group (2x2) weights and
  gradients travel in rings of permutes (46 MiB are about three quarters of all weights in bfloat16), and temporaries
  grow by more than the arguments shrink. In groups of 4 among 256 chips weights are gathered, in bfloat16.
- **Across slices** a chip sends only its own share of the gradients, which its slice has reduced before. The program
  for two slices needs more temporary memory than the one for a slice.
"""


def main() -> None:
    """Writes the page beside this script."""
    planner.use_cpu_devices("")
    plans: dict[str, list[tuple[Row, planner.StagePlan]]] = {}
    for title, rows in TABLES.items():
        plans[title] = []
        for row in rows:
            plans[title].append((row, row.plan()))
            print(
                title, row, "planned before" if plans[title][-1][1].cached else "compiled", file=sys.stderr, flush=True
            )
    tables = ""
    for title, made in plans.items():
        cells = [HEADER, ["---"] * len(HEADER), *(line(*one) for one in made)]
        tables += f"### {title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells) + "\n"
    flat = [one.report for _, one in plans["Data parallelism"]]
    flops = [one.flops for one in flat]
    text = PAGE.format(
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")),
        config=CONFIG,
        stage=STAGE,
        images=IMAGES,
        example=IMAGES * CHIPS["v5e:16x16"],
        tables=tables,
        checks="\n".join(checks(plans)),
        flops=f"FLOPs differ by {max(flops) / min(flops) - 1:.2%}",
        reduced=" and ".join(sorted(reduced_dtypes(plans))),
        ring=f"{flat[0].wire_bytes() / MIB:.1f}",
        limit=f"{2 * size_of(parameters(nn.resnet18(1000))['params']) / MIB:.1f}",
    )
    (ROOT / "docs" / "pods.md").write_text(text)


if __name__ == "__main__":
    cli.command(main)
