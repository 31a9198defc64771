"""GrowthWatchNode: memory from run to run, and what grows."""

from __future__ import annotations

from typing import Any

from .anything import ANYTHING, anything_input
from .image import image_of


class GrowthWatchNode:
    """Anything in; the same, a report and a picture over all runs so far out."""

    DESCRIPTION = (
        "Watches VRAM, RAM and tensors from run to run, and says whether they grow, which tensors, and what holds them. "
        "Connect it to the end of a workflow and queue that five times or more."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = (ANYTHING, "STRING", "IMAGE")
    RETURN_NAMES = ("anything", "report", "picture")
    OUTPUT_TOOLTIPS = (
        "What came in, unchanged.",
        "Whether memory grows, by how much in a run, and what grew. The first run is not counted: it loads.",
        "Memory over the runs, and the tensors that grew.",
    )
    FUNCTION = "watch"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "anything": anything_input(
                    "Memory is read when this has been made. It is not changed; nodes after this one run every time."
                ),
                "label": (
                    "STRING",
                    {
                        "default": "runs",
                        "tooltip": "Runs with the same label are compared. A new label begins anew; two of these nodes in a "
                        "workflow need two labels.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def watch(self, anything: Any, label: str) -> dict[str, Any]:
        from ..vram.growth_picture import draw_growth
        from ..vram.hosts import memory_nodes

        growth = memory_nodes.mark(label)
        picture = image_of(draw_growth(growth, title=f"Growth of memory: {label}"))
        report = "\n".join(growth.report())
        return {"ui": {"text": [report]}, "result": (anything, report, picture)}
