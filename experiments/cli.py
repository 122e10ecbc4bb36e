"""What all commands share: configs, overrides, the process group, and errors as one line."""

import argparse
import ast
import importlib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import jax
import ml_collections
from etils import epath

from jkd.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, UserError, nearest, unknown
from jkd.train.peers import left_alone
from jkd.train.workdir import (
    EXECUTION_FIELDS,
    check_writable,
    flatten,
    folder_of,
    is_execution,
    is_remote,
    read_config,
)

ROOT = pathlib.Path(__file__).parent.parent


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """Loads `configs/<method>.py[:variant]` and applies overrides by dotted name.

    Raises:
      UserError: for an unknown file, variant or field (the nearest known one is named), or a wrong type.
    """
    path, _, variant = spec.partition(":")
    file = pathlib.Path(path)
    file = file if file.exists() else ROOT / path
    if not file.is_file():
        known = [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("[a-z]*.py"))]
        raise unknown("config", path, known)
    module = _load_module(file)
    if variant and variant not in module.VARIANTS:
        raise unknown(f"variant of {path}", variant, module.VARIANTS)
    config = module.get_config(variant or "default")
    apply_overrides(config, overrides or {})
    return config


def _load_module(file: pathlib.Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
    if found is None or found.loader is None:
        raise UserError(f"{file} is no config: it is not a Python file.")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{file} is no config: {error.msg} (line {error.lineno}).") from error
    if not hasattr(module, "get_config") or not hasattr(module, "VARIANTS"):
        raise UserError(f"{file} is no config: it has no get_config(variant) or no VARIANTS, the names it takes.")
    return module


def apply_overrides(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields by dotted name, with the type that each field has.

    Raises:
      UserError: if a field does not exist or the value is of another type.
    """
    known = flatten(config.to_dict())
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"Unknown config field {name!r}.{nearest(name, known)} See the config file for all.")
        try:
            config.update_from_flattened_dict({name: _parse(value, known[name])})
        except (TypeError, ValueError, SyntaxError) as error:
            kind = type(known[name]).__name__
            raise UserError(
                f"Config field {name!r} takes {kind} values like {known[name]!r}, got {value!r}."
            ) from error


def load_run(
    workdir: str, overrides: Mapping[str, Any], allowed: Sequence[str] = ("eval_batch_size",)
) -> ml_collections.ConfigDict:
    """Loads the config of the run in `workdir`; only `allowed` fields and those of execution may be overridden.

    Raises:
      UserError: if the folder is not one of a run, or for an override of what the run computed.
    """
    folder = folder_of(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{workdir} is not the folder of a run: it holds no config.json.")
    config = ml_collections.ConfigDict(_with_tuples(read_config(folder)))
    if "method" not in config:
        raise UserError(f"{workdir} is not a run of `python -m experiments.train`: its config.json names no method.")
    changed = [n for n in overrides if n not in allowed and not is_execution(n)]
    for name in sorted(set(changed) & set(flatten(config.to_dict()))):
        raise UserError(
            f"Config field {name!r} decided what this run computed and cannot be changed now; these can: "
            f"{', '.join((*allowed, *(n if '.' in n else f'{n}.*' for n in EXECUTION_FIELDS)))}."
        )
    apply_overrides(config, overrides)
    return config


def _with_tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _with_tuples(value) for name, value in tree.items()}
    return tuple(_with_tuples(item) for item in tree) if isinstance(tree, list) else tree


def new_file(path: str) -> epath.Path:
    """A path to write to.

    Raises:
      UserError: if it exists already, or its folder does not or cannot be written.
    """
    file = folder_of(path) if is_remote(path) else epath.Path(path)
    if file.exists():
        raise UserError(f"{path} exists already and is not overwritten; give another name, or remove it.")
    if not is_remote(path) and not file.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {file.parent}.")
    try:
        check_writable(file.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    return file


def _parse(value: Any, like: Any) -> Any:
    if not isinstance(value, str) or isinstance(like, str):
        return value
    if isinstance(like, bool):
        return {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else value
    if isinstance(like, tuple):
        inner = value[1:-1] if value.startswith("(") and value.endswith(")") else value
        if set("()[]") & set(inner):
            raise ValueError(value)
        items = [item.strip() for item in inner.split(",") if item.strip()]
        return tuple(_parse(item, like[0]) if like else item for item in items)
    parsed = ast.literal_eval(value)
    if parsed is None or isinstance(parsed, bool):
        return value  # refused by the config, which wants a number here
    return float(parsed) if isinstance(like, float) and isinstance(parsed, int) else parsed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. Ask --help for the arguments.")


def parser(description: str, *, config: bool = True, processes: bool = True) -> argparse.ArgumentParser:
    """The arguments that commands share: a config, and how processes find each other."""
    made = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        made.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="configs/<method>.py[:variant]")
        made.epilog = "Any field of the config is set by --config.NAME=VALUE, e.g. --config.arms.kd.lr=0.02."
    if not processes:
        return made
    group = made.add_argument_group("several processes (give the same command to each)")
    group.add_argument(
        "--distributed", action="store_true", help="join the cluster that JAX detects: TPU pods, SLURM, ..."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parses arguments and the `--config.NAME=VALUE` overrides.

    Raises:
      UserError: for an argument that is neither; the nearest known one is named.
    """
    args, rest = made.parse_known_args(argv)
    overrides = {}
    for item in rest:
        name, equals, value = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            options = [f"--{option.replace('_', '-')}" for option in vars(args)]
            raise UserError(
                f"Unknown argument {item!r}.{nearest(item, options)} Fields are set as --config.NAME=VALUE."
            )
        overrides[name] = value
    return args, overrides


def initialize(args: argparse.Namespace) -> None:
    """Joins the process group, where there is one; the only place that does."""
    if (args.num_processes is not None or args.process_id is not None) and not args.coordinator:
        raise UserError("--num-processes and --process-id need --coordinator HOST:PORT, the address of process 0.")
    flags = os.environ.get("XLA_FLAGS", "")
    if getattr(jax.config, "jax_num_cpu_devices", 0) > 1 or "host_platform_device_count" in flags:
        # Virtual devices outnumber cores: steps in flight at once could starve a collective of threads. Only a CPU
        # backend that does not exist yet heeds this.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, where and above what time the environment says, if it does."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jkd" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def experiment(config: ml_collections.ConfigDict) -> ModuleType:
    """The module of the config's method."""
    if importlib.util.find_spec(f"experiments.{config.method}") is None:
        raise UserError(f"There is no method {config.method!r}: no experiments/{config.method}.py.")
    module = importlib.import_module(f"experiments.{config.method}")
    if not hasattr(module, "stages"):
        raise UserError(f"There is no method {config.method!r}: experiments/{config.method}.py has no stages(config).")
    return module


def command(main: Callable[[], None]) -> None:
    """Runs a command's main function; a mistake of the user's is one line and exit code 2."""
    from jkd.train import Preempted

    try:
        main()
    except Preempted as stop:
        _end(f"{stop}", EXIT_STOPPED)
    except UserError as error:
        _end(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _end("interrupted; run the same command again to go on from the last checkpoint", EXIT_INTERRUPTED)
    except Exception:
        if not left_alone():
            raise
        _end(traceback.format_exc(), 1)


def _end(line: str, code: int) -> NoReturn:
    print(f"jkd: {line}", file=sys.stderr, flush=True)
    if left_alone():  # JAX would wait for the other processes, and abort
        os._exit(code)
    sys.exit(code)
