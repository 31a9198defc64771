"""What nodes for ComfyUI's own models and those for WanVideoWrapper's share."""

import gc
import json
import logging
import threading
import time
from collections import Counter

import comfy.utils
import psutil
import torch

UPDATE = comfy.utils.ProgressBar.update_absolute


class AnyType(str):
    """A socket type that every other type connects to."""

    def __ne__(self, other: object) -> bool:
        return False


class EveryPrompt:
    """A node that runs at every prompt, even where ComfyUI has the outputs of all other nodes cached."""

    CATEGORY = "test"

    @classmethod
    def IS_CHANGED(cls, **_: object) -> float:
        return float("nan")


class TestSink(EveryPrompt):
    """Takes anything, so that what makes it is run."""

    FUNCTION = "take"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"anything": (AnyType("*"),)}}

    def take(self, anything: object) -> dict:
        return {}


class TestTellReport(EveryPrompt):
    """Tells a STRING as it is and, as JSON, the shape, dtype, least and greatest value of an IMAGE and how many shades
    each of its rows has at most."""

    FUNCTION = "tell"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"text": ("STRING", {"forceInput": True}), "picture": ("IMAGE",)}}

    def tell(self, text: str, picture: torch.Tensor) -> dict:
        rows = picture.mean(-1).flatten(0, 1).sort().values
        about = {
            "shape": list(picture.shape),
            "dtype": str(picture.dtype).removeprefix("torch."),
            "least": picture.min().item(),
            "greatest": picture.max().item(),
            "shades": 1 + int(rows.diff().ne(0).sum(-1).max()),
        }
        return {"ui": {"text": [text, json.dumps(about)]}}


class TestTellText(EveryPrompt):
    """Tells a STRING as it is."""

    FUNCTION = "tell"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def tell(self, text: str) -> dict:
        return {"ui": {"text": [text]}}


class TestSlowProgress(EveryPrompt):
    """From now on every move of a progress bar, in any prompt, takes so long, and is a line in the log; 0 ends it."""

    FUNCTION = "slow"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0})}}

    def slow(self, seconds: float) -> dict:
        def update_absolute(bar, value, *args, **kwargs) -> None:
            logging.info("TestSlowProgress: %s", value)
            time.sleep(seconds)
            UPDATE(bar, value, *args, **kwargs)

        comfy.utils.ProgressBar.update_absolute = update_absolute if seconds else UPDATE
        return {}


class TestCollectOften(EveryPrompt):
    """From now on, or until it is told to stop, another thread collects garbage again and again."""

    FUNCTION = "collect"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    stop = threading.Event()

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"often": ("BOOLEAN",)}}

    def collect(self, often: bool) -> dict:
        self.stop.set()
        if often:
            TestCollectOften.stop = stop = threading.Event()

            def run() -> None:
                while not stop.wait(0.001):
                    gc.collect()

            threading.Thread(target=run, daemon=True).start()
        return {}


class Probe(EveryPrompt):
    """Tells, as JSON, what a model looks like after the node that `trigger` comes from has run.

    patcher: class name of the model patcher. parameter_bytes: bytes of the diffusion model's parameters by device.
    forward_overrides: modules with a `forward` of their own in `__dict__`. hooks: forward hooks and pre-hooks on modules.
    rss: bytes of the process in RAM.
    """

    MODEL = "MODEL"
    FUNCTION = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": (cls.MODEL,)}, "optional": {"trigger": (AnyType("*"),)}}

    def probe(self, model, trigger: object = None) -> dict:
        diffusion_model = model.model.diffusion_model
        modules = list(torch.nn.Module.modules(diffusion_model))
        parameter_bytes: Counter[str] = Counter()
        # not its own methods, which a pack may have replaced
        for _, parameter in torch.nn.Module.named_parameters(diffusion_model):
            parameter_bytes[str(parameter.device)] += parameter.nbytes
        report = {
            "patcher": type(model).__name__,
            "parameter_bytes": parameter_bytes,
            "forward_overrides": sum("forward" in vars(module) for module in modules),
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
            "rss": psutil.Process().memory_info().rss,
            **self.more(model, modules),
        }
        return {"ui": {"text": [json.dumps(report)]}}

    def more(self, model, modules: list[torch.nn.Module]) -> dict:
        """What else is told of a model and the modules of its diffusion model."""
        return {}


class Disturbance:
    """Sleeps each time it is called, raises at call `raise_at` and has an allocation fail at call `memory_at` (0: never). Each
    call is a line in the log."""

    def __init__(self, node: str, place: str, raise_at: int, sleep_seconds: float, memory_at: int = 0) -> None:
        self.node = node
        self.place = place
        self.raise_at = raise_at
        self.sleep_seconds = sleep_seconds
        self.memory_at = memory_at
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        logging.info("%s: call %d", self.node, self.calls)
        time.sleep(self.sleep_seconds)
        if self.calls == self.raise_at:
            raise RuntimeError(f"{self.node}: {self.place} raises at call {self.calls}")
        if self.calls == self.memory_at:
            raise torch.OutOfMemoryError(f"{self.node}: an allocation fails in {self.place} at call {self.calls}")

    @staticmethod
    def inputs() -> dict:
        """The inputs of a node that makes one for a block."""
        return {
            "block": ("INT", {"default": 0, "min": 0, "max": 1024}),
            "raise_at": ("INT", {"default": 1, "min": 0, "max": 1_000_000}),
            "sleep_seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0}),
            "memory_at": ("INT", {"default": 0, "min": 0, "max": 1_000_000}),
        }


def randn(seed: int, *shape: int) -> torch.Tensor:
    """Normal random numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
