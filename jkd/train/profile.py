"""A profile of some steps of one stage, for TensorBoard (XProf) and Perfetto."""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from jkd.errors import UserError, unknown
from jkd.train.stage import Stage

KINDS = (".xplane.pb", ".trace.json.gz")  # for XProf, for Perfetto


class Span(NamedTuple):
    """The steps `start`..`stop - 1` of a stage."""

    stage: str
    start: int
    stop: int


def parse_span(text: str, stages: Sequence[Stage]) -> Span | None:
    """Reads `[STAGE:]START:STOP`, by default of the first stage that has steps; None for an empty text.

    Raises:
      UserError: if it is malformed, or names a stage or steps that are not there.
    """
    if not text:
        return None
    found = re.fullmatch(r"(?:([A-Za-z0-9_-]+):)?(\d+):(\d+)", text)
    if found is None:
        raise UserError(f"profile must be START:STOP or STAGE:START:STOP, such as 10:20 or kd:10:20, got {text!r}.")
    stepping = {stage.name: (stage.first_step, stage.num_steps) for stage in stages if stage.has_steps}
    name = found[1] or next(iter(stepping), "")
    if name not in stepping:
        raise unknown("stage with steps in profile", name, stepping)
    start, stop = int(found[2]), int(found[3])
    first, end = stepping[name]
    if not start < stop <= end:
        raise UserError(f"profile={text!r}: START must be below STOP, and STOP at most {end}, the steps of {name!r}.")
    if start < first:
        raise UserError(f"profile={text!r}: START must be at least {first}, the first step of {name!r}.")
    return Span(name, start, stop)


class Profile:
    """Traces the steps of a span while a stage runs; one that begins later in the span traces what is left of it.

    Every process writes its own file, so that a viewer shows all hosts as one run.
    """

    def __init__(self, span: Span | None, stage: str, folder: epath.Path):
        """Does nothing where `span` is None or of another stage."""
        self._span = span if span is not None and span.stage == stage else Span(stage, 0, 0)
        self._folder = folder
        self._local: tempfile.TemporaryDirectory | None = None
        self._name = ""

    def step(self, t: int, last: Any) -> contextlib.AbstractContextManager:
        """Begins or ends the trace where step `t` says so, and marks the step; `last` is what the last one returned."""
        if t >= self._span.stop:
            self.close(last)
        elif t >= self._span.start and self._local is None:
            self._local = tempfile.TemporaryDirectory(prefix="jkd-profile-")
            self._name = f"steps-{t}-{self._span.stop}"
            jax.profiler.start_trace(self._local.name)
        if self._local is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=t)

    def close(self, last: Any = None) -> None:
        """Ends the trace, if it is on, when the devices are done with it, and stores it."""
        if self._local is None:
            return
        local, self._local = self._local, None
        with local:
            try:
                jax.block_until_ready(last)
            finally:
                jax.profiler.stop_trace()
            # Written here and copied: the profiler knows no remote folders, and hosts may have equal names.
            run = self._folder / "plugins" / "profile" / self._name
            run.mkdir(parents=True, exist_ok=True)
            for kind in KINDS:
                for file in pathlib.Path(local.name).rglob(f"*{kind}"):
                    (run / f"process-{jax.process_index()}{kind}").write_bytes(file.read_bytes())
