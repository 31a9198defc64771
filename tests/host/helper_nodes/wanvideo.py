"""Custom nodes that only the tests of ComfyUI-WanVideoWrapper use: conditioning without encoders, a look inside a
WANVIDEOMODEL, a block that is slow or raises.

They import nothing of the wrapper. TestWanVideoProbe and TestWanVideoInBlock run at every prompt.
"""

import json
import logging
import time
from collections import Counter

import psutil
import torch


def randn(seed: int, *shape: int) -> torch.Tensor:
    """Normal random numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestWanVideoTextEmbeds:
    """Random WANVIDEOTEXTEMBEDS: one positive and one negative prompt of shape [tokens, 4096]."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**62}),
                "tokens": ("INT", {"default": 16, "min": 1, "max": 512}),
            }
        }

    def make(self, seed: int, tokens: int) -> tuple:
        prompts = {"prompt_embeds": seed, "negative_prompt_embeds": seed + 1}
        return ({name: [randn(seed, tokens, 4096)] for name, seed in prompts.items()},)


class TestWanVideoVaceEmbeds:
    """WANVIDIMAGE_EMBEDS as WanVideoVACEEncode makes them of some video, with random latents in place of a VAE's."""

    CATEGORY = "test"
    FUNCTION = "make"
    RETURN_TYPES = ("WANVIDIMAGE_EMBEDS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "width": ("INT", {"default": 64, "min": 16, "max": 8192, "step": 16}),
                "height": ("INT", {"default": 64, "min": 16, "max": 8192, "step": 16}),
                "num_frames": ("INT", {"default": 5, "min": 1, "max": 10_000, "step": 4}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**62}),
            }
        }

    def make(self, width: int, height: int, num_frames: int, strength: float, seed: int) -> tuple:
        frames, rows, columns = (num_frames - 1) // 4 + 1, height // 8, width // 8
        embeds = {
            "vace_context": [randn(seed, 96, frames, rows, columns)],
            "vace_scale": strength,
            "has_ref": False,
            "num_frames": num_frames,
            "target_shape": (16, frames, rows, columns),
            "vace_start_percent": 0.0,
            "vace_end_percent": 1.0,
            "vace_seq_len": frames * rows * columns // 4,
            "additional_vace_inputs": [],
        }
        return (embeds,)


class TestWanVideoProbe:
    """Tells, as JSON, what a WANVIDEOMODEL looks like after the node that `trigger` (a LATENT) comes from has run.

    patcher: class name of the model patcher. patched_linear: whether the wrapper put linear layers of its own in.
    parameter_bytes, block_bytes: bytes of the transformer's parameters, and of those in blocks, by device and dtype.
    linear: number of linear layers by class. compiled: modules wrapped by torch.compile. lora_buffers: unmerged LoRA
    tensors. overrides: attributes of modules that hide a method of their class. hooks: hooks on modules.
    state_dict: tensors that the wrapper keeps to load again. rss: bytes of the process in RAM.
    """

    CATEGORY = "test"
    FUNCTION = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("WANVIDEOMODEL",)}, "optional": {"trigger": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return float("nan")

    def probe(self, model, trigger: object = None) -> dict:
        transformer = model.model.diffusion_model
        modules = list(torch.nn.Module.modules(transformer))
        parameter_bytes: Counter[str] = Counter()
        block_bytes: Counter[str] = Counter()
        for name, parameter in torch.nn.Module.named_parameters(transformer):
            kind = f"{parameter.device} {str(parameter.dtype).removeprefix('torch.')}"
            parameter_bytes[kind] += parameter.nbytes
            if "blocks." in name:
                block_bytes[kind] += parameter.nbytes
        overrides = [
            name
            for module in modules
            for name, value in vars(module).items()
            if callable(value)
            and callable(getattr(type(module), name, None))
            and type(module).__name__ != "OptimizedModule"
        ]
        report = {
            "patcher": type(model).__name__,
            "patched_linear": transformer.patched_linear,
            "parameter_bytes": parameter_bytes,
            "block_bytes": block_bytes,
            "linear": Counter(type(module).__name__ for module in modules if isinstance(module, torch.nn.Linear)),
            "compiled": sum(type(module).__name__ == "OptimizedModule" for module in modules),
            "lora_buffers": sum(name.startswith("lora_diff_") for module in modules for name in module._buffers),
            "overrides": Counter(overrides),
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
            "state_dict": len(model.model["sd"] or ()),
            "rss": psutil.Process().memory_info().rss,
        }
        return {"ui": {"text": [json.dumps(report)]}}


class TestWanVideoInBlock:
    """The same WANVIDEOMODEL, one block of which sleeps each time it is due and raises at call `raise_at` (0: never).

    Each call writes `TestWanVideoInBlock: call N` to the log. It hangs a hook on the block, which all copies of the
    model share, and which goes once it raised, or when this node runs again for that model.
    """

    CATEGORY = "test"
    FUNCTION = "patch"
    RETURN_TYPES = ("WANVIDEOMODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("WANVIDEOMODEL",),
                "block": ("INT", {"default": 0, "min": 0, "max": 1024}),
                "raise_at": ("INT", {"default": 1, "min": 0, "max": 1_000_000}),
                "sleep_seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return float("nan")

    def patch(self, model, block: int, raise_at: int, sleep_seconds: float) -> tuple:
        transformer = model.model.diffusion_model
        calls = 0

        def hook(module: torch.nn.Module, args: tuple) -> None:
            nonlocal calls
            calls += 1
            logging.info("TestWanVideoInBlock: call %d", calls)
            time.sleep(sleep_seconds)
            if calls == raise_at:
                transformer.__dict__.pop("test_hook").remove()
                raise RuntimeError(f"TestWanVideoInBlock: block {block} raises at call {calls}")

        if "test_hook" in transformer.__dict__:
            transformer.__dict__["test_hook"].remove()
        target = transformer.blocks[block]
        target = getattr(target, "_orig_mod", target)
        transformer.__dict__["test_hook"] = target.register_forward_pre_hook(hook)
        return (model.clone(),)


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (TestWanVideoTextEmbeds, TestWanVideoVaceEmbeds, TestWanVideoProbe, TestWanVideoInBlock)
}
