"""Pack tensors into one flat buffer, each at a multiple of 512 bytes, and give views back out of it.

A tensor in a packed buffer is aligned and dense by construction. Strides that a dense tensor has on purpose
(a column-major FP8 operand) are kept: its storage is packed and the view rebuilt with the same strides.
Tensor subclasses are packed by their inner tensors through ``__tensor_flatten__`` and rebuilt with
``__tensor_unflatten__`` (protocol: torch/utils/_python_dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .encoded import EncodedTensor

ALIGNMENT = 512


def align(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


class CannotPack(TypeError):
    """This tensor cannot be taken apart into plain dense tensors; it has to stay where it is."""


@dataclass(frozen=True)
class TensorSpec:
    """Where one plain tensor lies in a packed buffer (``offset``, ``nbytes``) and how to see it there."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor inside ``buffer`` (uint8, one dimension), sharing its memory."""
        span = buffer[self.offset : self.offset + self.nbytes].view(self.dtype)
        return span.as_strided(self.shape, self.stride)

    def shifted(self, by: int) -> TensorSpec:
        """The same tensor in a buffer that begins ``by`` bytes later."""
        return TensorSpec(self.offset - by, self.nbytes, self.dtype, self.shape, self.stride)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of a strided tensor fill their span of memory exactly, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def strides_to_keep(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides that a packed copy of ``tensor`` has: its own where they are dense, else row-major contiguous."""
    if tensor.numel() and is_dense(tensor):
        return tuple(tensor.stride())
    stride = [1] * tensor.dim()
    for dim in range(tensor.dim() - 2, -1, -1):
        stride[dim] = stride[dim + 1] * max(1, tensor.shape[dim + 1])
    return tuple(stride)


def plan_tensor(tensor: torch.Tensor, offset: int) -> TensorSpec:
    """The place of a plain strided tensor in a packed buffer at ``offset`` (a multiple of ALIGNMENT)."""
    nbytes = tensor.numel() * tensor.element_size()
    return TensorSpec(offset, nbytes, tensor.dtype, tuple(tensor.shape), strides_to_keep(tensor))


def _has_flatten(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


def _carry_attributes(source: torch.Tensor, result: torch.Tensor, skip: Sequence[str] = ()) -> torch.Tensor:
    """Give ``result`` the attributes that somebody hung onto ``source`` (ComfyUI and GGUF loaders do)."""
    for name, value in vars(source).items():
        if name not in vars(result) and name not in skip:
            setattr(result, name, value)
    return result


def flatten(
    tensor: torch.Tensor, decode: bool = True
) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], torch.Tensor]]:
    """Take a tensor apart into plain strided tensors. One that is kept encoded is decoded; unless ``decode``, it is itself
    the part, and ``rebuild`` makes the plain one all the same.

    Returns (inner tensors, rebuild): ``rebuild(tensors)`` makes an object of the same class, Parameter or not,
    with the same extra attributes, over other inner tensors of the same shapes and dtypes. Nothing is copied.
    Raises CannotPack for a subclass without ``__tensor_flatten__``, a sparse or a meta tensor.
    """
    if tensor.is_meta:
        raise CannotPack("it is on the meta device and has no data")
    if tensor.layout is not torch.strided:
        raise CannotPack(f"its layout is {tensor.layout}")
    is_parameter = isinstance(tensor, nn.Parameter)

    if isinstance(tensor, EncodedTensor):

        def rebuild_plain(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            (part,) = parts
            result = nn.Parameter(part, requires_grad=False) if is_parameter else part
            return _carry_attributes(tensor, result, skip=EncodedTensor.ATTRIBUTES)

        return [tensor.decode() if decode or tensor.replaced is not None else tensor], rebuild_plain

    if _is_plain(tensor):

        def rebuild(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            (part,) = parts
            result = nn.Parameter(part, requires_grad=False) if is_parameter else part
            return _carry_attributes(tensor, result)

        return [tensor.detach()], rebuild

    if _has_flatten(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]
        flattened = [flatten(part, decode) for part in inner]
        nested = [(len(parts), rebuild_inner) for parts, rebuild_inner in flattened]
        cls, size, stride = type(tensor), tensor.shape, tensor.stride()

        def rebuild_subclass(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            rebuilt, start = {}, 0
            for name, (count, rebuild_inner) in zip(names, nested, strict=True):
                rebuilt[name] = rebuild_inner(parts[start : start + count])
                start += count
            result = cls.__tensor_unflatten__(rebuilt, context, size, stride)
            result = nn.Parameter(result, requires_grad=False) if is_parameter else result
            return _carry_attributes(tensor, result, skip=names)

        return [part for parts, _ in flattened for part in parts], rebuild_subclass

    if _is_thin_subclass(tensor):
        thin = type(tensor)

        def rebuild_thin(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            (part,) = parts
            return _carry_attributes(tensor, torch.Tensor._make_subclass(thin, part, False))

        return [tensor.as_subclass(torch.Tensor)], rebuild_thin

    raise CannotPack(f"{type(tensor).__name__} has no __tensor_flatten__")


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that ``tensor`` is made of: itself, or those inside a flattenable subclass."""
    if not _is_plain(tensor) and _has_flatten(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from leaves(getattr(tensor, name))
    else:
        yield tensor


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor objects that hold the memory of ``tensor``: its leaves, or the encoded bytes of those that are encoded."""
    for leaf in leaves(tensor):
        yield leaf.encoded if isinstance(leaf, EncodedTensor) and leaf.replaced is None else leaf


def _is_thin_subclass(tensor: torch.Tensor) -> bool:
    """A subclass that only adds attributes and methods to real storage (GGUF's parameters), not a wrapper."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or (
        type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer of a module, and how it lies in a packed buffer.

    ``owner`` is ``module._parameters`` or ``module._buffers`` and ``name`` its key there: replacing
    ``owner[name]`` is how the module gets to see another copy of the same weight. ``specs``: in the packed buffer;
    ``decoded``: once it is decoded, where it is packed encoded.
    """

    path: str
    owner: dict[str, torch.Tensor | None]
    name: str
    host: torch.Tensor
    specs: tuple[TensorSpec, ...]
    rebuild: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    decoded: tuple[TensorSpec, ...] | None = None

    def bind(self, buffer: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """The parameter over ``buffer``, whose byte 0 is byte ``shift`` of the packed buffer, or of the decoded one."""
        return self.rebuild([spec.shifted(shift).view(buffer) for spec in self.decoded or self.specs])
