"""What the devices of a compiled program send each other: each collective with its dtype and its bytes."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from jkd.train.hlo import Instruction, Program, dtype_and_bytes, parts


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


# What a device sends in a ring of n, in parts of the payload: rounds * (n - 1) / n. A permute sends it all.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 0}


def collectives(program: Program) -> list[Collective]:
    """The collectives of a compiled program, the most wire bytes first.

    Raises:
        ValueError: the program names its device groups in a way that is not known.
    """
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


def _distinct(program: Program, runs: Mapping[str, int]) -> Iterator[Instruction]:
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


def _within_slice(one: Instruction, devices: int) -> tuple[str, str, int, int]:
    """Kind, dtype, payload bytes and group size of a collective inside a slice."""
    kind = one.opcode.removesuffix("-start")
    group = _group_size(one, devices)
    # An asynchronous one has the shape (operands, results, ...); an all-reduce-start has the results alone.
    has_operands = one.opcode != kind and kind != "all-reduce"
    dtype, size = dtype_and_bytes(parts(one.shape)[1] if has_operands else one.shape)
    if kind == "reduce-scatter":
        return kind, dtype, size * group, group
    # A fused all-reduce and slice, which the TPU runs as one reduce-scatter.
    fused = one.computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if fused else kind, dtype, size, group


def _across_slices(one: Instruction) -> tuple[str, str, int, int]:
    """Kind, dtype, payload bytes and group size of a send to other slices; its shape is (operand, ...)."""
    transfer = one.find(r'_xla_megascale_transfer_type="(\w+)"')
    kind = "collective-permute" if transfer == "ONE_TO_ONE" else transfer.lower().replace("_", "-")
    dtype, size = dtype_and_bytes(parts(one.shape)[0])
    pairs = re.findall(r"(\d+)->(\d+)", one.attributes)
    listed = one.find(r'_xla_megascale_target="?\{+([\d,]+)\}').split(",")
    group = len(set(sum(pairs, ()))) if pairs else len(listed)
    return kind, dtype, size * group if kind == "all-gather" else size, group


def _group_size(one: Instruction, devices: int) -> int:
    """Devices in one group, from any of the forms in which HLO writes groups."""
    if pairs := one.find(r"source_target_pairs=\{(\{.*?\})\}"):
        return len(set(re.findall(r"\d+", pairs)))
    if listed := one.find(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    if counted := one.find(r"replica_groups=\[\d+,(\d+)\]<="):
        return int(counted)
    # The devices' order may stand between the mesh and its axes: mesh['a'=4], device_ids=([2,2]T(1,0)) {'a'}.
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:,\s*device_ids=\([^{]*\))?\s*\{(.*?)\}", one.attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'axis', or a part of one: 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups={}" in one.attributes:
        return devices
    raise ValueError(f"Unknown form of device groups in {one.name}:{one.attributes[:200]}")
