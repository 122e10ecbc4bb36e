"""What a run says: a progress bar, JSON lines, TensorBoard events."""

import contextlib
import io
import json
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jkd.errors import UserError
from jkd.train.workdir import is_remote

console = Console(stderr=True, highlight=False)
REMOTE_SECONDS = 30.0


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

    Object stores cannot append: there the whole file is written anew, `REMOTE_SECONDS` apart and in `flush`.
    """

    def __init__(self, path: epath.Path, offset: int, check: int | None = None):
        self._path, self.offset = path, offset
        self._remote: bytes | None = None
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
        if is_remote(path):
            self._remote, self._written, self._last = known, size, time.perf_counter()
        elif size > offset:
            os.truncate(path, offset)  # in place: a kill here leaves the old length or the new one

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; `offset` counts the bytes so far, `check` is their CRC-32."""
        line = (json.dumps(jsonable(record)) + "\n").encode()
        self.offset += len(line)
        self.check = zlib.crc32(line, self.check)
        if self._remote is None:
            with self._path.open("ab") as file:
                file.write(line)
            return
        self._remote += line
        if time.perf_counter() - self._last > REMOTE_SECONDS:
            self.flush()

    def flush(self) -> int:
        """Returns the length of the file when it holds all lines: before anything is stored that relies on them."""
        if self._remote is not None and self._written != self.offset:
            self._path.write_bytes(self._remote)
            self._written, self._last = self.offset, time.perf_counter()
        return self.offset


class Events:
    """TensorBoard events of one stage; events past the resumed step are hidden (purged) by TensorBoard."""

    def __init__(self, directory: epath.Path, start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=start)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the mean over members of every metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(np.mean(value)), step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds uint8[height, width] or uint8[height, width, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8[height, width] or uint8[height, width, 3].

    Raises:
      UserError: for other shapes or dtypes.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise UserError(f"A picture must be uint8[H, W] or uint8[H, W, 3], got {pixels.dtype}{list(pixels.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


class Mark(NamedTuple):
    """A moment of a stage: its step, its time without what was put aside, and the time it had waited for data."""

    step: int
    time: float
    stalled: float


class Meter:
    """Progress of one stage: a bar with ETA, and rates that leave out the first step, evaluations and checkpoints."""

    def __init__(self, name: str, start: int, stop: int, images_per_step: int, *, show: bool):
        self._name, self._stop, self._images = name, stop, images_per_step
        self._flops = self._peak = 0.0
        self._began = self._last = time.perf_counter()
        self._start = self._step = self._first = start
        self._stalled = self._aside = 0.0
        self._bar: Progress | None = None
        if show and sys.stderr.isatty():
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console)
            self._task = self._bar.add_task(name, total=stop, completed=start, rate="")
            self._bar.start()
        self._show = show
        # The bar and the lines say what happened in the last seconds.
        self._recent: deque[Mark] = deque([self._mark()], maxlen=25 if self._bar else 1)
        self._window = self._mark()

    def account(self, flops: float, peak: float) -> None:
        """Sets the FLOPs of a step and the `peak` FLOP/s of all devices, for MFU; 0: not known, and not shown."""
        self._flops, self._peak = flops, peak

    def stall(self, seconds: float) -> None:
        """Adds time spent waiting for a batch."""
        self._stalled += seconds

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - began

    def _mark(self) -> Mark:
        return Mark(self._step, time.perf_counter() - self._aside, self._stalled)

    def rates(self, since: Mark | None = None) -> dict[str, float]:
        """Milliseconds of a step, images per second, share of time without data, and MFU where the peak is known.

        They hold since the stage (re)started, or since an earlier moment.
        """
        since, now = since or Mark(self._start, self._began, 0.0), self._mark()
        elapsed, steps = max(now.time - since.time, 1e-9), now.step - since.step
        found = {
            "step_ms": 1000 * elapsed / steps if steps else 0.0,
            "images_per_second": steps * self._images / elapsed,
            "data_stall": (now.stalled - since.stalled) / elapsed,
        }
        return found | ({"mfu": steps * self._flops / elapsed / self._peak} if self._peak else {})

    def window(self) -> dict[str, float]:
        """The rates since this was asked last."""
        since, self._window = self._window, self._mark()
        return self.rates(since)

    def update(self, step: int) -> None:
        """Moves the bar, at most five times a second; without a terminal, a line every ten seconds."""
        self._step = step
        now = time.perf_counter()
        if self._start == self._first:  # rates leave out the first step, which compiles
            self._start, self._began, self._stalled, self._aside = step, now, 0.0, 0.0
            self._window = self._mark()
            self._recent.clear()
            self._recent.append(self._window)
        if not self._show or now - self._last < (0.2 if self._bar else 10.0):
            return
        self._last = now
        text = self._text(self._recent[0])
        self._recent.append(self._mark())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=text)
        else:
            left = (self._stop - step) * (now - self._began) / max(step - self._start, 1)
            console.print(f"{self._name}: step {step}/{self._stop}, {text}, ETA {left:.0f} s", soft_wrap=True)

    def _text(self, since: Mark | None = None) -> str:
        rates = self.rates(since)
        shown = f"{rates['step_ms']:.4g} ms a step, {rates['images_per_second']:,.0f} images/s, "
        shown += f"{100 * rates['data_stall']:.1f} % waiting for data"
        return shown + (f", {100 * rates['mfu']:.1f} % MFU" if "mfu" in rates else "")

    def close(self, step: int) -> None:
        """Ends the bar and prints the stage's rates."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=self._text())
            self._bar.stop()
        elif self._show:
            seconds = time.perf_counter() - self._began
            console.print(f"{self._name}: {step}/{self._stop} steps in {seconds:.1f} s, {self._text()}", soft_wrap=True)
