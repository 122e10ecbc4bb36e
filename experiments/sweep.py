r"""Expands a sweep file to one training command a line, for a shell, xargs or an array job.

    python -m experiments.sweep configs/sweeps/energy_kd_rates.toml | sh
    python -m experiments.sweep FILE | xargs -P 4 -d '\n' -n 1 sh -c
    python -m experiments.sweep FILE --line $SLURM_ARRAY_TASK_ID | sh      # --array=1-$(... --count)

A sweep file is TOML; its names are those of --config.NAME=VALUE:

    config = "configs/energy_kd.py"
    workdir = "runs/rates/kd-{arms.kd.lr}-{seed}"     # a folder for each line: fields, or {line}, the line's number

    [set]                                             # the same in all lines
    only = ["teacher", "kd"]

    [grid]                                            # every combination; the last field changes first
    "arms.kd.lr" = [0.01, 0.02]
    seed = [0, 1, 2]

    [[zip]]                                           # fields that change together: one axis of the grid
    "data.train_examples" = [100, 1000]
    batch_size = [32, 64]

Every line is checked against the config before the first is printed, and no two have one workdir.
"""

import itertools
import os
import pathlib
import re
import shlex
import tomllib
from collections.abc import Mapping
from typing import Any

from experiments import cli
from jkd.errors import UserError, unknown

KEYS = ("config", "workdir", "set", "grid", "zip")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__, config=False, processes=False)
    parser.add_argument("file", metavar="FILE", help="a sweep file, .toml")
    parser.add_argument("--line", type=int, metavar="N", help="print only line N, counted from 1")
    parser.add_argument("--count", action="store_true", help="print only the number of lines")
    args, overrides = cli.parse(parser, argv)
    lines = expand(args.file, overrides)
    if args.line is not None and not 1 <= args.line <= len(lines):
        raise UserError(f"--line must be one of 1..{len(lines)}, got {args.line}.")
    if args.count:
        print(len(lines))
    else:
        print("\n".join(lines if args.line is None else lines[args.line - 1 : args.line]))


def expand(file: str, overrides: Mapping[str, str] | None = None) -> list[str]:
    """The commands of a sweep file, quoted for a POSIX shell; `overrides` are added to its `[set]`.

    Raises:
      UserError: for a file that is no sweep, a field or value that the config does not take, or workdirs that are not
        all different.
    """
    sweep = _read(file)
    fixed = {name: _text(value) for name, value in sweep.get("set", {}).items()} | dict(overrides or {})
    lines, seen = [], dict[str, int]()
    for number, chosen in enumerate(_points(sweep, file), start=1):
        fields = {**fixed, **{name: _text(value) for name, value in chosen.items()}}
        cli.load_config(sweep["config"], fields)
        workdir = _workdir(sweep["workdir"], {**fields, "line": str(number)}, file)
        if seen.setdefault(os.path.normpath(workdir), number) != number:
            raise UserError(
                f"{file}: lines {seen[os.path.normpath(workdir)]} and {number} have one workdir, {workdir}: name in it "
                "every field that changes, or {line}."
            )
        command = ["python", "-m", "experiments.train", "--config", sweep["config"], "--workdir", workdir]
        lines.append(shlex.join([*command, *(f"--config.{name}={value}" for name, value in fields.items())]))
    return lines


def _read(file: str) -> dict[str, Any]:
    try:
        sweep = tomllib.loads(pathlib.Path(file).read_text())
    except OSError as error:
        raise UserError(f"The sweep file {file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{file} is no TOML: {error}.") from error
    for name in sweep:
        if name not in KEYS:
            raise unknown(f"entry of {file}", name, KEYS)
    for name in ("config", "workdir"):
        if not isinstance(sweep.get(name), str):
            raise UserError(f"{file} must name its {name}, as text.")
    tables = {"set": sweep.get("set", {}), "grid": sweep.get("grid", {})}
    blocks = sweep.get("zip", [])
    if not all(isinstance(t, dict) for t in tables.values()) or not isinstance(blocks, list):
        raise UserError(f"{file}: set and grid are tables, [set] and [grid], and zip is one or more [[zip]].")
    for block in (tables["grid"], *blocks):
        for name, values in block.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{file}: {name} must be a list of values, got {values!r} (dotted names need quotes).")
    return sweep


def _points(sweep: Mapping[str, Any], file: str) -> list[dict[str, Any]]:
    # Each axis is a list of points; a field may be on one axis only.
    axes = [[{name: value} for value in values] for name, values in sweep.get("grid", {}).items()]
    for block in sweep.get("zip", []):
        if len({len(values) for values in block.values()}) != 1:
            sizes = ", ".join(f"{name} {len(values)}" for name, values in block.items())
            raise UserError(f"{file}: the lists of one [[zip]] must have one length, got {sizes or 'none'}.")
        axes.append([dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True)])
    names = [name for axis in axes for name in axis[0]] + list(sweep.get("set", {}))
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{file} sets {name} more than once; a field has one place.")
    return [{k: v for point in points for k, v in point.items()} for points in itertools.product(*axes)]


def _text(value: Any) -> str:
    # As it would be written on a command line.
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) + "," * (len(value) == 1) if isinstance(value, list) else str(value)


def _workdir(template: str, fields: Mapping[str, str], file: str) -> str:
    def value(match: re.Match) -> str:
        if match[1] not in fields:
            raise unknown(f"field in the workdir of {file}", match[1], fields)
        return re.sub(r"[^\w.,=+-]", "_", fields[match[1]].rstrip(","))

    return re.sub(r"{([\w.]+)}", value, template)


if __name__ == "__main__":
    cli.command(main)
