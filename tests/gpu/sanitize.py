"""A streamed forward in every mode, for NVIDIA's checkers:

``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py`` (or ``racecheck``, ``initcheck``)

``--lossless on``: with encoded weights, for memcheck. The others look into nvCOMP's kernels then, of which initcheck says that
the encoder reads what nobody wrote, and which racecheck does not get through in minutes.
"""

import argparse

import torch
from intelligent_vram.vram import SwapConfig, attach
from torch import nn

WIDTH = 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lossless", choices=["on", "off"], default="off")
    lossless = parser.parse_args().lossless
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH, device="cuda")
    model = Model().cuda()
    expected = model(x)
    model = model.cpu()
    for mode in ("adaptive", "chunkwise", "layerwise"):
        for host_budget in (None, 0):
            config = SwapConfig(mode=mode, block_size=1 << 20, host_budget=host_budget, lossless=lossless)
            swap = attach(model, config, "cuda")
            for number in range(4):
                assert torch.equal(model(x), expected)
                if number == 2:
                    swap.evict(1 << 20)
            swap.detach()
    print("right to the bit in every mode")


if __name__ == "__main__":
    main()
