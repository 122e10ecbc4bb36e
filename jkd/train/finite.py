"""What happens when a metric is not finite: one line, and a bundle to look into."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from jkd.errors import UserError
from jkd.train.workdir import write_text


class NonFiniteError(UserError):
    """A metric of a step was NaN or infinite."""


def non_finite(
    stage: str,
    bad_step: np.ndarray,
    metrics: Mapping[str, Any],
    sources: Sequence[Any],
    last_good: int | None,
    workdir: epath.Path,
) -> NonFiniteError:
    """Writes `debug/STAGE-step-T` (metrics, batches, last good step) and makes the error that says so.

    Args:
      stage: the stage's name.
      bad_step: the first bad step of each program, -1 where there is none.
      metrics: of that step.
      sources: of each program, None for a stage without data.
      last_good: the step of the last checkpoint, None without one.
      workdir: the run's folder.
    """
    t = int(bad_step[bad_step >= 0].min())
    names = [name for name, value in metrics.items() if not np.isfinite(value).all()]
    bundle = workdir / "debug" / f"{stage}-step-{t}"
    if jax.process_index() == 0:
        bundle.mkdir(parents=True, exist_ok=True)
        found = {name: _json_number(np.asarray(value)) for name, value in metrics.items()}
        info = {"stage": stage, "step": t, "metrics": found, "last_good_step": last_good}
        write_text(bundle / "info.json", json.dumps(info, indent=2) + "\n")
        for k, source in enumerate(sources):
            if source is not None:
                with (bundle / f"batch-{k}.npz").open("wb") as file:
                    np.savez(file, **jax.tree.map(np.asarray, source.batch(t)))
    good = "There is no checkpoint" if last_good is None else f"The last good checkpoint is of step {last_good}"
    return NonFiniteError(
        f"Stage {stage!r}, step {t}: {', '.join(names)} is not finite. {good}; batch and metrics of the step are in "
        f"{bundle}. Try a lower learning rate."
    )


def _json_number(value: np.ndarray) -> Any:
    # JSON has no NaN and no infinity: they become "nan" and "inf".
    return np.where(np.isfinite(value), value.astype(object), value.astype(str)).tolist()
