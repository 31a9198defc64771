"""A real ComfyUI-WanVideoWrapper for the tests: where it is, tiny checkpoints that it loads, prompts in API format.

The wrapper derives heads and layers from the width. For one that it does not know it makes 12 heads, 30 blocks and, of a
VACE model, 15 VACE blocks, so that a width of 192 is a small model with all the blocks of a real one.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import write_wan
from .comfy import HERE, Host, find_host
from .workflows import Patch

NAME = "ComfyUI-WanVideoWrapper"
HELPERS = HERE / "helper_wanvideo"
DIM, FFN_DIM, BLOCKS, VACE_BLOCKS = 192, 384, 30, 15
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def find_wrapper(host: Host | None = None) -> Path | str:
    """The folder of the wrapper to test against, or one line that says why there is none.

    It is `WANVIDEOWRAPPER_PATH`, else in the `custom_nodes` of the ComfyUI that the tests use, else under `~/comfy`.
    """
    chosen = os.environ.get("WANVIDEOWRAPPER_PATH")
    if chosen:
        candidates = [Path(chosen).expanduser()]
    else:
        found = host or find_host()
        nodes = [] if isinstance(found, str) else [found.root / "custom_nodes" / NAME]
        candidates = [*nodes, Path.home() / "comfy" / NAME]
    root = next((c.absolute() for c in candidates if (c / "nodes_model_loading.py").is_file()), None)
    if root is None:
        return f"no {NAME} in {' or '.join(map(str, candidates))}; set WANVIDEOWRAPPER_PATH to its folder"
    return root


# -- checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: Path, *, vace: bool = False, scaled_fp8: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Write a Wan 2.1 text-to-video model, with `vace` a VACE model, for WanVideoModelLoader. Returns the path.

    `scaled_fp8`: the linear layers of all blocks in FP8 e4m3, each with a `scale_weight`. A path that ends in `.gguf` is
    written as GGUF, with the linear layers of all blocks in Q8_0.
    """
    shape = {"dim": DIM, "ffn_dim": FFN_DIM, "blocks": BLOCKS, "vace_blocks": VACE_BLOCKS if vace else 0}
    write_wan(path, **shape, dtype=dtype, seed=seed)
    if scaled_fp8:
        save_file(_scaled_fp8(load_file(path)), path)
    if path.suffix == ".gguf":
        _write_gguf(path, load_file(path))
    return path


def _is_linear_in_block(name: str, tensor: torch.Tensor) -> bool:
    return "blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def _scaled_fp8(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scaled FP8 as ComfyUI's older checkpoints have it; the empty `scaled_fp8` marks them."""
    scaled = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        if _is_linear_in_block(name, weight):
            scale = weight.float().abs().max() / FP8_MAX
            scaled[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[name] = weight
    return scaled


def _write_gguf(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """GGUF version 3 without metadata: F32 (type 0) and Q8_0 (type 8), data at multiples of 32 bytes."""
    infos, data = bytearray(), bytearray()
    for name, weight in weights.items():
        quantize = _is_linear_in_block(name, weight)
        values = weight.float().numpy()
        infos += np.uint64(len(name)).tobytes() + name.encode()
        infos += np.uint32(values.ndim).tobytes() + np.array(values.shape[::-1], np.uint64).tobytes()
        infos += np.uint32(8 if quantize else 0).tobytes() + np.uint64(len(data)).tobytes()
        data += _q8_0(values) if quantize else values.tobytes()
        data += bytes(-len(data) % 32)
    head = b"GGUF" + np.uint32(3).tobytes() + np.array([len(weights), 0], np.uint64).tobytes() + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def _q8_0(values: np.ndarray) -> bytes:
    """Blocks of 32 values: a scale in float16, then 32 signed bytes."""
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    quants = np.round(blocks / np.maximum(scales.astype(np.float32), 1e-12)).clip(-127, 127).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], axis=1).tobytes()


# -- prompts ---------------------------------------------------------------------------------------------------------


def wrapper_swap(blocks: int = 20, **settings: Any) -> Patch:
    """The wrapper's own WanVideoBlockSwap; `settings` are further inputs of it, such as `vace_blocks_to_swap`."""
    return "WanVideoBlockSwap", {
        "blocks_to_swap": blocks,
        "offload_img_emb": False,
        "offload_txt_emb": False,
        "vace_blocks_to_swap": 0,
        **settings,
    }


def compile_settings(**settings: Any) -> Patch:
    """The wrapper's own WanVideoTorchCompileSettings, for its blocks."""
    return "WanVideoTorchCompileSettings", {
        "backend": "inductor",
        "fullgraph": False,
        "mode": "default",
        "dynamic": False,
        "dynamo_cache_size_limit": 64,
        "compile_transformer_blocks_only": True,
        **settings,
    }


def in_wan_block(block: int, *, raise_at: int = 0, sleep_seconds: float = 0.0) -> Patch:
    """An exception at the nth call of a block (0: never), or a sleep at each; see TestWanVideoInBlock."""
    return "TestWanVideoInBlock", {"block": block, "raise_at": raise_at, "sleep_seconds": sleep_seconds}


def sample_video(
    model: str,
    *,
    swap: Patch | None = None,
    set_swap: Patch | None = None,
    between: Sequence[Patch] = (),
    loras: Sequence[tuple[str, float]] = (),
    merge_loras: bool = True,
    set_loras: bool = False,
    compiled: Patch | None = None,
    low_noise_model: str | None = None,
    extra: Mapping[str, Any] | None = None,
    vace: bool = False,
    quantization: str = "disabled",
    base_precision: str = "fp32",
    attention_mode: str = "sdpa",
    seed: int = 0,
    steps: int = 2,
    cfg: float = 1.0,
    width: int = 64,
    height: int = 64,
    num_frames: int = 5,
    force_offload: bool = True,
    probe: bool = False,
    save_as: str = "wan_latent.safetensors",
) -> dict[str, Any]:
    """Load a model with the wrapper, patch it, sample a latent [1, 16, (num_frames + 3) // 4, height / 8, width / 8] with
    the wrapper's sampler, save it.

    Args:
        model: file in `models/diffusion_models`.
        swap: the node that makes the loader's BLOCKSWAPARGS.
        set_swap: the node that makes the BLOCKSWAPARGS of a WanVideoSetBlockSwap, which comes before `between`.
        between: (class, inputs) of the nodes between loader and sampler, ids `patch0`, `patch1`, ...; each gets the
            WANVIDEOMODEL before it as its input `model` and passes one on as its first output.
        loras: files in `models/loras` with strengths, one WanVideoLoraSelect each. They go to the loader or, with
            `set_loras`, to a WanVideoSetLoRAs after it, which takes only such as are not merged.
        compiled: the node that makes the loader's WANCOMPILEARGS.
        low_noise_model: a second model, loaded and patched in the same way (ids end in ` low`), which samples the second
            half of the steps (Wan 2.2).
        extra: further nodes by id, in API format, for the others to refer to.
        vace: random VACE conditioning, for a VACE model.
        probe: also run TestWanVideoProbe on each sampled model, after sampling; read it with `workflows.probed`.
        save_as: where the latent goes, below ComfyUI's output folder; read it with `workflows.saved_latent`.
    """
    prompt: dict[str, Any] = dict(extra or {})
    video = {"width": width, "height": height, "num_frames": num_frames}
    prompt["text"] = _node("TestWanVideoTextEmbeds", seed=1, tokens=16)
    prompt["embeds"] = (
        _node("TestWanVideoVaceEmbeds", **video, strength=1.0, seed=3)
        if vace
        else _node("WanVideoEmptyEmbeds", **video)
    )
    loader = {
        "base_precision": base_precision,
        "quantization": quantization,
        "load_device": "offload_device",
        "attention_mode": attention_mode,
    }
    setters: list[tuple[str, dict[str, Any]]] = []
    if loras:
        lora = _chain_loras(prompt, loras, merge_loras)
        if set_loras:
            setters.append(("WanVideoSetLoRAs", {"lora": lora}))
        else:
            loader["lora"] = lora
    if swap is not None:
        prompt["swap"] = _node(swap[0], **swap[1])
        loader["block_swap_args"] = ["swap", 0]
    if compiled is not None:
        prompt["compile"] = _node(compiled[0], **compiled[1])
        loader["compile_args"] = ["compile", 0]
    if set_swap is not None:
        prompt["set swap"] = _node(set_swap[0], **set_swap[1])
        setters.append(("WanVideoSetBlockSwap", {"block_swap_args": ["set swap", 0]}))
    sampler = {
        "image_embeds": ["embeds", 0],
        "text_embeds": ["text", 0],
        "steps": steps,
        "cfg": cfg,
        "shift": 5.0,
        "seed": seed,
        "force_offload": force_offload,
        "scheduler": "euler",
        "riflex_freq_index": 0,
        "rope_function": "comfy",
    }
    for suffix, name in (("", model), (" low", low_noise_model)):
        if name is None:
            continue
        prompt[f"model{suffix}"] = _node("WanVideoModelLoader", **{**loader, "model": name})
        last = f"model{suffix}"
        for i, (class_type, inputs) in enumerate([*setters, *between]):
            number = i - len(setters)
            node = f"set{i}{suffix}" if number < 0 else f"patch{number}{suffix}"
            prompt[node] = _node(class_type, **{**inputs, "model": [last, 0]})
            last = node
        prompt[f"sampler{suffix}"] = _node("WanVideoSampler", **{**sampler, "model": [last, 0]})
        if probe:
            prompt[f"probe{suffix}"] = _node("TestWanVideoProbe", model=[last, 0], trigger=[f"sampler{suffix}", 0])
    if low_noise_model is not None:
        prompt["sampler"]["inputs"]["end_step"] = steps // 2
        prompt["sampler low"]["inputs"] |= {"start_step": steps // 2, "samples": ["sampler", 0]}
    result = "sampler" if low_noise_model is None else "sampler low"
    prompt["save"] = _node("TestSaveLatent", samples=[result, 0], path=save_as)
    return prompt


def _chain_loras(prompt: dict[str, Any], loras: Sequence[tuple[str, float]], merge: bool) -> list[Any]:
    """Add a WanVideoLoraSelect for each LoRA; returns a link to all of them."""
    for i, (name, strength) in enumerate(loras):
        previous = {"prev_lora": [f"lora{i - 1}", 0]} if i else {}
        prompt[f"lora{i}"] = _node("WanVideoLoraSelect", lora=name, strength=strength, merge_loras=merge, **previous)
    return [f"lora{len(loras) - 1}", 0]


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
