"""FreeMemory: passes anything through, and frees memory at that place in the graph."""

from __future__ import annotations

from typing import Any

from .anything import ANYTHING, anything_input


class FreeMemory:
    """Anything in, the same out, once memory has been freed."""

    DESCRIPTION = (
        "Frees memory at one place in the workflow. Connect it between the node that is done and the one that needs room: it "
        "runs after the first and before the second. Other branches of the workflow may run before or after it."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = (ANYTHING, "STRING")
    RETURN_NAMES = ("anything", "report")
    OUTPUT_TOOLTIPS = ("What came in, unchanged.", "What was unloaded, and how much memory is free before and after.")
    FUNCTION = "free"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def switch(default: bool, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "BOOLEAN", {"default": default, "tooltip": tooltip}

        return {
            "required": {
                "anything": anything_input(
                    "Whatever the next node needs: an image, a latent, a model. It is not changed."
                ),
                "unload_all_models": switch(
                    True,
                    "Move all of ComfyUI's models out of VRAM. One that is used again later is loaded again, which takes "
                    "its time.",
                ),
                "empty_cache": switch(
                    True,
                    "Return VRAM that PyTorch keeps for reuse to the driver, for other programs. ComfyUI itself does not need "
                    "it.",
                ),
                "gc_collect": switch(True, "Let Python find objects that only hold each other, and free them."),
                "every_run": switch(
                    False,
                    "Free at every run, also where nothing before this node changed. All nodes after it then run again "
                    "as well.",
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, every_run: bool = False, **_: Any) -> float:
        return float("nan") if every_run else 0.0

    def free(
        self, anything: Any, unload_all_models: bool, empty_cache: bool, gc_collect: bool, every_run: bool
    ) -> tuple[Any, str]:
        from ..vram.hosts import memory_nodes

        lines = memory_nodes.free(unload=unload_all_models, empty_cache=empty_cache, collect=gc_collect)
        return anything, "\n".join(lines)
