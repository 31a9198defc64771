"""Tensor subclasses as quantizers make them: thin ones over real bytes, wrappers around other tensors."""

import torch
from torch import nn


class QuantParameter(nn.Parameter):
    """As WanVideoWrapper's GGUF parameters: packed bytes and how to read them."""

    def __new__(cls, data, quant_type=None):
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, data, quant_type=None):
        self.quant_type = quant_type


class QuantTensor(torch.Tensor):
    """As ComfyUI-GGUF's tensors: `shape` is that of the weight, not of the bytes; copies of it are itself."""

    def __new__(cls, data, tensor_shape):
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, data, tensor_shape):
        self.tensor_shape = torch.Size(tensor_shape)

    @property
    def shape(self):
        return self.tensor_shape

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self


class Scaled(torch.Tensor):
    """A wrapper: int8 data and a scale, an ordinary tensor of `dtype` to everybody else."""

    @staticmethod
    def __new__(cls, data, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)

    def __init__(self, data, scale, dtype):
        self._data, self._scale = data, scale

    def __tensor_flatten__(self):
        return ["_data", "_scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner, dtype, size, stride):
        return Scaled(inner["_data"], inner["_scale"], dtype)

    def dequantized(self):
        return self._data.to(self.dtype) * self._scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(args[0]._data, args[0]._scale, args[0].dtype)
        plain = [arg.dequantized() if isinstance(arg, Scaled) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Opaque(torch.Tensor):
    """A wrapper that computes as what it hides, but tells nobody what that is."""

    @staticmethod
    def __new__(cls, hidden):
        return torch.Tensor._make_wrapper_subclass(cls, hidden.shape, dtype=hidden.dtype)

    def __init__(self, hidden):
        self.hidden = hidden

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].hidden)
        return func(*[arg.hidden if isinstance(arg, cls) else arg for arg in args], **(kwargs or {}))
