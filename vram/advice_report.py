"""A plan in words, as plain values and as a picture: for a log, a node, a command line. Sizes add up."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from .advise import Advice, Wishes
from .hardware import Hardware
from .model_facts import ModelFacts
from .picture import blank_plan, draw_plan
from .units import format_bytes


def report(
    facts: ModelFacts | None, card: Hardware, wishes: Wishes, advice: Advice, tokens: int, host: str
) -> list[str]:
    """Lines that say what is there, what was chosen, what it will do, and what the user should know."""
    lines = [*card.describe()]
    lines.append(
        f"Balance: {format_bytes(advice.available)} of VRAM available (10% of the card kept free), threshold "
        f"{wishes.threshold:.0%} is {format_bytes(int(wishes.threshold * card.device_total))}; {format_bytes(advice.usable_ram)} of "
        "RAM usable (80% of what is free)"
    )
    if facts is not None:
        lines.append(
            f"Model: {facts.description}; {format_bytes(facts.total_bytes)}, of which {format_bytes(facts.inside_bytes)} in "
            f"{len(facts.blocks)} blocks; {tokens:,} tokens in {host}"
        )
    config = advice.config
    how = "exactly as chosen" if config.streamed_blocks is not None else "by the plan"
    lines.append(
        f"Chosen: limit {format_bytes(config.max_vram)}, {config.mode}, units of up to {format_bytes(config.block_size)}, "
        f"{config.slots or 'the best number of'} slots, blocks streamed {how}, page-locked RAM up to "
        f"{format_bytes(config.host_budget or 0)}"
    )
    prediction = advice.prediction
    if prediction is not None:
        lines.append(f"Prediction: {prediction.describe()}")
        lines.append(
            f"RAM: {format_bytes(prediction.arena)} for the weights that the engine packs, of {format_bytes(card.host_available)} free"
        )
    return [*lines, *(f"Note: {remark}" for remark in advice.remarks)]


def as_json(facts: ModelFacts | None, card: Hardware, advice: Advice, tokens: int, host: str) -> dict[str, Any]:
    """The same as plain values, sizes in bytes, times in seconds."""
    prediction, config = advice.prediction, advice.config
    result: dict[str, Any] = {
        "device": card.name,
        "device_total": card.device_total,
        "available": advice.available,
        "usable_ram": advice.usable_ram,
        "link": card.to_device,
        "host": host,
        "tokens": tokens,
        "limit": config.max_vram,
        "mode": config.mode,
        "block_size": config.block_size,
        "slots": config.slots,
        "streamed_blocks": config.streamed_blocks,
        "host_budget": config.host_budget,
        "remarks": list(advice.remarks),
        "prediction": None,
    }
    if facts is not None:
        result["model"] = {
            "description": facts.description,
            "family": facts.family,
            "bytes": facts.total_bytes,
            "bytes_in_blocks": facts.inside_bytes,
            "blocks": facts.block_lists,
            "bytes_by_dtype": facts.bytes_by_dtype,
        }
    if prediction is not None:
        plan = prediction.plan
        result["prediction"] = {
            "peak": prediction.peak,
            "context": prediction.context,
            "beside": prediction.beside,
            "activations": prediction.activations,
            "resident": prediction.resident_bytes,
            "slots": prediction.slot_bytes,
            "seconds": prediction.seconds,
            "floor": prediction.floor,
            "compute": prediction.compute,
            "streamed": plan.streamed_bytes,
            "units": len(plan.units),
            "streamed_units": len(plan.streamed),
            "ram": prediction.arena,
        }
    return result


def picture(facts: ModelFacts | None, card: Hardware, advice: Advice) -> Image:
    """The plan drawn; where nothing is predicted, why."""
    title = f"{facts.description} on {card.name}" if facts is not None else card.name
    if advice.prediction is None:
        return blank_plan(title, advice.remarks[0])
    return draw_plan(
        advice.prediction, card.device_total, title=title, others=card.others, block_lists=facts.block_lists
    )
