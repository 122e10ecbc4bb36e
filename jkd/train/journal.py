"""What a running stage has logged and measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jkd.train.context import Context
from jkd.train.log import Events, JsonLines, jsonable, png
from jkd.train.processes import on_chief
from jkd.train.workdir import write_bytes


class Journal:
    """The JSON lines and TensorBoard events of a stage, and the last, largest and smallest value of every metric.

    Attributes:
      metrics: `{evaluator/name: value}` of the last evaluation.
      history: `{evaluator/name: {"last", "max", "min", "steps", "values"}}`: all values, and after which steps.
    """

    def __init__(self, ctx: Context, stage: str, folder: str):
        self._ctx, self._stage, self._folder = ctx, stage, folder
        self._lines: JsonLines | None = None
        self._events: Events | None = None
        self.metrics: dict[str, Any] = {}
        self.history: dict[str, dict[str, Any]] = {}

    def open(self, stored: Mapping[str, Any], step: int) -> None:
        """Goes on at a step, behind what a checkpoint or an outcome has `stored`."""
        self.history = stored.get("history", {})
        path = self._ctx.workdir / "metrics.jsonl"
        self._lines = on_chief(lambda: JsonLines(path, stored.get("log_offset", 0), stored.get("log_check")))
        if self._ctx.chief and self._ctx.options.tensorboard:
            self._events = Events(self._ctx.workdir / "tensorboard" / self._folder, step + 1)

    def stored(self) -> dict[str, Any]:
        """What a checkpoint or an outcome keeps: the history, and where the lines end that are now on disk."""
        kept: dict[str, Any] = {"history": jsonable(self.history)}
        if self._lines is not None:
            kept |= {"log_offset": self._lines.flush(), "log_check": self._lines.check}
        return kept

    def write(self, step: int, record: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """Logs metrics by kind; `rates` go to TensorBoard alone."""
        if self._lines is not None:
            self._lines.write({"stage": self._stage, "step": step, **record})
        if self._events is not None:
            for kind, values in {**record, "speed": rates}.items():
                self._events.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, as PNG files and to TensorBoard."""
        folder = self._ctx.workdir / "pictures" / self._folder
        if not (pictures and self._ctx.chief):
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_bytes(folder / f"{name}-{step:08d}.png", png(picture))
            if self._events is not None:
                self._events.picture(step, name, picture)

    def remember(self, step: int, found: Mapping[str, Any]) -> None:
        """Notes the values of an evaluation."""
        self.metrics.update(found)
        for name, value in found.items():
            old = self.history.get(name)
            value = np.asarray(value, np.float64)
            self.history[name] = jsonable(
                {
                    "last": value,
                    "max": value if old is None else np.fmax(old["max"], value),
                    "min": value if old is None else np.fmin(old["min"], value),
                    "steps": [*([] if old is None else old["steps"]), step],
                    "values": [*([] if old is None else old["values"]), value],
                }
            )

    def close(self) -> None:
        """Closes the files."""
        if self._events is not None:
            self._events.close()
