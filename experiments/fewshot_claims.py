"""What is claimed of few-shot adaptation, and tested."""

from collections.abc import Mapping
from typing import Any

from experiments.gans import FEATURES
from experiments.studies import Claim, Study

SOURCE = "source"  # the stage of the source domain's generator


def over_time(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Every arm at every step at which it was measured, as `ARM@STEP`."""
    found = {}
    for name, stage in stages.items():
        curves = {metric: curve for metric, curve in stage["history"].items() if len(curve["steps"]) > 1}
        for k, step in enumerate(next(iter(curves.values()))["steps"] if curves else ()):
            metrics_then = {metric: curve["values"][k] for metric, curve in curves.items()}
            found[f"{name}@{step}"] = {"metrics": metrics_then, "history": {}}
    return found


def slower(steps: tuple[int, ...]) -> tuple[Claim, ...]:
    """That contrastive learning keeps images more varied than fine-tuning, where both are equally well adapted."""
    variety = "variety/pixels"
    return (
        *(
            Claim(
                f"DCL is more varied than fine-tuning after {step} steps",
                "so",
                (f"dcl@{step}", variety),
                (f"finetune@{step}", variety),
            )
            for step in steps
        ),
        Claim(
            f"and it is as well adapted then (after {steps[0]} steps)",
            "so",
            (f"dcl@{steps[0]}", "variety/target"),
            (f"finetune@{steps[0]}", "variety/target"),
            0.02,
        ),
        Claim("DCL loses variety all the same", "so", (f"dcl@{steps[0]}", variety), (f"dcl@{steps[-1]}", variety)),
        Claim(
            f"DCL has the lower Frechet distance after {steps[0]} steps",
            "52.56 for 74.39 of CDC (FID, babies)",
            (f"finetune@{steps[0]}", "test/frechet"),
            (f"dcl@{steps[0]}", "test/frechet"),
        ),
        Claim("and at the end", "", "dcl", "finetune"),
        Claim("DCL is more varied than CDC at the end", "so", ("dcl", variety), ("cdc", variety)),
    )


PARTS = (
    Claim(
        "the generator's contrast alone is less varied than both",
        "so",
        ("dcl", "variety/pixels"),
        ("cl1", "variety/pixels"),
    ),
    Claim("and the discriminator's", "so", ("dcl", "variety/pixels"), ("cl2", "variety/pixels")),
    *(
        Claim(f"DCL is more varied than {name} at the end", "so", ("dcl", "variety/pixels"), (arm, "variety/pixels"))
        for arm, name in {"freeze_d": "FreezeD", "ada": "ADA", "ewc": "EWC"}.items()
    ),
)
SHARED: dict[str, Any] = {"shared": (FEATURES, SOURCE), "given": "start.workdir", "derived": over_time}
CONFIG = "configs/fewshot_dcl.py"
SOME = ("finetune", "dcl", "cdc")
STEPS = (250, 500, 1000, 2000)
STUDIES = (
    Study("digits", CONFIG, (0.001,), 0, (*slower(STEPS), *PARTS), **SHARED),
    Study("tuned", CONFIG, (0.0003, 0.001), 2, slower(STEPS), arms=SOME, **SHARED),
    Study("fashion", f"{CONFIG}:fashion", (0.001,), 0, slower(STEPS), arms=SOME, **SHARED),
)
