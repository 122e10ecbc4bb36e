"""Ahead-of-time plan: what a compiled program needs of devices that are not there, and how fast they could run it.

A laptop compiles the very program that a pod would run (`topology.py`). The program then tells its memory, its FLOPs
and, through its text, each collective with its bytes.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Group
from rich.table import Table

from jkd.train.chips import Chip, chip_of
from jkd.train.collectives import Collective, collectives
from jkd.train.hlo import Program
from jkd.train.work import loop_factors


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of one run of a program, in ms, if a chip's units and links all worked at their peaks at once.

    `between_slices` is None where the maker does not say how fast the data-center network is, and then bounds
    nothing. `bound` names the largest of the four, which is `total`.
    """

    compute: float
    memory: float
    network: float
    between_slices: float | None
    bound: str
    total: float


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What one device needs for one run of a compiled program; sizes in bytes.

    `total` = arguments + outputs - aliased + temporaries + generated code. `flops` and `bytes_accessed` are the
    compiler's own counts, times what `loop_factors` finds that loops add to them; bytes to on-chip memory are among
    them. `loops` has the trips of each loop of the program, None where the program does not tell (it counts once).
    `num_chips` is None for what is no known accelerator.
    """

    num_devices: int
    num_chips: int | None
    device_kind: str
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    generated_code: int
    total: int
    hbm_limit: int | None
    flops: float
    bytes_accessed: float
    collectives: tuple[Collective, ...]
    loops: dict[str, int | None]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "PlanReport":
        """The report that `to_dict` was called on.

        Raises:
            TypeError: fields are missing or unknown.
        """
        fields = {name: value for name, value in plain.items() if name != "roofline"}
        return cls(**{**fields, "collectives": tuple(Collective(**one) for one in plain["collectives"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON; with the roofline, None where the chip is not known."""
        found = self.roofline()
        return json.loads(json.dumps({**dataclasses.asdict(self), "roofline": found and dataclasses.asdict(found)}))

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def wire_bytes(self, *, across_slices: bool = False) -> int:
        """What a device sends inside its slice, or to other slices."""
        return sum(one.wire_bytes for one in self.collectives if one.across_slices == across_slices)

    def roofline(self) -> Roofline | None:
        """The times that the chip's peaks allow; None where the chip is not known."""
        chip = chip_of(self.device_kind)
        return None if chip is None else _roofline(self, chip)

    def table(self) -> Group:
        """The report for a `rich` console: the resources of a device, the roofline, the collectives."""
        return Group(*(made for made in (_resources(self), _times(self), _network(self)) if made is not None))


def _roofline(report: PlanReport, chip: Chip) -> Roofline:
    times: dict[str, float | None] = {
        "compute": 1e3 * report.flops / chip.peak_flops,
        "memory": 1e3 * report.bytes_accessed / chip.hbm_bandwidth,
        "network": 1e3 * report.wire_bytes() / chip.ici_bandwidth,
        "between_slices": 0.0,
    }
    if sent := report.wire_bytes(across_slices=True):
        times["between_slices"] = 1e3 * sent / chip.dcn_bandwidth if chip.dcn_bandwidth else None
    total, bound = max((time, name) for name, time in times.items() if time is not None)
    return Roofline(**times, bound=bound, total=total)  # type: ignore[arg-type]


def _resources(report: PlanReport) -> Table:
    looped = ", ".join(f"{name} x{'?' if trips is None else trips}" for name, trips in report.loops.items())
    untold = " (a loop x? is counted once)" if None in report.loops.values() else ""
    chips = "" if report.num_chips is None else f" on {report.num_chips} chips"
    title = f"{report.num_devices} devices{chips}: {report.device_kind}"
    made = Table("resource", "amount", title=title, caption=f"loops: {looped}{untold}" if looped else None)
    for name in ("arguments", "outputs", "aliased", "temporaries", "generated_code", "total"):
        made.add_row(name.replace("_", " "), _size(getattr(report, name)))
    limit = report.hbm_limit
    made.add_row("limit", f"{_size(limit)} ({report.total / limit:.1%} used)" if limit else "unknown")
    made.add_row("FLOPs", f"{report.flops:.4g}")
    made.add_row("bytes accessed", _size(report.bytes_accessed))
    return made


def _times(report: PlanReport) -> Table | None:
    found = report.roofline()
    if found is None:
        return None
    made = Table("roofline", "ms")
    for name in ("compute", "memory", "network", "between_slices"):
        time = getattr(found, name)
        mark = "  <- bound" if name == found.bound else ""
        made.add_row(name.replace("_", " "), "unknown" if time is None else f"{time:.4g}{mark}")
    return made


def _network(report: PlanReport) -> Table | None:
    if not report.collectives:
        return None
    made = Table("collective", "network", "dtype", "group", "count", "payload", "wire")
    for one in report.collectives:
        place = "between slices" if one.across_slices else "in a slice"
        counts = (str(one.group_size), str(one.count))
        made.add_row(one.kind, place, one.dtype, *counts, _size(one.bytes), _size(one.wire_bytes))
    return made


def _size(count: int | float) -> str:
    return f"{count / 1024**2:,.2f} MiB"


def report(compiled: jax.stages.Compiled, devices: Sequence[jax.Device]) -> PlanReport:
    """What each of the `devices` needs to run `compiled` (from `jitted.lower(...).compile()`) once."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is None:
        raise ValueError("This backend does not tell the memory of a compiled program.")
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "generated_code": memory.generated_code_size_in_bytes,
    }
    program = Program(compiled.as_text() or "")
    more_flops, more_bytes = loop_factors(program)
    chip = chip_of(devices[0].device_kind)
    return PlanReport(
        num_devices=len(devices),
        num_chips=None if chip is None else len(devices) // chip.devices,
        device_kind=devices[0].device_kind,
        **sizes,
        aliased=memory.alias_size_in_bytes,
        total=sum(sizes.values()) - memory.alias_size_in_bytes,
        hbm_limit=int(chip.hbm_gib * 1024**3) or None if chip else None,
        flops=more_flops * float(cost.get("flops", 0.0)),
        bytes_accessed=more_bytes * float(cost.get("bytes accessed", 0.0)),
        collectives=tuple(collectives(program)),
        loops=program.loops(),
    )


def largest_multiple(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit`, at most `most`, that `fits`; 0 where none does.

    Searches from above, a quarter of what is left at a time: a program that does not fit is refused in seconds, one
    that does may take minutes to compile. What it returns was seen to fit, and the next multiple was seen not to (or
    is above `most`).
    """
    high, low = most // unit + 1, most // unit
    while low and not fits(low * unit):
        high, low = low, low // 2
    while low and high - low > 1:
        middle = high - max(1, (high - low) // 4)
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit
