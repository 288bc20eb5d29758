"""The matching op in plain PyTorch: the specification that the Triton kernels are tested against.

Dims, also in `matching_kernels.py`: B images, R ranks, D joint dim, x_i (B, D) image features,
p_c (R, D) prototypes, y_i (B,) labels, s scale (exp of CLIP's logit_scale).

Similarity      A_ic = s * <x_i, p_c> / (|x_i| |p_c|)                                        (B, R)
Image to text   i2t  = 1/B sum_i [ lse_i - A_i,y_i ],      lse_i = log sum_c exp A_ic
                     = mean KL(one-hot || softmax of row i), which is cross-entropy
Text to image   t2i  = 1/|V| sum_{c in V} KL(q_c || softmax of column c)
                     = 1/|V| sum_{c in V} [ sum_i q_ci log q_ci - sum_i q_ci A_ic + lse_c ],
                V the ranks that occur in the batch,       lse_c = log sum_i exp A_ic,
                q_ci = hi_c where y_i = c, lo_c elsewhere, with n_c images of rank c:
                  target="normalized"  hi = 1/n_c,       lo = 0       (paper: label column / count)
                  target="softmax10"   hi = e^10 / z_c,  lo = 1 / z_c,  z_c = n_c e^10 + B - n_c
                    (the official code: softmax over the batch of 10 * one-hot,
                    xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/runner.py#L142-L158)

At a loss of 1e-8 the difference of two numbers near 100 would be all rounding, and so would a
gradient exp(A - lse) - 1. So logits are taken relative to the maximum of their column, and

    row      lse_i - A_i,y_i = softplus(lse of the other ranks - A_i,y_i)
    column   lse_c = lse_in + softplus(lse_out - lse_in)     in: images of rank c, out: all others

Where a rank has several images, the gradient of its column stays a difference of probabilities,
each with an error of about 1e-7 s: at losses below that it is rounding only.

A column needs a few numbers only. With a process group these are merged over the processes, so t2i
runs over the global batch without gathering any feature.

Everything is computed in float32 (float64 for float64 input), also under autocast: at s = 100 a
bfloat16 logit is off by up to 0.25. A zero vector has similarity 0 to everything and gets gradient
0, where `F.normalize` would return a gradient of 1e12.

Copy together with: nothing; needs torch>=2.4.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOW = -1e30  # instead of -inf, which makes second derivatives nan where a sum is empty
EPS = 1e-12  # a vector shorter than this counts as zero, as in F.normalize


def matching_loss(
    image_features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    target: str = "normalized",
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """i2t and t2i of the module docstring, two 0-dim tensors, both >= 0 up to rounding.

    image_features (B, D), prototypes (R, D), labels (B,) integers in 0..R-1, scale 0-dim.
    A label outside is an assertion that a GPU checks in its own time: nothing waits for it here.
    With `group` the result is that of all processes' images together. Each process's gradients are
    then its own share of the whole: sum them over the processes (each has its own features only).
    """
    if not _in_vmap():  # which has no rule for assertions
        inside = ((labels >= 0) & (labels < len(prototypes))).all()
        torch._assert_async(inside, f"labels outside 0..{len(prototypes) - 1}")
    logits = similarity(image_features, prototypes, scale)  # (B, R)
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)  # (B, R)
    label_logits = torch.where(is_label, logits, 0.0).sum(1)  # (B,)
    lse_others = torch.where(is_label, LOW, logits).logsumexp(1)  # (B,)
    # (B,); beyond 40, log1p(e^x) is x
    row_loss = F.softplus(lse_others - label_logits, threshold=40)
    columns = _column_statistics(logits, is_label)  # (7, R)
    sum_and_count = torch.stack([row_loss.sum(), logits.new_tensor(float(len(logits)))])  # (2,)
    # P processes: (P, 7R + 2)
    merged = _all_processes(torch.cat([columns.flatten(), sum_and_count]), group)

    row_sum, num_images = merged[:, -2:].sum(0)
    columns = merged[:, :-2].unflatten(1, columns.shape)  # (P, 7, R)
    t2i = _column_loss(columns, merged[:, -1], target)
    return row_sum / num_images.clamp_min(1), t2i


def match(
    image_features: Tensor, prototypes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Image features (B, D) against prototypes (R, D): what a trained model answers.

    Returns probabilities (B, R), the expected rank index (B,) under them, the most probable (B,).
    """
    probs = similarity(image_features, prototypes, scale).softmax(1)  # (B, R)
    ranks = torch.arange(probs.shape[1], device=probs.device, dtype=probs.dtype)
    return probs, (probs * ranks).sum(1), probs.argmax(1)


def similarity(image_features: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosine similarity: (B, D) x (R, D) -> logits (B, R), float32 (or float64)."""
    with torch.autocast(image_features.device.type, enabled=False):
        x, p = unit(image_features), unit(prototypes)
        dtype = torch.promote_types(x.dtype, p.dtype)
        return scale * (x.to(dtype) @ p.to(dtype).T)  # (B, D) x (D, R) -> (B, R)


def unit(vectors: Tensor) -> Tensor:
    """Rows of (M, D) divided by their length, in float32 (or float64); zero rows stay zero."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    square = vectors.square().sum(-1, keepdim=True)  # (M, 1)
    return vectors * torch.where(square > EPS**2, square.clamp_min(EPS**2).rsqrt(), 0.0)


def _in_vmap():
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Vmap for level in levels)


# What torch.compiler.assume_constant_result sets, without importing the compiler: dynamo calls it.
_in_vmap._dynamo_marked_constant = True


def _column_statistics(logits, is_label):
    """(B, R) -> (7, R): the maximum of each column and, relative to it, log-sum-exp of the images
    of other ranks, of its own images, the same again, sum of its images', of all; n_c."""
    # the loss does not depend on what is subtracted, so the maximum needs no gradient
    top = logits.detach().amax(0) if len(logits) else torch.zeros_like(logits).sum(0)  # (R,)
    below = logits - top
    lse_out = torch.where(is_label, LOW, below).logsumexp(0)
    lse_in = torch.where(is_label, below, LOW).logsumexp(0)
    total, count = below.sum(0), is_label.sum(0).to(top.dtype)
    # The same value as lse_in in a node of its own: so autograd cancels its 1/n against the -1/n of
    # `positive` before it adds the tiny gradient of lse_in. With one node for both, gradients at
    # losses below 1e-6 would be rounding.
    lse_in_again = torch.where(is_label, below, LOW).logsumexp(0)
    positive = torch.where(is_label, below, 0.0).sum(0)
    return torch.stack([top, lse_out, lse_in, lse_in_again, positive, total, count])


def _column_loss(columns, num_images, target):
    """t2i from the statistics (P, 7, R) and the numbers of images (P,) of P processes."""
    top, lse_out, lse_in, lse_in_again, positive, total, count = columns.unbind(1)  # (P, R) each
    shift = top.detach() - top.detach().amax(0)  # (P, R), to the maximum over the processes
    terms = (lse_out, lse_in, lse_in_again)
    lse_out, lse_in, lse_in_again = ((lse + shift).logsumexp(0) for lse in terms)  # (R,)
    positive = (positive + count * shift).sum(0)
    total = (total + num_images[:, None] * shift).sum(0)
    count, num_images = count.sum(0), num_images.sum()
    present = count > 0
    n = count.clamp_min(1)  # absent ranks are masked below; 1 keeps them finite
    if target == "normalized":
        q_log_q, hi, lo = -n.log(), 1 / n, 0.0
    else:
        z = n * math.exp(10) + (num_images - n)
        hi, lo = math.exp(10) / z, 1 / z
        q_log_q = n * hi * hi.log() + (num_images - n) * lo * lo.log()
    among_positives = lse_in_again + (q_log_q - (hi - lo) * positive - lo * total)
    loss = among_positives + F.softplus(lse_out - lse_in, threshold=40)
    return torch.where(present, loss, 0.0).sum() / present.sum().clamp_min(1)


def _all_processes(stats, group):
    """(S,) of this process -> (P, S) of all P processes, in rank order so that all merge alike."""
    return stats[None] if group is None else _Gather.apply(stats, group)


class _Gather(torch.autograd.Function):
    """all_gather whose backward keeps this process's share and needs no communication.

    Every process computes the same loss from the same stack, so the gradient of its own row is
    already the gradient of the global loss.
    """

    @staticmethod
    def forward(ctx, stats, group):
        ctx.rank = dist.get_rank(group)
        stack = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
        dist.all_gather(stack, stats.contiguous(), group=group)
        return torch.stack(stack)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rank], None
