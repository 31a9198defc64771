"""What the automatic plan promises for any card, machine, limit and workload. Models are files of 28 and 15 GB that take no
room on the disk; nothing here touches a device."""

import math
import re
import tracemalloc
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from intelligent_vram.cli.wan import WAN_14B, meta_model
from intelligent_vram.vram import NoBlocks, SwapConfig, attach, hardware
from intelligent_vram.vram import advise as advise_module
from intelligent_vram.vram import plan as plans
from intelligent_vram.vram.advice_report import as_json, report
from intelligent_vram.vram.advise import (
    PRESETS,
    RESERVE,
    STEP,
    USABLE_RAM,
    WORTH,
    Wishes,
    advise,
    available_vram,
    context_of,
)
from intelligent_vram.vram.hosts import traits
from intelligent_vram.vram.hosts.traits import COMFY, HOSTS, WANVIDEO, tokens_of
from intelligent_vram.vram.model_facts import read_model
from intelligent_vram.vram.plan import LimitTooSmall, allocated
from intelligent_vram.vram.predict import Work, predict, work
from intelligent_vram.vram.units import GIB, MIB, format_bytes

from .models import Transformer
from .test_model_facts import CODES, KNOWN, shapes, write_sparse

CODES.setdefault(torch.float8_e4m3fn, "F8_E4M3")
CARDS = ("RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "L4", "A100 80GB")
MODELS = ("bf16", "fp8")
TOKENS = st.sampled_from([256, 1024, 7800, 32760]) | st.integers(1, 80_000)
WANT_FEW, WANT_MANY = 1024, 32760  # tokens of an image and of a video of 832x480 pixels and 81 frames

BF16 = {name: tensor.to(torch.bfloat16) for name, tensor in meta_model(WAN_14B).state_dict().items()}
VACE = {
    **BF16,
    "vace_patch_embedding.weight": torch.empty(5120, 96, 1, 2, 2, dtype=torch.bfloat16, device="meta"),
    **{
        f"vace_{name}": tensor
        for name, tensor in BF16.items()
        if name.startswith("blocks.") and int(name.split(".")[1]) < 8
    },
}


def scaled(tensors):
    """The same in scaled FP8, as it is distributed: products of blocks in FP8, each with a scale, the rest as it was."""
    result = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn, device="meta")}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            result[name] = tensor.to(torch.float8_e4m3fn)
            result[f"{name.removesuffix('weight')}scale_weight"] = torch.empty((), device="meta")
        else:
            result[name] = tensor
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    files = {"bf16": BF16, "fp8": scaled(BF16), "vace": VACE}
    return {name: read_model(write_sparse(folder / f"{name}.safetensors", tensors)) for name, tensors in files.items()}


def machine(name="RTX 4090", ram=128, **numbers):
    return hardware.card(name).with_(host_total=ram * GIB, **numbers)


@lru_cache(maxsize=64)
def parts(facts, host):
    """What ``predict`` takes of a model: the layers that the engine packs, and the bytes beside."""
    config = traits.config_in(host, SwapConfig(), facts.block_lists)
    return traits.sizes_in(host, facts, config)


def predicted(facts, card, host, tokens, limit, share=1.0, **config):
    sizes, beside = parts(facts, host)
    amount = work(facts.block_parameters, traits.shape_of(facts), traits.costs_of(host, facts), card, tokens)
    link = share * card.to_device
    return predict(sizes.layers, SwapConfig(**config), limit, amount, beside, link, context_of(card))


def attempt(*args, **more):
    try:
        return predicted(*args, **more)
    except LimitTooSmall:
        return None


def uneven(count, indices):
    """By how much the gaps between ``indices`` of ``count`` differ, the wrap-around counted."""
    if len(indices) < 2:
        return 0
    gaps = [(after - before) % count for before, after in zip(indices, (*indices[1:], indices[0]), strict=True)]
    return max(gaps) - min(gaps)


cases = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "host": st.sampled_from(HOSTS),
        "card": st.sampled_from(CARDS),
        "tokens": TOKENS,
    }
)
CONFIGS = [
    {},
    {"mode": "chunkwise"},
    {"mode": "chunkwise", "slots": 4},
    {"slots": 8},
    {"mode": "layerwise"},
    {"block_size": 100 * MIB},
]
configs = st.sampled_from(CONFIGS)
limits = st.integers(1, 160).map(lambda quarters: quarters * GIB // 4)


# -- the limit ----------------------------------------------------------------------------------------------------------


@given(case=cases, limit=limits, config=configs)
def test_the_peak_is_within_the_limit_and_every_weight_is_counted_once(models, case, limit, config):
    facts, card = models[case["model"]], machine(case["card"])
    found = attempt(facts, card, case["host"], case["tokens"], limit, **config)
    assume(found is not None)
    plan, (sizes, beside) = found.plan, parts(facts, case["host"])
    slots = plan.slots * allocated(plan.slot_bytes)
    if not plan.slots and plan.streamed:  # on demand: the two largest at once
        slots = sum(sorted(allocated(plan.units[index].nbytes) for index in plan.streamed)[-2:])
    held = sum(allocated(plan.units[index].nbytes) for index in plan.resident)
    assert found.resident_bytes == held
    assert found.slot_bytes == slots
    assert found.peak == held + slots + beside + found.activations + context_of(card)
    assert found.peak <= limit
    layers = [index for unit in plan.units for index in range(unit.first, unit.last)]
    assert layers == list(range(len(sizes.layers)))
    assert plan.resident_bytes + plan.streamed_bytes == found.arena == sizes.packed_bytes
    assert facts.total_bytes - 16 <= found.arena + beside <= 1.001 * facts.total_bytes
    assert found.floor <= found.seconds * (1 + 1e-9)
    assert found.floor >= found.compute > 0


@given(case=cases, limit=limits, config=configs)
def test_what_is_streamed_is_spread_evenly(models, case, limit, config):
    found = attempt(models[case["model"]], machine(case["card"]), case["host"], case["tokens"], limit, **config)
    assume(found is not None)
    assert uneven(len(found.plan.units), found.plan.streamed) <= 1


@given(case=cases, limit=limits, more=limits, config=configs)
@example(
    case={"model": "bf16", "host": COMFY, "card": "RTX 4090", "tokens": 1024},
    limit=8 * GIB,
    more=14 * GIB,
    config={},
)
def test_more_vram_makes_nothing_slower_and_streams_no_more(models, case, limit, more, config):
    facts, card = models[case["model"]], machine(case["card"])
    less = attempt(facts, card, case["host"], case["tokens"], limit, **config)
    assume(less is not None)
    found = predicted(facts, card, case["host"], case["tokens"], limit + more, **config)  # fits all the more
    assert found.seconds <= 1.01 * less.seconds
    largest = max(unit.nbytes for unit in (*less.plan.units, *found.plan.units))
    assert found.plan.streamed_bytes <= less.plan.streamed_bytes + 8 * largest  # more slots cost residents
    if more >= 8 * GIB and less.plan.streamed and "mode" not in config:
        assert found.plan.streamed_bytes < less.plan.streamed_bytes


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@pytest.mark.parametrize("tokens", [WANT_FEW, 4000])
def test_no_step_of_the_limit_makes_a_forward_slower(models, mode, tokens):
    facts, card = models["bf16"], machine("A100 80GB")
    best, slower = math.inf, []
    for eighths in range(64, 104, 2):
        seconds = predicted(facts, card, COMFY, tokens, eighths * GIB // 8, mode=mode).seconds
        if seconds > 1.01 * best:
            slower.append((eighths / 8, round(seconds / best, 4)))
        best = min(best, seconds)
    assert slower == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [WANT_FEW, WANT_MANY])
def test_less_and_less_is_streamed_until_nothing_is(models, model, tokens):
    card = machine("A100 80GB")
    streamed = [
        predicted(models[model], card, COMFY, tokens, limit * GIB).plan.streamed_bytes for limit in range(9, 45, 5)
    ]
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > 0.3 * models[model].total_bytes
    assert streamed[-1] == 0


@given(case=cases, limit=st.integers(1, 3 * GIB), config=configs)
@example(
    case={"model": "bf16", "host": COMFY, "card": "RTX 4090", "tokens": WANT_MANY},
    limit=GIB,
    config={},
)
def test_a_limit_that_cannot_hold_says_which_would(models, case, limit, config):
    facts, card = models[case["model"]], machine(case["card"])
    assume(attempt(facts, card, case["host"], case["tokens"], limit, **config) is None)
    with pytest.raises(LimitTooSmall) as refusal:
        predicted(facts, card, case["host"], case["tokens"], limit, **config)
    needed = refusal.value.needed
    assert needed > limit
    assert f"{format_bytes(needed)} are needed" in str(refusal.value)
    assert str(refusal.value).startswith(format_bytes(limit))
    assert predicted(facts, card, case["host"], case["tokens"], needed, **config).peak <= needed


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [WANT_FEW, 7800, WANT_MANY])
def test_what_is_said_to_be_needed_is_the_least_that_would_do(models, tokens, config):
    facts, card = models["bf16"], machine()
    with pytest.raises(LimitTooSmall) as refusal:
        predicted(facts, card, COMFY, tokens, GIB // 2, **config)
    needed = refusal.value.needed
    # adaptive mode begins with units of block_size, though smaller ones would do
    for percent in (98, 95, 90, 80, 70) if config else (80, 70):
        assert attempt(facts, card, COMFY, tokens, needed * percent // 100, **config) is None, percent


# -- work ---------------------------------------------------------------------------------------------------------------


@given(case=cases, more=st.integers(1, 50_000))
def test_activations_and_compute_grow_with_tokens(models, case, more):
    facts, card = models[case["model"]], machine(case["card"])
    shape, costs = traits.shape_of(facts), traits.costs_of(case["host"], facts)
    few, many = (
        work(facts.block_parameters, shape, costs, card, tokens) for tokens in (case["tokens"], case["tokens"] + more)
    )
    assert many.activations > few.activations > few.least > 0
    assert many.least > few.least
    assert sum(many.blocks) >= sum(few.blocks) > 0
    assert many.outside >= few.outside
    if case["tokens"] > 8192:  # not bound by the host's own work
        assert all(b > a for a, b in zip(few.blocks, many.blocks, strict=True))
    assert len(few.blocks) == 40


def test_compute_is_at_least_what_the_operations_take(models):
    facts, card = models["bf16"], machine()
    found = predicted(facts, card, COMFY, WANT_MANY, 20 * GIB)
    products = 2 * WANT_MANY * 0.9 * sum(facts.block_parameters) / card.matmul  # keys and values of text are fewer
    pairs = 40 * 4 * WANT_MANY**2 * 5120 / card.attention
    assert products + pairs < found.compute < 2 * (products + pairs)
    slow = machine(matmul=card.matmul / 2)  # attention follows
    assert predicted(facts, slow, COMFY, WANT_MANY, 20 * GIB).compute > 1.5 * found.compute


def test_a_hosts_own_attention_counts_where_it_was_measured(models):
    facts, card = models["bf16"], machine()
    usual = advise(facts, card, Wishes(), WANT_MANY, COMFY)
    slower = advise(facts, card, Wishes(), WANT_MANY, COMFY, attention=card.attention / 3)
    assert slower.prediction.compute > 1.3 * usual.prediction.compute


def test_tokens_of_a_video_and_of_an_image(models, tmp_path):
    wan = models["bf16"]
    flux = read_model(write_sparse(tmp_path / "flux.safetensors", shapes(**KNOWN["Flux"][0])))
    small = {**BF16, "patch_embedding.weight": torch.empty(5120, 48, 1, 2, 2, dtype=torch.bfloat16, device="meta")}
    small["head.head.weight"] = torch.empty(48 * 4, 5120, dtype=torch.bfloat16, device="meta")
    of_5b = read_model(write_sparse(tmp_path / "5b.safetensors", small))
    assert tokens_of(wan, 832, 480, 81) == 21 * 30 * 52 == 32760
    assert tokens_of(wan, 832, 480, 1) == 30 * 52
    assert tokens_of(wan, 1280, 720, 81) == 21 * 45 * 80
    assert tokens_of(wan, 16, 16, 1) == 1
    assert tokens_of(flux, 1024, 1024, 1) == 64 * 64
    assert tokens_of(of_5b, 1280, 704, 121) == 31 * 22 * 40


@pytest.mark.parametrize(
    ("family", "channels", "patch", "size", "tokens"),
    [
        ("LTX-Video", 128, (1, 1, 1), (768, 512, 97), 13 * 16 * 24),
        ("Flux 2", 128, (1, 1), (1024, 1024, 1), 64 * 64),
        ("HunyuanVideo", 16, (1, 2, 2), (848, 480, 129), 33 * 30 * 53),
        ("HunyuanVideo", 32, (1, 1, 1), (848, 480, 121), 31 * 30 * 53),
    ],
)
def test_each_family_has_the_tokens_of_its_vae(models, family, channels, patch, size, tokens):
    facts = SimpleNamespace(family=family, sizes=replace(models["bf16"].sizes, out_channels=channels, patch_size=patch))
    assert tokens_of(facts, *size) == tokens


@pytest.mark.parametrize(
    "size",
    [(8, 480, 81), (832, 15, 81), (0, 0, 0), (832, 480, 0), (832, 480, -3), (-832, 480, 81), (-832, -480, 81)],
)
def test_a_size_of_less_than_a_token_is_refused(models, size):
    with pytest.raises(ValueError, match="less than one token"):
        tokens_of(models["bf16"], *size)


# -- the balance --------------------------------------------------------------------------------------------------------


def in_use(card, reserved, outside, others):
    """``card`` as if it were in this machine, with memory in use."""
    free = card.device_total - reserved - outside - others
    return replace(
        card, device="cuda:0", device_free=free, torch_reserved=reserved, outside_torch=outside, others=others
    )


@settings(max_examples=10)
@given(
    case=cases,
    ram=st.sampled_from([8, 24, 32, 64, 256]),
    threshold=st.integers(30, 90).map(lambda percent: percent / 100),
    others=st.sampled_from([None, 0, 1, 5]),
    grow=st.booleans(),
)
@example(
    case={"model": "bf16", "host": COMFY, "card": "RTX 4090", "tokens": 1024},
    ram=64,
    threshold=0.5,
    others=None,
    grow=True,
)
def test_tuning_takes_no_more_than_is_available_and_starts_at_the_threshold(models, case, ram, threshold, others, grow):
    facts, card = models[case["model"]], machine(case["card"], ram)
    if others is not None:
        card = in_use(card, GIB, 600 * MIB, others * GIB)
    wishes = Wishes(threshold=threshold, grow=grow)
    available = available_vram(card)
    wanted = min(int(threshold * card.device_total), available)

    def at(limit):
        return attempt(facts, card, case["host"], case["tokens"], limit)

    most = at(available)
    if most is None:
        with pytest.raises(LimitTooSmall):
            advise(facts, card, wishes, case["tokens"], case["host"])
        return
    advice = advise(facts, card, wishes, case["tokens"], case["host"])
    limit, found = advice.config.max_vram, advice.prediction
    assert wanted <= limit <= available == advice.available
    assert found.peak <= limit == found.limit
    assert advice.usable_ram == int(USABLE_RAM * ram * GIB)
    assert advice.config.host_budget <= advice.usable_ram
    assert advice.config.host_budget <= card.pinnable
    assert found.plan == at(limit).plan
    first = at(wanted)
    if grow:
        assert found.seconds <= (1 + WORTH) * most.seconds
    elif first is None:  # at the least more that holds anything
        assert limit == available or at(max(wanted, limit - 2 * STEP)) is None or limit - 2 * STEP < wanted
    if limit > wanted:
        assert first is None or (grow and first.seconds > (1 + WORTH) * most.seconds)


def test_memory_optimized_stays_at_its_threshold_unless_that_cannot_hold_the_smallest_plan(models):
    wishes = Wishes(**PRESETS["memory optimized"])
    card = machine("RTX 4090")
    threshold = int(0.4 * card.device_total)
    for tokens in (WANT_FEW, 7800):  # with few tokens copies do not hide: more VRAM would be faster
        assert advise(models["bf16"], card, wishes, tokens, COMFY).config.max_vram == threshold
    assert advise(models["bf16"], card, Wishes(), WANT_FEW, COMFY).config.max_vram > card.device_total // 2
    small = machine("RTX 4060 Ti 8GB", device_total=12 * GIB)
    threshold = int(0.4 * small.device_total)
    assert attempt(models["bf16"], small, COMFY, WANT_MANY, threshold) is None
    grown = advise(models["bf16"], small, wishes, WANT_MANY, COMFY)
    assert threshold < grown.config.max_vram <= available_vram(small)
    assert grown.prediction.peak <= grown.config.max_vram


def test_where_copies_hide_behind_compute_the_rest_of_the_card_stays_free(models):
    card = machine("RTX 4090")
    few, many = (advise(models["bf16"], card, Wishes(), tokens, COMFY) for tokens in (WANT_FEW, WANT_MANY))
    assert many.config.max_vram == int(0.5 * card.device_total)
    assert many.prediction.seconds <= 1.02 * many.prediction.compute
    assert few.config.max_vram > 0.8 * card.device_total


@pytest.mark.parametrize(
    ("lossless", "tokens", "encoded"),
    [("auto", WANT_FEW, True), ("auto", WANT_MANY, False), ("on", WANT_MANY, True), ("off", WANT_FEW, False)],
)
def test_encoded_weights_are_planned_with_where_they_are_faster(models, monkeypatch, lossless, tokens, encoded):
    monkeypatch.setattr(advise_module, "is_installed", lambda: True)
    wishes = Wishes(max_vram=8 * GIB, lossless=lossless)
    advice = advise(models["bf16"], machine(), wishes, tokens, WANVIDEO)
    assert (advice.prediction.plan.encoded_bytes > 0) == encoded
    plain = advise(models["bf16"], machine(), replace(wishes, lossless="off"), tokens, WANVIDEO).prediction
    assert lossless == "on" or advice.prediction.seconds <= plain.seconds


def test_what_other_programs_hold_is_not_available():
    card = hardware.card("RTX 4090")
    reserve = int(RESERVE * card.device_total)
    assert available_vram(card) == card.device_total - reserve
    used = in_use(card, reserved=GIB, outside=500 * MIB, others=3 * GIB)
    assert available_vram(used) == card.device_total - 3 * GIB - reserve
    full = in_use(card, reserved=0, outside=500 * MIB, others=card.device_total - 600 * MIB)
    assert available_vram(full) == 0
    assert context_of(used) == 500 * MIB
    assert context_of(card) == hardware.CONTEXT
    assert context_of(replace(card, device="cpu", outside_torch=0)) == 0


@pytest.mark.parametrize("host", HOSTS)
def test_a_full_card_is_refused_with_what_is_needed(models, host):
    card = machine()
    full = in_use(card, reserved=0, outside=500 * MIB, others=card.device_total - 600 * MIB)
    with pytest.raises(LimitTooSmall) as refusal:
        advise(models["bf16"], full, Wishes(), WANT_FEW, host)
    assert refusal.value.needed > GIB
    enough = advise(models["bf16"], card, Wishes(max_vram=refusal.value.needed), WANT_FEW, host)
    assert enough.prediction.peak <= refusal.value.needed


@pytest.mark.parametrize("limit", [6, 9, 17])
def test_a_limit_that_is_given_stands(models, limit):
    advice = advise(models["bf16"], machine(), Wishes(max_vram=limit * GIB), WANT_FEW, WANVIDEO)
    assert advice.config.max_vram == advice.prediction.limit == limit * GIB
    assert (limit - 1) * GIB < advice.prediction.peak <= limit * GIB  # it is used
    with pytest.raises(LimitTooSmall):
        advise(models["bf16"], machine(), Wishes(max_vram=GIB), WANT_FEW, WANVIDEO)


def test_a_limit_above_what_the_card_has_is_not_passed_over_in_silence(models):
    card = machine("RTX 4090")
    advice = advise(models["bf16"], card, Wishes(max_vram=100 * GIB), WANT_MANY, COMFY)
    assert advice.prediction.peak <= card.device_total or any("card" in remark for remark in advice.remarks)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("limit", [None, 12 * GIB])
def test_planning_for_28_gb_takes_under_50_mb(models, model, host, limit):
    card, (path,) = machine(), models[model].paths

    def plan():
        for cache in (plans._runs, plans._cut, plans._fitting):  # as if it were the first time
            cache.cache_clear()
        return advise(read_model(path), card, Wishes(max_vram=limit), 7800, host)

    plan()  # also imports what is not imported yet
    tracemalloc.start()
    plan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * MIB


# -- what a user chooses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("blocks", "vace"), [(5, 0), (0, 3), (20, 4), (40, 8)])
def test_so_many_blocks_are_streamed_as_were_asked_for(models, host, blocks, vace):
    wishes = Wishes(blocks_to_swap=blocks, vace_blocks_to_swap=vace)
    advice = advise(models["vace"], machine("A100 80GB"), wishes, WANT_FEW, host)
    plan = advice.prediction.plan
    streamed = {plan.units[index].block for index in plan.streamed}
    assert advice.config.streamed_blocks == len(streamed) == blocks + vace
    assert uneven(48, sorted(streamed)) <= 1
    assert None not in streamed
    assert not any("are to be streamed" in remark for remark in advice.remarks)


def test_more_blocks_than_there_are_is_all_of_them_with_a_remark(models):
    card = machine("A100 80GB")
    wishes = Wishes(blocks_to_swap=48, vace_blocks_to_swap=15)
    advice = advise(models["vace"], card, wishes, WANT_FEW, WANVIDEO)
    assert advice.config.streamed_blocks == 48
    assert advice.remarks == (
        "48 blocks are to be streamed, but the model has 40",
        "15 VACE blocks are to be streamed, but the model has 8",
    )
    plain = advise(models["bf16"], card, wishes, WANT_FEW, WANVIDEO)
    assert plain.config.streamed_blocks == 40
    assert "15 VACE blocks are to be streamed, but the model has 0" in plain.remarks


def test_too_few_streamed_blocks_for_the_card_are_refused_with_what_is_needed(models):
    with pytest.raises(LimitTooSmall) as refusal:
        advise(models["bf16"], machine("RTX 3060 12GB"), Wishes(blocks_to_swap=1), WANT_FEW, COMFY)
    assert refusal.value.needed > 24 * GIB
    advice = advise(
        models["bf16"],
        machine("A100 80GB"),
        Wishes(blocks_to_swap=1, max_vram=refusal.value.needed),
        WANT_FEW,
        COMFY,
    )
    assert advice.config.streamed_blocks == 1


@pytest.mark.parametrize(("streams", "slots"), [(1, 2), (4, 2), (6, 3), (8, 4), (13, 6), (16, 8)])
def test_slots_follow_from_streams_where_tuning_is_off(models, streams, slots):
    wishes = Wishes(auto=False, streams=streams, threshold=0.5)
    advice = advise(models["bf16"], machine(), wishes, WANT_FEW, COMFY)
    assert advice.config.slots == advice.prediction.plan.slots == slots
    assert advice.config.max_vram == int(0.5 * machine().device_total)
    assert advise(models["bf16"], machine(), replace(wishes, auto=True), WANT_FEW, COMFY).config.slots is None


@pytest.mark.parametrize("cuda", [True, False])
def test_without_cuda_optimization_the_plan_does_not_adapt(models, cuda):
    advice = advise(models["bf16"], machine(), Wishes(cuda=cuda), WANT_FEW, COMFY)
    assert advice.config.mode == ("adaptive" if cuda else "chunkwise")


def test_a_smaller_share_of_the_link_slows_what_is_bound_by_it(models):
    card = machine()

    def seconds(share, tokens, auto=False):
        wishes = Wishes(auto=auto, bandwidth=share)
        found = advise(models["bf16"], card, wishes, tokens, COMFY).prediction
        assert found.link == pytest.approx(card.to_device * (1 if auto else share))
        return found.seconds

    assert 3 < seconds(0.2, WANT_FEW) / seconds(1.0, WANT_FEW) < 5.1
    assert seconds(0.5, WANT_MANY) == pytest.approx(seconds(1.0, WANT_MANY), rel=0.01)
    assert seconds(0.2, WANT_FEW, auto=True) == seconds(1.0, WANT_FEW, auto=True)


# -- RAM ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(ram=st.integers(4, 64), model=st.sampled_from(MODELS), host=st.sampled_from(HOSTS), dram=st.booleans())
@example(ram=16, model="bf16", host=COMFY, dram=True)
def test_a_remark_says_how_much_ram_is_missing_or_not_page_locked(models, ram, model, host, dram):
    advice = advise(models[model], machine(ram=ram), Wishes(dram=dram), WANT_MANY, host)
    arena, budget = advice.prediction.arena, advice.config.host_budget
    assert (budget == 0) is not dram
    remarks = " ".join(advice.remarks)
    if arena > ram * GIB:
        assert f"RAM is too small by {format_bytes(arena - ram * GIB)}" in remarks
        assert "page-locked" not in remarks
    elif arena > budget:
        assert f"{format_bytes(arena - budget)} of the weights will not be page-locked" in remarks
    else:
        assert remarks == ""


def test_a_model_that_is_resident_as_a_whole_streams_nothing_that_could_be_slow(models):
    advice = advise(models["bf16"], machine("A100 80GB"), Wishes(dram=False), WANT_FEW, COMFY)
    assert advice.prediction.plan.streamed_bytes == 0
    assert not any("slower than predicted" in remark for remark in advice.remarks)


# -- models of which little is known ------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed_blocks", [None, 0, 2, 4])
def test_layerwise_is_predicted_with_the_blocks_that_the_engine_streams(streamed_blocks):
    model = Transformer()
    config = SwapConfig(mode="layerwise", streamed_blocks=streamed_blocks)
    swap = attach(model, config, "cpu")
    try:
        blocks = len({size.block for size in swap.weights.sizes if size.block is not None})
        amount = Work((0.1,) * blocks, 0.01, MIB, MIB, 0)
        assert predict(swap.weights.sizes, config, GIB, amount, 0, 1e9, 0).plan == swap.plan
    finally:
        swap.detach()


def test_of_no_model_and_of_an_unknown_family_nothing_is_predicted(tmp_path):
    card = machine()
    unknown = read_model(write_sparse(tmp_path / "model.safetensors", Transformer().state_dict()))
    for facts, words in ((None, "no model is connected or named"), (unknown, "its family is not known")):
        advice = advise(facts, card, Wishes(), WANT_FEW, COMFY)
        assert advice.prediction is None
        assert len(advice.remarks) == 1
        assert words in advice.remarks[0]
        assert advice.config.max_vram == advice.available == available_vram(card)
        chosen = Wishes(auto=False, grow=False, dram=False, streams=12, threshold=0.3, cuda=False, blocks_to_swap=7)
        config = advise(facts, card, chosen, WANT_FEW, COMFY).config
        assert (config.slots, config.host_budget, config.mode, config.streamed_blocks) == (6, 0, "chunkwise", 7)
        assert config.max_vram == int(0.3 * card.device_total)
        assert as_json(facts, card, advice, WANT_FEW, COMFY)["prediction"] is None
        assert not any(line.startswith("Prediction") for line in report(facts, card, Wishes(), advice, WANT_FEW, COMFY))


def test_a_family_that_was_not_measured_is_predicted_with_a_remark(tmp_path):
    flux = read_model(write_sparse(tmp_path / "flux.safetensors", shapes(**KNOWN["Flux"][0])))
    advice = advise(flux, machine(), Wishes(), 4096, COMFY)
    assert advice.prediction.peak <= advice.config.max_vram
    assert any("measured with Wan, not with Flux" in remark for remark in advice.remarks)


def test_a_known_family_without_known_blocks_is_refused(tmp_path):
    sd3 = read_model(write_sparse(tmp_path / "sd3.safetensors", shapes(**KNOWN["SD3"][0])))
    with pytest.raises(NoBlocks):
        advise(sd3, machine(), Wishes(), 4096, COMFY)


def test_a_model_that_the_wrapper_does_not_know_is_refused_there(tmp_path):
    flux = read_model(write_sparse(tmp_path / "flux.safetensors", shapes(**KNOWN["Flux"][0])))
    with pytest.raises(NoBlocks):
        advise(flux, machine(), Wishes(), 4096, WANVIDEO)


# -- words --------------------------------------------------------------------------------------------------------------

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": GIB}


def bytes_of(number, unit):
    return float(number) * UNITS[unit]


@settings(max_examples=10)
@given(case=cases, threshold=st.sampled_from([0.3, 0.5, 0.9]))
def test_the_sizes_that_are_printed_add_up(models, case, threshold):
    facts, card = models[case["model"]], machine(case["card"])
    wishes = Wishes(threshold=threshold)
    assume(attempt(facts, card, case["host"], case["tokens"], available_vram(card)) is not None)
    advice = advise(facts, card, wishes, case["tokens"], case["host"])
    found = advice.prediction
    head = found.describe().split(";")[0]
    sizes = [bytes_of(*size) for size in re.findall(r"([\d.]+) (B|KiB|MiB|GiB)\b", head)]
    assert len(sizes) == 7
    assert sizes[0] == pytest.approx(sum(sizes[2:]), abs=6 * 0.0051 * GIB)
    assert sizes[1] == pytest.approx(advice.config.max_vram, abs=0.0051 * GIB)
    plain = as_json(facts, card, advice, case["tokens"], case["host"])
    numbers = plain["prediction"]
    assert numbers["peak"] == sum(
        numbers[use] for use in ("resident", "slots", "beside", "activations", "context")
    )  # to the byte
    assert numbers["peak"] <= plain["limit"] <= plain["available"]
    assert numbers["streamed"] <= numbers["ram"]
    assert math.isclose(numbers["floor"], max(numbers["compute"], numbers["streamed"] / plain["link"]))
    lines = report(facts, card, wishes, advice, case["tokens"], case["host"])
    assert f"Prediction: {found.describe()}" in lines
    assert any(line.startswith(f"Chosen: limit {format_bytes(plain['limit'])}, adaptive") for line in lines)
    assert sum(line.startswith("Note: ") for line in lines) == len(advice.remarks)
    assert any(f"{format_bytes(advice.available)} of VRAM available" in line for line in lines)
