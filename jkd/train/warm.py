"""Warm starts: a new tree of variables takes from a stored one what fits, and a report says what did."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jkd.errors import UserError
from jkd.train.mesh import place_leaf
from jkd.trees import path_name

PathRules = Sequence[tuple[str, str | None]]
SHOWN = 3  # of the leaves in an error


@dataclasses.dataclass(frozen=True)
class Report:
    """What a warm start took; every field by leaf path.

    Attributes:
      taken: target path -> the source path whose values it has now.
      cast: target path -> (the source's dtype, the target's); of those taken.
      initialized: target paths that keep their own values, because no source leaf has their name.
      mismatched: target path -> (the source's shape, the target's): these keep their own values too.
      unused: source paths that no leaf of the target has, and those that a rule dropped.
    """

    taken: Mapping[str, str]
    cast: Mapping[str, tuple[str, str]]
    initialized: Sequence[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: Sequence[str]

    def summary(self) -> str:
        """The counts in one line."""
        total = len(self.taken) + len(self.initialized) + len(self.mismatched)
        return (
            f"{len(self.taken)} of {total} leaves taken ({len(self.cast)} cast), {len(self.initialized)} left as "
            f"initialized, {len(self.mismatched)} of another shape, {len(self.unused)} of the source unused"
        )

    def table(self, *, every: bool = False) -> Table:
        """The leaves and what became of them; without `every`, not those that were taken as they are."""
        made = Table()
        for column in ("leaf", "what", "source"):
            made.add_column(column, overflow="fold")
        for name, origin in self.taken.items():
            if every or origin != name or name in self.cast:
                what = "taken" if name not in self.cast else "taken, cast from {} to {}".format(*self.cast[name])
                made.add_row(name, what, "" if origin == name else origin)
        for name, (stored, wanted) in self.mismatched.items():
            made.add_row(name, f"as initialized: {list(wanted)}", f"is {list(stored)}")
        for name in self.initialized:
            made.add_row(name, "as initialized", "")
        for name in self.unused:
            made.add_row("", "unused", name)
        return made


def warm_start(target: Any, source: Any, rules: PathRules = (), *, strict: bool = False) -> tuple[Any, Report]:
    r"""Replaces the leaves of `target` by those of `source` that have their path and shape.

    Works on arrays, on traced values (inside jit or vmap, where the caller lays out the result) and on shapes. Arrays
    keep the target's dtype and sharding; of two ensembles, all members are taken.

    Args:
      target: a tree of variables, such as `{"params": ..., "batch_stats": ...}`.
      source: another one, of a stored model.
      rules: `(regex, replacement)` on source paths like `params/block1/conv/kernel`. The first rule whose regex is
        found in a path decides: all that it matches is replaced (`re.sub`, so `\1` is a group), or with None the leaf
        is dropped. A path that no rule matches stays as it is.
      strict: whether every leaf of both trees must be used; leaves that a rule drops may stay behind.

    Returns:
      The tree, of the target's structure, and the report.

    Raises:
      UserError: for a regex that cannot be read, if two source leaves get one path, if no leaf can be taken, or, with
        `strict`, if a target leaf is not taken or a source leaf is left over.
    """
    named, dropped = _renamed(source, rules)
    leaves: dict[str, Any] = {}
    taken, cast, initialized, mismatched = {}, {}, [], {}
    for path, leaf in jax.tree.leaves_with_path(target):
        name = path_name(path)
        leaves[name] = leaf
        if name not in named:
            initialized.append(name)
            continue
        origin, stored = named[name]
        if np.shape(stored) != np.shape(leaf):
            mismatched[name] = (np.shape(stored), np.shape(leaf))
            continue
        taken[name] = origin
        if stored.dtype != leaf.dtype:
            cast[name] = (str(stored.dtype), str(leaf.dtype))
        leaves[name] = _like(stored, leaf)
    left = [origin for name, (origin, _) in named.items() if name not in leaves]
    _check(taken, initialized, mismatched, left, strict)
    report = Report(taken, cast, initialized, mismatched, [*left, *dropped])
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves[path_name(path)], target), report


def parse_rules(lines: Sequence[str]) -> list[tuple[str, str | None]]:
    """Rules from text: `regex -> replacement`, and `regex ->` to drop.

    Raises:
      UserError: for a line without an arrow.
    """
    rules: list[tuple[str, str | None]] = []
    for line in lines:
        pattern, arrow, replacement = line.partition("->")
        if not arrow or not pattern.strip():
            raise UserError(f"The rule {line!r} must be 'regex -> replacement', or 'regex ->' to drop what it matches.")
        rules.append((pattern.strip(), replacement.strip() or None))
    return rules


def _renamed(source: Any, rules: PathRules) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    # New path -> (path in the source, leaf), and what was dropped.
    compiled = [(_regex(pattern), replacement) for pattern, replacement in rules]
    named: dict[str, tuple[str, Any]] = {}
    dropped = []
    for path, leaf in jax.tree.leaves_with_path(source):
        origin = path_name(path)
        name = _rename(origin, compiled)
        if name is None:
            dropped.append(origin)
        elif name in named:
            raise UserError(f"The rules give {named[name][0]} and {origin} one path, {name}: drop one of them.")
        else:
            named[name] = (origin, leaf)
    return named, dropped


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"The rule's regex {pattern!r} cannot be read: {error}.") from error


def _rename(name: str, rules: Sequence[tuple[re.Pattern, str | None]]) -> str | None:
    for pattern, replacement in rules:
        if pattern.search(name):
            try:
                return None if replacement is None else pattern.sub(replacement, name)
            except (re.error, IndexError) as error:
                raise UserError(f"The rule's replacement {replacement!r} cannot be used: {error}.") from error
    return name


def _like(stored: Any, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if stored.dtype != leaf.dtype:
        stored = stored.astype(leaf.dtype)
    if not isinstance(leaf, jax.Array) or any(isinstance(x, jax.core.Tracer) for x in (stored, leaf)):
        return stored
    # A copy, even where it lies as it should: a step that is given the result may take its memory.
    return place_leaf(jnp.copy(stored) if isinstance(stored, jax.Array) else stored, leaf.sharding)


def _check(taken: Mapping, initialized: Sequence, mismatched: Mapping, left: Sequence, strict: bool) -> None:
    problems = [f"{name} is {list(a)} in the source and {list(b)} here" for name, (a, b) in mismatched.items()]
    problems += [f"{name} is not in the source" for name in initialized]
    problems += [f"{name} of the source is not here" for name in left]
    if (strict and problems) or not taken:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        what = "does not fit" if taken else "has nothing that fits"
        raise UserError(f"The warm start's source {what}: {'; '.join(problems[:SHOWN])}{more}. Rename by rules.")
