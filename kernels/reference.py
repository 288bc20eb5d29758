"""The matching op in plain PyTorch: the specification that the Triton kernels are tested against.

Symbols, here and in `matching_triton.py`: B images, R ranks, D joint dim,

    x_i (B, D) image features    p_c (R, D) prototypes    y_i (B,) labels    s scale (exp of CLIP's logit_scale)

Similarity      A_ic = s * <x_i, p_c> / (|x_i| |p_c|)                                                  (B, R)
Image to text   i2t  = 1/B sum_i [ lse_i - A_i,y_i ],                lse_i = log sum_c exp A_ic
                     = mean KL(one-hot || softmax of row i), which is cross-entropy
Text to image   t2i  = 1/|V| sum_{c in V} KL(q_c || softmax of column c),   V = ranks that occur in the batch
                     = 1/|V| sum_{c in V} [ sum_i q_ci log q_ci - sum_i q_ci A_ic + lse_c ],
                lse_c = log sum_i exp A_ic,  n_c images of rank c,
                q_ci = hi_c where y_i = c, lo_c elsewhere:
                  target="normalized"  hi = 1/n_c,           lo = 0         (the paper: label column / its count)
                  target="softmax10"   hi = e^10 / z_c,      lo = 1 / z_c,  z_c = n_c e^10 + B - n_c
                                       (the official code: softmax over the batch of 10 * one-hot,
                                       xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/runner.py#L142-L158)

A column needs four numbers only: lse_c, sum of its positives, sum of all, n_c. With a process group these
are merged over the processes, so t2i runs over the global batch without gathering any feature.

Everything is computed in float32 (float64 for float64 input), also under autocast: at s = 100 a bfloat16
logit is off by up to 0.25. A zero vector has similarity 0 to everything and gets gradient 0, where
`F.normalize` would return a gradient of 1e12.

Copy-paste: needs torch>=2.4.
"""

import math

import torch
import torch.distributed as dist

EPS = 1e-12  # a vector shorter than this counts as zero, as in F.normalize


def matching_loss(image_features, prototypes, labels, scale, *, target="normalized", group=None):
    """i2t and t2i of the module docstring, two 0-dim tensors, both >= 0 up to rounding.

    image_features (B, D), prototypes (R, D), labels (B,) integers in 0..R-1, scale 0-dim.
    A label outside is an assertion that a GPU checks in its own time: nothing waits for it here.
    With `group` the result is that of all processes' images together. Each process's gradients are then its
    own share of the whole: sum them over the processes (features need no sum, they live on one process).
    """
    inside = ((labels >= 0) & (labels < len(prototypes))).all()
    torch._assert_async(inside, f"labels outside 0..{len(prototypes) - 1}")
    logits = similarity(image_features, prototypes, scale)  # (B, R)
    hit = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)  # (B, R)
    positives = torch.where(hit, logits, 0.0)  # (B, R)
    row_loss = logits.logsumexp(1) - positives.sum(1)  # (B,)
    columns = torch.stack(
        [logits.logsumexp(0), positives.sum(0), logits.sum(0), hit.sum(0).to(logits.dtype)]
    )  # (4, R)
    rows = torch.stack([row_loss.sum(), logits.new_tensor(float(len(logits)))])  # (2,)
    merged = _all_processes(torch.cat([columns.flatten(), rows]), group)  # (P, 4R + 2)

    row_sum, num_images = merged[:, -2:].sum(0)
    lse, positive, total, count = (
        merged[:, :-2].unflatten(1, columns.shape).unbind(1)
    )  # (P, R) each
    t2i = column_loss(
        lse.logsumexp(0), positive.sum(0), total.sum(0), count.sum(0), num_images, target
    )
    return row_sum / num_images.clamp_min(1), t2i


def match(image_features, prototypes, scale):
    """Image features (B, D) against prototypes (R, D): what a trained model answers.

    Returns probabilities (B, R), the expected rank index (B,) under them, and the most probable one (B,).
    """
    probs = similarity(image_features, prototypes, scale).softmax(1)  # (B, R)
    ranks = torch.arange(probs.shape[1], device=probs.device, dtype=probs.dtype)
    return probs, (probs * ranks).sum(1), probs.argmax(1)


def similarity(image_features, prototypes, scale):
    """Scaled cosine similarity: (B, D) x (R, D) -> logits (B, R), float32 (or float64)."""
    with torch.autocast(image_features.device.type, enabled=False):
        return scale * (unit(image_features) @ unit(prototypes).T)  # (B, D) x (D, R) -> (B, R)


def unit(vectors):
    """Rows of (M, D) divided by their length, in float32 (or float64); zero rows stay zero."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    square = vectors.square().sum(-1, keepdim=True)  # (M, 1)
    return vectors * torch.where(square > EPS**2, square.clamp_min(EPS**2).rsqrt(), 0.0)


def column_loss(lse, positive, total, count, num_images, target):
    """t2i from the four statistics of each column (R,) and the number of images in the batch."""
    present = count > 0
    n = count.clamp_min(1)  # absent ranks are masked below; 1 keeps them finite
    if target == "normalized":
        loss = lse - n.log() - positive / n
    else:
        z = n * math.exp(10) + (num_images - n)
        hi, lo = math.exp(10) / z, 1 / z
        entropy = n * hi * hi.log() + (num_images - n) * lo * lo.log()
        loss = entropy - (hi - lo) * positive - lo * total + lse
    return torch.where(present, loss, 0.0).sum() / present.sum().clamp_min(1)


def _all_processes(stats, group):
    """(S,) of this process -> (P, S) of all P processes, in rank order so that all merge alike."""
    return stats[None] if group is None else _Gather.apply(stats, group)


class _Gather(torch.autograd.Function):
    """all_gather whose backward keeps this process's share and needs no communication.

    Every process computes the same loss from the same stack, so the gradient of its own row is already
    the gradient of the global loss.
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
