"""One forward of a model at a time: the limit that is held meanwhile, what is measured, pressure from other programs, and
what happens when memory runs out on the way: the engine takes less of it, and the forward is repeated."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import limit
from .gates import as_function, hide_from_compile, marked
from .repeat import Call, let_go, out_of_memory
from .units import MIB, format_bytes

if TYPE_CHECKING:
    from .swap import Swap

log = logging.getLogger(__name__)

PRESSURE = 64 * MIB  # what other programs have to take for the engine to answer
MOST_TRIES = 12  # of one forward
WAITS = (0.25, 0.5, 1.0, 2.0)  # seconds to wait for memory that other programs hold, when the engine cannot take less


class Forward:
    """The forwards of one Swap. ``lock`` is held by the thread that computes; ``repeated`` counts repetitions."""

    def __init__(self, swap: Swap) -> None:
        self._swap = weakref.ref(swap)
        self.lock = threading.RLock()
        self.depth = 0
        self.repeated = 0
        self.outside_torch = 0
        self._held: Any = None
        self._budget = self._failed = 0
        self._told = False
        self._elements = 0
        self._repeats = self._tries = self._waits = 0

    @property
    def swap(self) -> Swap:
        """The Swap whose forwards these are. It is not kept: once it is off the model, nothing but its user does that."""
        return self._swap()

    # -- gates -------------------------------------------------------------------------------------------------------

    def gate(self, original: Callable) -> Callable:
        """``original``, the forward of the whole model, as one that is measured and held below the limit. While that is the
        model's, it keeps the Swap."""
        begin, end = hide_from_compile(as_function(self._begin)), hide_from_compile(as_function(self._end))

        def forward(*args: Any, **kwargs: Any) -> Any:
            begin(args, kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException as error:
                end(error)
                raise
            end(None)
            return result

        return marked(hide_from_compile(forward, recursive=False), self.swap)

    def repeatable(self, original: Callable) -> Callable:
        """``original``, which does the work of a forward, as one that is called again when memory ran out in it and the
        engine could make room."""
        keep, again = hide_from_compile(as_function(self._keep)), hide_from_compile(as_function(self._again))

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = keep(args, kwargs)
            while True:
                try:
                    return original(*args, **kwargs)
                except BaseException as error:
                    failure = error
                # outside of the except clause, which would keep what the forward had computed
                try:
                    if not again(call, failure):
                        raise failure
                finally:
                    failure = None  # see let_go

        return hide_from_compile(forward, recursive=False)

    def _keep(self, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        return Call(self.swap.root, args, kwargs, self.swap.device) if self.depth == 1 else None

    # -- begin and end -----------------------------------------------------------------------------------------------

    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.lock.acquire()
        self.depth += 1
        if self.depth > 1:
            return
        self._elements = _elements((args, kwargs))
        self._repeats = self._tries = self._waits = 0
        try:
            self._start()
        except BaseException as error:
            failure = error
        else:
            return
        try:
            try:
                again = out_of_memory(failure) and self._with_less(failure)
            except BaseException as error:
                failure, again = error, False
            if not again:
                self._end(failure)
                raise failure
        finally:
            failure = None

    def _start(self) -> None:
        swap = self.swap
        swap.ready()
        self.hold()
        swap.adapter.before(self._elements, self._budget)
        self._failed = limit.failed_allocations(swap.device)
        swap.streamer.begin(self.look, self._repeats)

    def hold(self) -> None:
        """Bind torch's allocator to what the limit leaves now."""
        swap = self.swap
        self.let_loose()
        self._budget = limit.budget_now(swap.device, swap.limit, self.outside_torch)
        self._held = limit.held(swap.device, self._budget)
        self._held.__enter__()

    def let_loose(self) -> None:
        """Bind torch's allocator no more."""
        if self._held is not None:
            held, self._held = self._held, None
            held.__exit__(None, None, None)

    def _end(self, error: BaseException | None) -> None:
        swap = self.swap
        explained: BaseException | None = None
        try:
            if self.depth == 1:
                swap.streamer.end(error is None, swap.adapter.peak())
                swap.adapter.after(error is None)
                every = swap.config.empty_cache_every
                if every and swap.telemetry.forwards % every == 0 and swap.device.type == "cuda":
                    torch.cuda.empty_cache()
                if out_of_memory(error):
                    explained = self._explain(error)
                elif error is None:
                    self._notice()
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.let_loose()
            self.lock.release()
        if explained is not None:
            try:
                raise explained from error
            finally:
                explained = None

    # -- memory ------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Between two units of a forward: give back resident units when other programs took memory that it needs."""
        swap = self.swap
        budget = limit.budget_now(swap.device, swap.limit, self.outside_torch)
        if budget >= self._budget - PRESSURE:
            return
        missing = swap.adapter.need() - budget
        given = swap.evict(missing) if missing > 0 else 0
        if given:
            log.info(
                "block swap: other programs took %s of VRAM while the model computes; gave back %s of resident units",
                format_bytes(self._budget - budget),
                format_bytes(given),
            )
        self.hold()

    def _notice(self) -> None:
        """Say it when a library got no memory and lived with that. cuDNN's convolutions then take another algorithm, for good,
        which rounds differently (torch, aten/src/ATen/native/cudnn/Conv_v8.cpp, ``try_plans``)."""
        if self._told or limit.failed_allocations(self.swap.device) <= self._failed:
            return
        self._told = True
        log.warning(
            "block swap: a library found no memory for its workspace and chose another algorithm, which can round differently "
            "in the last bits; a higher max_vram_gb avoids that"
        )

    def _again(self, call: Call | None, error: BaseException) -> bool:
        """Whether a forward that failed with ``error`` is to be called again: memory ran out in it, what it was called with
        is as it was, and the engine could take less."""
        if call is None or self.depth != 1 or not out_of_memory(error):
            return False
        self.swap.streamer.end(False, 0)
        reason = call.restore()
        if reason is not None:
            log.warning(
                "block swap: memory ran out in a forward that cannot be repeated: the model was given %s", reason
            )
            return False
        return self._with_less(error)

    def _with_less(self, error: BaseException) -> bool:
        """Begin the forward again with a plan that takes less memory. False when there is none."""
        if self.swap.device.type != "cpu":
            gc.collect()  # an exception of before, somebody else's, may still hold VRAM
        while True:
            if not self._room():
                return False
            what = str(error).split("\n")[0].split(". GPU")[0]
            let_go(error)
            try:
                self.swap.mend()
                self.hold()
                self.swap.adapter.start_smaller(self._budget)
                self._failed = limit.failed_allocations(self.swap.device)
                self._repeats += 1
                self.swap.streamer.begin(self.look, self._repeats)
            except BaseException as failure:
                if not out_of_memory(failure):
                    raise
                error = failure
                continue
            self.repeated += 1
            log.warning(
                "block swap: memory ran out in a forward (%s); it is repeated with less: %s",
                what,
                self.swap.plan.describe(),
            )
            return True

    def _room(self) -> bool:
        """Whether it can be tried once more: with a smaller plan, or after a moment because other programs hold memory that
        the limit leaves to this one."""
        swap = self.swap
        self._tries += 1
        if self._tries > MOST_TRIES:
            return False
        if swap.adapter.shrink():
            return True
        if self._waits >= len(WAITS) or not limit.taken_by_others(swap.device, swap.limit, self.outside_torch):
            return False
        time.sleep(WAITS[self._waits])
        self._waits += 1
        return True

    def _explain(self, error: BaseException) -> torch.OutOfMemoryError:
        """An out-of-memory error of a forward in words that say what to change."""
        swap = self.swap
        adapter = swap.adapter
        taken = limit.taken_by_others(swap.device, swap.limit, self.outside_torch)
        tried = f", also when it was repeated {self._repeats} times with smaller plans" if self._repeats else ""
        others = (
            f" Other programs hold {format_bytes(taken)} of the VRAM that the limit leaves to this one: close them, or wait."
            if taken
            else ""
        )
        in_use = adapter.peak()
        adapter.failed()
        return torch.OutOfMemoryError(
            f"The forward needs more than the VRAM limit of {format_bytes(swap.limit)}{tried}: {format_bytes(in_use)} "
            f"were in use ({format_bytes(swap.device_bytes)} of them weights, {swap.plan.describe()}) when an allocation "
            f"failed.{others} Raise max_vram_gb, or use a smaller resolution or fewer frames. ({error})"
        )


def _elements(values: Any) -> int:
    """Elements of all tensors in nested arguments: what activations grow with."""
    if isinstance(values, torch.Tensor):
        return values.numel()
    if isinstance(values, dict):
        return sum(_elements(value) for value in values.values())
    if isinstance(values, list | tuple):
        return sum(_elements(value) for value in values)
    return 0
