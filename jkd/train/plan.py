"""Ahead-of-time plan: compile a sharded function for devices that are not there, and count what it costs.

A TPU topology is described by libtpu alone, so a laptop compiles the very program that a pod would run. The
compiled program then tells its memory, its FLOPs and, through its text, each collective with its bytes.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from rich.console import Group
from rich.table import Table

from jkd.errors import UserError, unknown


class _Chip(NamedTuple):
    device_kind: str
    example: str
    hbm_gib: float  # a device, as the compiler itself states it when a program is too big
    options: Mapping[str, str] = {}


_CHIPS = {
    "v4": _Chip("TPU v4", "v4:2x2x4", 30.75, {"chip_config_name": "megacore"}),
    "v5e": _Chip("TPU v5 lite", "v5e:16x16", 15.75),
    "v5p": _Chip("TPU v5", "v5p:4x4x4", 95.74),
    "v6e": _Chip("TPU v6 lite", "v6e:16x16", 31.25),
    "tpu7x": _Chip("TPU7x", "tpu7x:4x4x4", 94.75),
}
# What libtpu reads when it loads. The accelerator type has to be a valid one; the topology's name decides.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_EXAMPLES = f"Examples: {', '.join(chip.example for chip in _CHIPS.values())}, cpu:8."


def topology_devices(spec: str, slices: int = 1) -> list[jax.Device]:
    """The devices to compile for: `"v5e:16x16"` is a TPU topology, `"cpu:8"` the first 8 local CPU devices.

    TPU devices can be compiled for but not run on. A `tpu7x` chip is two devices, any other chip is one. Sets
    libtpu's variables in this process's environment where they are not set.

    Args:
        spec: `NAME:LAYOUT`; the layout counts chips along each dimension of one slice, `cpu:` takes a number.
        slices: number of equal TPU slices joined by the data-center network.

    Raises:
        UserError: an unknown name, a layout that the TPU does not have, libtpu missing, too few CPU devices.
    """
    name, _, layout = spec.partition(":")
    if slices < 1 or (name == "cpu" and slices > 1):
        raise UserError(f"slices must be at least 1, and exactly 1 for cpu: got {slices} for {spec!r}.")
    if name not in _CHIPS and name != "cpu":
        raise UserError(f"{unknown('topology', name, [*_CHIPS, 'cpu'])} {_EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*" if name == "cpu" else r"[1-9]\d*(x[1-9]\d*)+", layout):
        raise UserError(f"Topology {spec!r} has no valid layout. {_EXAMPLES}")
    return _cpu_devices(int(layout)) if name == "cpu" else _tpu_devices(spec, _CHIPS[name], slices)


def _cpu_devices(number: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if number > len(devices):
        reason = f"this process has {len(devices)} CPU devices: set JAX_NUM_CPU_DEVICES={number}"
        raise UserError(f"Topology 'cpu:{number}' is too large: {reason}.")
    return devices[:number]


def _tpu_devices(spec: str, chip: _Chip, slices: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(f"Topology {spec!r} needs libtpu: pip install 'jkd[tpu]'.")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if re.search(r":1(x1)+$", spec):  # a host of one chip; the default host has 2x2
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(spec, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Topology {spec!r} does not exist: {reason}. {_EXAMPLES}") from error


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, dtype and group size in one run of the program, added up.

    `count` is how often they run (loop trips included); `bytes` their full payload on one device: the gathered
    array of a gather, the array before a scatter, the reduced or exchanged array otherwise; `wire_bytes` what one
    device sends, by the ring algorithms: (n-1)/n of the payload for gather, scatter and all-to-all, 2(n-1)/n for
    an all-reduce, all of it for a permute. `group_size` n counts devices, or slices where `across_slices` says
    that the bytes cross the data-center network; for a permute, all devices that take part.
    """

    kind: str
    dtype: str
    count: int
    bytes: int
    wire_bytes: int
    group_size: int
    across_slices: bool = False


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What one device needs for one run of a compiled program; sizes in bytes.

    `total` = arguments + outputs - aliased + temporaries + generated code. `flops` and `bytes_accessed` are the
    compiler's own counts, which take each loop body once, however often it runs. `loops` has the trips of each
    loop of the program, None where the program does not tell (its collectives are counted once).
    """

    num_devices: int
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

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def table(self) -> Group:
        """The report for a `rich` console: the resources of a device, then the collectives."""
        looped = ", ".join(f"{name} x{'?' if trips is None else trips}" for name, trips in self.loops.items())
        caption = f"FLOPs and bytes accessed take each loop body once: {looped}" if looped else None
        device = Table("resource", "amount", title=f"{self.num_devices} x {self.device_kind}", caption=caption)
        for name in ("arguments", "outputs", "aliased", "temporaries", "generated_code", "total"):
            device.add_row(name.replace("_", " "), _size(getattr(self, name)))
        limit = self.hbm_limit
        device.add_row("limit", f"{_size(limit)} ({self.total / limit:.1%} used)" if limit else "unknown")
        device.add_row("FLOPs", f"{self.flops:.4g}")
        device.add_row("bytes accessed", _size(self.bytes_accessed))
        network = Table("collective", "network", "dtype", "group", "count", "payload", "wire")
        for one in self.collectives:
            place = "between slices" if one.across_slices else "in a slice"
            counts = (str(one.group_size), str(one.count))
            network.add_row(one.kind, place, one.dtype, *counts, _size(one.bytes), _size(one.wire_bytes))
        return Group(device, network) if self.collectives else Group(device)


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
    program = _Program(compiled.as_text() or "")
    kind = devices[0].device_kind
    limits = {chip.device_kind: int(chip.hbm_gib * 1024**3) for chip in _CHIPS.values()}
    return PlanReport(
        num_devices=len(devices),
        device_kind=kind,
        **sizes,
        aliased=memory.alias_size_in_bytes,
        total=sum(sizes.values()) - memory.alias_size_in_bytes,
        hbm_limit=limits.get(kind),
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=tuple(_collectives(program)),
        loops=program.loops(),
    )


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """The collectives of a compiled program or of its optimized HLO text, the most wire bytes first.

    Raises:
        ValueError: the text is no HLO module, or names its device groups in a way that is not known.
    """
    return _collectives(_Program(compiled if isinstance(compiled, str) else compiled.as_text() or ""))


class _Instruction(NamedTuple):
    computation: str = ""
    root: str = ""
    name: str = ""
    shape: str = ""
    opcode: str = ""
    inside: str = ""  # between the parentheses: operands, or a constant's value
    attributes: str = ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class _Program:
    """The instructions of an HLO module, and how often each computation runs."""

    def __init__(self, text: str):
        self.instructions: list[_Instruction] = []
        computation = self.entry = ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _HEADER.match(line):
                computation = header[2]
                self.entry = computation if header[1] else self.entry
            elif computation and (found := _INSTRUCTION.match(line)):
                self.instructions.append(_Instruction(computation, *(group or "" for group in found.groups())))
        if not self.entry:
            raise ValueError("The text is no HLO module: it has no ENTRY computation.")
        self.named = {(one.computation, one.name): one for one in self.instructions}
        self.roots = {one.computation: one for one in self.instructions if one.root}
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.splitlines()[0])
        self.num_devices = math.prod(int(count) for count in counts)

    def loops(self) -> dict[str, int | None]:
        return {one.name: self.trips(one) for one in self.instructions if one.opcode == "while"}

    def runs(self) -> dict[str, int]:
        """How often each computation runs: once a call, times the trips of the loops around it."""
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for one in self.instructions:
            trips = self.trips(one) if one.opcode == "while" else 1
            for called in re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(one.attributes))):
                callers[called].append((one.computation, 1 if trips is None else trips))

        @functools.cache
        def count(name: str) -> int:
            return 1 if name == self.entry else sum(count(caller) * trips for caller, trips in callers[name])

        return {name: count(name) for name in self.roots}

    def trips(self, loop: _Instruction) -> int | None:
        """Trips of `for i in range(start, bound, step)`: what XLA noted, else read off the program.

        The TPU compiler drops the note, but its counted loops stay plain: `i < bound`, then `i + step`.
        """
        if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition, body = loop.find(r"condition=%?([\w.\-]+)"), loop.find(r"body=%?([\w.\-]+)")
        test = self.roots[condition]
        counter, bound = (self._source(condition, name) for name in (test.operands + ["", ""])[:2])
        index = counter.find(r"index=(\d+)")
        if test.opcode != "compare" or "direction=LT" not in test.attributes or not index:
            return None
        start = self._element(self._source(loop.computation, loop.operands[0]), index)
        added = self._element(self.roots[body], index)
        terms = [self._source(body, name) for name in added.operands]
        steps = [term for term in terms if term.find(r"index=(\d+)") != index]
        literals = [one.inside for one in (start, bound, *steps) if one.opcode == "constant"]
        numbers = [int(literal) for literal in literals if re.fullmatch(r"-?\d+", literal)]
        if added.opcode != "add" or len(steps) != 1 or len(numbers) != 3 or numbers[2] < 1:
            return None
        return len(range(*numbers))

    def _source(self, computation: str, name: str) -> _Instruction:
        """The instruction behind a name, seen through copies; an empty one where there is none."""
        found = self.named.get((computation, name), _Instruction())
        return self._source(computation, found.operands[0]) if found.opcode == "copy" else found

    def _element(self, values: _Instruction, index: str) -> _Instruction:
        name = values.operands[int(index)] if values.opcode == "tuple" else ""
        return self._source(values.computation, name)


# What a device sends in a ring of n, in parts of the payload: rounds * (n - 1) / n. A permute sends it all.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 0}


def _collectives(program: _Program) -> list[Collective]:
    runs = program.runs()
    sums: dict[tuple[str, str, int, bool], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    for one in _distinct(program, runs):
        across = one.opcode == "send"
        kind, dtype, size, group = _across_slices(one) if across else _within_slice(one, program.num_devices)
        wire = _ROUNDS[kind] * size * (group - 1) // group if _ROUNDS[kind] else size
        times, (count, sizes, wires) = runs[one.computation], sums[kind, dtype, group, across]
        sums[kind, dtype, group, across] = (count + times, sizes + times * size, wires + times * wire)
    found = [Collective(*key[:2], *total, *key[2:]) for key, total in sums.items()]
    return sorted(found, key=lambda one: one.wire_bytes, reverse=True)


def _distinct(program: _Program, runs: Mapping[str, int]) -> Iterator[_Instruction]:
    """Each collective once.

    Channel ids do not tell collectives apart: all those of one `shard_map` share one. Every instruction counts,
    except that the TPU compiler repeats a collective in each fusion which carries a part of it, under one chain.
    """
    chains = set()
    for one in program.instructions:
        is_send = one.opcode == "send" and "_xla_megascale_transfer_type" in one.attributes
        if runs[one.computation] == 0 or not (is_send or one.opcode.removesuffix("-start") in _ROUNDS):
            continue
        chain = one.find(r'chain_id="(\d+)"')
        key = (one.opcode, one.find(r"channel_id=(\d+)"), chain)
        if not chain or key not in chains:
            yield one
        chains.add(key)


def _within_slice(one: _Instruction, devices: int) -> tuple[str, str, int, int]:
    """Kind, dtype, payload bytes and group size of a collective inside a slice."""
    kind = one.opcode.removesuffix("-start")
    group = _group_size(one, devices)
    # An asynchronous one has the shape (operands, results, ...); an all-reduce-start has the results alone.
    has_operands = one.opcode != kind and kind != "all-reduce"
    dtype, size = _dtype_and_bytes(_parts(one.shape)[1] if has_operands else one.shape)
    if kind == "reduce-scatter":
        return kind, dtype, size * group, group
    # A fused all-reduce and slice, which the TPU runs as one reduce-scatter.
    fused = one.computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if fused else kind, dtype, size, group


def _across_slices(one: _Instruction) -> tuple[str, str, int, int]:
    """Kind, dtype, payload bytes and group size of a send to other slices; its shape is (operand, ...)."""
    transfer = one.find(r'_xla_megascale_transfer_type="(\w+)"')
    kind = "collective-permute" if transfer == "ONE_TO_ONE" else transfer.lower().replace("_", "-")
    dtype, size = _dtype_and_bytes(_parts(one.shape)[0])
    pairs = re.findall(r"(\d+)->(\d+)", one.attributes)
    listed = one.find(r'_xla_megascale_target="?\{+([\d,]+)\}').split(",")
    group = len(set(sum(pairs, ()))) if pairs else len(listed)
    return kind, dtype, size * group if kind == "all-gather" else size, group


def _group_size(one: _Instruction, devices: int) -> int:
    """Devices in one group, from any of the forms in which HLO writes groups."""
    if pairs := one.find(r"source_target_pairs=\{(\{.*?\})\}"):
        return len(set(re.findall(r"\d+", pairs)))
    if listed := one.find(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    if counted := one.find(r"replica_groups=\[\d+,(\d+)\]<="):
        return int(counted)
    mesh = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", one.attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'axis', or a part of one: 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups={}" in one.attributes:
        return devices
    raise ValueError(f"Unknown form of device groups in {one.name}:{one.attributes[:200]}")


def _parts(shape: str) -> list[str]:
    """The elements of a tuple shape: `(f32[2]{0}, (s8[1], s8[1]))` has two."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _dtype_and_bytes(shape: str) -> tuple[str, int]:
    """The dtypes, joined by `+`, and bytes of all arrays in a shape: 1024 for `f32[16,16]{1,0}`."""
    dtypes, total = set(), 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else 8  # pred is a byte
        total += math.ceil(math.prod(int(dim) for dim in re.findall(r"\d+", dims)) * bits / 8)
        dtypes.add(dtype)
    return "+".join(sorted(dtypes)), total
