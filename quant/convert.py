"""A checkpoint into another format, tensor by tensor, without ever holding the whole of it in its own precision.

>>> conversion = plan_conversion("wan2.1_t2v_14B_bf16.safetensors", "fp8_e4m3fn")
>>> conversion.nbytes / conversion.source_nbytes
0.51
>>> into_file(conversion, "wan2.1_t2v_14B_fp8.safetensors", "cuda")
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..vram.device import resolve
from .formats import FORMATS, Format
from .quantize import Unquantizable, quantize
from .select import DEFAULT_KEEP, choose, choose_all
from .source import (
    LAYERS,
    Located,
    Refused,
    check_readable,
    check_unquantized,
    locate,
    open_source,
)
from .staging import Outbox, ReadAhead
from .write import CannotWrite, Shaped, check_writable, nbytes_of, writing

NONE = "none"
COMFY_QUANT, SCALED_FP8 = LAYOUTS = ("comfy_quant", "scaled_fp8")

Progress = Callable[[int, int], None]
Measured = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Conversion:
    """What becomes of a checkpoint, known before a weight is read. Sizes in bytes, names without the checkpoint's prefix.

    paths: the files. format: None where all is passed on as it is. layout: how quantized layers are described: "comfy_quant"
    (ComfyUI of today) or "scaled_fp8" (ComfyUI 0.3.64 and others of its time). sources: the tensors of the files, in their
    order. settings: of each quantized weight, by name. kept: the other weights with the reason for each, in words. outputs:
    torch's name of the dtype and the shape of each tensor that is made, in the order in which it is made. metadata: of the
    new file.
    """

    paths: tuple[Path, ...]
    format: Format | None
    layout: str
    sources: tuple[Located, ...] = field(repr=False)
    settings: dict[str, dict[str, Any]] = field(repr=False)
    kept: dict[str, str] = field(repr=False)
    outputs: dict[str, Shaped] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)

    @cached_property
    def nbytes(self) -> int:
        """Of what is made."""
        return sum(map(nbytes_of, self.outputs.values()))

    @cached_property
    def source_nbytes(self) -> int:
        """Of the transformer's weights in the files, which is what is read."""
        return sum(source.nbytes for source in self.sources)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the weights that are quantized, in the files' order."""
        return tuple(self.settings)

    @cached_property
    def kept_nbytes(self) -> dict[str, int]:
        """Bytes that stay as they are, by reason, the most first."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            if source.name in self.kept:
                counts[self.kept[source.name]] += source.nbytes
        return dict(counts.most_common())


def plan_conversion(
    path_or_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    quantization: str,
    *,
    keep: str | None = DEFAULT_KEEP,
    first_last: int = 0,
    tensor_cores: bool = True,
    layout: str = COMFY_QUANT,
) -> Conversion:
    """What ``convert`` would do, by the headers of the files alone.

    quantization: a name in FORMATS, or "none": all tensors are passed on, also of a quantized checkpoint. keep, first_last:
    as ``choose`` takes them. tensor_cores: whether layers multiply in the format where the card can. layout: "scaled_fp8"
    is for fp8_e4m3fn only, and quantizes all linear layers, whatever ``keep`` says: the hosts that need it run all of them in FP8.

    Raises ModelUnreadable for files that are missing, cut off or corrupted; Refused for formats that cannot be converted, or
    models of which nothing would be quantized; AlreadyQuantized; ValueError for settings that make no sense.
    """
    if quantization != NONE and quantization not in FORMATS:
        raise ValueError(f"{quantization!r} is no format; there are {', '.join(FORMATS)} and {NONE}")
    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is no layout; there are {', '.join(LAYOUTS)}")
    if first_last < 0:
        raise ValueError(f"{first_last} blocks at either end is less than none")
    format = FORMATS.get(quantization)
    if layout == SCALED_FP8 and format not in (None, FORMATS["fp8_e4m3fn"]):
        raise ValueError(f"the layout {SCALED_FP8} stores fp8_e4m3fn only, not {quantization}")
    facts = open_source(path_or_paths)
    sources, metadata = locate(facts)
    check_readable(facts, metadata)
    paths = tuple(map(Path, facts.paths))
    if format is None:
        outputs = {source.name: (source.dtype, source.shape) for source in sources}
        return Conversion(paths, None, layout, sources, {}, {}, outputs, metadata)
    check_unquantized(facts, metadata)
    choice = choose_all(facts) if layout == SCALED_FP8 else choose(facts, format, keep, first_last)
    if not choice.quantized or not facts.blocks:
        why = "it has no list of blocks that is known" if not facts.blocks else "every layer is kept as it is"
        raise Refused(f"{paths[0]}: no weight of it would be quantized: {why}. {facts.description}")
    shapes = {source.name: source.shape for source in sources}
    settings = {name: format.settings(shapes[name][1], tensor_cores) for name in choice.quantized}
    outputs = {}
    for source in sources:
        outputs |= _outputs_of(source, format, layout, settings.get(source.name))
    if layout == SCALED_FP8:
        # two elements: layers are to be dequantized, as they have to be where a dimension suits no FP8 product
        full = not tensor_cores or any(format.refuses(shapes[name]) for name in settings)
        outputs["scaled_fp8"] = (_name(format.storage), (2 if full else 0,))
    else:
        layers = {_layer(name): described for name, described in settings.items()}
        metadata |= {LAYERS: json.dumps({"format_version": "1.0", "layers": layers})}
    return Conversion(paths, format, layout, sources, settings, choice.kept, outputs, metadata)


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scale_of(weight: str, layout: str) -> str:
    return f"{_layer(weight)}.{'scale_weight' if layout == SCALED_FP8 else 'weight_scale'}"


def _outputs_of(source: Located, format: Format, layout: str, settings: Mapping[str, Any] | None) -> dict[str, Shaped]:
    if settings is None:
        return {source.name: (source.dtype, source.shape)}
    made: dict[str, Shaped] = {
        source.name: (_name(format.storage), source.shape),
        _scale_of(source.name, layout): ("float32", format.scale_shape(source.shape[0])),
    }
    if layout == COMFY_QUANT:
        made[f"{_layer(source.name)}.comfy_quant"] = ("uint8", (len(json.dumps(settings)),))
    return made


def convert(
    conversion: Conversion,
    device: torch.device | str,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ``conversion.outputs``, in their order, as CPU tensors of their own. Quantized on ``device``, of which it
    takes the largest weight in both precisions and 256 MiB.

    progress(done, total): bytes of the files, after each tensor; what it raises breaks the conversion off. measured(name,
    original, stored, scale, settings): each quantized weight, on the device, valid during the call.

    Raises NoDevice, ModelUnreadable when a file cannot be read to its end, and Unquantizable, naming the weight.
    """
    with closing(_converted(conversion, resolve(device), progress, measured)) as converted:
        for name, tensor in converted:
            yield name, tensor.cpu()


def into_memory(
    conversion: Conversion,
    device: torch.device | str,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> dict[str, torch.Tensor]:
    """As ``convert``, all in a dict in this order, copied from the device by several threads. Beside the result it takes 256 MiB
    of RAM and, of the largest quantized weight, on a CPU one copy in each precision, on a GPU three page-locked ones."""
    made: dict[str, torch.Tensor] = dict.fromkeys(conversion.outputs, torch.empty(0))

    def put(name: str, tensor: torch.Tensor, staged: bool) -> None:
        made[name] = tensor.clone() if staged else tensor

    _send_all(conversion, device, put, progress, measured)
    return made


def into_file(
    conversion: Conversion,
    path: str | os.PathLike[str],
    device: torch.device | str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    measured: Measured | None = None,
) -> Path:
    """As ``convert``, into a safetensors file that appears under its name when it is whole; ``<path>.part`` before. Takes
    256 MiB of RAM and a few times the largest weight.

    Raises also FileExistsError, unless ``overwrite``, and CannotWrite.
    """
    path = Path(path)
    check_writable(path, overwrite)
    if path.exists() and any(path.samefile(source) for source in conversion.paths):
        raise CannotWrite(f"{path}: it is the file that is read; choose another name")
    with writing(path, conversion.outputs, conversion.metadata, overwrite=overwrite) as put:
        _send_all(conversion, device, lambda name, tensor, staged: put(name, tensor), progress, measured)
    return path


def _send_all(
    conversion: Conversion,
    device: torch.device | str,
    put: Callable[[str, torch.Tensor, bool], None],
    progress: Progress | None,
    measured: Measured | None,
) -> None:
    device = resolve(device)
    largest = max((nbytes_of(conversion.outputs[name]) for name in conversion.settings), default=0)
    with (
        Outbox(put, device, largest) as outbox,
        closing(_converted(conversion, device, progress, measured)) as converted,
    ):
        for name, tensor in converted:
            outbox.send(name, tensor)


def _converted(
    conversion: Conversion, device: torch.device, progress: Progress | None, measured: Measured | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are made: weights that were quantized on ``device``, all others on the CPU."""
    sizes = [source.nbytes for source in conversion.sources if source.name in conversion.settings]
    buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)
    done = 0
    with ReadAhead(conversion.sources, device) as files:
        for source in conversion.sources:
            settings = conversion.settings.get(source.name)
            if settings is None:
                tensor = torch.empty(source.nbytes, dtype=torch.uint8)
                files.next_into(tensor)
                yield source.name, _viewed(tensor, source)
            else:
                files.next_into(buffer[: source.nbytes])
                yield from _quantized(conversion, source, _viewed(buffer[: source.nbytes], source), settings, measured)
            done += source.nbytes
            if progress is not None:
                progress(done, conversion.source_nbytes)
    if (mark := conversion.outputs.get("scaled_fp8")) and conversion.format is not None:
        yield "scaled_fp8", torch.zeros(mark[1], dtype=conversion.format.storage)


def _quantized(
    conversion: Conversion,
    source: Located,
    weight: torch.Tensor,
    settings: Mapping[str, Any],
    measured: Measured | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """A quantized weight and what describes it."""
    try:
        stored, scale = quantize(weight, conversion.format, weight.device)
    except Unquantizable as error:
        raise Unquantizable(
            f"{source.file}: {source.name} cannot be quantized: {error}. Download or copy the file again, "
            "or let the pattern of what to keep name it"
        ) from None
    if measured is not None:
        measured(source.name, weight, stored, scale, settings)
    yield source.name, stored
    yield _scale_of(source.name, conversion.layout), scale.cpu()
    if conversion.layout == COMFY_QUANT:
        yield f"{_layer(source.name)}.comfy_quant", torch.tensor([*json.dumps(settings).encode()], dtype=torch.uint8)


def _viewed(data: torch.Tensor, source: Located) -> torch.Tensor:
    """Bytes, uint8 [nbytes], as the tensor that they are."""
    return data.view(getattr(torch, source.dtype)).view(source.shape)
