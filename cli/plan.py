"""``intelligent-vram plan``: what a model will take on this card or another, before it is loaded."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..vram import hardware
from ..vram.advice_report import as_json, picture, report
from ..vram.advise import PRESETS, Advice, Wishes, advise
from ..vram.device import NoDevice
from ..vram.discover import NoBlocks
from ..vram.hosts.traits import COMFY, HOSTS, tokens_of
from ..vram.inspect_weights import Unreadable
from ..vram.model_facts import ModelFacts, read_model
from ..vram.plan import LimitTooSmall
from ..vram.units import GIB

MOST_PIXELS = 1 << 20


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="predict VRAM, RAM and step time of a model file, and the plan, without loading it",
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 there is a plan, 1 it does not fit, 2 something could not be read or measured.",
    )
    parser.add_argument(
        "model", nargs="+", type=Path, help="safetensors or GGUF; of a sharded model its index or any file"
    )
    parser.add_argument("--vram", type=_gib, metavar="GIB", help="what may be used in all; else chosen")
    parser.add_argument("--ram", type=_gib, metavar="GIB", help="RAM, all of it free, instead of what is here")
    parser.add_argument("--size", type=_size, metavar="WxHxFRAMES", help="default 832x480x81, of image models 832x480")
    parser.add_argument("--host", choices=HOSTS, default=COMFY, help="whose sampler runs it")
    parser.add_argument("--device", default=None, help='"cuda", "cuda:1", "cpu", or a card by name: "RTX 4090"')
    parser.add_argument("--card-vram", type=_gib, metavar="GIB", help="memory of the card, where it differs")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of page-locked copies to the card")
    parser.add_argument("--throughput", type=float, metavar="TFLOPS", help="of 16-bit linear layers")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="thresholds of IntelligentVRAMNode")
    parser.add_argument("--png", type=Path, help="draw the plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, measure or look up, plan, print."""
    try:
        facts = read_model(args.model)
        card = _card(args)
        image = len(facts.sizes.patch_size or ()) == 2
        tokens = tokens_of(facts, *(args.size or (832, 480, 1 if image else 81)))
    except (Unreadable, NoDevice, hardware.NotMeasurable, ValueError, RuntimeError) as error:
        print(f"intelligent-vram plan: {error}", file=sys.stderr)
        return 2
    wishes = Wishes(max_vram=args.vram, **PRESETS.get(args.preset, {}))
    try:
        advice = advise(facts, card, wishes, tokens, args.host)
    except (LimitTooSmall, NoBlocks) as error:
        print(f"intelligent-vram plan: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(as_json(facts, card, advice, tokens, args.host)))
    else:
        print("\n".join(report(facts, card, wishes, advice, tokens, args.host)))
    return _draw(args.png, facts, card, advice) if args.png else 0


def _draw(path: Path, facts: ModelFacts, card: hardware.Hardware, advice: Advice) -> int:
    """Write the picture. Returns the exit code."""
    if advice.prediction is None:
        print("intelligent-vram plan: no picture: nothing is predicted of this model", file=sys.stderr)
        return 0
    try:
        picture(facts, card, advice).save(path)
    except (OSError, ValueError) as error:
        print(f"intelligent-vram plan: {path}: {error}", file=sys.stderr)
        return 2
    return 0


def _card(args: argparse.Namespace) -> hardware.Hardware:
    """The device that was asked for, measured if it is here, with the numbers that were given."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = re.fullmatch(r"(cuda|cpu)(:\d+)?", name)
    card = hardware.measure(name) if here else hardware.card(name)
    return card.with_(
        device_total=args.card_vram,
        host_total=args.ram,
        to_device=None if args.bandwidth is None else args.bandwidth * 1e9,
        matmul=None if args.throughput is None else args.throughput * 1e12,
    )


def _gib(text: str) -> int:
    value = float(text)
    if not 0 < value < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text} is no size in GiB")
    return round(value * GIB)


def _size(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not like 832x480x81 or 1024x1024")
    size = tuple(int(number[:20]) for number in (match[1], match[2], match[3] or "1"))
    if max(size) > MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text[:60]} is larger than {MOST_PIXELS:,} in a direction")
    return size
