"""Cases for the matching op, and its formulas written out in float64, independently of kernels/."""

import contextlib
import math

import torch
import torch.nn.functional as F

from kernels import matching_loss

TARGETS = ["normalized", "softmax10"]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
GATES = {FP32: 1e-5, FP16: 2e-3, BF16: 6e-3}  # |ours - exact| / |exact| of a whole gradient


def round_as_a_gpu_does() -> None:
    """Triton's interpreter truncates float32 to bfloat16: where all images are of one rank, that
    bias alone makes an error of 5e-2 of what rounding leaves at 2e-3."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def round_to_bfloat16(values, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (triton.language.float32, triton.language.bfloat16):
            return convert(values, input_dtype, output_dtype, rounding_mode)
        return torch.tensor(values).to(BF16).view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = round_to_bfloat16


with contextlib.suppress(ImportError):
    import triton

    if not CUDA:
        round_as_a_gpu_does()


def exact_logits(features, prototypes, scale):
    """Cosines times scale in float64; a zero vector has cosine 0 to everything."""

    def direction(v):
        length = v.norm(dim=1, keepdim=True)
        return torch.where(length > 0, v / length.clamp_min(1e-300), 0.0)

    return scale * direction(features) @ direction(prototypes).T


def exact_loss(features, prototypes, labels, scale, target="normalized"):
    """(i2t, t2i) rank by rank from the definition of the Kullback-Leibler divergence."""
    logits = exact_logits(features, prototypes, scale)
    divergences = []
    for rank in labels.unique().tolist():
        one_hot = (labels == rank).double()
        q = one_hot / one_hot.sum() if target == "normalized" else (10 * one_hot).softmax(0)
        log_p = logits[:, rank].log_softmax(0)
        divergences.append((torch.xlogy(q, q) - q * log_p).sum())
    return F.cross_entropy(logits, labels.long()), torch.stack(divergences).mean()


def exact_gradients(case, target="normalized", weights=(1.0, 1.0)):
    """Losses and the gradients of weights[0] * i2t + weights[1] * t2i, all float64."""
    features, prototypes, labels, scale = case
    leaves = [t.detach().double().cpu().requires_grad_() for t in (features, prototypes, scale)]
    losses = exact_loss(leaves[0], leaves[1], labels.cpu(), leaves[2], target)
    total = weights[0] * losses[0] + weights[1] * losses[1]
    return torch.stack(losses).detach(), torch.autograd.grad(total, leaves)


def gradients(case, target="normalized", weights=(1.0, 1.0), autocast=None, **options):
    """The same through the library, in whatever dtype the case has."""
    features, prototypes, labels, scale = case
    leaves = [t.detach().requires_grad_() for t in (features, prototypes, scale)]
    with torch.autocast(features.device.type, dtype=autocast, enabled=autocast is not None):
        losses = matching_loss(leaves[0], leaves[1], labels, leaves[2], target=target, **options)
    total = weights[0] * losses[0] + weights[1] * losses[1]
    return torch.stack(losses).detach(), torch.autograd.grad(total, leaves)


def relative(ours, exact):
    """|ours - exact| / |exact|, norms over the whole tensor: an all-zero `ours` scores 1."""
    difference = ours.detach().double().cpu() - exact
    return float(difference.norm() / exact.norm().clamp_min(1e-300))


def make_case(
    num_images, num_ranks, dim, scale=100.0, labels="uniform", dtype=torch.float32, seed=0
):
    """Random features near their prototype: beyond chance, yet not so sure that gradients vanish."""
    random = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(num_ranks, dim, generator=random)
    picked = {
        "uniform": torch.randint(num_ranks, (num_images,), generator=random),
        "one": torch.full((num_images,), num_ranks // 2),
        "half": torch.randint((num_ranks + 1) // 2, (num_images,), generator=random)
        * 2
        % num_ranks,
    }[labels]
    noise = torch.randn(num_images, dim, generator=random)
    features = 3 * (noise + min(0.5, 5 / scale) * prototypes[picked])
    return features.to(dtype), prototypes.to(dtype), picked, torch.tensor(scale)


def make_confident_case(loss, scale, per_rank, num_ranks=9, dim=32):
    """Each image between its own prototype and one other, such that every row loses `loss`."""
    random = torch.Generator().manual_seed(0)
    square = torch.randn(dim, dim, generator=random, dtype=torch.float64)
    prototypes = torch.linalg.qr(square)[0][:num_ranks]
    labels = torch.arange(num_ranks).repeat(per_rank)
    margin = -math.log(math.expm1(loss)) / scale  # of the cosines
    angle = math.pi / 4 - math.asin(margin / math.sqrt(2))  # cos - sin = sqrt(2) sin(pi/4 - angle)
    own, other = prototypes[labels], prototypes[(labels + 1) % num_ranks]
    features = 3 * (math.cos(angle) * own + math.sin(angle) * other)
    return features.float(), 2 * prototypes.float(), labels, torch.tensor(scale)


# --- the fused kernels, through Triton's interpreter where there is no GPU ---


def on_device(case):
    return tuple(t.to(DEVICE) for t in case)


def fused(case, target="normalized", weights=(1.0, 1.0), **options):
    return gradients(on_device(case), target, weights, impl="triton", **options)


def check(case, target="normalized", weights=(0.7, 1.9), **options):
    """Both losses and all three gradients; logits of size s carry an error of s * 2^-24."""
    scale = float(case[3])
    dtype = min(case[0].dtype, case[1].dtype, key=lambda dtype: dtype.itemsize)
    gate = GATES[dtype] * max(1.0, scale / 100)
    losses, grads = fused(case, target, weights, **options)
    case = tuple(t.cpu() for t in case)
    rounded = tuple(t.to(dtype) for t in case[:2])  # float32 beside a half dtype becomes that
    exact_losses, exact_grads = exact_gradients((*rounded, *case[2:]), target, weights)
    torch.testing.assert_close(
        losses.cpu().double(), exact_losses, rtol=1e-6, atol=2e-6 * max(1.0, scale / 10)
    )
    for i, (ours, exact) in enumerate(zip(grads, exact_grads)):
        assert torch.isfinite(ours).all(), i
        error = relative(ours, exact)
        if error > gate:  # a sum that cancels: PyTorch's float32 errs as much
            floor = relative(gradients(case, target, weights, impl="torch")[1][i], exact)
            assert error <= 2 * floor and error <= 1e-2, (i, error, floor)


def check_degenerate(shape, scale, dtype=FP32):
    """One image or one rank: a loss is exactly 0, its gradient rounding, so errors are absolute."""
    case = make_case(*shape, scale=scale, dtype=dtype)
    for target in TARGETS:
        losses, grads = fused(case, target)
        exact_losses, exact_grads = exact_gradients(case, target)
        torch.testing.assert_close(losses.cpu().double(), exact_losses, rtol=1e-5, atol=2e-5)
        for ours, exact in zip(grads, exact_grads):
            error = (ours.cpu().double() - exact).norm()
            assert error <= GATES[dtype] * exact.norm() + 1e-5 * max(1.0, scale)
