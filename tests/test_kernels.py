"""The fused kernels against float64: through Triton's interpreter where there is no GPU.

pytest tests/test_kernels.py                    a sample of the grid
pytest tests/test_kernels.py -m full            the whole grid
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matching_cases import (
    BF16,
    CUDA,
    DEVICE,
    FP16,
    FP32,
    GATES,
    TARGETS,
    check,
    check_degenerate,
    exact_gradients,
    exact_logits,
    fused,
    make_case,
    make_confident_case,
    on_device,
    relative,
)

triton = pytest.importorskip("triton")

from kernels import match, matching_kernels, matching_loss, matching_triton  # noqa: E402

ROOT = Path(__file__).parents[1]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")

# --- the grid -------------------------------------------------------------------------------------

BATCHES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000]
RANKS = [1, 2, 5, 16, 17, 61, 64, 65, 101, 127, 128]
DIMS = [16, 112, 512, 640, 1024]
SCALES = [0.01, 1.0, 14.3, 100.0, 1000.0]
LABELS = ["uniform", "one", "half"]
GRID = list(itertools.product(BATCHES, RANKS, DIMS))
SAMPLE = [  # B, R, D, scale, labels, target, dtype
    (2, 5, 16, 1.0, "uniform", "normalized", FP32),
    (31, 16, 112, 14.3, "half", "softmax10", FP32),
    (32, 61, 512, 100.0, "uniform", "normalized", FP32),
    (33, 17, 112, 1000.0, "one", "normalized", FP32),
    (64, 128, 96, 14.3, "uniform", "softmax10", FP32),
    (65, 64, 16, 0.01, "half", "normalized", FP32),
    (129, 101, 48, 100.0, "half", "softmax10", FP32),
    (640, 5, 16, 14.3, "uniform", "softmax10", FP32),  # chunks in the backward, two steps in finish
    (32, 61, 512, 100.0, "uniform", "softmax10", FP16),
    (63, 65, 112, 14.3, "half", "normalized", FP16),
    (127, 100, 16, 14.3, "one", "softmax10", FP16),
    (40, 101, 1024, 100.0, "uniform", "normalized", BF16),
    (128, 128, 64, 14.3, "half", "normalized", BF16),
    (257, 17, 112, 1000.0, "half", "softmax10", BF16),
]


@pytest.mark.parametrize("B,R,D,scale,labels,target,dtype", SAMPLE)
def test_sample_of_the_grid(B, R, D, scale, labels, target, dtype):
    check(make_case(B, R, D, scale, labels, dtype), target)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("index", range(len(GRID)))
def test_grid(index, dtype):
    B, R, D = GRID[index]
    scale = SCALES[(index + index // len(DIMS)) % len(SCALES)]  # not one scale for each D
    if B == 1 or R == 1:
        check_degenerate((B, R, D), min(scale, 14.3), dtype)
    else:
        case = make_case(B, R, D, scale, LABELS[index % 3], dtype, seed=index)
        # as torch.amp.GradScaler would: fp16 has no full precision below 6e-5, where these gradients lie
        loss_scale = 1024 / scale if dtype == FP16 and scale <= 1 else 1.0
        check(case, TARGETS[index % 2], weights=(0.7 * loss_scale, 1.9 * loss_scale))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("per_rank", [1, 3])
@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("loss", [1e-8, 1e-4, 1.0])
def test_confident_images_keep_their_precision(loss, scale, per_rank, weights):
    case = make_confident_case(loss, scale, per_rank)
    losses, grads = fused(case, weights=weights)
    exact_losses, exact_grads = exact_gradients(case, weights=weights)
    torch.testing.assert_close(losses.cpu().double(), exact_losses, rtol=2e-5, atol=0)
    assert all(relative(ours, exact) < 5e-5 for ours, exact in zip(grads, exact_grads))


@pytest.mark.parametrize("loss", [1e-8, 1e-6, 1e-3])
def test_confident_images_keep_their_gradient_in_fp16(loss):
    """Under loss scaling, as fp16 has nothing below 6e-8."""
    features, prototypes, labels, scale = make_confident_case(loss, 100.0, 1)
    case = features.half(), prototypes.half(), labels, scale
    weights = (65536.0, 65536.0)
    _, grads = fused(case, weights=weights)
    _, exact = exact_gradients(case, weights=weights)
    assert all(relative(ours, gradient) < 5e-3 for ours, gradient in zip(grads, exact))


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 1, 16), (9, 1, 16)])
def test_one_image_one_rank(shape):
    check_degenerate(shape, 10.0)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("target", TARGETS)
def test_zero_vectors_have_gradient_zero(target, dtype):
    features, prototypes, labels, scale = make_case(40, 9, 32, dtype=dtype)
    features[3], prototypes[2] = 0, 0
    check((features, prototypes, labels, scale), target)
    _, grads = fused((features, prototypes, labels, scale), target)
    assert not grads[0][3].any() and not grads[1][2].any()


def test_zero_scale():
    features, prototypes, labels, _ = make_case(40, 9, 32)
    _, grads = fused((features, prototypes, labels, torch.tensor(0.0)))
    _, exact = exact_gradients((features, prototypes, labels, torch.tensor(0.0)))
    assert not grads[0].any() and not grads[1].any() and relative(grads[2], exact[2]) < 1e-5


def test_counts_are_exact_beyond_what_fp32_can_count():
    """Else labels that are right would be refused."""
    empty = dict(device=DEVICE, dtype=FP32)
    parts, columns = torch.zeros(1, 7, 64, **empty), torch.empty(6, 64, **empty)
    counts, i2t, t2i, sums = (torch.empty(n, **empty) for n in ((2,), (), (), (3, 4)))
    parts[0, 1] = 1.0
    integers = parts.view(torch.int32)[0]
    integers[5, :3] = torch.tensor([2**24, 1, 1])
    integers[6, 1] = 2**24 + 2
    counter = torch.zeros(1, device=DEVICE, dtype=torch.int32)
    matching_triton._launch(
        matching_triton.finish_kernel, (4,), parts, parts, columns, counts, i2t, t2i, sums, counter,
        1, 3, RPAD=64, SMOOTH=False, FINISH=True, **matching_triton.FINISH, num_warps=4, num_stages=1,
    )  # fmt: skip
    assert counts.tolist() == [2**24 + 2, 3] and i2t.isfinite() and t2i.isfinite()


def test_true_maximum_at_scale_100():
    """Every cosine far below 1: a fixed maximum of `scale` would underflow to log 0."""
    features, prototypes, labels, scale = make_case(48, 20, 64, 1000.0)
    features -= 4 * prototypes.mean(0)
    check((features, prototypes, labels, scale))


def test_empty_batch():
    _, prototypes, _, scale = make_case(4, 9, 32)
    losses, grads = fused((torch.zeros(0, 32), prototypes, torch.zeros(0, dtype=torch.long), scale))
    assert not losses.any() and not grads[1].any() and not grads[2].any()


def test_zero_gradient_would_fail():
    """The measure of this file is not vacuous: a gradient of zeros is as wrong as can be."""
    _, exact = exact_gradients(make_case(64, 21, 32))
    for gradient in exact:
        assert relative(torch.zeros_like(gradient), gradient) == 1.0 > 10 * max(GATES.values())


# --- inputs ---------------------------------------------------------------------------------------


def test_rows_any_distance_apart():
    features, prototypes, labels, scale = make_case(33, 9, 32)
    plain = fused((features, prototypes, labels, scale))
    features, prototypes, labels, scale = on_device(
        (features, prototypes, labels, scale)
    )  # views stay views
    spread = torch.zeros(33, 50, device=DEVICE)
    spread[:, :32] = features
    views = [
        (spread[:, :32], prototypes, labels, scale),  # copied: 50 is no multiple of 16
        (torch.cat([features, features], 1)[:, :32], prototypes, labels, scale),
        (features.T.contiguous().T, prototypes, labels, scale),
        (
            features,
            prototypes.repeat_interleave(2, 0)[::2],
            labels.repeat_interleave(2)[::2],
            scale,
        ),
    ]
    for view in views:
        losses, grads = fused(view)
        assert torch.equal(losses, plain[0])
        for ours, expected in zip(grads, plain[1]):  # another stride, another kernel on a GPU
            assert relative(ours, expected) < 2e-6 if CUDA else torch.equal(ours, expected)


def test_broadcast_rows():
    _, prototypes, labels, scale = make_case(8, 9, 32)
    features = torch.randn(1, 32, device=DEVICE).expand(8, 32)
    check((features, *on_device((prototypes, labels, scale))))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, FP32)])
def test_float32_beside_bfloat16_is_rounded_to_it(dtypes, target):
    features, prototypes, labels, scale = make_case(40, 9, 32, 14.3)
    case = (features.to(dtypes[0]), prototypes.to(dtypes[1]), labels, scale)
    check(case, target)
    assert [gradient.dtype for gradient in fused(case)[1]] == [*dtypes, FP32]


def test_scale_of_any_float_dtype_and_labels_of_any_integer_dtype():
    features, prototypes, labels, scale = make_case(40, 9, 32, 16.0)
    plain = fused((features, prototypes, labels, scale))
    for dtype, integer in [
        (torch.float64, torch.int32),
        (FP32, torch.uint8),
        (FP16, torch.int8),
        (BF16, torch.int16),
    ]:
        losses, grads = fused((features, prototypes, labels.to(integer), scale.to(dtype)))
        assert torch.equal(losses, plain[0]) and grads[2].dtype == dtype
        torch.testing.assert_close(grads[2].float(), plain[1][2], rtol=1e-2, atol=0)


def test_autocast():
    case = make_case(40, 9, 32, dtype=BF16)
    plain, under = fused(case), fused(case, autocast=BF16)
    assert torch.equal(plain[0], under[0]) and plain[0].dtype == FP32
    assert all(torch.equal(a, b) for a, b in zip(plain[1], under[1]))


def test_loss_scaling_does_not_overflow():
    """Upstream gradients of 2^16 leave the fp16 operands inside where they are."""
    case = make_case(64, 9, 32, 14.3, dtype=FP16)
    check(case, weights=(65536.0, 65536.0))


def test_rare_ranks_do_not_overflow(monkeypatch):
    """B/|V| beyond fp16: the scaling that keeps G inside, forced here at a small size."""
    case = make_case(64, 9, 32, 14.3, "one", dtype=FP16)
    if not CUDA:
        monkeypatch.setattr(matching_kernels, "FP16_ROOM", triton.language.constexpr(2.0))
    check(case)


@pytest.mark.skipif(CUDA, reason="a device-side assertion ends the CUDA context")
def test_labels_outside_are_refused_by_the_kernel():
    """Where the wrapper may not look."""
    features, prototypes, labels, scale = make_case(40, 9, 32)
    for wrong in (labels + 9, labels - 9, torch.where(labels == 0, 2**32, labels)):
        losses = matching_triton.matching_loss(features, prototypes, wrong, scale)
        assert all(loss.isnan() for loss in losses)  # the interpreter leaves assertions out
    check(make_case(40, 9, 32))


@needs_cuda
@pytest.mark.parametrize("num_images", [8, 5000])
def test_labels_outside_are_asserted_on_the_gpu(num_images):
    code = (
        f"import torch, kernels; x = torch.ones({num_images}, 16, device='cuda');"
        f"y = torch.zeros({num_images}, dtype=torch.long, device='cuda'); y[-1] = 4;"
        "kernels.matching_loss(x, x[:4], y, 1.0, impl='triton');"
        "torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "a label is outside" in run.stdout + run.stderr


@pytest.mark.parametrize("shape", [(33, 9, 32), (600, 9, 16), (20, 120, 16)])
def test_every_output_is_written(monkeypatch, shape):
    """Memory that was not written is NaN or 77 here, and nothing changes."""
    case = make_case(*shape)
    plain = fused(case, "softmax10")

    def poisoned(make):
        def make_and_poison(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return make_and_poison

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    losses, grads = fused(case, "softmax10")
    assert torch.equal(losses, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, plain[1]))


def test_repeats_bit_for_bit():
    cases = [make_case(*shape) for shape in [(280, 9, 16), (8, 9, 16), (100, 9, 16), (70, 120, 16)]]
    first = [fused(case) for case in cases]
    for _ in range(20 if CUDA else 2):
        for case, (losses, grads) in zip(cases, first):
            again = fused(case)
            assert torch.equal(losses, again[0])
            assert all(torch.equal(a, b) for a, b in zip(grads, again[1]))


def test_counters_return_to_zero():
    """A second backward of one forward finds them as the first one did."""
    features, prototypes, labels, scale = on_device(make_case(280, 9, 48))
    leaves = features.requires_grad_(), prototypes.requires_grad_()
    loss = sum(matching_loss(*leaves, labels, scale, impl="triton"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("BM,BK", [(32, 32), (64, 16)])
def test_size_of_tiles_changes_only_rounding(monkeypatch, BM, BK):
    launch = dict(num_warps=4, num_stages=1)
    monkeypatch.setattr(matching_triton, "forward_config", lambda *a: dict(BM=BM, BK=BK, **launch))
    monkeypatch.setattr(matching_triton, "backward_config", lambda *a: dict(BM=BM, BD=BK, **launch))
    check(make_case(150, 9, 32, 14.3))


# --- match ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 9, 112), (20, 128, 32), (1, 1, 16)])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_match(shape, dtype):
    features, prototypes, _, scale = make_case(*shape, 14.3, dtype=dtype)
    args = on_device((features, prototypes, scale))
    probs, expected, argmax = match(*args, impl="triton")
    exact = exact_logits(features.double(), prototypes.double(), scale.double()).softmax(1)
    torch.testing.assert_close(probs.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    mean = exact @ torch.arange(shape[1]).double()
    torch.testing.assert_close(expected.cpu().double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(argmax.cpu(), exact.argmax(1))


@needs_cuda
@pytest.mark.parametrize("shape", [(32, 61, 512), (257, 101, 1024), (5000, 101, 640)])
def test_tf32(monkeypatch, shape):
    """The one float32 that "auto" takes."""
    monkeypatch.setattr(matching_triton, "float32_dots", lambda: "tf32")
    case = make_case(*shape, 14.3)
    _, grads = fused(case)
    _, exact = exact_gradients(case)
    assert all(relative(ours, gradient) < 1e-2 for ours, gradient in zip(grads, exact))


@needs_cuda
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(
    "shape", [(4096, 101, 512), (5000, 101, 112), (4096, 61, 640), (20000, 101, 512)]
)
def test_many_images(dtype, shape):
    """Tiles of 64 images and more, whose wgmma runs beside the next loads; and the same for prediction."""
    case = make_case(*shape, 14.3, dtype=dtype)
    check(
        case, weights=(700, 1900)
    )  # as loss scaling does: a mean over 20,000 images underflows in fp16
    features, prototypes, _, scale = on_device(case)
    probs, expected, _ = match(features, prototypes, scale, impl="triton")
    exact = exact_logits(case[0].double(), case[1].double(), case[3].double()).softmax(1)
    ranks = torch.arange(shape[1], dtype=torch.float64)
    torch.testing.assert_close(probs.cpu().double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(expected.cpu().double(), exact @ ranks, rtol=1e-5, atol=1e-4)
