"""Stages, the sharded step, the loop, checkpoints and ensembles."""

from jkd.train.caches import forget_programs
from jkd.train.ensemble import ensemble
from jkd.train.finite import NonFiniteError
from jkd.train.loop import LoopOptions, run
from jkd.train.mesh import fsdp, jit_step, make_mesh, place, replicate, shard, tree_shardings
from jkd.train.outcome import check_run, evaluate_outcome, finished_stages, load_outcome, outcome_shapes
from jkd.train.passes import evaluate, sweep
from jkd.train.signals import Preempted
from jkd.train.stage import Evaluator, Outcome, Stage
from jkd.train.state import Aux, TrainState, chain, create_state, make_train_step
from jkd.train.warm import warm_start

__all__ = [
    "Aux",
    "Evaluator",
    "LoopOptions",
    "NonFiniteError",
    "Outcome",
    "Preempted",
    "Stage",
    "TrainState",
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
    "outcome_shapes",
    "place",
    "replicate",
    "run",
    "shard",
    "sweep",
    "tree_shardings",
    "warm_start",
]
