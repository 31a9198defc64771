"""New host memory: exact, private, in huge pages, and not copied to forked processes while it is page-locked."""

import gc
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from intelligent_vram.vram.host_memory import HUGE_PAGE, HostSegment, new_memory

from .page_locking import Registrar

ROOT = Path(__file__).parents[2]
SMAPS = Path("/proc/self/smaps")
HUGE = hasattr(mmap, "MADV_HUGEPAGE")


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
        inference.fill_(9)
    assert bool((plain == 9).all())
    assert plain.data_ptr() % (HUGE_PAGE if HUGE and nbytes >= HUGE_PAGE else mmap.PAGESIZE) == 0
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
def test_memory_is_marked_as_not_for_forked_processes_while_it_is_page_locked():
    segment, registrar = HostSegment(2 * HUGE_PAGE + 5000), Registrar(refuse=(1,))
    places = [segment.buffer.data_ptr(), segment.buffer.data_ptr() + segment.nbytes - 1]
    assert not segment.page_lock(registrar)  # refused
    for _ in range(2):
        assert not any("dc" in flags_at(place) for place in places)
        assert segment.page_lock(registrar)
        assert all("dc" in flags_at(place) for place in places)
        assert segment.release() is None
    assert segment.page_lock(registrar)
    view = segment.buffer[5:]
    del segment
    gc.collect()
    assert registrar.ranges == {}
    assert not any("dc" in flags_at(place) for place in places)
    view.fill_(1)


FORK = """
import gc, mmap, os, torch

torch.set_num_threads(1)  # forked processes have no threads of torch's
from intelligent_vram.vram.host_memory import HostSegment
from tests.engine.page_locking import Registrar

page_locked, free, registrar = HostSegment(1 << 26), HostSegment(1 << 26), Registrar()
page_locked.buffer.fill_(5), free.buffer.fill_(6)
assert page_locked.page_lock(registrar)
address = page_locked.buffer.data_ptr()
child = os.fork()
if not child:
    with open("/proc/self/maps") as maps:
        spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps]
    assert not any(begin <= address < end for begin, end in spans)
    others = [mmap.mmap(-1, 1 << 26) for _ in range(4)]  # one may lie there now
    for number, other in enumerate(others):
        other[:] = bytes([number]) * len(other)
    del page_locked
    gc.collect()
    assert [other[-1] for other in others] == [0, 1, 2, 3]
    assert len(registrar.ranges) == 1
    os._exit(int(free.buffer[-1]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
assert page_locked.release() is None
child = os.fork()
if not child:
    os._exit(int(page_locked.buffer[-1]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept from forked processes on Linux")
def test_a_forked_process_does_not_get_page_locked_memory_and_lives_on_without_it():
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
