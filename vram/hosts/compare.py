"""Two of ComfyUI's models beside each other: what they answer to the same noise, and their weights, one at a time.

Both run through the host's own sampling and model management, one after the other, and each is unloaded before its
weights are read. So it does not matter how a model is loaded (whole, low-VRAM, faulted in, streamed), and a card that
holds one of them is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .comfy import ROOT

KEY = "intelligent_vram_compare"
COMPILED = "_orig_mod."
SHAPES_TOLD = 3  # differences that an error names


class DifferentModels(ValueError):
    """The two models are not two versions of the same one."""


@dataclass(frozen=True)
class WeightPair:
    """A weight of both models, float32, on the device that computes. ``format``: of the second one as it is stored."""

    name: str
    format: str
    reference: torch.Tensor
    result: torch.Tensor


class Comparison:
    """``reference`` and ``model``: MODELs of the same architecture. Raises DifferentModels, naming what differs.

    ``outputs`` first, then ``weights``; both move the host's progress bar and end when the prompt is interrupted.
    """

    def __init__(self, reference: Any, model: Any) -> None:
        self.reference, self.model = reference, model
        self.left_out: list[str] = []
        self._weights = _common_weights(reference, model)
        self._progress = comfy.utils.ProgressBar(2 if self.shared else 2 + len(self._weights))

    @property
    def shared(self) -> bool:
        """Whether both are copies of one model in memory."""
        return _transformer(self.reference) is _transformer(self.model)

    @property
    def patched(self) -> bool:
        """Whether a LoRA or the like changes weights of one of them."""
        return bool(self.reference.patches or self.model.patches)

    def sigma(self, position: float) -> float:
        """The noise level of a model's schedule at ``position``: 0 is pure noise, 1 the end."""
        sampling = self.reference.get_model_object("model_sampling")
        return min(float(sampling.percent_to_sigma(position)), float(sampling.sigma_max))

    def outputs(
        self, positive: Any, latent: dict[str, Any], seed: int, position: float
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the transformers of both answer to ``latent`` with the noise of ``seed`` at ``sigma(position)``: the tensors
        of one sampling step at cfg 1, in the order in which they were computed, on the host.

        Raises ValueError where the schedule has no noise left, or the models did not answer the same questions.
        """
        sigma = self.sigma(position)
        if not sigma > 0:
            raise ValueError(f"at position {position:g} of the schedule no noise is left; choose an earlier one")
        image = _filled(self.reference, latent)
        noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
        answers = []
        for model in (self.reference, self.model):
            answers.append(_answers(model, noise, image, positive, sigma, seed))
            _unload(model)
            self._step()
        first, second = ([tuple(tensor.shape) for tensor in answer] for answer in answers)
        if first != second or not first:
            raise ValueError(
                f"the host ran the two models on different batches: outputs of shapes {first} and {second}. Use a smaller latent "
                "or a single conditioning"
            )
        return answers[0], answers[1]

    def weights(self) -> Iterator[WeightPair]:
        """The weights of two and more dimensions, in order of definition, without LoRAs; nothing for copies of one model.
        Those that cannot be read are named in ``left_out``."""
        if self.shared:
            return
        for model in (self.reference, self.model):
            _unload(model)
        modules = [dict(_transformer(model).named_modules()) for model in (self.reference, self.model)]
        device = self.reference.load_device
        for path, name in self._weights:
            key = f"{path}.{name}" if path else name
            first, second = (_owner(found, path) for found in modules)
            tensors = [_plain(owner, name, device) for owner in (first, second)]
            if tensors[0] is None or tensors[1] is None or tensors[0].shape != tensors[1].shape:
                self.left_out.append(key)
            else:
                yield WeightPair(key, _format(second, name), tensors[0], tensors[1])
            self._step()

    def _step(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._progress.update(1)


def _transformer(model: Any) -> torch.nn.Module:
    return getattr(model.model, ROOT)


def _owner(modules: dict[str, torch.nn.Module], path: str) -> torch.nn.Module:
    """The module at ``path``, also where torch.compile has put a module around it."""
    if path in modules:
        return modules[path]
    return next(module for name, module in modules.items() if name.replace(COMPILED, "") == path)


def _shapes(model: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes of the weights by path of the module and name; scales of quantized layers have less than two dimensions, and
    are left out with the rest that has."""
    found = {}
    for path, module in _transformer(model).named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() >= 2 and "scale" not in name.split("_"):
                found[path.replace(COMPILED, ""), name] = tuple(tensor.shape)
    return found


def _common_weights(reference: Any, model: Any) -> list[tuple[str, str]]:
    """Weights of two and more dimensions that both have. Raises DifferentModels unless these are all."""
    names = [f"{type(each.model).__name__} ({type(_transformer(each)).__name__})" for each in (reference, model)]
    first, second = _shapes(reference), _shapes(model)
    if names[0] != names[1]:
        raise DifferentModels(
            f"these are different models, which cannot be compared: the reference is {names[0]}, the other {names[1]}"
        )
    differences = [
        f"{'.'.join(filter(None, key))} is {_size(first.get(key))} in the reference and {_size(second.get(key))} in the other"
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    ]
    if differences:
        more = len(differences) - SHAPES_TOLD
        told = "; ".join(differences[:SHAPES_TOLD]) + (f"; and {more} more" if more > 0 else "")
        raise DifferentModels(f"these are different models, which cannot be compared: {told}")
    return list(first)


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))


def _filled(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The latent image as the host's sampler nodes prepare it for ``model``."""
    prepare = comfy.sample.fix_empty_latent_channels
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    known = inspect.signature(prepare).parameters
    return prepare(
        model, latent["samples"], **{name: latent[name] for name in ratios if name in known and name in latent}
    )


def _answers(
    model: Any, noise: torch.Tensor, image: torch.Tensor, positive: Any, sigma: float, seed: int
) -> list[torch.Tensor]:
    """What the transformer of ``model`` puts out in one step of sampling."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, list | tuple) else [output]
        found.extend(part.detach().to("cpu", copy=True) for part in parts if isinstance(part, torch.Tensor))

    def watch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        handle = getattr(executor.class_obj, ROOT).register_forward_hook(keep)
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, watch)
    comfy.sample.sample_custom(
        watched,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]),
        positive,
        positive,
        image,
        disable_pbar=True,
        seed=seed,
    )
    return found


def _unload(model: Any) -> None:
    """Take ``model`` and its copies off the device by the host's model management: its weights are whole and unpatched
    then, in RAM. Other models stay."""
    loaded = comfy.model_management.current_loaded_models
    keep = [each for each in loaded if each.model is None or each.model.model is not model.model]
    if len(keep) < len(loaded):
        comfy.model_management.free_memory(1e30, model.load_device, keep_loaded=keep)


def _plain(module: torch.nn.Module, name: str, device: torch.device) -> torch.Tensor | None:
    """A weight as the layer computes with it, in float32 on ``device``; None where its class does not tell how."""
    tensor = getattr(module, name).detach()
    shape = tensor.shape
    tensor = tensor.to(device)
    if type(tensor).dequantize is not torch.Tensor.dequantize:
        plain = tensor.dequantize().to(torch.float32)
    elif type(tensor) in (torch.Tensor, torch.nn.Parameter):
        computed = getattr(module, f"{name}_comfy_model_dtype", None)  # faulted in by ComfyUI, it is cast to this
        if computed is not None and computed.is_floating_point and tensor.dtype.is_floating_point:
            tensor = tensor.to(computed)
        plain = tensor.to(torch.float32)
        convert = getattr(module, f"convert_{name}", None)  # layers with a scale, before ComfyUI had quantized tensors
        if convert is not None:
            plain = convert(plain)
    else:
        return None
    return plain if plain.shape == shape and prod(shape) else None


def _format(module: torch.nn.Module, name: str) -> str:
    """How a weight is stored, in a few words."""
    tensor = getattr(module, name)
    kind = getattr(module, "quant_format", None) if name == "weight" else None
    if kind is not None:
        return str(kind)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{type(tensor).__name__} {dtype}"
    scaled = isinstance(getattr(module, f"scale_{name}", None), torch.Tensor)
    return f"{dtype}, scaled" if scaled else dtype
