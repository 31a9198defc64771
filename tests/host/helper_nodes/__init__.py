"""Custom nodes that only the tests use: conditioning without a text encoder, latents as files, a look inside a MODEL.

TestModelProbe and TestSaveLatent run at every prompt, even where ComfyUI has the outputs of all other nodes cached.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

import folder_paths
import psutil
import torch
from aiohttp import web
from safetensors.torch import save_file
from server import PromptServer


def end_with(parent: psutil.Process) -> None:
    """Wait for the process that started ComfyUI; should it die without stopping ComfyUI, end ComfyUI too."""
    parent.wait()
    os._exit(1)


threading.Thread(target=end_with, args=(psutil.Process(os.getppid()),), daemon=True).start()


class AnyType(str):
    """A socket type that every other type connects to."""

    def __ne__(self, other: object) -> bool:
        return False


@PromptServer.instance.routes.get("/helper_nodes/pending_flags")
async def pending_flags(request: web.Request) -> web.Response:
    """What was asked of `/free` and not yet taken up by the thread that runs the prompts."""
    return web.json_response(PromptServer.instance.prompt_queue.get_flags(reset=False))


class TestConditioning:
    """Random CONDITIONING of shape [1, tokens, dim], the same for the same seed; `pooled_dim` 0 leaves pooled out."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "tokens": ("INT", {"default": 16, "min": 1, "max": 4096}),
                "dim": ("INT", {"default": 4096, "min": 1, "max": 65536}),
                "pooled_dim": ("INT", {"default": 0, "min": 0, "max": 65536}),
            }
        }

    def make(self, seed: int, tokens: int, dim: int, pooled_dim: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, tokens, dim, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled_dim, generator=generator)} if pooled_dim else {}
        return ([[embedding, extra]],)


class TestSaveLatent:
    """Writes a LATENT as tensor `samples` to a .safetensors file below ComfyUI's output folder; tells its full path."""

    CATEGORY = "test"
    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"samples": ("LATENT",), "path": ("STRING", {"default": "latent.safetensors"})}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return float("nan")

    def save(self, samples: dict, path: str) -> dict:
        folder = Path(folder_paths.get_output_directory()).resolve()
        file = (folder / path).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{path} is not below the output folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"samples": samples["samples"].cpu().contiguous()}, file)
        return {"ui": {"text": [str(file)]}}


class TestModelProbe:
    """Tells, as JSON, what a MODEL looks like after the node that `trigger` comes from has run.

    patcher: class name of the model patcher. loaded_size, model_size: bytes, as the patcher answers its host.
    parameter_bytes: bytes of the diffusion model's parameters by device. forward_overrides: modules with a `forward`
    of their own in `__dict__`. hooks: forward hooks and pre-hooks on modules. rss: bytes of the process in RAM.
    """

    CATEGORY = "test"
    FUNCTION = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}, "optional": {"trigger": (AnyType("*"),)}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return float("nan")

    def probe(self, model, trigger: object = None) -> dict:
        diffusion_model = model.model.diffusion_model
        parameter_bytes: Counter[str] = Counter()
        for parameter in diffusion_model.parameters():
            parameter_bytes[str(parameter.device)] += parameter.nbytes
        modules = list(diffusion_model.modules())
        report = {
            "patcher": type(model).__name__,
            "loaded_size": model.loaded_size(),
            "model_size": model.model_size(),
            "parameter_bytes": parameter_bytes,
            "forward_overrides": sum("forward" in vars(module) for module in modules),
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
            "rss": psutil.Process().memory_info().rss,
        }
        return {"ui": {"text": [json.dumps(report)]}}


class TestRaiseInBlock:
    """A clone of a MODEL that sleeps each time one transformer block is due, and raises at call `raise_at` (0: never).

    Each call writes `TestRaiseInBlock: call N` to the log. Calls are counted from when this node ran: a second prompt
    that finds this node's output cached counts on, so it does not raise again.
    """

    CATEGORY = "test"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL",),
                "block_type": (["double_block", "single_block"],),
                "block": ("INT", {"default": 0, "min": 0, "max": 1024}),
                "raise_at": ("INT", {"default": 1, "min": 0, "max": 1_000_000}),
                "sleep_seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0}),
            }
        }

    def patch(self, model, block_type: str, block: int, raise_at: int, sleep_seconds: float) -> tuple:
        calls = 0

        def replacement(args: dict, extra: dict) -> dict:
            nonlocal calls
            calls += 1
            logging.info("TestRaiseInBlock: call %d", calls)
            time.sleep(sleep_seconds)
            if calls == raise_at:
                raise RuntimeError(f"TestRaiseInBlock: {block_type} {block} raises at call {calls}")
            return extra["original_block"](args)

        patched = model.clone()
        patched.set_model_patch_replace(replacement, "dit", block_type, block)
        return (patched,)


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (TestConditioning, TestSaveLatent, TestModelProbe, TestRaiseInBlock)
}
