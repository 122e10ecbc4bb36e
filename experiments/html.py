"""The report page of a reproduction: one self-contained HTML file, and its claims on a terminal."""

import base64
import html
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from experiments import report
from experiments.studies import HOLDS, REVERSED, measure_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; width: 100% } caption { text-align: left; font-weight: 600 }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.holds { color: #176d2f } .reversed { color: #a3231a } .open { color: #7a5c00 } img { max-width: 100% }
"""
COLUMNS = ("claim", "the paper", "test", "effect", "95 % interval", "p", "p (Holm)", "seeds", "verdict")


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        f"<h2>{_text(m)}</h2>" + "".join(_study(n, s) for n, s in studies.items()) for m, studies in results.items()
    ]
    intro = (
        "Every arm has its own learning rate, tuned on validation rows of seeds that the final runs do not use; "
        "differences are paired by seed (one split, one teacher and one initialization a seed), in percentage points "
        "of test accuracy where nothing else is said. A claim holds where the whole interval is on its side; p is "
        "that of the paired t-test, and 'before correction' says that the claim does not hold at 5 % after Holm's "
        "correction for all claims of its "
        "study. Intervals are over seeds, which share one pool of training rows and one set of test rows: they say "
        "nothing about other data."
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>jkd: claims</title><style>{STYLE}</style>"
        f"<h1>Claims, tested</h1><p>{intro}</p>{''.join(parts)}</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _study(name: str, study: Mapping[str, Any]) -> str:
    head = f"<h3>{_text(name)} <small>({_text(study['config'])})</small></h3>"
    if "not_run" in study:
        return f"{head}<p class='open'>Not run: {_text(study['not_run'])}</p>"
    measure = measure_of(study)
    rows = report.summarize(study["stages"], study.get("baseline", ""), measure)[measure.metric]
    if not study["tuning"]:
        whose = "of the study" if study["rates"] else "of the config"
        head += f"<p>Nothing was tuned: every arm has the learning rate {whose}.</p>"
    image = base64.b64encode(report.plot(rows, measure.title, name)).decode()
    claims = "".join(_claim(claim) for claim in study["claims"])
    headings = "".join(f"<th>{column}</th>" for column in COLUMNS)
    alt = f"{_text(measure.title)} of every arm"
    return (
        f"{head}<table><caption>Claims</caption><tr>{headings}</tr>{claims}</table>"
        f"{_arms(study, rows, measure.title)}<img alt='{alt}' src='data:image/png;base64,{image}'>"
    )


def _claim(claim: Mapping[str, Any]) -> str:
    kind = {HOLDS: "holds", REVERSED: "reversed"}.get(claim["verdict"], "open")
    words = "".join(f"<td>{_text(claim[name])}</td>" for name in ("claim", "paper", "test"))
    numbers = "".join(f"<td class='n'>{_text(value)}</td>" for value in _numbers(claim))
    return f"<tr>{words}{numbers}<td class='{kind}'>{_text(claim['verdict'])}</td></tr>"


def _numbers(claim: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = claim["interval"]
    p = ("", "") if claim["p_value"] is None else (f"{claim['p_value']:.3f}", f"{claim['p_holm']:.3f}")
    return f"{claim['effect']:+.2f}", f"[{low:+.2f}, {high:+.2f}]", *p, str(claim["seeds"])


def _arms(study: Mapping[str, Any], rows: Mapping[str, Any], title: str) -> str:
    lines = []
    for name, row in rows.items():
        rate, tried = study["rates"].get(name, ""), [float(r) for r in study["tuning"].get(name, {})]
        if rate in (min(tried, default=None), max(tried, default=None)):
            rate = f"{rate} (the edge of those tried)"
        interval = "" if row["interval"] is None else "[{:.2f}, {:.2f}]".format(*row["interval"])
        cells = (rate, f"{row['mean']:.2f}", interval, f"{row['best_epoch_mean']:.2f}", row["seeds"])
        lines.append(f"<tr><td>{_text(name)}</td>" + "".join(f"<td class='n'>{_text(c)}</td>" for c in cells) + "</tr>")
    names = ("arm", "tuned rate", "last epoch", "95 % interval", "best epoch", "seeds")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f"<table><caption>{_text(title)}</caption>{head}{''.join(lines)}</table>"


def print_claims(results: Mapping[str, Any]) -> None:
    """Prints the claims tables."""
    console = report.table_console()
    for method, studies in results.items():
        for name, study in studies.items():
            if "not_run" in study:
                console.print(f"{method}/{name}: not run: {study['not_run']}", soft_wrap=True, markup=False)
                continue
            table = Table(title=f"{method}/{name}: claims ({measure_of(study).title}; paired by seed)")
            for column in ("claim", "effect", "95 % interval", "p", "p (Holm)", "seeds", "verdict"):
                table.add_column(column)
            for claim in study["claims"]:
                numbers = [value.replace("[", r"\[") for value in _numbers(claim)]
                table.add_row(claim["claim"], *numbers, claim["verdict"])
            console.print(table)
