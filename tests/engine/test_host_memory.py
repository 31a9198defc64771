"""New host memory: exact, private, in huge pages, and not copied to forked processes while it is page-locked."""

import os
import re
from pathlib import Path

import pytest
import torch
from intelligent_vram.vram.host_memory import HUGE_PAGE, HostSegment, new_memory

from .page_locking import Registrar

SMAPS = Path("/proc/self/smaps")


def flags_at(address):
    """What Linux says of the mapping that holds an address: "hg" huge pages are asked for, "dc" not for forked processes, "sh"
    shared."""
    begin = end = 0
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(part, 16) for part in span.groups())
        elif line.startswith("VmFlags:") and begin <= address < end:
            return set(line.split()[1:])
    raise LookupError(hex(address))


needs_flags = pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags:" not in SMAPS.read_text(), reason="the system does not tell how memory is mapped"
)


@pytest.mark.parametrize("nbytes", [0, 1, 4097, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 12_345])
def test_memory_is_of_exact_size_and_can_be_written_through_either_view(nbytes):
    segment = HostSegment(nbytes)
    plain, inference = segment.buffer, segment.buffer_for(torch.inference_mode()(torch.empty)(1))
    assert [plain.is_inference(), inference.is_inference()] == [False, True]
    assert plain.shape == inference.shape == (nbytes,)
    assert plain.untyped_storage().nbytes() == nbytes
    plain.fill_(7)
    with torch.inference_mode():
        assert bool((inference == 7).all())
    assert nbytes < HUGE_PAGE or plain.data_ptr() % HUGE_PAGE == 0
    assert new_memory(nbytes).untyped_storage().nbytes() == nbytes


def test_memory_lives_as_long_as_a_view_of_it():
    view = HostSegment(2 * HUGE_PAGE).buffer[HUGE_PAGE:]
    view.fill_(3)
    others = [new_memory(2 * HUGE_PAGE).fill_(number) for number in range(8)]
    assert int(view.long().sum()) == 3 * HUGE_PAGE
    assert [int(other[-1]) for other in others] == list(range(8))


@needs_flags
@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="this kernel has no transparent huge pages"
)
@pytest.mark.parametrize("make", [lambda nbytes: HostSegment(nbytes).buffer, new_memory])
def test_huge_pages_are_asked_for_what_fills_them(make):
    memory = make(3 * HUGE_PAGE + 12_345)
    first, last = memory.data_ptr(), memory.data_ptr() + 3 * HUGE_PAGE
    assert "hg" in flags_at(first)
    assert "hg" in flags_at(last - 1)
    assert "hg" not in flags_at(last)
    assert "sh" not in flags_at(first)


@needs_flags
def test_page_locked_memory_is_not_copied_to_forked_processes():
    segment, registrar = HostSegment(2 * HUGE_PAGE + 5000), Registrar()
    places = [segment.buffer.data_ptr(), segment.buffer.data_ptr() + segment.nbytes - 1]
    for _ in range(2):
        assert not any("dc" in flags_at(place) for place in places)
        assert segment.page_lock(registrar)
        assert all("dc" in flags_at(place) for place in places)
        assert segment.release() is None
    assert not any("dc" in flags_at(place) for place in places)
