"""``intelligent-vram growth``: call a function again and again, and say whether memory grows and what holds it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..vram.allocation_sites import AlreadyRecording
from ..vram.growth import LEAST, GrowthWatch
from ..vram.growth_picture import draw_growth


class CannotRun(RuntimeError):
    """The script cannot be found, read or called; the text says why."""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "growth",
        help="call a function of a script again and again, and report what grows",
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 memory does not grow, 1 it grows, 2 the script cannot be run or there are too few runs.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a .py file, or the dotted name of a module")
    parser.add_argument("--function", default="run", help="what to call, without arguments (default run)")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="how often (default 10)")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="first runs that do not count (default 1)")
    parser.add_argument("--device", help='"cuda", "cuda:1", "cpu"; by default the first GPU, else the CPU')
    parser.add_argument("--where", action="store_true", help="also say which line allocated what grew; slower")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw memory over the runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, call, report."""
    if args.warm_up < 0 or args.runs < args.warm_up + LEAST:
        return _fail(f"{args.runs} runs with {args.warm_up} to warm up are too few: at least {LEAST} have to count")
    try:
        watch = GrowthWatch(args.device, warm_up=args.warm_up, always=True, where=args.where)
    except RuntimeError as error:  # torch's own for a name that is none, NoDevice for a device that is not there
        return _fail(str(error))
    try:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout), _importing(args.script), watch:
            call = _function(args.script, args.function)
            for _ in tqdm(range(args.runs), desc="Running", unit="run", delay=1, disable=args.json):
                _call(call)
                watch.mark()
            growth = watch.growth()
    except (CannotRun, AlreadyRecording) as error:
        return _fail(str(error))
    print(json.dumps(growth.as_json()) if args.json else "\n".join(growth.report()))
    if args.png is not None:
        try:
            draw_growth(growth, title=f"{args.function}() of {Path(args.script).name}, {args.runs} runs").save(args.png)
        except (OSError, ValueError) as error:
            return _fail(f"{args.png}: {error}")
    return int(bool(growth.grows))


def _call(function: Callable[[], object]) -> None:
    """One run. What it returns is let go, so that only what the script keeps is counted."""
    try:
        function()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise CannotRun(f"the run ended with {type(error).__name__}: {error}") from None
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _function(script: str, name: str) -> Callable[[], object]:
    """The function of a script or module, which is loaded under its own name."""
    path = Path(script)
    try:
        if path.suffix == ".py":
            specification = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(specification)
            sys.modules[path.stem] = module
            specification.loader.exec_module(module)
        else:
            module = importlib.import_module(script)
    except (Exception, SystemExit) as error:
        if not isinstance(error, FileNotFoundError | ModuleNotFoundError):
            traceback.print_exc()
        raise CannotRun(f"{script} cannot be loaded: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise CannotRun(f"{script} has no function {name}; name one with --function")
    return function


@contextlib.contextmanager
def _importing(script: str) -> Iterator[None]:
    """As if Python had been started with the script: what lies beside it can be imported, and sys.argv is its own."""
    path, arguments, modules = sys.path[:], sys.argv[:], set(sys.modules)
    is_file = script.endswith(".py")
    sys.path.insert(0, str(Path(script).resolve().parent) if is_file else "")
    sys.argv[:] = [script]
    try:
        yield
    finally:
        sys.path[:], sys.argv[:] = path, arguments
        if is_file and Path(script).stem not in modules:
            sys.modules.pop(Path(script).stem, None)


def _fail(reason: str) -> int:
    print(f"intelligent-vram growth: {reason}", file=sys.stderr)
    return 2
