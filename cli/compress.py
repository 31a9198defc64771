"""``intelligent-vram compress``: a checkpoint with its weights encoded without loss, checked, and back again."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..quant.lossless import Compressed, check_file, compress_file, decompress_file
from ..quant.source import Refused
from ..vram.codec import Corrupt, NoCodec
from ..vram.device import NoDevice, resolve
from ..vram.inspect_weights import Unreadable
from ..vram.units import format_bytes


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "compress",
        help="encode the weights of a safetensors file without loss, so that fewer bytes are streamed",
        description=__doc__.splitlines()[0],
        epilog="Encoded on a GPU, weights are decoded on a GPU only. Exit status: 0 done, 1 the file is damaged or cannot be "
        "encoded, 2 something could not be read or written.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a safetensors file")
    parser.add_argument("target", type=Path, metavar="OUT", nargs="?", help="the file to write")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--decompress", action="store_true", help="write the file that IN was made of, to the byte")
    what.add_argument(
        "--check", action="store_true", help="decode IN and compare each tensor by its hash; writes nothing"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu: where to encode; by default the GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Encode, decode or check one file, and say what was done."""
    begin = time.perf_counter()
    try:
        if args.check == (args.target is not None):
            raise ValueError("--check takes one file, and nothing is written" if args.check else "OUT is missing")
        with tqdm(unit="B", unit_scale=True, desc=args.source.name) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            said = _do(args, progress)
    except (Refused, Unreadable, Corrupt) as error:
        return _failed(error, 1)
    except (ValueError, OSError, NoDevice, NoCodec) as error:
        return _failed(error, 2)
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was written", 130)
    print(f"{said} in {time.perf_counter() - begin:.1f} s")
    return 0


def _do(args: argparse.Namespace, progress: Any) -> str:
    if args.check:
        file = check_file(args.source, progress)
        return f"{args.source}: {len(file.encoded)} encoded tensors decoded, all are what was encoded,"
    if args.decompress:
        file = decompress_file(args.source, args.target, overwrite=args.overwrite, progress=progress)
        return f"{args.target}: {format_bytes(args.target.stat().st_size)}, {len(file.encoded)} tensors decoded"
    device = resolve(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _summary(
        args.target, compress_file(args.source, args.target, device, overwrite=args.overwrite, progress=progress)
    )


def _summary(target: Path, made: Compressed) -> str:
    share = made.nbytes / max(1, made.plain)
    return (
        f"{target}: {format_bytes(made.nbytes)} of {format_bytes(made.plain)} ({share:.3f}), {made.encoded} tensors encoded "
        f"and {made.stored} as they were"
    )


def _failed(error: object, status: int) -> int:
    print(f"intelligent-vram compress: {error}", file=sys.stderr)
    return status
