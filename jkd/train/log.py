"""What a run says: a progress bar, JSON lines, TensorBoard events."""

import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jkd.errors import UserError

console = Console(stderr=True, highlight=False)


def jsonable(tree: Any) -> Any:
    """Numbers and arrays as floats and lists, at full precision; dicts, lists and strings as they are."""
    if isinstance(tree, Mapping):
        return {str(name): jsonable(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [jsonable(value) for value in tree]
    if tree is None or isinstance(tree, str | bool | int):
        return tree
    return np.asarray(tree).tolist()


def brief(metrics: Mapping[str, Any]) -> str:
    """Metrics in one line, each as the mean over members."""
    return ", ".join(f"{name} {np.mean(value):.4g}" for name, value in metrics.items()) or "no metrics"


class JsonLines:
    """A file of JSON lines that can be cut back to where a checkpoint saw it.

    Remote file systems cannot append: there the whole file is written anew with every line.
    """

    def __init__(self, path: epath.Path, offset: int, check: int | None = None):
        self._path, self.offset = path, offset
        self._remote = b"" if "://" in str(path) else None
        if not path.exists():
            path.write_bytes(b"")
        size = path.stat().length
        if size < offset:
            raise UserError(
                f"{path} is shorter than the checkpoint saw it ({size} < {offset} bytes): restore the file, or start "
                "again in a new workdir."
            )
        with path.open("rb") as file:
            known = file.read(offset)
        self.check = zlib.crc32(known)
        if check not in (None, self.check):
            raise UserError(
                f"{path} is not what the checkpoint saw (its first {offset} bytes were altered): restore the file, or "
                "start again in a new workdir."
            )
        if self._remote is not None:
            self._remote = known
        elif size > offset:
            os.truncate(path, offset)  # in place: a kill here leaves the old length or the new one

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; `offset` counts the bytes so far, `check` is their CRC-32."""
        line = (json.dumps(jsonable(record)) + "\n").encode()
        self.offset += len(line)
        self.check = zlib.crc32(line, self.check)
        if self._remote is not None:
            self._remote += line
            self._path.write_bytes(self._remote)
        else:
            with self._path.open("ab") as file:
                file.write(line)


class Events:
    """TensorBoard events of one stage; events past the resumed step are hidden (purged) by TensorBoard."""

    def __init__(self, directory: epath.Path, start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=start)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the mean over members of every metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(np.mean(value)), step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class Meter:
    """Progress of one stage: a bar with ETA, images per second, and the share of time spent waiting for data."""

    def __init__(self, name: str, start: int, stop: int, images_per_step: int, *, show: bool):
        self._name, self._stop, self._images = name, stop, images_per_step
        self._began = self._last = time.perf_counter()
        self._start = self._step = self._first = start
        self._stalled = 0.0
        self._bar: Progress | None = None
        if show and sys.stderr.isatty():
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console)
            self._task = self._bar.add_task(name, total=stop, completed=start, rate="")
            self._bar.start()
        self._show = show

    def stall(self, seconds: float) -> None:
        """Adds time spent waiting for a batch."""
        self._stalled += seconds

    def rates(self) -> dict[str, float]:
        """Steps and images per second since the stage (re)started, and the share of time without data."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        steps = (self._step - self._start) / elapsed
        return {
            "steps_per_second": steps,
            "images_per_second": steps * self._images,
            "data_stall": self._stalled / elapsed,
        }

    def update(self, step: int) -> None:
        """Moves the bar, at most five times a second; without a terminal, a line every ten seconds."""
        self._step = step
        now = time.perf_counter()
        if self._start == self._first:  # rates leave out the first step, which compiles
            self._start, self._began, self._stalled = step, now, 0.0
        if not self._show or now - self._last < (0.2 if self._bar else 10.0):
            return
        self._last = now
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=self._text())
        else:
            left = (self._stop - step) * (now - self._began) / max(step - self._start, 1)
            console.print(f"{self._name}: step {step}/{self._stop}, {self._text()}, ETA {left:.0f} s")

    def _text(self) -> str:
        rates = self.rates()
        return f"{rates['images_per_second']:,.0f} images/s, {100 * rates['data_stall']:.1f} % waiting for data"

    def close(self, step: int) -> None:
        """Ends the bar and prints the stage's rates."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=self._text())
            self._bar.stop()
        elif self._show:
            seconds = time.perf_counter() - self._began
            console.print(f"{self._name}: {step}/{self._stop} steps in {seconds:.1f} s, {self._text()}")
