"""``intelligent-vram doctor``: what is wrong with the weights in model files, before a kernel finds out."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..vram.inspect_weights import COLUMN_MAJOR, KINDS, ROW_MAJOR, STRIDED, Fp8Weight, Issue, Report, Unreadable
from ..vram.model_files import inspect_file
from ..vram.units import format_bytes

WIDTH = 120
INDENT = " " * 9
OPERANDS = {
    ROW_MAJOR: "row-major: weight.t() is the column-major second operand without a copy",
    COLUMN_MAJOR: "column-major: the second operand as they are, weight.t() is not",
    STRIDED: "strided: they have to be copied to be an operand",
}


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="check model files: cut off, misaligned, not contiguous, FP8 layers that cannot use FP8 products",
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 no fault, 1 faults, 2 a file could not be read.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="safetensors, GGUF, .pt, .pth, .ckpt or .bin"
    )
    parser.add_argument("--show", type=int, default=5, metavar="N", help="name the first N of each kind (default 5)")
    parser.add_argument("--strict", action="store_true", help="count notes as faults")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Inspect, print. Exit code 0 without findings that count, 1 with such, 2 when a file could not be read."""
    results: list[tuple[Path, Report | Unreadable]] = []
    for path in tqdm(args.files, desc="Inspecting", unit="file", delay=1, disable=args.json):
        try:
            results.append((path, inspect_file(path)))
        except Unreadable as error:
            results.append((path, error))
    if args.json:
        print(json.dumps({"files": [_record(path, result) for path, result in results]}))
    else:
        print("\n\n".join(_text(path, result, args.show) for path, result in results))
    return max(_status(result, args.strict) for _, result in results)


def _status(result: Report | Unreadable, strict: bool) -> int:
    if isinstance(result, Unreadable):
        return 2
    return int(bool(result.issues if strict else result.faults))


def _record(path: Path, result: Report | Unreadable) -> dict[str, Any]:
    if isinstance(result, Unreadable):
        return {"file": str(path), "error": str(result)}
    return {
        "file": str(path),
        "error": None,
        "format": result.form,
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "faults": result.faults,
        "findings": [asdict(issue) | {"fault": issue.fault} for issue in result.issues],
        "fp8": [asdict(weight) | {"divisible": weight.divisible} for weight in result.fp8],
    }


def _text(path: Path, result: Report | Unreadable, show: int) -> str:
    if isinstance(result, Unreadable):
        return f"{path}\n{_entry('UNREAD', str(result))}"
    lines = [
        f"{path}",
        _entry("file", f"{result.form}, {_many(result.tensors, 'tensor')}, {format_bytes(result.nbytes)}"),
    ]
    if result.fp8:
        lines.append(_entry("FP8", describe_fp8(result.fp8)))
    kinds = Counter(issue.kind for issue in result.issues)
    for name in sorted(kinds, key=lambda name: not KINDS[name].fault):
        lines += _kind([issue for issue in result.issues if issue.kind == name], show)
    if not result.faults:
        lines.append(_entry("ok", "no fault found"))
    return "\n".join(lines)


def _kind(issues: Sequence[Issue], show: int) -> list[str]:
    """What one kind of finding is, the first of it, and what to do."""
    kind = KINDS[issues[0].kind]
    lines = [_entry("FAULT" if kind.fault else "note", f"{kind.title}: {len(issues):,}")]
    lines += [f"{INDENT}  {issue.path}: {issue.problem}" for issue in issues[:show]]
    if 0 < show < len(issues):
        lines.append(f"{INDENT}  and {len(issues) - show:,} more")
    return [*lines, _entry("", kind.advice)]


def _entry(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {label:<7}", subsequent_indent=INDENT)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def describe_fp8(weights: Sequence[Fp8Weight]) -> str:
    """FP8 weights in a sentence: how many, their scales, whether their dimensions and layout suit an FP8 product."""
    dtypes = " and ".join(sorted({weight.dtype for weight in weights}))
    scales = Counter(weight.scale_dtype for weight in weights if weight.scale is not None)
    scaled = ", ".join(f"{count:,} with a {dtype} scale" for dtype, count in scales.items()) or "none with a scale"
    divisible = sum(weight.divisible for weight in weights)
    layouts = Counter(weight.layout for weight in weights)
    operands = "; ".join(f"{count:,} {OPERANDS[layout]}" for layout, count in layouts.items())
    return (
        f"{_many(len(weights), 'weight')} in {dtypes}, {scaled}; {divisible:,} of {len(weights):,} with dimensions that are "
        f"multiples of 16, as an FP8 product wants; {operands}"
    )
