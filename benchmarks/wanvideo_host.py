"""ComfyUI-WanVideoWrapper in this process, without ComfyUI's server: its own model class, and the steps of its sampler.

Nothing of the wrapper or of ComfyUI is copied: both are imported from where they are installed.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from intelligent_vram.cli.wan import WanConfig, random_weights, sample_inputs

NAME = "wanvideowrapper"
LAUNCHER = Path(__file__).resolve().parent.parent / "tests" / "host" / "cpu_launcher.py"
DTYPE = torch.bfloat16
# What the sampler takes over from BLOCKSWAPARGS as attributes of the transformer, and their values without an entry.
ATTRIBUTES = {
    "use_non_blocking": False,
    "blocks_to_swap": 0,
    "vace_blocks_to_swap": 0,
    "prefetch_blocks": 0,
    "block_swap_debug": False,
    "offload_img_emb": False,
    "offload_txt_emb": False,
}


def default_paths() -> tuple[Path, Path]:
    """Folders of ComfyUI and of the wrapper: ``COMFYUI_PATH`` and ``WANVIDEOWRAPPER_PATH``, else below ``~/comfy``."""
    home = Path.home() / "comfy"
    comfyui = Path(os.environ.get("COMFYUI_PATH") or home / "ComfyUI").expanduser()
    chosen = os.environ.get("WANVIDEOWRAPPER_PATH")
    beside = (comfyui / "custom_nodes", home)
    candidates = [Path(chosen).expanduser()] if chosen else [folder / "ComfyUI-WanVideoWrapper" for folder in beside]
    return comfyui, next((path for path in candidates if path.is_dir()), candidates[-1])


def own_arguments(blocks: int, **settings: Any) -> dict[str, Any]:
    """BLOCKSWAPARGS of the wrapper's own block swap for all of so many blocks. Of a number it swaps one block less."""
    return {**ATTRIBUTES, "blocks_to_swap": blocks + 1, **settings}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward: latent [16, F, H, W] in fp32, timestep [1], text [L, 4096] in bf16, the video's tokens."""

    latent: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    tokens: int

    @classmethod
    def sample(cls, config: WanConfig, tokens: int, device: torch.device, seed: int = 1) -> Inputs:
        """Seeded values; the same on any device."""
        latent, timestep, text = sample_inputs(config, tokens, torch.float32, device, seed)
        return cls(latent[0], timestep, text[0].to(DTYPE), tokens)


class Wrapper:
    """The wrapper's parts that load, swap, run and offload a model. Raises ImportError where it or ComfyUI is not whole."""

    def __init__(self, comfyui: Path, wrapper: Path, device: torch.device) -> None:
        sys.path.insert(0, str(comfyui.absolute()))
        sys.modules.setdefault("server", None)  # the wrapper does without it
        if device.type == "cpu":
            _tolerate_cpu_builds()
            importlib.import_module("comfy.cli_args").args.cpu = True
        package = ModuleType(NAME)  # its own __init__ would register all nodes
        package.__path__ = [str(wrapper.absolute())]
        sys.modules[NAME] = package
        self._loading = importlib.import_module(f"{NAME}.nodes_model_loading")
        self._utils = importlib.import_module(f"{NAME}.utils")
        self._management = importlib.import_module("comfy.model_management")
        self.device: torch.device = self._loading.device

    def model(self, config: WanConfig) -> torch.nn.Module:
        """A text-to-video model as the wrapper's loader leaves it: without weights, which come with each run."""
        with self._loading.init_empty_weights():
            model = self._loading.WanModel(
                model_type="t2v",
                patch_size=config.patch_size,
                text_len=config.text_len,
                in_dim=config.in_dim,
                dim=config.dim,
                in_features=config.dim,
                out_features=config.dim,
                ffn_dim=config.ffn_dim,
                ffn2_dim=config.ffn_dim,
                freq_dim=config.freq_dim,
                text_dim=config.text_dim,
                out_dim=config.out_dim,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                attention_mode="sdpa",
                rope_func="comfy",
                main_device=self.device,
                offload_device=self._loading.offload_device,
                dtype=DTYPE,
            )
        return model.eval()

    def load(
        self, transformer: torch.nn.Module, weights: Mapping[str, torch.Tensor], arguments: dict[str, Any] | None
    ) -> None:
        """What the sampler does before its first step. ``arguments``: BLOCKSWAPARGS, None to have all on the device."""
        for name, default in ATTRIBUTES.items() if arguments is not None else ():
            setattr(transformer, name, arguments.get(name, default))
        self._loading.load_weights(
            transformer,
            weights,
            DTYPE,
            base_dtype=DTYPE,
            transformer_load_device=self.device,
            block_swap_args=arguments,
        )
        self._management.unload_all_models()
        self._management.soft_empty_cache()
        gc.collect()
        self._utils.init_blockswap(transformer, arguments, {"auto_cpu_offload": False})

    def offload(self, transformer: torch.nn.Module) -> None:
        """What the sampler does after its last step."""
        self._utils.offload_transformer(transformer)


class Run:
    """One run of the sampler: loads the weights and prepares block swap; ``forward`` is a step, ``end`` offloads.

    ``arguments``: BLOCKSWAPARGS, of which the run has its own copy; None to have all weights on the device.
    """

    def __init__(
        self,
        wrapper: Wrapper,
        transformer: torch.nn.Module,
        weights: Mapping[str, torch.Tensor],
        arguments: dict[str, Any] | None,
    ) -> None:
        self.wrapper = wrapper
        self.transformer = transformer
        self.options = copy.deepcopy({"merge_loras": False, "block_swap_args": arguments})
        wrapper.load(transformer, weights, self.options["block_swap_args"])

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """One call of the transformer as the sampler makes it. Returns the prediction [16, F, H, W] in fp32."""
        self.transformer.rope_embedder.k = 0
        self.transformer.rope_embedder.num_frames = inputs.latent.shape[1]
        video, _, _ = self.transformer(
            context=[inputs.text],
            pred_id=None,
            vace_data=None,
            attn_cond=None,
            x=[inputs.latent],
            y=None,
            clip_fea=None,
            seq_len=inputs.tokens,
            device=self.wrapper.device,
            freqs=None,
            t=inputs.timestep,
            is_uncond=False,
            current_step=0,
            current_step_percentage=0.0,
            last_step=False,
            control_lora_enabled=False,
            enhance_enabled=False,
            transformer_options=self.options,
        )
        return video[0]

    def end(self) -> None:
        """Offload the transformer; nothing of the run lasts longer."""
        self.wrapper.offload(self.transformer)
        self.options.clear()


def host_weights(config: WanConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded weights in pageable host memory, by the names that a checkpoint has."""
    return dict(random_weights(config, DTYPE, seed))


def _tolerate_cpu_builds() -> None:
    """What the host tests do to import ComfyUI beside a PyTorch without CUDA."""
    spec = importlib.util.spec_from_file_location("cpu_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    launcher.tolerate_torchvision_without_operators()
    launcher.tolerate_missing_torchaudio()
