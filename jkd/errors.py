"""The one exception for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable


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
