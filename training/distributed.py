"""torchrun: process group, main process, and what the processes exchange beside gradients.

Every function also works without torchrun: one process, no communication.
Copy together with: nothing (torch only).
"""

import contextlib
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def init_distributed(args: Namespace) -> None:
    """Join the process group that torchrun set up: one process per GPU, or CPU processes.

    Without torchrun: make the GPU of --device cuda:1 the current one, whose memory is measured.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing and os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit(
            f"WORLD_SIZE is set without {missing[0]}; start train.py with torchrun, or unset it"
        )
    is_cuda = args.device.startswith("cuda")
    is_torchrun = "WORLD_SIZE" in os.environ and not missing
    if is_cuda and is_torchrun:  # also where a resumed run has the number of its first process
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if is_cuda:
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if is_torchrun:
        dist.init_process_group("nccl" if is_cuda else "gloo")


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The others wait until the main process is through, or has failed (then they fail alike)."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def data_parallel(loss_module: nn.Module) -> nn.Module:
    """loss_module in DistributedDataParallel, which averages gradients over the processes.

    Batch norm statistics stay each process's own until `average_buffers`.
    """
    if not dist.is_initialized():
        return loss_module
    with warnings.catch_warnings():  # torch 2.13 has a new name for it, torch 2.4 only this one
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(loss_module, broadcast_buffers=False)


def average_buffers(model: nn.Module) -> None:
    """Batch norm statistics of all processes, so that they evaluate one and the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows (M / P, ...) that process p of P read as p, p + P, ... -> all (M, ...), in order."""
    if not dist.is_initialized():
        return rows
    shards: list[Tensor] = [rows] * world_size()
    dist.all_gather_object(shards, rows)
    gathered = rows.new_empty(sum(map(len, shards)), *rows.shape[1:])
    for p, shard in enumerate(shards):
        gathered[p :: len(shards)] = shard
    return gathered
