"""How a run is executed, and what its stages share."""

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jkd.errors import UserError
from jkd.train.log import console
from jkd.train.mesh import Rules
from jkd.train.passes import Residents, sweep
from jkd.train.profile import Span
from jkd.train.signals import Preempted, StopRequest


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a run is executed; none of it changes what is computed.

    Attributes:
      checkpoint_every: steps between checkpoints of a stage; 0 saves only when asked to stop.
      keep: checkpoints of the running stage that are kept.
      progress: whether to show a bar (on a terminal) or lines.
      tensorboard: whether to write TensorBoard events.
      profile: `[STAGE:]START:STOP`, steps of a stage to profile; see `jkd.train.profile`.
    """

    checkpoint_every: int = 1000
    keep: int = 3
    progress: bool = True
    tensorboard: bool = True
    profile: str = ""

    def __post_init__(self):
        if self.keep < 1 or self.checkpoint_every < 0:
            raise UserError(
                "keep must be >= 1 and checkpoint_every >= 0 (0: only when asked to stop), got "
                f"keep={self.keep}, checkpoint_every={self.checkpoint_every}."
            )


@dataclasses.dataclass
class Context:
    """What the stages of one run share."""

    workdir: epath.Path
    mesh: Mesh
    rules: Rules
    key: jax.Array
    log_every: int
    options: LoopOptions
    residents: Residents
    stop: StopRequest
    span: Span | None = None  # what is profiled
    steps_before: int = 0
    begun: bool = False  # whether a step was taken

    @property
    def chief(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return jax.process_index() == 0

    def say(self, text: str) -> None:
        """Prints a line, once."""
        if self.chief:
            console.print(text, soft_wrap=True)

    def sweep(self, fn: Any, args: Any, source: Any, key: Any = None) -> Any:
        """`jkd.train.sweep` on the run's mesh; SIGTERM ends it (of one process: several agree only at their steps)."""
        return sweep(
            fn,
            args,
            source,
            key,
            mesh=self.mesh,
            residents=self.residents,
            rules=self.rules,
            watch=lambda: self.stop_if_asked("the end of a sweep"),
        )

    def stop_if_asked(self, before: str) -> None:
        """Raises Preempted where a single process was asked to stop: no state is under way that could be saved."""
        if self.stop.asked:
            raise Preempted(
                f"Stopped on request before {before}; what is finished is in {self.workdir}. Run the same command "
                "again to go on."
            )
