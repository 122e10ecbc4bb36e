"""The text of a compiled program (HLO): its instructions, its loops, and how often each computation runs."""

import functools
import math
import re
from collections import defaultdict
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a computation; sizes are in its shape, all else in its attributes."""

    computation: str = ""
    root: str = ""
    name: str = ""
    shape: str = ""
    opcode: str = ""
    inside: str = ""  # between the parentheses: operands, or a constant's value
    attributes: str = ""

    @property
    def operands(self) -> list[str]:
        """The names of its operands, in the same computation."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        return re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(self.attributes)))

    def find(self, pattern: str) -> str:
        """The first group of a pattern in its attributes; empty where it is not found."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


class Program:
    """The instructions of an HLO module, and how often each computation runs."""

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        computation = self.entry = ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _HEADER.match(line):
                computation = header[2]
                self.entry = computation if header[1] else self.entry
            elif computation and (found := _INSTRUCTION.match(line)):
                self.instructions.append(Instruction(computation, *(group or "" for group in found.groups())))
        if not self.entry:
            raise ValueError("The text is no HLO module: it has no ENTRY computation.")
        self.named = {(one.computation, one.name): one for one in self.instructions}
        self.roots = {one.computation: one for one in self.instructions if one.root}
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.splitlines()[0])
        self.num_devices = math.prod(int(count) for count in counts)

    def loops(self) -> dict[str, int | None]:
        """The trips of every loop, None where the program does not tell."""
        return {one.name: self.trips(one) for one in self.instructions if one.opcode == "while"}

    def runs(self, *, loops: bool = True) -> dict[str, int]:
        """How often each computation runs: once a call, times the trips of the loops around it.

        Without `loops`, every loop body runs once, as in the compiler's own counts.
        """
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for one in self.instructions:
            trips = self.trips(one) if loops and one.opcode == "while" else 1
            for called in one.called:
                callers[called].append((one.computation, 1 if trips is None else trips))

        @functools.cache
        def count(name: str) -> int:
            return 1 if name == self.entry else sum(count(caller) * trips for caller, trips in callers[name])

        return {name: count(name) for name in self.roots}

    def trips(self, loop: Instruction) -> int | None:
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

    def operand(self, one: Instruction, k: int) -> Instruction:
        """The k-th operand of an instruction; an empty one where there is none."""
        names = one.operands
        return self.named.get((one.computation, names[k]), Instruction()) if k < len(names) else Instruction()

    def _source(self, computation: str, name: str) -> Instruction:
        """The instruction behind a name, seen through copies; an empty one where there is none."""
        found = self.named.get((computation, name), Instruction())
        return self._source(computation, found.operands[0]) if found.opcode == "copy" else found

    def _element(self, values: Instruction, index: str) -> Instruction:
        name = values.operands[int(index)] if values.opcode == "tuple" else ""
        return self._source(values.computation, name)


def parts(shape: str) -> list[str]:
    """The elements of a tuple shape: `(f32[2]{0}, (s8[1], s8[1]))` has two."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def dtype_and_bytes(shape: str) -> tuple[str, int]:
    """The dtypes, joined by `+`, and bytes of all arrays in a shape: 1024 for `f32[16,16]{1,0}`."""
    dtypes, total = set(), 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        total += math.ceil(math.prod(int(dim) for dim in re.findall(r"\d+", dims)) * bits_of(dtype) / 8)
        dtypes.add(dtype)
    return "+".join(sorted(dtypes)), total


def dimensions(shape: str) -> list[int]:
    """The sizes of an array: [16, 4] for `f32[16,4]{1,0}`, [] for a scalar or a tuple."""
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []


def bits_of(dtype: str) -> int:
    """The bits of one element: 16 for `bf16`, 8 for `f8e4m3fn`."""
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 8  # pred is a byte
