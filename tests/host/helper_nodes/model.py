"""Nodes for ComfyUI's own models."""

import gc
import json
import weakref
from pathlib import Path

import folder_paths
import torch
from safetensors.torch import save_file

import nodes

from .base import Disturbance, EveryPrompt, Probe


def call(node: str, **inputs: object) -> object:
    """The first output of a node, called as the host calls it."""
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    return getattr(node_class(), node_class.FUNCTION)(**inputs)[0]


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


class TestSaveLatent(EveryPrompt):
    """Writes a LATENT as tensor `samples` to a .safetensors file below ComfyUI's output folder; tells its full path."""

    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"samples": ("LATENT",), "path": ("STRING", {"default": "latent.safetensors"})}}

    def save(self, samples: dict, path: str) -> dict:
        folder = Path(folder_paths.get_output_directory()).resolve()
        file = (folder / path).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{path} is not below the output folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"samples": samples["samples"].cpu().contiguous()}, file)
        return {"ui": {"text": [str(file)]}}


class TestModelProbe(Probe):
    """A probe of a MODEL, which also tells loaded_size and model_size: bytes, as the patcher answers its host."""

    def more(self, model, modules: list[torch.nn.Module]) -> dict:
        return {"loaded_size": model.loaded_size(), "model_size": model.model_size()}


class TestMergeProbe(Probe):
    """A probe of a MODEL with block swap attached. to_merge: how many weights a merge would read from it; not_its_own: how many
    of those from elsewhere than the model's own memory."""

    def more(self, model, modules: list[torch.nn.Module]) -> dict:
        own = {id(slotted.tensor) for slotted in vars(model.model)["intelligent_vram_state"].swap.tensors()}
        to_merge = [entries[0][0] for entries in model.get_key_patches("diffusion_model.").values()]
        return {"to_merge": len(to_merge), "not_its_own": sum(id(weight) not in own for weight in to_merge)}


class TestForget(EveryPrompt):
    """Loads a model, samples with it through BlockSwapWrapper (`swap_mode` "none": without), and lets go of it; `hand_over`: after
    the host did what it does before it loads another copy. Tells, as JSON, what of it is alive before garbage is collected."""

    FUNCTION = "forget"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "unet_name": ("STRING",),
                "lora_name": ("STRING",),
                "swap_mode": ("STRING",),
                "lossless": ("STRING",),
                "hand_over": ("BOOLEAN",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
            }
        }

    def forget(self, **inputs: object) -> dict:
        gc.disable()
        try:
            remembered = self.sampled(**inputs)
            alive = [name for name, thing in remembered.items() if thing() is not None]
        finally:
            gc.enable()
        return {"ui": {"text": [json.dumps({"alive": alive, "remembered": list(remembered)})]}}

    def sampled(
        self, unet_name: str, lora_name: str, swap_mode: str, lossless: str, hand_over: bool, **inputs: object
    ) -> dict[str, weakref.ref]:
        model = call("UNETLoader", unet_name=unet_name, weight_dtype="default")
        if swap_mode != "none":
            settings = {"max_vram_gb": 0.0, "block_size_mb": 1, "empty_cache_freq": 0, "lossless": lossless}
            model = call("BlockSwapWrapper", model=model, swap_mode=swap_mode, **settings)
        if lora_name:
            model = call("LoraLoaderModelOnly", model=model, lora_name=lora_name, strength_model=0.5)
        sampling = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        call("KSampler", model=model, **sampling, **inputs)
        transformer = model.model.diffusion_model
        there = {"patcher": model, "model": model.model, "transformer": transformer, "block": transformer.blocks[0]}
        if swap_mode != "none":
            there |= {"swap": model.swap, "packed": model.swap.packed, "arena": model.swap.packed.arena}
        if hand_over:
            model.detach(False)
        return {name: weakref.ref(thing) for name, thing in there.items()}


class TestRaiseInBlock:
    """A clone of a MODEL, one transformer block of which sleeps or raises; see Disturbance.

    Calls are counted from when this node ran: a second prompt that finds this node's output cached counts on, so it does
    not raise again.
    """

    CATEGORY = "test"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        types = {"model": ("MODEL",), "block_type": (["double_block", "single_block"],)}
        return {"required": {**types, **Disturbance.inputs()}}

    def patch(self, model, block_type: str, block: int, **when: float) -> tuple:
        disturb = Disturbance("TestRaiseInBlock", f"{block_type} {block}", **when)

        def replacement(args: dict, extra: dict) -> dict:
            disturb()
            return extra["original_block"](args)

        patched = model.clone()
        patched.set_model_patch_replace(replacement, "dit", block_type, block)
        return (patched,)


class TestDeepClone:
    """A clone of a MODEL with weights of its own, as the host makes one for each further GPU."""

    CATEGORY = "test"
    FUNCTION = "clone"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}}

    def clone(self, model) -> tuple:
        copy = model.clone(force_deepcopy=True)
        if copy.model is model.model:
            raise RuntimeError("the clone shares its weights")
        return (copy,)


NODES = (TestConditioning, TestSaveLatent, TestModelProbe, TestMergeProbe, TestForget, TestRaiseInBlock, TestDeepClone)
