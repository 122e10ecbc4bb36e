"""SIGTERM as a request to stop at a step on which all processes agree."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from jkd.errors import UserError


class Preempted(UserError):
    """The run was asked to stop, and has saved where it was."""


class StopRequest:
    """Listens for SIGTERM while the run lasts.

    One process reads a flag; several use JAX's preemption service, which lets all of them stop at one step even
    if only one of them was told. That service compares how often each process has asked whether to stop: all ask at
    the same moments of a run.
    """

    def __init__(self) -> None:
        self._asked = False
        self._questions = 0
        self._old: object = None

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)  # type: ignore[arg-type]

    def reached(self) -> bool:
        """Whether to stop here; the same answer on all processes, which must all ask."""
        if jax.process_count() == 1:
            return self._asked
        self._questions += 1
        return multihost_utils.reached_preemption_sync_point(self._questions)
