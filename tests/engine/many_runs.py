"""A process of its own that runs two models in turn with changing patches, and prints what it holds after run 20 and run 200.

In a process of its own, because what the C library keeps of freed memory depends on what ran before."""

import gc
import json
import threading

import psutil
import torch
from intelligent_vram.vram import Patches, SwapConfig
from page_locking import Registrar, attach_locked, shared_budget
from torch import nn


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(768, 768) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def adding(run):
    """Other weights are patched from run to run, by other amounts; after 20 runs the same weights again."""
    paths = {f"blocks.{block}.weight" for block in range(4) if (run % 20 >> block) & 1}
    return Patches(lambda path: run if path in paths else None, lambda path, tensor: tensor + run)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    models, x, packed = [Wide(), Wide()], torch.randn(2, 768), [None, None]
    before = [{name: weight.clone() for name, weight in model.state_dict().items()} for model in models]
    size = sum(weight.nbytes for weight in models[0].parameters())
    registrar, shared = Registrar(), shared_budget(round(1.5 * size))
    config, process, held = SwapConfig(mode="chunkwise", block_size=3_000_000), psutil.Process(), {}
    for run in range(1, 201):
        swap = attach_locked(models[run % 2], registrar, shared, config, packed[run % 2], patches=adding(run))
        models[run % 2](x)
        assert registrar.nbytes == shared.locked <= 1.5 * size
        packed[run % 2] = swap.detach()
        if run in (20, 200):
            gc.collect()
            held[run] = {
                "rss": process.memory_info().rss,
                "packed": shared.held,
                "locked": [shared.locked, registrar.nbytes, shared.pending],
                "threads": threading.active_count(),
                "files": process.num_fds() if hasattr(process, "num_fds") else 0,
            }
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    print(json.dumps(held))


main()
