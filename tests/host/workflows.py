"""Prompts in ComfyUI's API format, and how to read what they leave. Node ids are words: `model`, `sampler`, `save`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Patch = tuple[str, Mapping[str, Any]]


def lora(name: str, strength: float = 1.0) -> Patch:
    """A LoRA, to go between loader and sampler."""
    return "LoraLoaderModelOnly", {"lora_name": name, "strength_model": strength}


def disturbance(block: int, *, raise_at: int = 0, sleep_seconds: float = 0.0, memory_at: int = 0) -> dict[str, Any]:
    """An exception, or an allocation that fails, at the nth call of a block (0: never), or a sleep at each; see Disturbance."""
    return {"block": block, "raise_at": raise_at, "sleep_seconds": sleep_seconds, "memory_at": memory_at}


def in_block(block: int, *, block_type: str = "double_block", **when: float) -> Patch:
    """A `disturbance` of a block of a MODEL."""
    return "TestRaiseInBlock", {"block_type": block_type, **disturbance(block, **when)}


def text_to_video(
    unet_name: str,
    *,
    between: Sequence[Patch] = (),
    extra: Mapping[str, Any] | None = None,
    weight_dtype: str = "default",
    seed: int = 0,
    steps: int = 2,
    cfg: float = 1.0,
    width: int = 64,
    height: int = 64,
    length: int = 5,
    pooled_dim: int = 0,
    probe: bool = False,
    save_as: str = "latent.safetensors",
) -> dict[str, Any]:
    """Load a diffusion model, patch it, sample a latent [1, 16, (length + 3) // 4, height / 8, width / 8], save it.

    Args:
        unet_name: file in `models/diffusion_models`.
        between: (class, inputs) of the nodes between loader and sampler, ids `patch0`, `patch1`, ...; each gets the
            MODEL before it as its input `model` and passes one on as its first output.
        extra: further nodes by id, in API format, for `between` to refer to.
        pooled_dim: width of the conditioning's pooled part, 768 for HunyuanVideo.
        probe: also run TestModelProbe on the sampled MODEL, after sampling; read it with `probed`.
        save_as: where the latent goes, below ComfyUI's output folder; read it with `saved_latent`.
    """
    prompt: dict[str, Any] = dict(extra or {})
    prompt["model"] = _node("UNETLoader", unet_name=unet_name, weight_dtype=weight_dtype)
    last = "model"
    for i, (class_type, inputs) in enumerate(between):
        prompt[f"patch{i}"] = _node(class_type, **{**inputs, "model": [last, 0]})
        last = f"patch{i}"
    conditioning = {"tokens": 16, "dim": 4096, "pooled_dim": pooled_dim}
    prompt["positive"] = _node("TestConditioning", seed=1, **conditioning)
    prompt["negative"] = _node("TestConditioning", seed=2, **conditioning)
    prompt["latent"] = _node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1)
    prompt["sampler"] = _node(
        "KSampler",
        model=[last, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    prompt["save"] = _node("TestSaveLatent", samples=["sampler", 0], path=save_as)
    if probe:
        prompt["probe"] = _node("TestModelProbe", model=[last, 0], trigger=["sampler", 0])
    return prompt


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def saved_latent(entry: Mapping[str, Any]) -> torch.Tensor:
    """The latent that a finished prompt saved, if no later prompt saved to the same file."""
    return load_file(Path(entry["outputs"]["save"]["text"][0]))["samples"]


def probed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What TestModelProbe told in a finished prompt."""
    return json.loads(entry["outputs"]["probe"]["text"][0])
