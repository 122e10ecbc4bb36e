"""Accuracy and time of bfloat16 training against float32: every seed of every arm of a config, paired.

python -m benchmarks.precision [--config configs/energy_kd.py] [--out runs/precision] [--config.NAME=VALUE ...]
"""

import argparse
import time

import numpy as np
from rich.table import Table

from experiments import cli, report, train
from jkd import metrics
from jkd.train.log import console

DEMO = {"only": ("ce", "kd", "energy_kd")}
METRIC = "test/top1"


def compare(config: str, out: str, overrides: dict) -> Table:
    """Runs the config in both precisions and tabulates the paired differences."""
    found, seconds = {}, {}
    for precision in ("float32", "bfloat16"):
        made = cli.load_config(config, {**DEMO, **overrides, "precision": precision})
        began = time.perf_counter()
        found[precision] = train.run(made, f"{out}/{precision}", show=False)["results"][METRIC]
        seconds[precision] = time.perf_counter() - began
    table = Table(title=f"{METRIC}, %; seconds: {seconds['float32']:.0f} float32, {seconds['bfloat16']:.0f} bfloat16")
    for column in ("stage", "float32", "bfloat16", "bfloat16 - float32, 95 % interval", "seeds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, row in found["float32"].items():
        wide, narrow = np.asarray(row["values"]), np.asarray(found["bfloat16"][name]["values"])
        pair = metrics.paired_difference(narrow, wide)
        difference = rf"{pair.mean:+.2f} \[{pair.low:.2f}, {pair.high:.2f}]"
        table.add_row(name, f"{wide.mean():.2f}", f"{narrow.mean():.2f}", difference, str(len(wide)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/energy_kd.py")
    parser.add_argument("--out", default="runs/precision")
    args, overrides = cli.parse(parser)
    cli.use_compilation_cache()
    console.print("Training twice; finished runs in --out are read, not repeated.")
    report.table_console().print(compare(args.config, args.out, overrides))


if __name__ == "__main__":
    cli.command(main)
