"""A host gets a quantization that it reads: the one that was asked for, or the nearest, with the reason."""

import pytest
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.vram.hosts.quant_choice import COMFY_QUANT, E4M3, INT8, SCALED_FP8, Reads, choose

ALGORITHMS = {name: format.comfy for name, format in FORMATS.items()}
ALL = Reads(frozenset(ALGORITHMS.values()), convrot=True, scaled=False)


@pytest.mark.parametrize("quantization", ALGORITHMS)
def test_a_host_that_reads_all_gets_what_was_asked_for(quantization: str) -> None:
    choice = choose(quantization, ALGORITHMS, ALL)
    assert (choice.quantization, choice.layout, choice.reason) == (quantization, COMFY_QUANT, None)


@pytest.mark.parametrize(
    ("quantization", "known", "chosen"),
    [
        ("int8_convrot", Reads(ALL.algorithms, convrot=False, scaled=False), "int8"),
        ("int8_convrot", Reads(frozenset({E4M3}), convrot=False, scaled=False), "fp8_e4m3fn"),
        ("int8", Reads(frozenset({E4M3}), convrot=False, scaled=True), "fp8_e4m3fn"),
        ("fp8_e5m2", Reads(frozenset({E4M3, INT8}), convrot=True, scaled=False), "fp8_e4m3fn"),
    ],
)
def test_what_a_host_does_not_read_becomes_the_nearest_that_it_does(
    quantization: str, known: Reads, chosen: str
) -> None:
    choice = choose(quantization, ALGORITHMS, known)
    assert (choice.quantization, choice.layout) == (chosen, COMFY_QUANT)
    assert choice.reason is not None
    assert f"does not read {quantization}: {chosen} is used instead" in choice.reason


@pytest.mark.parametrize("quantization", ALGORITHMS)
def test_an_old_host_gets_fp8_in_its_own_layout(quantization: str) -> None:
    choice = choose(quantization, ALGORITHMS, Reads(frozenset(), convrot=False, scaled=True))
    assert (choice.quantization, choice.layout) == ("fp8_e4m3fn", SCALED_FP8)
    assert (choice.reason is None) == (quantization == "fp8_e4m3fn")


@pytest.mark.parametrize("known", [Reads(frozenset(), False, False), Reads(frozenset({"nvfp4"}), False, False)])
def test_a_host_that_reads_nothing_of_this_is_refused(known: Reads) -> None:
    with pytest.raises(ValueError, match="update ComfyUI"):
        choose("int8", ALGORITHMS, known)
