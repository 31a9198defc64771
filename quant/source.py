"""What a checkpoint is quantized from: its files, what they are refused for, where each of its tensors lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..vram.inspect_weights import FP8, Unreadable
from ..vram.model_facts import FLOATS, ModelFacts, read_model
from ..vram.model_files import AGAIN, PICKLED, SAFETENSORS_DTYPES, read_header
from ..vram.model_headers import LONGEST_HEADER, ModelUnreadable, check_json

LAYERS = "_quantization_metadata"  # entry of a header that lists quantized layers
ANEW = "Quantize the bf16 or fp16 checkpoint"
# ends of names by which formats are known that ComfyUI's loader does not read
FOREIGN = {
    ".absmax": "bitsandbytes",
    ".qweight": "AWQ, GPTQ or nunchaku",
    ".qzeros": "AWQ or GPTQ",
    ".weight_int8": "an INT8 format of another program",
}
BITSANDBYTES = ".quant_state.bitsandbytes__"


class Refused(Unreadable):
    """The files can be read, but not quantized or passed on; the message names them, says why and what to do."""


class AlreadyQuantized(Refused):
    """The checkpoint is quantized: it can be loaded as it is, and quantizing it again would only lose accuracy."""


class Located(NamedTuple):
    """A tensor of a checkpoint: its name without prefix, torch's name of its dtype, its shape, and its ``nbytes`` from byte
    ``start`` of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def open_source(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> ModelFacts:
    """The facts of a safetensors checkpoint: one file, an index, a shard, or a list of files.

    Raises ModelUnreadable for what is missing, cut off or corrupted, and Refused for other formats.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else [*paths]
    for path in map(Path, given):
        _check_kind(path)
    return read_model(given)


def _check_kind(path: Path) -> None:
    """Raises Refused by what a file is, whatever it is called."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return  # read_model says what is wrong
    if int.from_bytes(head, "little") <= LONGEST_HEADER:
        head = b""  # it is the length of a header, whose first bytes can be any
    suffix = path.suffix.lower()
    if head.startswith(b"GGUF") or suffix == ".gguf":
        raise Refused(
            f"{path}: GGUF is a quantized format already; load it with ComfyUI-GGUF or WanVideoWrapper. {ANEW}"
        )
    if head.startswith((b"PK\x03\x04", b"\x80")) or suffix in PICKLED:
        raise Refused(
            f"{path}: it is pickled, which could run code when loaded and cannot be read in parts. "
            "Convert it to safetensors where you trust it"
        )


def locate(facts: ModelFacts) -> tuple[tuple[Located, ...], dict[str, str]]:
    """Where the tensors of ``facts`` lie, in the files' order, and the metadata of the files, names in it without prefix.

    Raises ModelUnreadable.
    """
    found: list[Located] = []
    metadata: dict[str, str] = {}
    wanted = {weight.name for weight in facts.weights}
    for file in map(Path, facts.paths):
        try:
            stored, entries, _ = read_header(file, LONGEST_HEADER, check_json)
        except OSError as error:
            raise ModelUnreadable(f"{file}: it could not be read: {error.strerror or error}") from None
        except Unreadable as error:
            raise ModelUnreadable(f"{file}: {error}") from None
        if not isinstance(entries, Mapping):
            raise ModelUnreadable(f"{file}: its metadata is no list of names and texts. {AGAIN}")
        metadata |= {key: text for key, text in entries.items() if isinstance(text, str) and key not in metadata}
        for tensor in sorted(stored, key=lambda tensor: (tensor.start, tensor.end)):
            name = tensor.name.removeprefix(facts.prefix)
            if tensor.name.startswith(facts.prefix) and name in wanted:
                dtype = SAFETENSORS_DTYPES[tensor.dtype][0]
                found.append(Located(name, dtype, tensor.shape, file, tensor.start, tensor.end - tensor.start))
    if len(found) != len(wanted):
        raise ModelUnreadable(f"{facts.paths[0]}: it changed while it was read. Try again when it is whole")
    if LAYERS in metadata:
        metadata[LAYERS] = json.dumps(_without_prefix(metadata[LAYERS], facts))
    return tuple(found), metadata


def _without_prefix(text: str, facts: ModelFacts) -> dict[str, Any]:
    """The list of quantized layers in a header, with the names that they have without the model's prefix."""
    try:
        described = json.loads(text)
        layers = {name.removeprefix(facts.prefix): settings for name, settings in described["layers"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelUnreadable(f"{facts.paths[0]}: its {LAYERS} is not ComfyUI's ({error!r:.200}). {ANEW}") from None
    return {**described, "layers": layers}


def check_unquantized(facts: ModelFacts, metadata: Mapping[str, str]) -> None:
    """Raises AlreadyQuantized for a checkpoint that is quantized in a way that ComfyUI reads."""
    names = {weight.name for weight in facts.weights}
    if LAYERS in metadata or any(name.endswith(".comfy_quant") for name in names):
        found = "ComfyUI's quantized format"
    elif "scaled_fp8" in names or any(name.endswith(".scale_weight") for name in names):
        found = "scaled FP8"
    elif any(weight.dtype in FP8 for weight in facts.weights):
        found = "FP8 without scales"
    else:
        return
    raise AlreadyQuantized(
        f"{facts.paths[0]}: it is in {found} already. Load it as it is (quantization none). {ANEW} for another format"
    )


def check_readable(facts: ModelFacts, metadata: Mapping[str, str]) -> None:
    """Raises Refused for a checkpoint in a format that ComfyUI reads wrongly or not at all, naming a weight."""
    path = facts.paths[0]
    dtypes = {weight.name: weight.dtype for weight in facts.weights}
    for name in dtypes:
        kind = next((kind for end, kind in FOREIGN.items() if name.endswith(end)), None)
        if kind is None and BITSANDBYTES in name:
            kind = "bitsandbytes"
        if kind is not None:
            raise Refused(f"{path}: it is quantized by {kind} ({name}), which ComfyUI does not read. {ANEW}")
    listed = json.loads(metadata[LAYERS])["layers"] if LAYERS in metadata else {}
    for name, dtype in dtypes.items():
        layer = name.removesuffix(".weight")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise Refused(f"{path}: {name} is stored as {dtype}, which PyTorch cannot hold. {ANEW}")
        if layer == name:
            continue
        marked = f"{layer}.comfy_quant" in dtypes or layer in listed
        if f"{layer}.weight_scale" in dtypes and not marked:
            raise Refused(
                f"{path}: {layer} has a weight_scale, but nothing says in which format; ComfyUI would load noise. {ANEW}"
            )
        if dtype not in (*FLOATS, *FP8) and not marked:
            raise Refused(f"{path}: {name} is stored as {dtype}, and nothing says how that stands for a weight. {ANEW}")
    scaled = {dtype for name, dtype in dtypes.items() if f"{name.removesuffix('weight')}scale_weight" in dtypes}
    if "float8_e5m2" in scaled | {dtypes.get("scaled_fp8")}:
        raise Refused(f"{path}: it is scaled FP8 in e5m2, which ComfyUI takes for e4m3 and loads as noise. {ANEW}")
