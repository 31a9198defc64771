"""Several ranks attend to one long sequence, each bringing a piece of its keys and values.

    torchrun --standalone --nproc-per-node 2 docs/kv_sync.py             # on CPUs, over Gloo
    torchrun --standalone --nproc-per-node 2 docs/kv_sync.py --cuda      # on GPUs, over NCCL

Every rank computes keys and values for its own part of each new block, and a layer's exchange runs while the next layer
computes. At the end every rank has the same cache, which is checked. ``--strategy pairwise`` for the other exchange;
``--crash-rank 1`` ends that rank on the way, and the others say so.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os

import torch
import torch.distributed as dist
from intelligent_vram.vram.kv_cache import CacheShape, ModelCache
from intelligent_vram.vram.kv_sync import CacheSync, RankLost

LAYERS, HEADS, HEAD_DIM, BLOCKS = 8, 8, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--strategy", default="ring", choices=("ring", "pairwise", "collective"))
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds")
    parser.add_argument("--crash-rank", type=int)
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if args.cuda else torch.device("cpu")
    if args.cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

    dtype = torch.bfloat16 if args.cuda else torch.float32
    cache = ModelCache(CacheShape(LAYERS, 1, HEADS, 64 * BLOCKS * world, HEAD_DIM, "lbhd", dtype, device))
    sync = CacheSync(cache, strategy=args.strategy, timeout=args.timeout)
    generator = torch.Generator().manual_seed(rank)
    try:
        with torch.inference_mode():
            for block in range(BLOCKS):
                own = 64 if args.strategy == "collective" else 32 + 8 * ((rank + block) % 4)
                if rank == args.crash_rank and block == 1:
                    os._exit(0)
                sync.agree(own, start=cache.current_length)
                exchanges = []
                for layer in range(LAYERS):
                    key, value = torch.randn(2, own, 1, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
                    sync.put(layer, key, value)
                    exchanges.append(sync.start(layer))
                for exchange in exchanges:
                    exchange.wait()
    except RankLost as lost:
        print(f"rank {rank}: {lost}", flush=True)
        os._exit(1)
    keys, _ = cache.get_data(LAYERS - 1)
    digest = hashlib.sha256(cache.buffer.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]
    digests: list[str | None] = [None] * world
    dist.all_gather_object(digests, digest)
    if rank == 0:
        print(f"{world} ranks, {keys.shape[0]} tokens each, caches {'equal' if len(set(digests)) == 1 else 'DIFFER'}")
    sync.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
