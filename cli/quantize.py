"""``intelligent-vram quantize``: a checkpoint into FP8 or INT8 that ComfyUI loads, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..quant.convert import COMFY_QUANT, LAYOUTS, Conversion, Measured, into_file, plan_conversion
from ..quant.formats import FORMATS
from ..quant.quantize import Unquantizable
from ..quant.select import DEFAULT_KEEP
from ..quant.source import Refused
from ..quant.write import check_writable
from ..vram.device import NoDevice
from ..vram.units import format_bytes

REPORTS = (".png", ".json")


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "quantize",
        help="convert a safetensors checkpoint into FP8 or INT8 that ComfyUI loads",
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 written, 1 this checkpoint cannot be quantized, 2 something could not be read or written.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="safetensors; of a sharded model its index or any file")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=tuple(FORMATS), default="fp8_e4m3fn", help="default fp8_e4m3fn")
    parser.add_argument(
        "--keep",
        metavar="REGEX",
        help="layers inside the blocks that stay as they are, searched in their names; '' quantizes all. Default: "
        + DEFAULT_KEEP.replace("%", "%%"),
    )
    parser.add_argument("--first-last", type=int, default=0, metavar="N", help="blocks at either end that stay too")
    parser.add_argument("--dequantize", action="store_true", help="compute in 16 bit, not in the format")
    parser.add_argument("--layout", choices=LAYOUTS, default=COMFY_QUANT, help="scaled_fp8: for ComfyUI of 2025")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; by default the GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="accuracy of each layer, as .png or .json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, convert, say what was made."""
    try:
        check_writable(args.target, args.overwrite)
        accuracy = _accuracy(args.report)
        conversion = plan_conversion(
            args.source,
            args.format,
            keep=DEFAULT_KEEP if args.keep is None else args.keep,
            first_last=args.first_last,
            tensor_cores=not args.dequantize,
            layout=args.layout,
        )
        begin = time.perf_counter()
        _convert(conversion, args, None if accuracy is None else accuracy.add)
        print(_summary(conversion, args.target, time.perf_counter() - begin))
        if accuracy is not None:
            print("\n".join([*accuracy.table(), *accuracy.warnings()]))
            _save(accuracy, args.report)
    except (Refused, Unquantizable) as error:
        return _failed(error, 1)
    except (ValueError, OSError, NoDevice) as error:
        return _failed(error, 2)
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was written", 130)
    return 0


def _failed(error: object, status: int) -> int:
    print(f"intelligent-vram quantize: {error}", file=sys.stderr)
    return status


def _accuracy(path: Path | None) -> Any:
    """What collects accuracy; None where no report is wanted. Raises ValueError for a file that cannot become one."""
    if path is None:
        return None
    if path.suffix.lower() not in REPORTS:
        raise ValueError(f"{path}: a report is a {' or a '.join(REPORTS)} file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    from ..quant.accuracy import Accuracy

    return Accuracy()


def _save(accuracy: Any, path: Path) -> None:
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps(accuracy.as_json(), indent=1), encoding="utf-8")
    else:
        accuracy.picture().save(path)


def _convert(conversion: Conversion, args: argparse.Namespace, measured: Measured | None) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=conversion.source_nbytes, unit="B", unit_scale=True, desc=conversion.format.name) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        into_file(conversion, args.target, device, overwrite=args.overwrite, progress=progress, measured=measured)


def _summary(conversion: Conversion, target: Path, seconds: float) -> str:
    """One line: sizes, speed, what was kept."""
    rate = conversion.source_nbytes / seconds / 1e9
    kept = sum(conversion.kept_nbytes.values())
    reasons = ", ".join(f"{format_bytes(nbytes)} because {reason}" for reason, nbytes in conversion.kept_nbytes.items())
    return (
        f"{target}: {format_bytes(conversion.nbytes)} of {format_bytes(conversion.source_nbytes)}, read at {rate:.2f} GB/s "
        f"in {seconds:.1f} s; {len(conversion.quantized)} weights in {conversion.format.name}, "
        f"{format_bytes(kept)} kept" + (f" ({reasons})" if reasons else "")
    )
