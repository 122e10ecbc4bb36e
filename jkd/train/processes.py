"""What several processes of one run agree on."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jkd.errors import UserError

MESSAGE_BYTES = 2000


def barrier(name: str) -> None:
    """Waits for all processes (nothing to do for one)."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def worst(code: int) -> int:
    """The largest of the processes' codes: all of them go on with the same one."""
    if jax.process_count() == 1:
        return code
    return int(multihost_utils.process_allgather(np.int32(code)).max())


def from_chief(text: str) -> str:
    """The first process's text, up to `MESSAGE_BYTES` of it, on all processes."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode()[:MESSAGE_BYTES]
    sent = np.zeros(MESSAGE_BYTES, np.uint8)
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return received.tobytes().rstrip(b"\0").decode(errors="replace")


def on_chief(fn: Callable[[], Any]) -> Any:
    """Runs `fn` on process 0 alone and returns its result there, None elsewhere.

    Raises:
      UserError: on every process, where it fails on the first: the others would wait for it for ever.
    """
    result, problem = None, ""
    if jax.process_index() == 0:
        try:
            result = fn()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}." if error.strerror else str(error)
    problem = from_chief(problem)
    if problem:
        raise UserError(problem)
    return result
