"""Ends a run that makes no progress any more, with a line that says where it hangs."""

import dataclasses
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from jkd.errors import EXIT_HUNG, end_now

TICK = 1.0  # seconds
BUSY = 0.2  # of a core: work of the host that reports nothing, such as compiling, or clustering in `prepare`
STEPPING = "training"  # the phase in which every step is progress


@dataclasses.dataclass
class Progress:
    """Where a run is: written by the loop, read by the threads that watch it.

    Attributes:
      stage: the running stage's name.
      step: steps of it that were dispatched.
      phase: what it is doing.
      saved: the step of its newest checkpoint that is known to be complete.
      beats: grows whenever anything was finished.
    """

    stage: str = ""
    step: int = 0
    phase: str = "start"
    saved: int = 0
    beats: int = 0

    def at(self, phase: str, **changes: str | int) -> None:
        """Notes what begins now; whatever came before it is finished."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.phase = phase
        self.beats += 1

    def __str__(self) -> str:
        return f"stage {self.stage!r}, step {self.step}, {self.phase}" if self.stage else self.phase

    @property
    def way_on(self) -> str:
        """Where a restarted run goes on."""
        where = f"step {self.saved} of stage {self.stage!r}" if self.stage else "its beginning"
        return f"to go on from {where} or later"


class Watchdog:
    """A thread that ends the process when `progress` stands still for `timeout` seconds; 0 never does.

    Only time in which this thread itself was scheduled counts: neither a suspended machine nor a process that was
    stopped for a while is taken for a hang. Between steps, where nothing reports, a process that computes does not
    hang, however long it takes.
    """

    def __init__(self, progress: Progress, timeout: float, tell: Callable[[str, int], None] = lambda line, code: None):
        self._progress, self._timeout, self._tell = progress, timeout, tell
        self._tick = min(TICK, timeout / 10)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jkd-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._timeout:
            self._thread.join()

    def _watch(self) -> None:
        beats, still, last, used = self._progress.beats, 0.0, time.monotonic(), time.process_time()
        while not self._done.wait(self._tick):
            now, cpu = time.monotonic(), time.process_time()
            computes = self._progress.phase != STEPPING and cpu - used > BUSY * (now - last)
            still += min(now - last, 2 * self._tick)
            last, used = now, cpu
            if computes or self._progress.beats != beats:
                beats, still = self._progress.beats, 0.0
            elif still >= self._timeout:
                self._hung(still)

    def _hung(self, seconds: float) -> None:
        line = (
            f"nothing was finished for {seconds:.0f} s (loop.hang_timeout): the run hangs in {self._progress}. "
            f"Run the same command again {self._progress.way_on}; the stacks of all threads are above."
        )
        self._tell(line, EXIT_HUNG)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)
        end_now(line, EXIT_HUNG)
