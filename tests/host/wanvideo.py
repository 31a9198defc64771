"""A real ComfyUI-WanVideoWrapper for the tests: where it is, tiny checkpoints that it loads, prompts in API format.

The wrapper derives heads and layers from the width. For one that it does not know it makes 12 heads, 30 blocks and, of a
VACE model, 15 VACE blocks, so that a width of 96 is a small model with all the blocks of a real one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import write_lora, write_wan
from .comfy import ComfyServer, Host, PromptFailed, find_host
from .workflows import Patch, disturbance, saved_latent

NAME = "ComfyUI-WanVideoWrapper"
DIM, FFN_DIM, BLOCKS, VACE_BLOCKS = 96, 640, 30, 15
LORA_LAYERS = (
    *("blocks.1.self_attn.q", "blocks.1.self_attn.v", "blocks.7.ffn.0"),
    *("blocks.14.cross_attn.v", "blocks.22.self_attn.o", "blocks.29.ffn.2"),
)
# second outputs of nodes that also make BLOCKSWAPARGS
ARGUMENTS_OUTPUT = {"BlockSwapWrapperWanVideo": 1}
NO_CONVOLUTION = "aten::slow_conv3d_forward"
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


def why_not_loaded(server: ComfyServer) -> str | None:
    """One line that says why a running ComfyUI did not load the wrapper; None when it did."""
    try:
        server.object_info("WanVideoSampler")
    except KeyError:
        reason = [line for line in server.log_text().splitlines() if "Cannot import" in line or "No module" in line]
        return f"ComfyUI does not load {NAME}: {reason[0] if reason else 'see its log'}"
    return None


# -- checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, *, vace: bool = False, seed: int = 0) -> Path:
    """Write a Wan 2.1 text-to-video model in fp32, with `vace` a VACE model, for WanVideoModelLoader. Returns the path."""
    shape = {"dim": DIM, "ffn_dim": FFN_DIM, "blocks": BLOCKS, "vace_blocks": VACE_BLOCKS if vace else 0}
    return write_wan(path, **shape, dtype=torch.float32, seed=seed)


def write_quantized(path: Path, checkpoint: Path) -> Path:
    """Write `checkpoint` with the linear layers of all blocks quantized: as GGUF in Q8_0 where `path` ends in `.gguf`,
    else in FP8 e4m3, each with a `scale_weight`. Returns the path."""
    weights = load_file(checkpoint)
    if path.suffix == ".gguf":
        _write_gguf(path, weights)
    else:
        save_file(scaled_fp8(weights), path)
    return path


def write_models(models: Path) -> dict[str, str]:
    """Write tiny models below ComfyUI's folder `models`. Returns their names by kind: plain, low (other weights), fp8
    (scaled), vace, gguf; and that of a LoRA for them, lora. Of each model there is a second name, see `reference`."""
    folder = models / "diffusion_models"
    plain = write_checkpoint(folder / "tiny_plain.safetensors")
    paths = {
        "plain": plain,
        "low": write_checkpoint(folder / "tiny_other.safetensors", seed=1),
        "fp8": write_quantized(folder / "tiny_fp8.safetensors", plain),
        "vace": write_checkpoint(folder / "tiny_vace.safetensors", vace=True),
        "gguf": write_quantized(folder / "tiny_q8.gguf", plain),
    }
    for path in paths.values():
        os.link(path, folder / reference(path.name))
    lora = write_lora(models / "loras" / "tiny_lora.safetensors", plain, LORA_LAYERS)
    return {"lora": lora.name, **{kind: path.name for kind, path in paths.items()}}


def reference(name: str) -> str:
    """Another name of the same file. ComfyUI keeps loaded models by name: what is loaded by this one no other prompt
    has touched."""
    return f"reference_{name}"


def _is_linear_in_block(name: str, tensor: torch.Tensor) -> bool:
    return "blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def scaled_fp8(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def in_wan_block(block: int, **when: float) -> Patch:
    """A `disturbance` of a block of a WANVIDEOMODEL."""
    return "TestWanVideoInBlock", disturbance(block, **when)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node in API format, for `extra` of `sample_video`."""
    return {"class_type": class_type, "inputs": inputs}


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
    cache: Patch | None = None,
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
        cache: the node that makes the sampler's CACHEARGS.
        low_noise_model: a second model, loaded and patched in the same way (ids end in ` low`), which samples the second
            half of the steps (Wan 2.2).
        extra: further nodes by id, in API format, for the others to refer to.
        vace: random VACE conditioning, for a VACE model.
        probe: also run TestWanVideoProbe on each sampled model, after sampling; read it with `workflows.probed`.
        save_as: where the latent goes, below ComfyUI's output folder; read it with `workflows.saved_latent`.
    """
    prompt: dict[str, Any] = dict(extra or {})
    video = {"width": width, "height": height, "num_frames": num_frames}
    prompt["text"] = node("TestWanVideoTextEmbeds", seed=1, tokens=16)
    prompt["embeds"] = (
        node("TestWanVideoVaceEmbeds", **video, strength=1.0, seed=3) if vace else node("WanVideoEmptyEmbeds", **video)
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
        prompt["swap"] = node(swap[0], **swap[1])
        loader["block_swap_args"] = _arguments("swap", swap)
    if compiled is not None:
        prompt["compile"] = node(compiled[0], **compiled[1])
        loader["compile_args"] = ["compile", 0]
    if set_swap is not None:
        prompt["set swap"] = node(set_swap[0], **set_swap[1])
        setters.append(("WanVideoSetBlockSwap", {"block_swap_args": _arguments("set swap", set_swap)}))
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
    if cache is not None:
        prompt["cache"] = node(cache[0], **cache[1])
        sampler["cache_args"] = ["cache", 0]
    for suffix, file in (("", model), (" low", low_noise_model)):
        if file is None:
            continue
        prompt[f"model{suffix}"] = node("WanVideoModelLoader", **{**loader, "model": file})
        last = f"model{suffix}"
        for i, (class_type, inputs) in enumerate([*setters, *between]):
            number = i - len(setters)
            name = f"set{i}{suffix}" if number < 0 else f"patch{number}{suffix}"
            prompt[name] = node(class_type, **{**inputs, "model": [last, 0]})
            last = name
        prompt[f"sampler{suffix}"] = node("WanVideoSampler", **{**sampler, "model": [last, 0]})
        if probe:
            prompt[f"probe{suffix}"] = node("TestWanVideoProbe", model=[last, 0], trigger=[f"sampler{suffix}", 0])
    if low_noise_model is not None:
        prompt["sampler"]["inputs"]["end_step"] = steps // 2
        prompt["sampler low"]["inputs"] |= {"start_step": steps // 2, "samples": ["sampler", 0]}
    result = "sampler" if low_noise_model is None else "sampler low"
    prompt["save"] = node("TestSaveLatent", samples=[result, 0], path=save_as)
    return prompt


def _arguments(name: str, patch: Patch) -> list[Any]:
    """A link to the BLOCKSWAPARGS of a node."""
    return [name, ARGUMENTS_OUTPUT.get(patch[0], 0)]


def _chain_loras(prompt: dict[str, Any], loras: Sequence[tuple[str, float]], merge: bool) -> list[Any]:
    """Add a WanVideoLoraSelect for each LoRA; returns a link to all of them."""
    for i, (name, strength) in enumerate(loras):
        previous = {"prev_lora": [f"lora{i - 1}", 0]} if i else {}
        prompt[f"lora{i}"] = node("WanVideoLoraSelect", lora=name, strength=strength, merge_loras=merge, **previous)
    return [f"lora{len(loras) - 1}", 0]


# -- sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """What a prompt left: its latent, what it wrote to the log, and what its probes told (` low`: of the second model)."""

    latent: torch.Tensor
    log: str
    reports: dict[str, dict[str, Any]]

    @property
    def report(self) -> dict[str, Any]:
        """What the probe of the only model, or the first, told."""
        return self.reports["probe"]


class Sampler:
    """The tiny models on one server.

    `models` are file names by kind, see `write_models`. Of a VACE model the prompts have VACE conditioning.
    """

    def __init__(self, server: ComfyServer, models: Mapping[str, str]) -> None:
        self.server = server
        self.models = dict(models)
        self._references: dict[str, torch.Tensor] = {}

    def prompt(self, kind: str, **scene: Any) -> dict[str, Any]:
        """The prompt of `sample_video` for a kind of model; `low_noise_model` is a kind too."""
        return self._prompt(str, kind, scene)

    def sample(self, kind: str, **scene: Any) -> Sampled:
        """Run the prompt. PromptFailed if it does not succeed."""
        start = len(self.server.log_text())
        entry = self.server.run(self.prompt(kind, **scene))
        outputs = {name: output["text"][0] for name, output in entry["outputs"].items() if "text" in output}
        reports = {name: json.loads(text) for name, text in outputs.items() if name.startswith("probe")}
        return Sampled(saved_latent(entry), self.server.log_text()[start:], reports)

    def reference(self, kind: str, **scene: Any) -> torch.Tensor:
        """The latent of a prompt without nodes of this pack, made once, with a model that no other prompt touches."""
        prompt = self._prompt(reference, kind, scene)
        key = json.dumps(prompt, sort_keys=True)
        if key not in self._references:
            try:
                self._references[key] = saved_latent(self.server.run(prompt))
            except PromptFailed as error:
                if NO_CONVOLUTION not in str(error):
                    raise
                pytest.skip(f"this torch has no convolution for the wrapper's {kind} model on this device")
        return self._references[key]

    def _prompt(self, rename: Any, kind: str, scene: Mapping[str, Any]) -> dict[str, Any]:
        scene = {"vace": kind == "vace", **scene}
        if low := scene.get("low_noise_model"):
            scene["low_noise_model"] = rename(self.models[low])
        return sample_video(rename(self.models[kind]), **scene)
