"""OrdinalCLIP's matching op: images (B, D) against rank prototypes (R, D), loss and prediction.

    matching_loss   both contrastive terms, with gradients     formulas: `reference.py`
    match           probabilities, expected rank, most probable rank
    similarity      the logits alone

`impl="torch"` is `reference.py`, `impl="triton"` the fused kernels on CUDA. "auto" takes the
kernels for R <= 128 and D a multiple of 16, in bfloat16, float16 or TF32, else PyTorch, and prints
why once.

Copy together with: the whole folder; needs torch>=2.4.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .reference import similarity, unit

TRITON_UNAVAILABLE = ""  # why the fused kernels cannot be had
try:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        TRITON_UNAVAILABLE = f"triton is {triton.__version__}, the fused kernels need 3.6"
except ModuleNotFoundError as error:
    if error.name != "triton":  # Triton is there but broken: say so, do not fall back
        raise
    TRITON_UNAVAILABLE = "triton is not installed"
HAS_TRITON = not TRITON_UNAVAILABLE
if HAS_TRITON:
    from . import matching_triton

__all__ = ["match", "matching_loss", "similarity", "unit", "which_impl", "HAS_TRITON"]

TARGETS = ("normalized", "softmax10")
IMPLS = ("auto", "torch", "triton")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED_RANKS = 128
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_logged = set()  # choices of impl="auto" that were printed in this process


def matching_loss(
    image_features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    *,
    target: str = "normalized",
    impl: str = "auto",
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image matching loss (paper's L_i2t and L_t2i): two 0-dim tensors.

    Args:
        image_features: (B, D), any float dtype, not normalised. prototypes: (R, D), likewise.
        labels: (B,) integers in 0..R-1.
        scale: the multiplier itself (100, not its log): 0-dim tensor or number.
        target: "normalized", the paper's column target, or "softmax10", the official code's.
        impl: "auto", "torch" or "triton".
        group: torch.distributed process group over whose images t2i and the means run; None = this
            process alone. Gradients are then this process's share: sum them over the processes
            (DistributedDataParallel averages, so multiply the loss by the number of processes).

    Gradients flow to image_features, prototypes and scale.
    Raises ValueError for shapes, dtypes, devices, labels, target or impl that do not fit, and
    ImportError for impl="triton" without Triton. Labels on a GPU are checked there, without
    waiting: an index outside 0..R-1 is a device-side assertion.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    _check_features(image_features, prototypes)
    check_labels(labels, image_features, len(prototypes))
    scale = _as_scale(scale, image_features)
    op = _select_implementation(impl, image_features, prototypes)
    return op.matching_loss(image_features, prototypes, labels, scale, target=target, group=group)


def match(
    image_features: Tensor, prototypes: Tensor, scale: Tensor | float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Image features (B, D) against prototypes (R, D) -> probs (B, R), expected (B,), argmax (B,).

    `expected` is the mean rank index under `probs`, in 0..R-1. Arguments as in `matching_loss`.
    The fused kernel has no gradient: where one is wanted, "auto" takes the PyTorch path.
    """
    _check_features(image_features, prototypes)
    scale = _as_scale(scale, image_features)
    tracked = (image_features, prototypes, scale)
    if impl == "auto" and torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
        impl = "torch"
    op = _select_implementation(impl, image_features, prototypes)
    return op.match(image_features, prototypes, scale)


def which_impl(
    device: torch.device | str, impl: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(implementation, why) that `impl` comes to: ("torch", "the fused kernels need CUDA, ...")."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
    if impl != "auto":
        return impl, "asked for"
    reason = _unsupported_device(torch.device(device)) or _unsupported_dtypes({dtype})
    if not reason and dtype == torch.float32 and matching_triton.float32_dots() == "ieee":
        reason = "without tensor cores (float32 matmul precision 'highest') PyTorch is faster"
    return ("torch", reason) if reason else ("triton", "fused kernels on CUDA")


def _unsupported_device(device):
    """What keeps the fused kernels from running on this device, or ""."""
    if device.type != "cuda":
        return f"the fused kernels need CUDA, this is {device.type}"
    if TRITON_UNAVAILABLE:
        return TRITON_UNAVAILABLE
    if torch.version.hip:
        return "the fused kernels are for NVIDIA's GPUs"
    generation = matching_triton.gpu_generation(device)
    if generation < 8:
        return f"the fused kernels need compute capability 8.0, this is {generation}.x"
    return ""


def _unsupported_dtypes(dtypes):
    """What keeps the fused kernels from taking these dtypes, or ""."""
    for dtype in dtypes.difference(FUSED_DTYPES):
        return f"the fused kernels compute in float32, this is {str(dtype)[6:]}"
    if torch.float16 in dtypes and len(dtypes) > 1:  # whose range the other's would leave
        return "the fused kernels take float16 only on both sides"
    return ""


def _unsupported_call(image_features, prototypes):
    """What keeps the fused kernels from taking these tensors on any device, or ""."""
    if reason := _unsupported_dtypes({image_features.dtype, prototypes.dtype}):
        return reason
    if image_features.shape[1] % 16 or not image_features.shape[1]:
        return f"the fused kernels take D in multiples of 16, this is {image_features.shape[1]}"
    if len(prototypes) > FUSED_RANKS:
        return f"the fused kernels take up to {FUSED_RANKS} ranks, these are {len(prototypes)}"
    if _in_function_transform():
        return "the fused kernels have no rules for torch.func and forward-mode gradients"
    return ""


def _in_function_transform():
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or torch.autograd.forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, without importing the compiler: dynamo calls it.
_in_function_transform._dynamo_marked_constant = True


def _select_implementation(impl, image_features, prototypes):
    """The module that computes: `reference` or `matching_triton`."""
    device = image_features.device
    dtype = min(image_features.dtype, prototypes.dtype, key=lambda dtype: dtype.itemsize)
    name, why = which_impl(device, impl, dtype)
    if name == "triton":
        if not HAS_TRITON:
            raise ImportError(
                f"impl='triton': {TRITON_UNAVAILABLE}; pip install 'triton>=3.6', or use "
                "impl='torch'"
            )
        reason = _unsupported_call(image_features, prototypes)
        if impl == "triton" and not matching_triton.INTERPRET:
            reason = reason or _unsupported_device(device)
        if impl == "triton" and reason:
            raise ValueError(f"impl='triton': {reason}; use impl='auto' or impl='torch'")
        if reason:
            name, why = "torch", reason
    if impl == "auto":
        _log_once(f"kernels: the matching op runs on impl={name!r}: {why}")
    return reference if name == "torch" else matching_triton


def _log_once(line):
    if not torch.compiler.is_compiling() and line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr)


def _check_features(image_features, prototypes):
    if image_features.dim() != 2 or prototypes.dim() != 2 or not len(prototypes):
        raise ValueError(
            f"got image_features {tuple(image_features.shape)} and prototypes "
            f"{tuple(prototypes.shape)}; expected (B, D) and (R, D) with R >= 1"
        )
    if image_features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"image_features have D={image_features.shape[1]}, prototypes D={prototypes.shape[1]}; "
            "use an image encoder and a text tower of the same joint dimension"
        )
    if not (image_features.is_floating_point() and prototypes.is_floating_point()):
        raise ValueError(
            f"image_features are {image_features.dtype}, prototypes {prototypes.dtype}; "
            "expected floating point"
        )
    if image_features.device != prototypes.device:
        raise ValueError(
            f"image_features are on {image_features.device}, prototypes on {prototypes.device}; "
            "move both to one device"
        )


def check_labels(labels: Tensor, images: Tensor, num_ranks: int) -> None:
    """ValueError unless labels are rank indices (B,) of images (B, ...), on their device.

    Indices outside 0 .. num_ranks-1 are found on the CPU only: reading a GPU's would wait for it.
    """
    if not torch.is_tensor(labels):
        raise ValueError(
            f"labels is a {type(labels).__name__}; expected rank indices (B,): torch.tensor(labels)"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"got labels {tuple(labels.shape)} for {len(images)} images; "
            "expected one rank index per image, (B,)"
        )
    if labels.dtype not in LABEL_DTYPES:
        raise ValueError(
            f"labels are {labels.dtype}; expected integer rank indices (labels.long())"
        )
    if labels.device != images.device:
        raise ValueError(
            f"labels are on {labels.device}, image_features on {images.device}; "
            "move both to one device"
        )
    is_traced = torch.compiler.is_compiling() or _in_function_transform()
    if is_traced or type(labels) is not Tensor or labels.device.type != "cpu" or not len(labels):
        return  # the ops check a GPU's labels where they lie
    low, high = int(labels.long().min()), int(labels.long().max())
    if low < 0 or high >= num_ranks:
        raise ValueError(
            f"labels run from {low} to {high}; expected rank indices 0..{num_ranks - 1}"
        )


def _as_scale(scale, image_features):
    """A 0-dim tensor beside the features. A number is filled in on the device: no copy, no wait."""
    if not isinstance(scale, torch.Tensor):
        double = image_features.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        return torch.full((), float(scale), dtype=dtype, device=image_features.device)
    if scale.numel() != 1:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; expected a number or a 0-dim tensor"
        )
    return scale.reshape(()).to(image_features.device, non_blocking=True)
