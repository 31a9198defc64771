"""Whatever comes in at a node or a command: a result, or a refusal in words, in bounded time and memory."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache

import pytest
import torch
from hypothesis import strategies as st
from intelligent_vram.cli.main import main
from intelligent_vram.cli.wan import WanConfig, write_checkpoint
from intelligent_vram.nodes.block_swap import chosen
from intelligent_vram.quant.formats import FORMATS
from intelligent_vram.quant.select import DEFAULT_KEEP, choose
from intelligent_vram.vram import NoBlocks, SwapConfig, hardware
from intelligent_vram.vram.advice_report import as_json, picture, report
from intelligent_vram.vram.advise import PRESETS, Wishes, advise
from intelligent_vram.vram.cards import CARDS
from intelligent_vram.vram.hosts.traits import HOSTS, tokens_of
from intelligent_vram.vram.kv_cache import CacheFull, CacheShape, ModelCache
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.plan import MODES, LimitTooSmall
from intelligent_vram.vram.units import GIB

from .fuzzing import bounded, fuzz

SMALL = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=4, text_dim=16, freq_dim=16, in_dim=16, out_dim=16, text_len=8
)
NUMBERS = (
    st.integers(-5, 100_000)
    | st.floats()
    | st.sampled_from([2**31, 2**63, 10**400, -(10**400), float("nan"), float("inf"), 1e308, 5e-324])
)
ANYTHING = NUMBERS | st.none() | st.booleans() | st.text(max_size=6) | st.lists(st.integers(), max_size=2) | st.binary()
LETTERS = "blocks.0ffnq|^$()[]?\\dwsSDW{}1,2-"  # of patterns; with * and + one of them can take longer than a life


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "small.safetensors"
    write_checkpoint(SMALL, path, torch.bfloat16, progress=False)
    return read_model(path)


@cache
def card(name):
    return hardware.card(name)


# -- block swap ----------------------------------------------------------------------------------------------------------


def test_fuzzed_settings_of_block_swap_make_a_configuration_or_are_refused_by_name():
    def check(values, others):
        with contextlib.suppress(ValueError), bounded(most=1 << 20, slowest=1):
            config = SwapConfig.from_user(*values, **others)
            assert config.mode in MODES
            assert config.block_size > 0
            assert config.max_vram is None or config.max_vram > 0
            assert chosen(None, *values) == SwapConfig.from_user(*values)

    modes = st.sampled_from(MODES) | ANYTHING
    others = st.dictionaries(
        st.sampled_from(["streamed_blocks", "slots", "host_budget", "block_names", "offload_device"]), ANYTHING
    )
    fuzz(check, 0.03, values=st.tuples(ANYTHING, ANYTHING, modes, ANYTHING), others=others)


def test_fuzzed_configurations_are_refused_with_a_value_error_alone():
    names = ["max_vram", "block_size", "mode", "empty_cache_every", "streamed_blocks", "slots", "host_budget"]

    def check(values):
        with contextlib.suppress(ValueError):
            SwapConfig(**values)

    fuzz(check, 0.02, values=st.dictionaries(st.sampled_from([*names, "block_names", "offload_device"]), ANYTHING))


# -- the plan that needs no numbers --------------------------------------------------------------------------------------

# as the node declares them, and as scripts may give them
WISHES = {
    "auto": st.booleans(),
    "threshold": st.floats(0.3, 0.9),
    "grow": st.booleans(),
    "blocks_to_swap": st.integers(0, 48),
    "vace_blocks_to_swap": st.integers(0, 15),
    "cuda": st.booleans(),
    "dram": st.booleans(),
    "streams": st.integers(1, 16),
    "bandwidth": st.floats(0.1, 1.0),
    "max_vram": st.none() | st.integers(1, 1 << 40),
    "block_size": st.integers(1, 1 << 32),
}


def test_fuzzed_wishes_are_planned_for_reported_and_drawn_or_refused_in_words(facts):
    def check(wishes, preset, size, name, memory, host, known):
        machine = card(name).with_(device_total=memory)
        asked = Wishes(**{**wishes, **PRESETS.get(preset, {})})
        with bounded(slowest=10):
            try:
                tokens = tokens_of(facts, *size)
                advice = advise(facts if known else None, machine, asked, tokens, host)
            except (LimitTooSmall, NoBlocks, ValueError):
                return
            assert report(facts if known else None, machine, asked, advice, tokens, host)
            if advice.prediction is not None:
                assert as_json(facts, machine, advice, tokens, host)
                assert picture(facts, machine, advice).size[0] > 0

    side = st.integers(16, 16384) | st.integers(-5, 16)
    fuzz(
        check,
        0.15,
        wishes=st.fixed_dictionaries({}, optional=WISHES),
        preset=st.sampled_from([*PRESETS, "custom"]),
        size=st.tuples(side, side, st.integers(-2, 10_000)),
        name=st.sampled_from([entry.name for entry in CARDS]),
        memory=st.none() | st.integers(1 << 28, 1 << 40),
        host=st.sampled_from(HOSTS),
        known=st.booleans(),
    )


def test_fuzzed_names_of_cards_are_found_or_refused_with_those_that_are_like_them():
    def check(name):
        with bounded(slowest=2), contextlib.suppress(hardware.NotMeasurable, ValueError):
            assert hardware.card(name).to_device > 0

    words = st.sampled_from(["RTX", "4090", "A100", "GB", "24", "Ti", "MIG", "1g.10gb", "NVIDIA", "-", " ", "9" * 40])
    fuzz(check, 0.03, name=st.lists(words | st.text(max_size=4), max_size=6).map(" ".join))


def test_fuzzed_arguments_of_the_plan_command_end_with_a_status(facts):
    number = st.floats().map(str) | st.integers(-5, 1 << 40).map(str) | st.text(max_size=4)
    options = st.sampled_from(["--vram", "--ram", "--card-vram", "--bandwidth", "--throughput"])
    size = st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 1 << 20)).map(
        lambda sides: f"--size={'x'.join(map(str, sides))}"
    )
    more = st.tuples(options, number).map(lambda pair: f"{pair[0]}={pair[1]}")

    def check(arguments):
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silent[0], silent[1], bounded(slowest=10):
            try:
                status = main(["plan", facts.paths[0], "--device=RTX 4090", *arguments])
            except SystemExit as leave:
                status = leave.code
        assert status in (0, 1, 2)

    fuzz(check, 0.1, arguments=st.lists(size | more, max_size=3))


# -- quantization --------------------------------------------------------------------------------------------------------


def test_fuzzed_patterns_of_what_to_keep_choose_or_are_refused(facts):
    def check(pattern, first_last, format):
        with bounded(), contextlib.suppress(ValueError):
            choice = choose(facts, format, pattern, first_last)
            assert {*choice.quantized, *choice.kept} == {weight.name for weight in facts.weights}

    patterns = st.text(LETTERS, max_size=24).filter(lambda text: not re.search(r"\{\d{3,}", text))
    fuzz(
        check,
        0.1,
        pattern=st.none() | patterns | st.sampled_from([DEFAULT_KEEP, r"blocks\.(0|39)\."]),
        first_last=st.integers(0, 9),
        format=st.sampled_from([*FORMATS.values()]),
    )


def test_the_default_pattern_is_linear_in_the_name():
    """It repeats nothing, so that no name of a file takes it long."""
    assert not re.search(r"(?<!\\)[*+{]", DEFAULT_KEEP)
    with bounded(slowest=1):
        for letter in "ame_.":
            assert re.compile(DEFAULT_KEEP, re.IGNORECASE).search(letter * 200_000) is None


# -- key/value caches ----------------------------------------------------------------------------------------------------


def test_fuzzed_shapes_and_rows_of_a_cache_fit_or_are_refused_and_change_nothing():
    def check(shape, options, writes):
        with bounded():
            try:
                shape = CacheShape(**shape)
                cache = ModelCache(shape, **options)
            except ValueError:
                return
            layer = cache[0]
            for rows, start, sizes in writes:
                before = int(layer.key.current_length), int(layer.value.current_length)
                key = torch.ones(sizes or shape.stored(rows), dtype=shape.dtype)
                try:
                    layer.write(key, key, start)
                except (ValueError, CacheFull):
                    assert (int(layer.key.current_length), int(layer.value.current_length)) == before
                keys, values = layer.get_data()
                assert keys.shape == values.shape == layer.key.shape

    size = st.sampled_from([1, 1, 2, 3, 0, -1])
    shapes = {
        "layers": st.integers(1, 3),
        "batch": size,
        "heads": size,
        "max_length": st.integers(0, 9),
        "head_dim": st.sampled_from([1, 4, 8, 0]),
        "layout": st.sampled_from(["bhld", "blhd", "lbhd", "bhdl"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
        "fp8": st.booleans(),
    }
    write = st.tuples(
        st.integers(0, 6), st.none() | st.integers(-2, 12), st.none() | st.lists(st.integers(0, 4), max_size=5)
    )
    options = {
        "when_full": st.sampled_from(["error", "grow", "roll", "wait"]),
        "sink": st.sampled_from([0, 0, 1, 9, -1]),
    }
    fuzz(
        check,
        0.15,
        shape=st.fixed_dictionaries(shapes),
        options=st.fixed_dictionaries(options),
        writes=st.lists(write, max_size=5),
    )


# -- sizes ---------------------------------------------------------------------------------------------------------------


def test_no_number_of_units_takes_the_planner_long(facts):
    with bounded(slowest=2):
        for limit in (1, GIB, 1 << 50):
            with contextlib.suppress(LimitTooSmall):
                advise(facts, card("RTX 4090"), Wishes(max_vram=limit, block_size=1), 1024, HOSTS[0])
