"""RAdam and its schedule as in the paper, and what may be added: warm-up, a mean of the weights.

Copy together with: nothing (torch only).
"""

import math
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """One optimizer group per part; every parameter that trains is in exactly one."""
    groups = [
        dict(name=name, params=[p for p in part.parameters() if p.requires_grad])
        for name, part in model.named_children()
    ]
    own = [p for p in model.parameters(recurse=False) if p.requires_grad]  # a learned temperature
    groups.append(dict(name="temperature", params=own))
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable
    return [group for group in groups if group["params"]]


def build_optimizer(args: Namespace, model: nn.Module) -> torch.optim.RAdam:
    """Decoupled weight decay, one parameter group per part (xk-huang/OrdinalCLIP@ca10a20
    ordinalclip/runner/optim.py); --lr-image and --lr-prompts replace --lr in theirs."""
    groups = param_groups(model)
    for group in groups:
        name = {"image_encoder": "lr_image", "prototypes": "lr_prompts"}.get(group["name"])
        group["lr"] = (getattr(args, name) if name else None) or args.lr
    return torch.optim.RAdam(
        groups, lr=args.lr, weight_decay=args.weight_decay, decoupled_weight_decay=True
    )


def build_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """A cosine over all epochs, after --warmup epochs in which the learning rate rises linearly."""
    if not args.warmup:
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    warmup, length = args.warmup, args.epochs - args.warmup

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (epoch - warmup) / length)) / 2

    return lr_scheduler.LambdaLR(optimizer, factor)


def build_average(args: Namespace, model: nn.Module) -> AveragedModel | None:
    """--ema: a copy of the model whose weights and buffers are moving averages; None without.

    After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's: 0.999 from the start
    would keep half of the initial weights for 700 steps.
    """
    if args.ema is None:
        return None

    def average(means: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        steps = int(averaged.n_averaged)  # on the CPU: reading `count` would wait for the GPU
        decay = min(args.ema, (1 + steps) / (10 + steps))
        if means[0].is_floating_point():
            return get_ema_multi_avg_fn(decay)(means, values, count)
        for mean, value in zip(means, values):  # indices: 0.9 * 5 + 0.1 * 5 would become 4
            mean.copy_(value)

    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return averaged


def epochs_without_progress(log: list[dict[str, float]]) -> int:
    """Epochs since the one with the lowest validation MAE (argmax), the first of equals."""
    errors = [row["val_mae_argmax"] for row in log]
    return len(errors) - 1 - errors.index(min(errors)) if errors else 0


def check_losses(loss_sums: Tensor, epoch: int, step: int) -> None:
    """FloatingPointError naming the first loss that is not finite; last.pt stays as it was."""
    for name, value in zip(("loss", "i2t", "t2i"), loss_sums.tolist()):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} in epoch {epoch}, by step {step}; try a lower --lr or "
                "--precision fp32. --resume continues from the last checkpoint"
            )
