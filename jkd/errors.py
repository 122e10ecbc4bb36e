"""The one exception for mistakes that the user can fix, and how processes end."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable
from typing import NoReturn

# docs/reliability.md says when each of them comes.
EXIT_USER_ERROR = 2
EXIT_LOST = 75  # EX_TEMPFAIL: another process is gone; the same command goes on
EXIT_HUNG = 76
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143


class UserError(ValueError):
    """A mistake that the user can fix: commands print it as one line, without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?`, or an empty string where nothing known comes close to `name`."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` ones: names the nearest and lists all."""
    known = sorted(known)
    return UserError(f"Unknown {kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")


def end_now(line: str, code: int) -> NoReturn:
    """Prints one line and ends the process from any thread: nothing is waited for, nothing cleaned up."""
    with contextlib.suppress(OSError, ValueError):
        shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
        os.write(2, f"{shown}jkd: error: {line}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
