"""A diffusers pipeline that keeps its frames, and the growth watch, on a real GPU."""

import gc

import pytest
import torch
from intelligent_vram.vram.allocation_sites import AlreadyRecording
from intelligent_vram.vram.growth import ALLOCATED, LIVE, RESERVED, GrowthWatch
from intelligent_vram.vram.growth_picture import draw_growth
from intelligent_vram.vram.pipeline_state import ReleasingPipeline

from ..tiny_pipeline import calls, pipeline
from .conftest import ON_A_CARD

pytestmark = ON_A_CARD

KEEP = ("kv_cache",)
SIZES = {"size": 256, "device": "cuda"}  # a frame is 12 MiB, a call's decoder_cache 36
FRAME = 3 * 1024 * 1024 * 4
MIB = 1 << 20


def memory(pipe, between=lambda: None):
    """Frames of 30 calls, and memory allocated and reserved after each."""
    gc.collect()
    torch.cuda.empty_cache()
    seen = []

    def after(number):
        between()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    return calls(pipe, 30, after), seen


def tidy():
    """What some do after each frame."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()


def test_memory_after_call_30_is_that_after_call_3_and_without_release_it_grows():
    memory(pipeline(**SIZES))  # what CUDA loads once
    expected, plain = memory(pipeline(**SIZES))
    frames, released = memory(ReleasingPipeline(pipeline(**SIZES), keep=KEEP))
    print("MiB after calls 3, 30 plain", [tuple(n / MIB for n in plain[i]) for i in (2, 29)])
    print("MiB after calls 3, 30 released", [tuple(n / MIB for n in released[i]) for i in (2, 29)])
    assert released[29] == released[2]
    assert plain[29][0] - plain[2][0] == 27 * FRAME
    assert plain[29][1] > plain[2][1]
    assert all(torch.equal(a, b) for a, b in zip(frames, expected, strict=True))


def test_sharing_the_state_keeps_a_call_from_holding_it_twice():
    peaks = {}
    for share in (True, False):
        pipe = ReleasingPipeline(pipeline(**SIZES), names=(), keep=KEEP, share=share)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        calls(pipe, 20)
        peaks[share] = torch.cuda.max_memory_allocated() - before
    print("peak MiB with 20 frames kept: shared", peaks[True] / MIB, "copied", peaks[False] / MIB)
    assert peaks[False] - peaks[True] > 15 * FRAME


def test_emptying_caches_and_synchronizing_after_each_frame_is_not_needed():
    frames, plain = memory(ReleasingPipeline(pipeline(**SIZES), keep=KEEP))
    expected, tidied = memory(ReleasingPipeline(pipeline(**SIZES), keep=KEEP), between=tidy)
    print("MiB reserved after call 30: as it is", plain[29][1] / MIB, "tidied each call", tidied[29][1] / MIB)
    assert plain[29][0] == tidied[29][0]
    assert plain[29][1] == plain[2][1]
    # what one call needs and frees stays reserved for the next: no more than that
    assert plain[29][1] - tidied[29][1] <= 10 * FRAME
    assert all(torch.equal(a, b) for a, b in zip(frames, expected, strict=True))


def test_the_watch_finds_what_grows_on_the_card_and_which_line_made_it():
    pipe = pipeline(**SIZES)
    state = None
    with GrowthWatch("cuda", unit="frame", where=True) as watch:
        for number in range(12):
            state = pipe(state=state, block_idx=number)
            watch.mark()
        growth = watch.growth()
    print("\n".join(growth.report()))
    verdicts = {counter.name: counter.grows for counter in growth.counters}
    assert verdicts[ALLOCATED] is verdicts[RESERVED] is verdicts[LIVE] is True
    frames = growth.kinds[0]
    assert (frames.kind.shape, frames.count, frames.nbytes) == ((1, 3, 1024, 1024), 10, 10 * FRAME)
    assert any("['videos'][*]" in holder or ".videos[*]" in holder for holder in frames.holders)
    assert frames.sites
    assert abs(growth.unseen) < MIB
    assert draw_growth(growth, title="Frames kept").height > 1000


def test_frames_that_are_released_do_not_grow_and_most_marks_only_read_counters():
    pipe = ReleasingPipeline(pipeline(**SIZES), keep=KEEP)
    state = None
    watch = GrowthWatch("cuda", unit="frame", warm_up=2)
    for number in range(30):
        state = pipe(state=state, block_idx=number)
        watch.mark()
    growth = watch.growth()
    print(growth.verdict(), sum(mark.scanned for mark in growth.marks))
    assert not any(counter.grows for counter in growth.counters if counter.name in (ALLOCATED, RESERVED, LIVE))
    assert sum(mark.scanned for mark in growth.marks) < 10


def test_a_record_of_the_allocator_that_is_someone_elses_is_left_alone():
    torch.cuda.memory._record_memory_history(enabled="state", context="alloc", stacks="python")
    try:
        with pytest.raises(AlreadyRecording, match="someone else"), GrowthWatch("cuda", where=True):
            pass
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    with GrowthWatch("cuda", where=True) as watch:
        watch.mark()


def test_memory_that_no_tensor_accounts_for_is_told():
    kept = []
    watch = GrowthWatch("cuda")
    weight = torch.randn(512, 1024, device="cuda", requires_grad=True)
    for _ in range(6):
        kept.append(weight.exp().sin().exp().sum())  # holds what its gradient needs
        watch.mark()
    growth = watch.growth()
    assert growth.counters[0].grows
    assert growth.unseen > 4 * 2 * MIB
    assert any(line.startswith("Outside the tensors that Python knows") for line in growth.report())
