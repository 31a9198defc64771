"""Nodes for the models of ComfyUI-WanVideoWrapper. They import nothing of it."""

from collections import Counter

import torch

from .base import Disturbance, EveryPrompt, Probe, randn


class TestWanVideoTextEmbeds(EveryPrompt):
    """Random WANVIDEOTEXTEMBEDS: one positive and one negative prompt of shape [tokens, 4096].

    It runs at every prompt, and so does the sampler behind it, also for a prompt that is the same as one before.
    """

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


class TestWanVideoProbe(Probe):
    """A probe of a WANVIDEOMODEL, which also tells the following.

    patched_linear: whether the wrapper put linear layers of its own in. block_bytes: bytes of the parameters in blocks by
    device and dtype. linear: number of linear layers by class. compiled: modules wrapped by torch.compile. lora_buffers:
    unmerged LoRA tensors. overrides: attributes of modules that hide a method of their class, by name. class_overrides:
    methods of torch.nn.Module that the transformer's class hides. state_dict: tensors that the wrapper keeps to load
    again.
    """

    MODEL = "WANVIDEOMODEL"

    def more(self, model, modules: list[torch.nn.Module]) -> dict:
        transformer = model.model.diffusion_model
        block_bytes: Counter[str] = Counter()
        for name, parameter in torch.nn.Module.named_parameters(transformer):
            if "blocks." in name:
                block_bytes[f"{parameter.device} {str(parameter.dtype).removeprefix('torch.')}"] += parameter.nbytes
        overrides = [
            name
            for module in modules
            for name, value in vars(module).items()
            if callable(value)
            and callable(getattr(type(module), name, None))
            and type(module).__name__ != "OptimizedModule"
        ]
        of_all_modules = {name for name, value in vars(torch.nn.Module).items() if callable(value)}
        return {
            "patched_linear": transformer.patched_linear,
            "block_bytes": block_bytes,
            "linear": Counter(type(module).__name__ for module in modules if isinstance(module, torch.nn.Linear)),
            "compiled": sum(type(module).__name__ == "OptimizedModule" for module in modules),
            "lora_buffers": sum(name.startswith("lora_diff_") for module in modules for name in module._buffers),
            "overrides": Counter(overrides),
            "class_overrides": sorted(of_all_modules & set(vars(type(transformer)))),
            "state_dict": len(model.model["sd"] or ()),
        }


class TestWanVideoInBlock(EveryPrompt):
    """The same WANVIDEOMODEL, one block of which sleeps or raises; see Disturbance.

    It hangs a hook on the block, which all copies of the model share, and which goes once it raised, or when this node
    runs again for that model.
    """

    FUNCTION = "patch"
    RETURN_TYPES = ("WANVIDEOMODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("WANVIDEOMODEL",), **Disturbance.inputs()}}

    def patch(self, model, block: int, **when: float) -> tuple:
        transformer = model.model.diffusion_model
        disturb = Disturbance("TestWanVideoInBlock", f"block {block}", **when)

        def hook(module: torch.nn.Module, args: tuple) -> None:
            try:
                disturb()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                transformer.__dict__.pop("test_hook").remove()
                raise

        if "test_hook" in transformer.__dict__:
            transformer.__dict__["test_hook"].remove()
        target = transformer.blocks[block]
        target = getattr(target, "_orig_mod", target)
        transformer.__dict__["test_hook"] = target.register_forward_pre_hook(hook)
        return (model.clone(),)


NODES = (TestWanVideoTextEmbeds, TestWanVideoVaceEmbeds, TestWanVideoProbe, TestWanVideoInBlock)
