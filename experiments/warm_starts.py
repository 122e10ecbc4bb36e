"""Where training starts from stored variables: the stages "init_teacher" and "init_student"."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.distillation_setup import Setup, selected_arms, variable_shapes
from experiments.stored import Stored, check_seeds, one_of, stored_stage
from jkd import train
from jkd.errors import UserError
from jkd.train.log import console
from jkd.train.warm import parse_rules


def warm_parts(config: ConfigDict) -> list[str]:
    """Those of "teacher" and "student" that start from stored variables, `init_from`."""
    trained = {"teacher": not config.teacher.workdir, "student": bool(selected_arms(config))}
    return [part for part, trains in trained.items() if trains and config[part].init_from]


def warm_stages(setup: Setup) -> list[train.Stage]:
    """The stages "init_teacher" and "init_student", where the config asks for them: they hold what to start from."""
    return [_warm_stage(setup, part) for part in warm_parts(setup.config)]


def warm_needs(setup: Setup, part: str) -> tuple[str, ...]:
    """What a stage that trains the "teacher" or a "student" needs for its start."""
    return (f"init_{part}",) if part in warm_parts(setup.config) else ()


def warmed(setup: Setup, part: str, variables: Any, previous: Mapping[str, train.Outcome]) -> Any:
    """Initialized variables, or what they are after the warm start."""
    for name in warm_needs(setup, part):
        rules = parse_rules(setup.config[part].init_rules)
        variables, _ = train.warm_start(variables, previous[name].published, rules)
    return variables


def check_warm(config: ConfigDict) -> None:
    """Raises UserError for warm starts that cannot be read, before any data is."""
    for part in ("teacher", "student"):
        parse_rules(config[part].init_rules)
        if config[part].init_from:
            Stored.parse(config[part].init_from, f"{part}.init_from")
    if config.teacher.workdir and config.teacher.init_from:
        raise UserError("teacher.workdir gives a finished teacher, which takes no teacher.init_from: leave one out.")


def read_as(setup: Setup, stage: str, stored: Stored) -> Stored:
    """A stored model, read as that of a stage where a file has PyTorch's names."""
    return dataclasses.replace(stored, model=setup.model(stage), shape=setup.task.shape)


def _warm_stage(setup: Setup, part: str) -> train.Stage:
    section = setup.config[part]
    stage = next(iter(setup.teachers)) if part == "teacher" else part
    shapes = variable_shapes(setup, stage)
    stored = read_as(setup, stage, Stored.parse(section.init_from, f"{part}.init_from"))

    def check(outcome: train.Outcome) -> Any:
        check_seeds(outcome, setup.config, str(stored))
        return train.warm_start(shapes, one_of(outcome), parse_rules(section.init_rules))[1]

    def say(outcome: train.Outcome) -> None:
        report = check(outcome)
        if jax.process_index() == 0:
            console.print(f"Warm start of the {part} from {stored}: {report.summary()}.", soft_wrap=True)
            if report.table().row_count:
                console.print(report.table())

    made = stored_stage(f"init_{part}", stored, setup.config, say)
    return dataclasses.replace(made, check=lambda: check(stored.shapes()) and None)
