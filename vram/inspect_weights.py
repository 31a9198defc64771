"""What is wrong with the weights of a model, before a kernel finds out: kinds of findings, FP8 operands, loaded models.

Of a loaded model: which weights are not contiguous or not aligned, by the rules of contiguity.py. Of any model: whether
its FP8 weights can be operands of an FP8 matrix product. Files are inspected in model_files.py.

Facts about FP8: torch._scaled_mm takes a row-major first operand and a column-major second one, whose dimensions are
multiples of 16, and float32 scales; cuBLASLt wants both at addresses that are multiples of 16
(https://docs.nvidia.com/cuda/cublas/#cublasltmatmul).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .contiguity import ALIGNMENT, Finding, problem_of, strides_are_deliberate
from .layout import plain_tensors

FP8 = ("float8_e4m3fn", "float8_e5m2")
FP8_MULTIPLE = 16
KITCHEN_CUDA = 13  # what comfy-kitchen's compiled kernels are built with; ComfyUI does not use them with less
ROW_MAJOR, COLUMN_MAJOR, STRIDED = "row-major", "column-major", "strided"


class Unreadable(ValueError):
    """The file could not be inspected; the message says why and what to do."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding. A fault breaks loading or a kernel; what is no fault is worth knowing."""

    name: str
    fault: bool
    title: str
    advice: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "cut_off",
            True,
            "the file is cut off: tensors reach past its end",
            "Loaders refuse it, or crash when they read the missing part. Download or copy it again, and compare sizes.",
        ),
        Kind(
            "gap",
            True,
            "bytes that belong to no tensor",
            "safetensors refuses such a file. Download it again; if it is like that at its source, it has to be written anew.",
        ),
        Kind(
            "overlap",
            True,
            "tensors that share bytes of the file",
            "safetensors refuses such a file. Download it again; if it is like that at its source, it has to be written anew.",
        ),
        Kind(
            "malformed",
            True,
            "tensors whose dtype, shape and size do not fit",
            "Loaders refuse it. Download it again; if it is like that at its source, it has to be written anew.",
        ),
        Kind(
            "split_elements",
            True,
            "tensors that do not begin at a multiple of what the format wants",
            "Mapped into RAM their elements lie at odd addresses, which not every reader takes. Load the file and save it again.",
        ),
        Kind(
            "mapped_misaligned",
            False,
            f"tensors that do not begin at a multiple of {ALIGNMENT} bytes in the file",
            "Mapped into RAM they have misaligned addresses. This is usual (safetensors pads its header to 8 bytes) and does "
            "no harm where weights are copied to the GPU, as in ComfyUI and this pack: a copy is aligned. It matters only to "
            "a loader that puts the file on the GPU in one piece and takes views of it.",
        ),
        Kind(
            "strided",
            True,
            "weights that are not contiguous",
            "A dense transposed weight keeps its strides when it is moved to the GPU, and kernels that expect rows fail or get "
            "slow. Make it contiguous where it is made, or call intelligent_vram.vram.contiguity.mend(module).",
        ),
        Kind(
            "misaligned",
            True,
            "weights at misaligned addresses on the GPU",
            'FP8 and FP4 kernels fail with "misaligned address". Such a weight is a view into something larger: copy it, or '
            "call intelligent_vram.vram.contiguity.mend(module).",
        ),
        Kind(
            "misaligned_in_ram",
            False,
            "weights at misaligned addresses in RAM",
            "They are mapped from a file, or views into something larger. This does no harm where they are copied to the GPU: "
            "a copy is aligned.",
        ),
        Kind(
            "fp8_dimensions",
            True,
            f"FP8 weights with a dimension that is no multiple of {FP8_MULTIPLE}",
            "torch._scaled_mm refuses them. WanVideoWrapper's _fast modes stop with its error; ComfyUI computes such layers in "
            "higher precision. Keep these layers in bf16, or do not use FP8 matrix products.",
        ),
        Kind(
            "fp8_no_scale",
            True,
            "FP8 weights without the scale that the file promises, or that others in it have",
            "They would be used as if their scale were 1. Get the file again, or quantize the model anew.",
        ),
        Kind(
            "fp8_scale_dtype",
            False,
            "FP8 scales that are not float32",
            "torch._scaled_mm takes float32 only, and loaders convert them. A 16-bit scale has lost precision already.",
        ),
        Kind(
            "fp8_scale_shape",
            False,
            "FP8 scales of more than one element",
            "One scale a row or a block. WanVideoWrapper's _fast modes take one scale a weight only and stop with an error.",
        ),
        Kind(
            "fp8_column_major",
            False,
            "FP8 weights that are kept column-major",
            "As they are they can be the second operand. A layer that calls weight.t() gives a row-major one, which "
            "torch._scaled_mm refuses.",
        ),
    )
}


@dataclass(frozen=True)
class Issue(Finding):
    """A finding of a kind in KINDS. ``path`` names the tensor."""

    kind: str

    @property
    def fault(self) -> bool:
        """Whether it breaks loading or a kernel."""
        return KINDS[self.kind].fault


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor without its values. ``dtype`` is torch's name, ``layout`` one of the three above."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ROW_MAJOR


@dataclass(frozen=True)
class Fp8Weight:
    """An FP8 weight [out, in]. ``layout`` is how it is kept: of a row-major one, ``weight.t()`` is the column-major second
    operand without a copy. ``scale`` names its scale, None where there is none."""

    path: str
    dtype: str
    shape: tuple[int, int]
    layout: str
    scale: str | None
    scale_dtype: str | None
    scale_shape: tuple[int, ...] | None

    @property
    def divisible(self) -> bool:
        """Whether both dimensions are multiples of 16."""
        return all(size % FP8_MULTIPLE == 0 for size in self.shape)


@dataclass(frozen=True)
class Report:
    """What was found in one file or model. ``form`` is the format, ``nbytes`` the size of its tensors in bytes."""

    subject: str
    form: str
    tensors: int
    nbytes: int
    issues: tuple[Issue, ...]
    fp8: tuple[Fp8Weight, ...]

    @property
    def faults(self) -> int:
        """How many findings break loading or a kernel."""
        return sum(issue.fault for issue in self.issues)


# -- FP8 -----------------------------------------------------------------------------------------------------------------


def fp8_weights(facts: Mapping[str, Facts]) -> list[Fp8Weight]:
    """The FP8 tensors of two dimensions, each with its scale: ``weight_scale`` (ComfyUI) or ``scale_weight`` (older)."""
    found = []
    for path, weight in facts.items():
        if weight.dtype in FP8 and len(weight.shape) == 2 and not path.endswith(("_scale", ".scale_weight")):
            names = (f"{path}_scale", f"{path.removesuffix('weight')}scale_weight")
            name = next((name for name in names if name in facts), None)
            scale = facts[name] if name is not None else None
            described = (scale.dtype, scale.shape) if scale is not None else (None, None)
            found.append(Fp8Weight(path, weight.dtype, weight.shape, weight.layout, name, *described))
    return found


def promised_scales(facts: Mapping[str, Facts], metadata: Mapping[str, Any]) -> dict[str, str]:
    """The weights that a checkpoint says are quantized, each with where it says so: ``_quantization_metadata``,
    ``comfy_quant`` tensors, or the older mark ``scaled_fp8``, which speaks for all FP8 weights. Raises Unreadable."""
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        promised = {f"{layer}.weight": "_quantization_metadata" for layer in layers}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"its _quantization_metadata is not ComfyUI's ({error!r}). Quantize the model anew") from None
    promised |= {name.removesuffix("comfy_quant") + "weight": name for name in facts if name.endswith(".comfy_quant")}
    marks = [name.removesuffix("scaled_fp8") for name in facts if name.split(".")[-1] == "scaled_fp8"]
    return {
        path: f"{mark}scaled_fp8"
        for mark in marks
        for path, weight in facts.items()
        if weight.dtype in FP8 and path.startswith(mark)
    } | promised


def check_fp8(weights: list[Fp8Weight], promised: Mapping[str, str]) -> Iterator[Issue]:
    """What keeps FP8 weights from a matrix product in FP8, or makes its result wrong."""
    some = next((weight.scale for weight in weights if weight.scale is not None), None)
    for weight in weights:
        if not weight.divisible:
            problem = f"{weight.dtype} of shape {list(weight.shape)}"
            yield Issue(weight.path, problem, "fp8_dimensions")
        if weight.layout == COLUMN_MAJOR:
            yield Issue(weight.path, f"{weight.dtype} of shape {list(weight.shape)}", "fp8_column_major")
        if weight.scale is None or weight.scale_shape is None:
            if weight.path in promised:
                problem = f"no scale, though {promised[weight.path]} says that it is quantized"
                yield Issue(weight.path, problem, "fp8_no_scale")
            elif some is not None:
                yield Issue(weight.path, f"no scale, though others have one ({some})", "fp8_no_scale")
        elif math.prod(weight.scale_shape) != 1:
            yield Issue(weight.scale, f"{weight.scale_dtype} of shape {list(weight.scale_shape)}", "fp8_scale_shape")
        elif weight.scale_dtype != "float32":
            yield Issue(weight.scale, f"it is {weight.scale_dtype}", "fp8_scale_dtype")


# -- tensors in memory ---------------------------------------------------------------------------------------------------


def inspect_module(module: nn.Module, subject: str | None = None) -> Report:
    """Parameters, buffers and FP8 scales of a loaded model, wherever they are. Those on the meta device are passed by."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, part in module.named_modules():
        for name in ("weight_scale", "scale_weight"):
            # WanVideoWrapper keeps its scales as plain attributes
            if isinstance(scale := getattr(part, name, None), torch.Tensor):
                named[f"{path}.{name}" if path else name] = scale
    return inspect_tensors(subject or type(module).__name__, "module", named)


def inspect_tensors(subject: str, form: str, named: Mapping[str, torch.Tensor]) -> Report:
    """The same of tensors by name, as ``form``: a state dict, for one. What is not strided is passed by."""
    plain = dict(part for path, tensor in named.items() for part in _parts(path, tensor))
    plain = {path: tensor for path, tensor in plain.items() if not tensor.is_meta and tensor.layout is torch.strided}
    facts = {
        path: Facts(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _layout(tensor))
        for path, tensor in plain.items()
    }
    fp8 = fp8_weights(facts)
    layouts = [
        Issue(path, problem, _kind(tensor))
        for path, tensor in plain.items()
        if (problem := problem_of(tensor)) is not None
    ]
    issues = [*layouts, *check_fp8(fp8, promised_scales(facts, {}))]
    return Report(subject, form, len(plain), sum(t.nbytes for t in plain.values()), tuple(issues), tuple(fp8))


def _parts(path: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors of a tensor by name: those inside a quantized one under the names that a checkpoint gives them."""
    if next(plain_tensors(tensor)) is tensor:
        yield path, tensor
        return
    for index, name in enumerate(tensor.__tensor_flatten__()[0]):
        inner = path if index == 0 else f"{path}_scale" if name in ("scale", "_param_scale") else f"{path}.{name}"
        yield from _parts(inner, getattr(tensor, name))


def _layout(tensor: torch.Tensor) -> str:
    if tensor.is_contiguous():
        return ROW_MAJOR
    return COLUMN_MAJOR if strides_are_deliberate(tensor) else STRIDED


def _kind(tensor: torch.Tensor) -> str:
    """The kind of a finding of ``problem_of``."""
    if _layout(tensor) == STRIDED:
        return "strided"
    return "misaligned_in_ram" if tensor.device.type == "cpu" else "misaligned"
