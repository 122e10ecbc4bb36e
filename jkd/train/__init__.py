"""Stages, the sharded step, the loop, checkpoints and ensembles."""

from jkd.train.caches import forget_programs
from jkd.train.ensemble import ensemble
from jkd.train.finite import NonFiniteError
from jkd.train.gradient import Aux, value_and_grad
from jkd.train.loop import LoopOptions, run
from jkd.train.mesh import fsdp, jit_step, make_mesh, place, replicate, shard, tree_shardings
from jkd.train.outcome import check_run, evaluate_outcome, finished_stages, load_outcome, outcome_shapes
from jkd.train.passes import evaluate, sweep
from jkd.train.signals import Preempted
from jkd.train.stage import Evaluator, Outcome, Stage
from jkd.train.state import (
    ModelStep,
    TrainState,
    chain,
    create_state,
    make_train_step,
    plain_state,
    restore_state,
)
from jkd.train.transforms import AVERAGES, average, microbatch, remat
from jkd.train.warm import warm_start

__all__ = [
    "AVERAGES",
    "Aux",
    "Evaluator",
    "LoopOptions",
    "ModelStep",
    "NonFiniteError",
    "Outcome",
    "Preempted",
    "Stage",
    "TrainState",
    "average",
    "chain",
    "check_run",
    "create_state",
    "ensemble",
    "evaluate",
    "evaluate_outcome",
    "finished_stages",
    "forget_programs",
    "fsdp",
    "jit_step",
    "load_outcome",
    "make_mesh",
    "make_train_step",
    "microbatch",
    "outcome_shapes",
    "place",
    "plain_state",
    "remat",
    "replicate",
    "restore_state",
    "run",
    "shard",
    "sweep",
    "tree_shardings",
    "value_and_grad",
    "warm_start",
]
