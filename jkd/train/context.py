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
from jkd.train.watchdog import Progress


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How a run is executed; none of it changes what is computed.

    Attributes:
      checkpoint_every: steps between checkpoints of a stage; 0 saves only when asked to stop.
      keep: checkpoints of the running stage that are kept.
      progress: whether to show a bar (on a terminal) or lines.
      tensorboard: whether to write TensorBoard events.
      profile: `[STAGE:]START:STOP`, steps of a stage to profile; see `jkd.train.profile`.
      peer_timeout: of several processes, seconds until a host that does not answer is given up; a process that died
        is noticed at once. 0: the processes do not watch each other.
      hang_timeout: seconds without any progress after which the process ends with the stacks of its threads; 0: never.
    """

    checkpoint_every: int = 1000
    keep: int = 3
    progress: bool = True
    tensorboard: bool = True
    profile: str = ""
    peer_timeout: float = 60.0
    hang_timeout: float = 1800.0

    def __post_init__(self):
        if self.keep < 1 or self.checkpoint_every < 0:
            raise UserError(
                "keep must be >= 1 and checkpoint_every >= 0 (0: only when asked to stop), got "
                f"keep={self.keep}, checkpoint_every={self.checkpoint_every}."
            )
        if self.peer_timeout < 0 or self.hang_timeout < 0:
            raise UserError(
                "peer_timeout and hang_timeout must be >= 0 seconds (0: off), got "
                f"peer_timeout={self.peer_timeout}, hang_timeout={self.hang_timeout}."
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
    progress: Progress
    span: Span | None = None  # what is profiled
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
        """`jkd.train.sweep` on the run's mesh; SIGTERM ends it."""

        def watch() -> None:
            self.progress.at("a sweep of prepare")
            self.stop_if_asked("the end of a sweep")

        named: Any = {"mesh": self.mesh, "residents": self.residents, "rules": self.rules, "watch": watch}
        rows = sweep(fn, args, source, key, **named)
        self.progress.at("prepare")
        return rows

    def stop_if_asked(self, before: str) -> None:
        """Raises Preempted if the run was asked to stop: no state is under way that could be saved."""
        if self.stop.reached():
            raise Preempted(
                f"Stopped on request before {before}; what is finished is in {self.workdir}. Run the same command "
                "again to go on."
            )
