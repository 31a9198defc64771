"""Coverage-guided fuzzing of model headers: ``python tests/faults/atheris_headers.py FOLDER -max_total_time=3600``.

Needs atheris (pip install atheris). FOLDER keeps what reached new code, for the next run. The first byte of an input chooses the
format. It ends at the first error that is not one of the declared ones, at an input that takes 10 s, or at 2 GB of memory.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["intelligent_vram.vram.model", "intelligent_vram.vram.inspect_weights"]):
    from intelligent_vram.quant.convert import plan_conversion
    from intelligent_vram.vram.inspect_weights import Unreadable
    from intelligent_vram.vram.model_facts import read_model
    from intelligent_vram.vram.model_files import inspect_file

HEADER = b"""{"__metadata__":{"format":"pt","_quantization_metadata":"{\\"layers\\":{}}"},
"model.diffusion_model.blocks.0.ffn.0.weight":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},
"model.diffusion_model.blocks.1.weight_scale":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[8,12]}}"""
FIELD = b"\x11\0\0\0\0\0\0\0general.alignment\4\0\0\0\x20\0\0\0"
TENSOR = b"\x0a\0\0\0\0\0\0\0blocks.0.w\1\0\0\0\x20\0\0\0\0\0\0\0\x08\0\0\0" + bytes(8)
SEEDS = {
    "safetensors": b"\0" + len(HEADER).to_bytes(8, "little") + HEADER + bytes(12),
    "gguf": b"\1GGUF\3\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0" + FIELD + TENSOR + bytes(96),
}
FILES = [Path(tempfile.gettempdir()) / f"fuzzed-{os.getpid()}.{suffix}" for suffix in ("safetensors", "gguf")]


def one_input(data: bytes) -> None:
    """Read the bytes as a file in all ways."""
    path = FILES[data[0] % 2 if data else 0]
    path.write_bytes(data[1:])
    for reader in (read_model, inspect_file, lambda path: plan_conversion(path, "int8")):
        with contextlib.suppress(Unreadable):
            reader(path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name, content in SEEDS.items():
        (folder / name).write_bytes(content)
    try:
        atheris.Setup([*sys.argv, "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/"], one_input)
        atheris.Fuzz()
    finally:
        for file in FILES:
            file.unlink(missing_ok=True)
