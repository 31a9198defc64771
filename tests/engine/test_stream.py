"""In steady state every streamed unit is copied once per forward, in the order of use, before it is needed."""

from collections import Counter

import pytest
import torch
from intelligent_vram.vram import SwapConfig, attach
from intelligent_vram.vram import swap as swap_module
from intelligent_vram.vram.layout import Entry, flatten, plan_tensor
from intelligent_vram.vram.link import Link
from intelligent_vram.vram.order import Order
from intelligent_vram.vram.plan import MODES
from intelligent_vram.vram.stream import Streamer, StreamUnit
from intelligent_vram.vram.telemetry import Telemetry
from torch import nn

from .counting import counted
from .models import CASES, Transformer, build, inputs, outputs, smallest_limit, wanted_outputs, weight_bytes

SMALL = 9000
CPU = torch.device("cpu")


class CountingLink(Link):
    """A CPU's link that writes down where copies come from, and what memory it hands out."""

    def __init__(self, device):
        super().__init__(device)
        self.copied = []
        self.allocations = 0

    def copy(self, target, source):
        self.copied.append((source.data_ptr(), source.numel()))
        super().copy(target, source)

    def empty(self, nbytes):
        self.allocations += 1
        return super().empty(nbytes)


@pytest.fixture
def counted_link(monkeypatch):
    """The next model that is attached streams over this link."""
    link = CountingLink(CPU)
    monkeypatch.setattr(swap_module, "open_link", lambda device: link)
    return link


def copies_of_a_forward(swap, link, x, **call):
    """Indices of the units in the order in which they are copied during one forward."""
    units = {(unit.source.data_ptr(), unit.nbytes): unit.index for unit in swap.streamer.units}
    link.copied.clear()
    swap.root(x, **call)
    return [units[copied] for copied in link.copied]


def rotated(sequence, first):
    start = sequence.index(first)
    return [*sequence[start:], *sequence[:start]]


# -- a whole model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("name", ["two lists", "a list between the blocks", "blocks in reverse", "buffers"])
@torch.no_grad()
def test_once_the_order_is_known_each_streamed_unit_is_copied_once_per_forward_in_order_of_use(
    name, slots, mode, counted_link
):
    model, x = build(name), inputs()
    swap = attach(model, SwapConfig(mode=mode, block_size=4500, slots=slots, streamed_blocks=5), "cpu")
    for _ in range(3):
        model(x)
    used = [run.unit.index for run in swap.streamer.order.runs]
    assert len(used) > slots
    assert set(Counter(used).values()) == {1}
    for _ in range(3):
        copied = copies_of_a_forward(swap, counted_link, x)
        assert rotated(copied, used[0]) == used
        assert swap.telemetry.last().misses == 0


@pytest.mark.parametrize("mode", ["adaptive", "layerwise"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_forward_that_is_like_the_last_one_misses_nothing(name, mode):
    model, x = build(name), inputs()
    limit = smallest_limit(model, mode=mode, block_size=SMALL) + weight_bytes(model) // 3
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, max_vram=limit), "cpu")
    call = CASES[name].calls[-1]
    for _ in range(5):
        model(x, **call)
    assert [record.misses for record in swap.telemetry.records()[-2:]] == [0, 0]


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@torch.no_grad()
def test_units_that_stay_in_their_slots_are_not_copied_again(mode, counted_link):
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(mode=mode, block_size=60_000, slots=5, streamed_blocks=3), "cpu")
    for _ in range(3):
        model(x)
    assert len(swap.plan.streamed) <= len(swap.streamer.slots)
    assert copies_of_a_forward(swap, counted_link, x) == []
    assert swap.telemetry.last().streamed_bytes == 0


@torch.no_grad()
def test_resident_units_are_never_copied_again(counted_link):
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL), "cpu")
    for _ in range(3):
        model(x)
    assert swap.plan.streamed == ()
    allocations = counted_link.allocations
    assert copies_of_a_forward(swap, counted_link, x) == []
    assert counted_link.allocations == allocations


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@torch.no_grad()
def test_slots_are_allocated_once_and_not_in_a_forward(mode, counted_link):
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, streamed_blocks=4), "cpu")
    allocations = counted_link.allocations
    for _ in range(4):
        model(x)
    assert counted_link.allocations == allocations
    assert len(swap.streamer.slots) == swap.plan.slots


@torch.no_grad()
def test_layerwise_mode_copies_each_layer_once_and_gives_all_memory_back(counted_link):
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(mode="layerwise"), "cpu")
    for _ in range(4):
        assert copies_of_a_forward(swap, counted_link, x) == list(range(len(swap.plan.units)))
        assert swap.streamer.floating_bytes == 0


@torch.no_grad()
def test_blocks_that_are_skipped_in_every_other_forward_cost_no_miss_for_the_others_in_the_long_run():
    model, x = build("blocks that are skipped"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL, streamed_blocks=5, slots=3), "cpu")
    for skip in ((), (2,), (), (2,), (), (2,)):
        model(x, skip=skip)
    layers_of_a_block = len(swap.plan.streamed) // 5
    assert all(record.misses <= layers_of_a_block + 3 for record in swap.telemetry.records()[2:])


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@pytest.mark.parametrize("name", ["blocks in a list", "parametrized weights", "several dtypes", "two lists"])
@torch.no_grad()
def test_units_that_were_evicted_are_fetched_ahead_like_all_others(name, mode):
    model, x = build(name), inputs()
    limit = smallest_limit(model, mode=mode, block_size=SMALL) + weight_bytes(model) // 2
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, max_vram=limit), "cpu")
    for _ in range(3):
        model(x)
    assert swap.evict(1 << 40) > 0
    for _ in range(3):
        model(x)
    assert swap.telemetry.last().misses == 0


@pytest.mark.parametrize("mode", ["adaptive", "chunkwise"])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
@torch.no_grad()
def test_the_memory_that_is_taken_is_what_the_plan_says(share, mode):
    model, x = build("blocks in a list"), inputs()
    limit = smallest_limit(model, mode=mode, block_size=SMALL) + int(weight_bytes(model) * share)
    swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, max_vram=limit), "cpu")
    beside = weight_bytes(model) - sum(weight.nbytes for weight in packed_weights(swap))
    for _ in range(4):
        assert swap.device_bytes == beside + swap.plan.device_bytes
        assert swap.plan.device_bytes == swap.plan.resident_bytes + swap.plan.slots * swap.plan.slot_bytes
        model(x)
    assert (swap.plan.streamed == ()) == (share == 2.0)


def packed_weights(swap):
    return [entry.entry.host for layer in swap.packed.layers for entry in layer.entries]


@torch.no_grad()
def test_what_is_counted_as_streamed_is_what_was_copied(counted_link):
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL, streamed_blocks=3), "cpu")
    for _ in range(3):
        model(x)
    counted_link.copied.clear()
    model(x)
    assert (
        swap.telemetry.last().streamed_bytes == swap.plan.streamed_bytes == sum(size for _, size in counted_link.copied)
    )


@torch.no_grad()
def test_records_tell_each_forward_its_units_and_its_bytes():
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL, streamed_blocks=5), "cpu")
    for _ in range(4):
        model(x)
    records = swap.telemetry.records()
    assert [record.index for record in records] == [0, 1, 2, 3]
    for record in records:
        assert [span.unit for span in record.units] == list(swap.plan.streamed)
        assert all(span.start <= span.end <= record.seconds for span in record.units)
        assert record.compute == record.seconds - record.stall
        assert 0 <= record.host_seconds <= record.seconds
        assert "ms" in record.describe()
    assert sum(record.misses for record in records[1:]) == 0


@torch.no_grad()
def test_a_forward_that_broke_off_leaves_no_record():
    model, x = build("blocks in a list"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL), "cpu")
    model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 7))
    model(x)
    assert len(swap.telemetry.records()) == 2


@torch.no_grad()
def test_only_the_last_records_are_kept():
    model, x = build("blocks in a list"), inputs(batch=1)
    swap = attach(model, SwapConfig(block_size=1 << 20), "cpu")
    for _ in range(70):
        model(x)
    records = swap.telemetry.records()
    assert len(records) == 64
    assert records[-1].index == 69
    assert swap.telemetry.last() == records[-1]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_engine_costs_the_host_little_work_a_layer_however_many_there_are(mode):
    """The time that it takes is printed by benchmarks/block_swap.py."""

    def lines_a_layer(count):
        model = Transformer(lambda: nn.Linear(32, 32), count)
        with counted() as lines:
            model(x)
        swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, streamed_blocks=count), "cpu")
        for _ in range(2):
            model(x)
        with counted() as streamed:
            model(x)
        swap.detach()
        return (streamed() - lines()) / count

    x = inputs()
    few, many = lines_a_layer(50), lines_a_layer(200)
    assert many < 1.05 * few < 400


@torch.no_grad()
def test_calls_with_changing_skips_and_orders_stay_right_over_a_whole_sampling():
    generator = torch.Generator().manual_seed(0)
    model, x = build("blocks in changing order"), inputs()
    orders = [
        tuple(torch.randint(0, 5, (int(torch.randint(1, 8, (), generator=generator)),), generator=generator).tolist())
        for _ in range(30)
    ]
    wanted = outputs(model, [{"order": order} for order in orders], x)
    for mode in MODES:
        swap = attach(model, SwapConfig(mode=mode, block_size=SMALL, max_vram=150_000), "cpu")
        for order, result in zip(orders, wanted, strict=True):
            assert torch.equal(model(x, order=order), result)
        swap.detach()


# -- a streamer by itself ----------------------------------------------------------------------------------------------


class Layers:
    """Linear layers as units of a streamer, each from one buffer."""

    def __init__(self, count, slots):
        torch.manual_seed(0)
        self.layers = [nn.Linear(16, 16, bias=False) for _ in range(count)]
        self.originals = [layer.weight for layer in self.layers]
        self.link = CountingLink(CPU)
        self.telemetry = Telemetry(self.link)
        self.streamer = Streamer(self.link, self.telemetry)
        self.units = []
        for number, layer in enumerate(self.layers):
            weight = layer.weight
            spec = plan_tensor(weight.detach(), 0)
            buffer = weight.detach().clone().reshape(-1).view(torch.uint8)
            entry = Entry("weight", layer._parameters, "weight", weight, (spec,), flatten(weight)[1])
            self.units.append(StreamUnit(number, spec.nbytes, [(entry, 0)], buffer))
        self.streamer.configure(self.units, self.units, slots, 16 * 16 * 4)
        self.copied = []

    def enter(self, number):
        self.streamer.enter(number)
        assert self.layers[number].weight.equal(self.originals[number])
        assert self.layers[number].weight.data_ptr() != self.originals[number].data_ptr()

    def use(self, number):
        self.enter(number)
        self.streamer.leave(number)

    def forward(self, sequence):
        """Use layers in order; returns the units that were copied on the way and the number of misses."""
        self.link.copied.clear()
        self.streamer.begin()
        for number in sequence:
            self.use(number)
        self.streamer.end(True, 0)
        assert all(layer.weight is weight for layer, weight in zip(self.layers, self.originals, strict=True))
        source = {unit.source.data_ptr(): unit.index for unit in self.units}
        return [source[pointer] for pointer, _ in self.link.copied], self.telemetry.last().misses


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_copies_run_ahead_of_use_by_the_number_of_slots(slots):
    streamed = Layers(8, slots)
    streamed.forward(range(8))
    assert streamed.forward(range(8)) == ([*range(slots, 8), *range(slots)], 0)
    streamed.streamer.begin()
    streamed.enter(3)
    loaded = {unit.index for unit in streamed.units if unit.slot is not None}
    assert 3 in loaded
    assert loaded <= {3, 4, 5, 6, 7, 0, 1, 2}
    assert len(loaded) == slots


def test_the_first_forward_follows_the_order_of_definition():
    assert Layers(6, 3).forward(range(6))[1] == 0


def test_a_reversed_order_is_missed_once_and_then_known():
    streamed = Layers(6, 2)
    _, misses = streamed.forward(range(5, -1, -1))
    assert misses > 0
    copied, misses = streamed.forward(range(5, -1, -1))
    assert misses == 0
    assert rotated(copied, 5) == [5, 4, 3, 2, 1, 0]


def test_a_unit_that_is_used_twice_in_a_row_is_copied_once():
    streamed = Layers(5, 2)
    sequence = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    streamed.forward(sequence)
    copied, misses = streamed.forward(sequence)
    assert (sorted(copied), misses) == ([0, 1, 2, 3, 4], 0)


def test_a_unit_that_comes_back_soon_is_kept_when_there_are_slots():
    streamed = Layers(4, 3)
    sequence = [0, 1, 0, 2, 0, 3]
    for _ in range(3):
        copied, misses = streamed.forward(sequence)
    assert copied.count(0) <= 1
    assert (sorted({*copied, 0}), misses) == ([0, 1, 2, 3], 0)


def test_a_skipped_unit_does_not_stop_the_copies_of_those_behind_it():
    streamed = Layers(6, 2)
    streamed.forward(range(6))
    _, misses = streamed.forward([0, 1, 3, 4, 5])
    assert misses <= 1


def test_as_many_slots_as_units_need_no_copy_in_any_order():
    streamed = Layers(4, 4)
    streamed.forward(range(4))
    for sequence in ([3, 1, 2, 0], [0, 0, 2], [1, 2, 3]):
        assert streamed.forward(sequence) == ([], 0)


def test_a_unit_in_use_is_never_overwritten():
    streamed = Layers(6, 2)
    streamed.streamer.begin()
    for number in range(6):
        streamed.enter(number)
    for number in range(6):
        assert streamed.layers[number].weight.equal(streamed.originals[number])
    for number in range(5, -1, -1):
        streamed.streamer.leave(number)
    streamed.streamer.end(True, 0)
    assert streamed.streamer.floating_bytes == 0
    assert all(layer.weight is weight for layer, weight in zip(streamed.layers, streamed.originals, strict=True))


def test_a_unit_that_is_entered_twice_stays_until_it_was_left_twice():
    streamed = Layers(3, 2)
    streamed.streamer.begin()
    streamed.enter(0)
    streamed.enter(0)
    streamed.streamer.leave(0)
    for number in (1, 2, 1, 2):
        streamed.use(number)
    assert streamed.layers[0].weight.data_ptr() != streamed.originals[0].data_ptr()
    assert streamed.layers[0].weight.equal(streamed.originals[0])
    streamed.streamer.leave(0)
    streamed.streamer.end(True, 0)
    assert streamed.layers[0].weight is streamed.originals[0]


def test_memory_on_demand_holds_no_more_than_the_cap():
    streamed = Layers(6, 0)
    unit = streamed.units[0].nbytes
    for cap in (2 * unit, unit):
        streamed.streamer.limit_floating(cap)
        streamed.streamer.relearn()
        for _ in range(3):
            streamed.forward(range(6))
            assert streamed.streamer.floating_bytes == 0
        assert streamed.streamer.peak_bytes <= cap


def test_resident_units_stay_bound_until_they_are_evicted():
    streamed = Layers(4, 2)
    streamed.streamer.make_resident(streamed.units[2])
    streamed.streamer.relearn()
    resident, original = streamed.layers[2].weight, streamed.originals[2]
    assert resident.equal(original)
    for _ in range(2):
        streamed.link.copied.clear()
        streamed.streamer.begin()
        for number in range(4):
            streamed.use(number)
            assert streamed.layers[2].weight is resident
        streamed.streamer.end(True, 0)
        assert streamed.units[2].source.data_ptr() not in [pointer for pointer, _ in streamed.link.copied]
        assert streamed.telemetry.last().misses == 0
    assert streamed.streamer.evict(streamed.units[2]) == streamed.units[2].nbytes
    assert streamed.streamer.evict(streamed.units[2]) == 0
    assert streamed.layers[2].weight is original
    streamed.streamer.relearn()
    streamed.forward(range(4))
    assert 2 in streamed.forward(range(4))[0]


def test_after_closing_nothing_is_held_and_everything_is_unbound():
    streamed = Layers(4, 3)
    streamed.streamer.begin()
    streamed.enter(1)
    streamed.streamer.close()
    assert streamed.streamer.device_bytes == 0
    assert all(layer.weight is weight for layer, weight in zip(streamed.layers, streamed.originals, strict=True))


@torch.no_grad()
def test_the_order_of_the_streamer_is_that_of_the_last_whole_forward():
    model, x = build("blocks in changing order"), inputs()
    swap = attach(model, SwapConfig(block_size=SMALL, streamed_blocks=5), "cpu")
    assert isinstance(swap.streamer.order, Order)
    model(x, order=(2, 0, 4))
    blocks = [run.unit.index for run in swap.streamer.order.runs]
    model(x, order=(2, 0, 4))
    assert [span.unit for span in swap.telemetry.last().units] == blocks
    assert torch.equal(model(x, order=(0, 1, 2, 3, 4)), wanted_outputs("blocks in changing order")[0])
