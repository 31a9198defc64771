"""ModelAccuracyReport: what a quantized model loses against the one that it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .image import image_of

if TYPE_CHECKING:
    import torch


class ModelAccuracyReport:
    """Two versions of a model in; a report, a picture and the error of one forward out."""

    DESCRIPTION = (
        "Compares two versions of one model, such as a bf16 checkpoint and an FP8 or INT8 one: runs one step of each on the "
        "same noise, then compares their weights layer by layer. Says which layers suffer and how to keep them. Both models "
        "run one after the other, so a card that runs one of them is enough; both are unloaded afterwards."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("STRING", "IMAGE", "FLOAT")
    RETURN_NAMES = ("report", "picture", "relative_error")
    OUTPUT_TOOLTIPS = (
        "The error of the whole model, of each kind of layer, and of the worst layers; and what to do about them.",
        "The error of each weight by block and kind of layer.",
        "Of the whole model's output in one step: ||model - reference|| / ||reference||. 0 is equal to the bit.",
    )
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "reference": (
                    "MODEL",
                    {
                        "tooltip": "What the other is measured against: the model in its source precision. It may be streamed."
                    },
                ),
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The quantized model, of the same architecture. It may be streamed. Neither is changed."
                    },
                ),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "A prompt that the models are meant for: errors depend on what they compute."},
                ),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "The size to compare at: an empty latent, or one to add noise to. A small one takes less "
                        "time; at the size that you use the error may be another."
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": False,
                        "tooltip": "Of the noise, which is the same for both models.",
                    },
                ),
            },
            "optional": {
                "position": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 0.99,
                        "step": 0.01,
                        "tooltip": "The step to compare, as a part of the whole schedule: 0 is the first step, from pure noise, which "
                        "is right for an empty latent; later ones need a latent with something in it.",
                    },
                ),
            },
        }

    def compare(
        self, reference: Any, model: Any, positive: Any, latent: dict[str, Any], seed: int, position: float = 0.0
    ) -> tuple[str, torch.Tensor, float]:
        from ..quant.accuracy import Accuracy, ErrorSum
        from ..vram.hosts.compare import Comparison

        comparison = Comparison(reference, model)
        accuracy = Accuracy()
        forward = ErrorSum()
        for expected, result in zip(*comparison.outputs(positive, latent, seed, position), strict=True):
            forward.add(result, expected)
        accuracy.forward = forward.error()
        for pair in comparison.weights():
            accuracy.compare(pair.name, pair.reference, pair.result, pair.format)

        lines = [
            f"Output of one forward at sigma {comparison.sigma(position):.4g}: {accuracy.forward.describe()}",
            "Weights: both are copies of one model in memory" if comparison.shared else "Weights:",
        ]
        if not comparison.shared:
            lines += accuracy.table()
        if comparison.left_out:
            lines.append(f"Not compared, because they cannot be read: {', '.join(comparison.left_out)}")
        if comparison.patched:
            lines.append("LoRAs count in the output, not in the weights.")
        warnings = accuracy.warnings()
        lines += ["", "Warnings:", *warnings] if warnings else []
        image = image_of(accuracy.picture("Model accuracy"))
        return "\n".join(lines), image, accuracy.forward.relative
