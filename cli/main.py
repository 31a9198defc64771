"""The console command ``intelligent-vram``."""

from __future__ import annotations

import argparse
import logging
import sys

from . import compress, demo, doctor, growth, plan, quantize


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="intelligent-vram", description="Stream diffusion models whose weights do not fit the GPU."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine does")
    commands = parser.add_subparsers(dest="command", required=True)
    compress.add_parser(commands)
    demo.add_parser(commands)
    doctor.add_parser(commands)
    growth.add_parser(commands)
    plan.add_parser(commands)
    quantize.add_parser(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
