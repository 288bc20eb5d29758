"""What --method builds, and its loss: one row of METHODS each.

A builder gets BuildInputs and returns a module with

    loss(images (B, 3, S, S), labels (B,), *, target, group) -> (total, i2t, t2i)    0-dim tensors
    predict(images) -> dict(probs (B, R))
    export(copy=True) -> the module that evaluates (text tower run once); else shares the encoder

Needs: ordinalclip, clip_model, clip_weights, tokenizer, backbones, data, training.checkpoints,
.distributed, .loaders, .run_folder.
"""

import contextlib
import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
from backbones import build_image_encoder
from clip_model import CLIP, download, tiny_clip
from clip_weights import check_finite, unwrap
from ordinalclip import FixedPrototypes, LinearPrototypes, OrdinalCLIP, RankPrompts, Regression
from tokenizer import Tokenizer
from training.checkpoints import load_checkpoint
from training.distributed import is_main, main_process_first
from training.loaders import exit_on_user_error, load_task, without_image_encoder
from training.run_folder import Run, check_same_images, is_digits

CONTEXT_KEY = "prototypes.context_embeds"  # in state dicts
LINEAR_DIM, LINEAR_SCALE = 1024, math.log(100)  # of the baselines where no CLIP is loaded


class BuildInputs(NamedTuple):
    """What a method is built from."""

    args: Namespace
    task: data.Task
    image_encoder: nn.Module  # (B, 3, S, S) -> (B, D)
    dim: int  # D
    clip: CLIP | None  # None where neither prompts nor image encoder need it


class Method(NamedTuple):
    build: Callable[[BuildInputs], nn.Module]
    needs_clip: bool
    has_prompts: bool  # --tune has an effect


def build_linear(inputs: BuildInputs) -> OrdinalCLIP:
    scale = inputs.clip.logit_scale if inputs.clip else LINEAR_SCALE
    prototypes = LinearPrototypes(inputs.task.num_ranks, inputs.dim)
    return OrdinalCLIP(inputs.image_encoder, prototypes, scale)


def build_regression(inputs: BuildInputs) -> Regression:
    loss_type = inputs.args.regression_loss
    return Regression(inputs.image_encoder, inputs.dim, inputs.task.num_ranks, loss_type)


def build_zeroshot(inputs: BuildInputs) -> OrdinalCLIP:
    clip, names = inputs.clip, inputs.task.rank_names
    prompts = [zeroshot_prompt(inputs.args, inputs.task, name) for name in names]
    tokenizer = Tokenizer()
    for prompt in prompts:  # CLIP reads its feature at the first [EOT]
        if {tokenizer.sot_token, tokenizer.eot_token} & {*tokenizer.encode(prompt)}:
            raise ValueError(f"{prompt!r} spells out a special token of CLIP; use other words")
    with torch.no_grad():
        prototypes = clip.encode_text(tokenizer(prompts, clip.context_length))
    return OrdinalCLIP(inputs.image_encoder, FixedPrototypes(prototypes), clip.logit_scale)


def zeroshot_prompt(args: Namespace, task: data.Task, rank_name: str) -> str:
    return f"{args.context or task.context} {rank_name}."


def build_rank_prompts(inputs: BuildInputs) -> OrdinalCLIP:
    args, task, tokenizer = inputs.args, inputs.task, Tokenizer()
    context = args.context or task.context
    names = [tokenizer.encode(name) for name in task.rank_names]
    prompts = RankPrompts(
        inputs.clip,
        task.num_ranks,
        context=int(context) if is_digits(context) else torch.tensor(tokenizer.encode(context)),
        rank_tokens=names if args.rank_init == "names" else None,
        interp=args.interp,
        num_base_ranks=args.base_ranks,
        rank_position=args.rank_position,
    )
    prompts.rank_embeds.requires_grad_(args.tune != "context")
    prompts.context_embeds.requires_grad_(args.tune != "rank")
    return OrdinalCLIP(inputs.image_encoder, prompts, inputs.clip.logit_scale)


METHODS = {  # in the order of the paper's rows
    "linear": Method(build_linear, needs_clip=False, has_prompts=False),
    "regression": Method(build_regression, needs_clip=False, has_prompts=False),
    "zeroshot": Method(build_zeroshot, needs_clip=True, has_prompts=False),
    "coop": Method(build_rank_prompts, needs_clip=True, has_prompts=True),
    "ordinalclip": Method(build_rank_prompts, needs_clip=True, has_prompts=True),
}


def needs_clip(args: Namespace) -> bool:
    return METHODS[args.method].needs_clip or args.image_encoder == "clip"


def build_run(args: Namespace) -> Run:
    """Images, ranks and model, on its device and untrained. SystemExit for user errors."""
    task = load_task(args)
    check_same_images(args, task)
    torch.manual_seed(args.seed)
    return Run(args, task, *build_model(args, task))


@exit_on_user_error()
def build_model(args: Namespace, task: data.Task) -> tuple[nn.Module, dict[str, Any]]:
    """-> the model on its device, and how its images are prepared (image_size, mean, std, ...)."""
    clip = load_clip(args) if needs_clip(args) else None
    dim = clip.embed_dim if clip else LINEAR_DIM
    if args.image_encoder == "clip":
        encoder = clip.visual.requires_grad_(True)
        preprocess = dict(image_size=clip.image_size, mean=data.CLIP_MEAN, std=data.CLIP_STD)
    else:
        weights = None if args.image_weights == "none" else args.image_weights
        with flags_in_messages():
            encoder = build_image_encoder(
                args.image_encoder, dim, weights=weights, download=download
            )
        preprocess = dict(image_size=encoder.image_size, mean=encoder.mean, std=encoder.std)
    if args.official:  # xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/utils.py#L370-L400
        preprocess |= dict(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)
        preprocess |= dict(squash=True, resample="bilinear")
    preprocess["draft"] = not args.no_draft
    if args.freeze_image:
        encoder.requires_grad_(False)
    if args.compile:
        encoder.compile()
    model = METHODS[args.method].build(BuildInputs(args, task, encoder, dim, clip))
    model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    return model, preprocess


def load_clip(args: Namespace) -> CLIP:
    if args.clip == "tiny":
        return tiny_clip(image_size=96)
    with main_process_first(), flags_in_messages():  # it downloads, the others find the file
        return CLIP.from_pretrained(
            args.clip, quick_gelu=args.quick_gelu, trust_torchscript=args.trust_torchscript
        )


FLAGS_OF_ARGUMENTS = {  # in messages of clip_weights
    "quick_gelu=True": "--quick-gelu",
    "quick_gelu=False": "--no-quick-gelu",
    "trust_torchscript=True": "--trust-torchscript",
    "choose another cache_dir, or put": "or put",
}


@contextlib.contextmanager
def flags_in_messages() -> Iterator[None]:
    """Errors about weights name the flags of train.py, not the arguments of the loaders."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        for argument, flag in FLAGS_OF_ARGUMENTS.items():
            message = message.replace(argument, flag)
        raise ValueError(message) from error


class LossModule(nn.Module):
    """A module whose forward is the loss, for DistributedDataParallel to wrap.

    Each process's gradients are its share of the gradient of the global loss; DDP averages them, so
    multiply the total by the number of processes before backward.
    """

    def __init__(self, model: nn.Module, target: str) -> None:
        super().__init__()
        self.model, self.target = model, target

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = dist.group.WORLD if dist.is_initialized() else None
        return self.model.loss(images, labels, target=self.target, group=group)


def build_loss(run: Run) -> LossModule:
    model = without_image_encoder(run.model) if run.args.freeze_image else run.model
    return LossModule(model, "softmax10" if run.args.official else "normalized")


# --- --init ---


@functools.lru_cache(maxsize=1)  # until warm_start has used it
def init_state(init: str) -> dict[str, Tensor]:
    """State dict of the run that --init names, a folder or a checkpoint; also the official code's.

    There the prompts are called prompt_learner (xk-huang/OrdinalCLIP@ca10a20
    ordinalclip/models/ordinalclip.py#L30-L50). SystemExit for a file without both names.
    """
    path = Path(init)
    path = path / "best.pt" if path.is_dir() else path
    saved = load_checkpoint(path)
    if {"settings", "model"} <= saved.keys():
        return saved["model"]
    try:
        state = unwrap(saved, str(path), quiet=True)
        state = {key: value for key, value in state.items() if torch.is_tensor(value)}
        check_finite(state, str(path))
    except ValueError as error:
        raise SystemExit(f"--init {error}") from error
    state = {key.replace("prompt_learner.", "prototypes."): v for key, v in state.items()}
    if not any(key.startswith(("image_encoder.", "prototypes.")) for key in state):
        raise SystemExit(f"--init {path} holds neither an image_encoder nor a prompt_learner")
    return state


def warm_start(args: Namespace, model: nn.Module) -> None:
    """Copy the image encoder and the prompt of another run; resample its base ranks to our number.

    Base embeddings lie at equal distances from the lowest rank to the highest, in both runs, so
    rank c of R starts where rank c (R_old - 1) / (R - 1) of the other run ended.
    """
    source, state = init_state(args.init), model.state_dict()
    init_state.cache_clear()
    updates = {key: v for key, v in source.items() if key.startswith("image_encoder.")}
    ranks_key = "prototypes.rank_embeds"
    if {CONTEXT_KEY, ranks_key} <= source.keys() and CONTEXT_KEY in state:
        updates |= {key: source[key] for key in (CONTEXT_KEY, ranks_key)}
        if (rows := source[ranks_key]).dim() == 3:
            rows = rows.float().permute(1, 2, 0)  # (K, T, W) -> (T, W, K)
            num = len(state[ranks_key])
            rows = nn.functional.interpolate(rows, num, mode="linear", align_corners=True)
            updates[ranks_key] = rows.permute(2, 0, 1)
    for key, value in updates.items():
        if key not in state or state[key].shape != value.shape:
            model_shape = tuple(state[key].shape) if key in state else "nothing of that name"
            raise SystemExit(
                f"--init {args.init}: {key} is {tuple(value.shape)} there, here {model_shape}; "
                "use the same --image-encoder, --clip and number of context tokens"
            )
    model.load_state_dict(state | updates)
    if is_main():
        prompts = " and prompts" if ranks_key in updates else ""
        unused = {key for key in source.keys() - updates.keys() if "_extra_state" not in key}
        unused = sorted({key.split(".")[0] for key in unused})
        unused = f", without its {', '.join(unused)}" if unused else ""
        print(f"starts with the image encoder{prompts} of {args.init}{unused}")
