"""The fused kernels against float64: through Triton's interpreter where there is no GPU.

pytest tests/test_kernels.py                    a sample of the grid, compile gate
pytest tests/test_kernels.py -m full            the whole grid, every shipped configuration
pytest tests/test_kernels.py -m benchmark -s    the table of kernels/bench.py
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
triton = pytest.importorskip("triton")

from test_reference import (  # noqa: E402
    TARGETS,
    check_two_processes,
    exact_gradients,
    exact_logits,
    gradients,
    make_case,
    relative,
)

from kernels import bench, match, matching_loss, matching_triton  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).parents[1]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# |ours - exact| / |exact| of a whole gradient. The interpreter truncates to bfloat16, a GPU rounds.
GATES = {FP32: 1e-5, FP16: 2e-3, BF16: 6e-3 if CUDA else 2e-2}
IN_STEPS = [
    "residual_kernel",
    "image_gradient_kernel",
    "rank_sums_kernel",
    "prototype_gradient_kernel",
]
TOGETHER = [name for name in IN_STEPS if name != "image_gradient_kernel"]  # a tile holds all ranks
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def on_device(case):
    return tuple(t.to(DEVICE) for t in case)


def fused(case, target="normalized", weights=(1.0, 1.0), **options):
    return gradients(on_device(case), target, weights, impl="triton", **options)


def check(case, target="normalized", weights=(0.7, 1.9), gate=None, **options):
    """Both losses and all three gradients; logits of size s carry an error of s * 2^-24."""
    scale, dtype = float(case[3]), case[0].dtype
    gate = gate or GATES[dtype] * max(1.0, scale / 100)
    losses, grads = fused(case, target, weights, **options)
    case = tuple(t.cpu() for t in case)
    exact_losses, exact_grads = exact_gradients(case, target, weights)
    torch.testing.assert_close(
        losses.cpu().double(), exact_losses, rtol=1e-6, atol=2e-6 * max(1.0, scale / 10)
    )
    for i, (ours, exact) in enumerate(zip(grads, exact_grads)):
        assert torch.isfinite(ours).all(), i
        error = relative(ours, exact)
        if (
            error > gate
        ):  # where all is learnt, exp(A - lse) - 1 cancels: PyTorch's float32 errs as much
            floor = relative(gradients(case, target, weights, impl="torch")[1][i], exact)
            assert error <= 2 * floor and error <= 1e-2, (i, error, floor)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    names, launch = [], matching_triton._launch

    def record(kernel, *args, **options):
        names.append(kernel.__name__)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(matching_triton, "_launch", record)
    return names


@pytest.fixture
def plan(monkeypatch):
    """Names of the kernels that would be launched; nothing is computed."""
    names = []
    monkeypatch.setattr(
        matching_triton, "_launch", lambda kernel, *a, **o: names.append(kernel.__name__)
    )
    return names


# --- the grid -------------------------------------------------------------------------------------

BATCHES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000]
RANKS = [1, 5, 16, 17, 61, 64, 65, 101, 128, 129, 1000]
DIMS = [16, 100, 512, 640, 1024]
SCALES = [0.01, 1.0, 14.3, 100.0, 1000.0]
LABELS = ["uniform", "one", "half"]
GRID = list(itertools.product(BATCHES, RANKS, DIMS))
SAMPLE = [  # B, R, D, scale, labels, target, dtype
    (2, 5, 16, 1.0, "uniform", "normalized", FP32),
    (31, 16, 100, 14.3, "half", "softmax10", FP32),
    (32, 61, 512, 100.0, "uniform", "normalized", FP32),
    (33, 17, 640, 1000.0, "one", "normalized", FP32),
    (64, 129, 100, 14.3, "uniform", "softmax10", FP32),
    (65, 64, 16, 0.01, "half", "normalized", FP32),
    (129, 101, 100, 100.0, "half", "softmax10", FP32),
    (1000, 5, 16, 14.3, "uniform", "softmax10", FP32),  # two levels of merging, chunks in backward
    (5, 1000, 16, 14.3, "uniform", "normalized", FP32),
    (32, 61, 512, 100.0, "uniform", "softmax10", FP16),
    (63, 65, 100, 14.3, "half", "normalized", FP16),
    (127, 300, 16, 14.3, "one", "softmax10", FP16),
    (256, 101, 1024, 100.0, "uniform", "normalized", BF16),
    (128, 128, 640, 1.0, "one", "normalized", BF16),
    (257, 17, 100, 1000.0, "half", "softmax10", BF16),
]


@pytest.mark.parametrize("B,R,D,scale,labels,target,dtype", SAMPLE)
def test_sample_of_the_grid(B, R, D, scale, labels, target, dtype):
    check(make_case(B, R, D, scale, labels, dtype), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("B,R,D,scale,labels,dtype", [
    (1, 5, 16, 14.3, "uniform", FP32), (33, 17, 640, 1000.0, "one", FP32), (129, 101, 100, 100.0, "half", FP32),
    (300, 61, 512, 14.3, "uniform", FP32), (130, 101, 512, 100.0, "half", FP16), (257, 65, 100, 1.0, "uniform", BF16),
])  # fmt: skip
def test_backward_in_steps(launches, monkeypatch, B, R, D, scale, labels, target, dtype):
    """As for thousands of images."""
    monkeypatch.setattr(matching_triton, "AT_ONCE", 0)
    if B == 1:
        check_degenerate((B, R, D), scale, dtype)
    else:
        check(make_case(B, R, D, scale, labels, dtype), target)
    steps = ["prepare_kernel", "forward_kernel", *(IN_STEPS if dtype == FP32 else TOGETHER)]
    assert launches[: len(steps)] == steps and "backward_kernel" not in launches


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("index", range(len(GRID)))
def test_grid(index, dtype, monkeypatch):
    if (index + [FP32, FP16, BF16].index(dtype)) % 2:
        monkeypatch.setattr(matching_triton, "AT_ONCE", 0)
    (B, R, D), scale = (
        GRID[index],
        SCALES[(index + index // len(DIMS)) % len(SCALES)],
    )  # not one scale for each D
    if B == 1 or R == 1:
        check_degenerate((B, R, D), min(scale, 14.3), dtype)
    else:
        case = make_case(B, R, D, scale, LABELS[index % 3], dtype, seed=index)
        # as torch.amp.GradScaler would: fp16 has no full precision below 6e-5, where these gradients lie
        loss_scale = 1024 / scale if dtype == FP16 and scale <= 1 else 1.0
        check(case, TARGETS[index % 2], weights=(0.7 * loss_scale, 1.9 * loss_scale))


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


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 1, 16), (9, 1, 16), (6, 40, 1)])
def test_one_image_one_rank_one_dimension(shape):
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
    empty = dict(device="cuda" if CUDA else "cpu", dtype=FP32)
    parts, columns, counts = (
        torch.zeros(1, 6, 64, **empty),
        torch.empty(5, 64, **empty),
        torch.empty(2, **empty),
    )
    parts[0, 1] = 1.0
    integers = parts.view(torch.int32)[0]
    integers[3, :3] = torch.tensor([2**24, 1, 1])
    integers[5, 1] = 2**24 + 2
    i2t, t2i = torch.empty((), **empty), torch.empty((), **empty)
    matching_triton._launch(matching_triton.finish_kernel, (1,), parts, columns, counts, i2t, t2i, 1, 3,
                            RPAD=64, BR=64, SMOOTH=False, warps=4, stages=1)  # fmt: skip
    assert counts.tolist() == [2**24 + 2, 3] and i2t.isfinite() and t2i.isfinite()


def test_true_maximum_at_scale_100():
    """Every cosine far below 1: a fixed maximum of `scale` would underflow to log 0."""
    features, prototypes, labels, scale = make_case(48, 20, 64, 1000.0)
    features -= 4 * prototypes.mean(0)
    check((features, prototypes, labels, scale))


def test_empty_batch(launches):
    _, prototypes, _, scale = make_case(4, 9, 32)
    losses, grads = fused((torch.zeros(0, 32), prototypes, torch.zeros(0, dtype=torch.long), scale))
    assert not losses.any() and not grads[1].any() and not grads[2].any()
    assert launches == ["finish_kernel"]


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
        (spread[:, :32], prototypes, labels, scale),
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
        for ours, expected in zip(
            grads, plain[1]
        ):  # on a GPU another stride may be another compiled kernel
            assert relative(ours, expected) < 2e-6 if CUDA else torch.equal(ours, expected)


def test_broadcast_rows():
    _, prototypes, labels, scale = make_case(8, 9, 32)
    features = torch.randn(1, 32, device=DEVICE).expand(8, 32)
    check((features, *on_device((prototypes, labels, scale))))


@pytest.mark.parametrize("dtypes", [(FP16, FP32), (FP32, BF16), (BF16, FP16)])
def test_mixed_dtypes_meet_in_float32(dtypes):
    features, prototypes, labels, scale = make_case(40, 9, 32, 14.3)
    case = (features.to(dtypes[0]), prototypes.to(dtypes[1]), labels, scale)
    losses, grads = fused(case)
    exact_losses, exact_grads = exact_gradients(case)
    torch.testing.assert_close(losses.cpu().double(), exact_losses, rtol=1e-6, atol=2e-6)
    for ours, exact, dtype in zip(grads, exact_grads, (*dtypes, FP32)):
        assert ours.dtype == dtype and relative(ours, exact) <= GATES[dtype]


@pytest.mark.parametrize("at_once", [0, 4096])
def test_scale_of_any_float_dtype_and_labels_of_any_integer_dtype(monkeypatch, at_once):
    monkeypatch.setattr(matching_triton, "AT_ONCE", at_once)
    features, prototypes, labels, scale = make_case(40, 9, 32, 16.0)
    plain = fused((features, prototypes, labels, scale))
    for dtype, integer in [
        (torch.float64, torch.int32),
        (FP32, torch.uint8),
        (FP16, torch.int8),
        (BF16, torch.int16),
    ]:
        if dtype == BF16 and not CUDA:
            continue  # the interpreter truncates its gradient
        losses, grads = fused((features, prototypes, labels.to(integer), scale.to(dtype)))
        assert torch.equal(losses, plain[0]) and grads[2].dtype == dtype
        torch.testing.assert_close(grads[2].float(), plain[1][2], rtol=1e-2, atol=0)


def test_autocast():
    case = make_case(40, 9, 32, dtype=BF16)
    plain, under = fused(case), fused(case, autocast=BF16)
    assert torch.equal(plain[0], under[0]) and plain[0].dtype == FP32
    assert all(torch.equal(a, b) for a, b in zip(plain[1], under[1]))


@pytest.mark.parametrize("at_once", [0, 4096])
def test_loss_scaling_does_not_overflow(monkeypatch, at_once):
    """Upstream gradients of 2^16 leave the fp16 operands inside where they are."""
    monkeypatch.setattr(matching_triton, "AT_ONCE", at_once)
    case = make_case(64, 9, 32, 14.3, dtype=FP16)
    check(case, weights=(65536.0, 65536.0))


@pytest.mark.parametrize("at_once", [0, 4096])
def test_rare_ranks_do_not_overflow(monkeypatch, at_once):
    """B/|V| beyond fp16: the scaling that keeps G inside, forced here at a small size."""
    monkeypatch.setattr(matching_triton, "AT_ONCE", at_once)
    case = make_case(64, 9, 32, 14.3, "one", dtype=FP16)
    if not CUDA:
        monkeypatch.setattr(matching_triton, "FP16_ROOM", triton.language.constexpr(2.0))
    check(case)


@pytest.mark.skipif(CUDA, reason="a device-side assertion ends the CUDA context")
@pytest.mark.parametrize("at_once", [0, 4096])
def test_labels_outside_are_refused_by_the_kernel(monkeypatch, at_once):
    """Where the wrapper may not look."""
    monkeypatch.setattr(matching_triton, "AT_ONCE", at_once)
    features, prototypes, labels, scale = make_case(40, 9, 32)
    for wrong in (labels + 9, labels - 9, torch.where(labels == 0, 2**32, labels)):
        losses = matching_triton.matching_loss(features, prototypes, wrong, scale)
        assert all(loss.isnan() for loss in losses)  # the interpreter leaves assertions out
    with pytest.raises(ValueError, match="labels run from"):
        matching_loss(features, prototypes, labels + 9, scale, impl="triton")
    check(make_case(40, 9, 32))  # the counters are as they were


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


def test_impl_triton_needs_cuda(monkeypatch):
    monkeypatch.setattr(matching_triton, "INTERPRET", False)
    features, prototypes, labels, scale = make_case(4, 3, 16)
    with pytest.raises(
        ValueError, match="impl='triton': the fused kernels need CUDA, this is cpu; use impl='auto'"
    ):
        matching_loss(features, prototypes, labels, scale, impl="triton")


# --- which path ran, and how often ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 61, 512), (256, 101, 1024), (4096, 128, 16)])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_one_launch_each_way(plan, shape, dtype):
    fused(make_case(*shape, dtype=dtype))
    assert plan == ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize("shape,dtype,expected", [
    ((20, 129, 16), FP32, ["forward_kernel", *IN_STEPS]),
    ((20, 129, 16), FP16, ["forward_kernel", *IN_STEPS]),
    ((4097, 128, 16), FP32, ["prepare_kernel", "forward_kernel", *IN_STEPS]),
    ((4097, 128, 16), BF16, ["prepare_kernel", "forward_kernel", *TOGETHER]),
    ((4097, 128, 16), FP16, ["prepare_kernel", "forward_kernel", *TOGETHER]),
    ((4097, 129, 16), FP16, ["prepare_kernel", "forward_kernel", *IN_STEPS]),
])  # fmt: skip
def test_more_ranks_or_images_take_the_backward_in_steps(plan, shape, dtype, expected):
    fused(make_case(*shape, dtype=dtype))
    assert plan == expected


def test_tf32x3_takes_steps_for_more_than_64_ranks(plan, monkeypatch):
    """Its operands take the registers of three."""
    monkeypatch.setattr(matching_triton, "_precision", lambda: "tf32x3")
    fused(make_case(8, 64, 16))
    assert plan.pop() == "backward_kernel"
    fused(make_case(8, 65, 16))
    assert plan[-4:] == IN_STEPS


def test_chunks_of_images_are_added_up(launches):
    check(make_case(700, 9, 16, 14.3))
    assert launches == ["forward_kernel", "backward_kernel"]


def test_impl_torch_and_auto(launches):
    case = on_device(make_case(8, 3, 16))
    gradients(case, impl="torch")
    assert launches == []
    gradients(case, impl="auto")
    assert launches == (["forward_kernel", "backward_kernel"] if CUDA else [])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("shape,dtype,way", [
    ((40, 9, 32), FP32, "at once"), ((20, 130, 16), FP32, "in steps"), ((40, 9, 32), FP16, "together"),
])  # fmt: skip
def test_gradients_that_are_not_needed_are_skipped(launches, monkeypatch, needs, shape, dtype, way):
    if way == "together":
        monkeypatch.setattr(matching_triton, "AT_ONCE", 0)
    features, prototypes, labels, scale = case = on_device(
        make_case(*shape, scale=14.3, dtype=dtype)
    )
    leaves = [
        t.clone().requires_grad_(need) for t, need in zip((features, prototypes, scale), needs)
    ]
    i2t, t2i = matching_loss(leaves[0], leaves[1], labels, leaves[2], impl="triton")
    assert i2t.requires_grad == any(needs)
    if any(needs):
        (i2t + t2i).backward()
        _, exact = exact_gradients(case)
        for leaf, gradient, need in zip(leaves, exact, needs):
            assert (leaf.grad is not None) == need
            assert not need or relative(leaf.grad, gradient) <= GATES[dtype]
    need_x, need_p, need_s = needs
    steps = [any(needs), need_x and not (need_p and way == "together"), need_p, need_p or need_s]
    steps = [name for name, needed in zip(IN_STEPS, steps) if needed]
    ran = launches[launches.index("forward_kernel") + 1 :]
    assert ran == (["backward_kernel"] * any(needs) if way == "at once" else steps)


@pytest.mark.parametrize("weights", [(1.0, None), (None, 1.0)])
def test_one_loss_alone(weights):
    features, prototypes, labels, scale = make_case(40, 9, 32, 14.3)
    leaves = [t.to(DEVICE).requires_grad_() for t in (features, prototypes, scale)]
    losses = matching_loss(leaves[0], leaves[1], labels.to(DEVICE), leaves[2], impl="triton")
    losses[weights.index(1.0)].backward()
    exact_weights = [w or 0.0 for w in weights]
    _, exact = exact_gradients((features, prototypes, labels, scale), weights=exact_weights)
    for leaf, gradient in zip(leaves, exact):
        assert relative(leaf.grad, gradient) <= GATES[FP32]


def test_no_second_derivative():
    features, prototypes, labels, scale = on_device(make_case(8, 3, 16))
    features.requires_grad_()
    i2t, _ = matching_loss(features, prototypes, labels, scale, impl="triton")
    (gradient,) = torch.autograd.grad(i2t, features, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='torch'"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(33, 9, 32), (600, 9, 16), (20, 130, 16)])
def test_every_output_is_written(monkeypatch, shape):
    """Memory that was not written is NaN here, and nothing changes."""
    case = make_case(*shape)
    plain = fused(case, "softmax10")

    def poisoned(make):
        def make_and_poison(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make_and_poison

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    losses, grads = fused(case, "softmax10")
    assert torch.equal(losses, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, plain[1]))


def test_repeats_bit_for_bit_and_counters_return_to_zero():
    """Sizes in turn, with one, several and two levels of programs, share the counters."""
    cases = [make_case(*shape) for shape in [(280, 9, 16), (8, 9, 16), (100, 9, 16), (70, 130, 16)]]
    first = [fused(case) for case in cases]
    for _ in range(20 if CUDA else 2):
        for case, (losses, grads) in zip(cases, first):
            again = fused(case)
            assert torch.equal(losses, again[0])
            assert all(torch.equal(a, b) for a, b in zip(grads, again[1]))
    assert matching_triton._counters
    assert not any(counters.any() for counters in matching_triton._counters.values())


@pytest.mark.parametrize("at_once", [0, 4096])
@pytest.mark.parametrize("BM,BK", [(32, 32), (64, 16)])
def test_size_of_tiles_changes_only_rounding(monkeypatch, BM, BK, at_once):
    tiles = dict(forward_config=(BM, 64, BK, 4, 2), backward_config=(BM, BK, 4, 1),
                 image_gradient_config=(BM, BK, 16, 4, 2), rank_sums_config=(BM, 16, BK, 4, 2))  # fmt: skip
    for name, tile in tiles.items():
        monkeypatch.setattr(matching_triton, name, lambda *a, tile=tile: tile)
    monkeypatch.setattr(matching_triton, "AT_ONCE", at_once)
    check(make_case(150, 9, 32, 14.3))


def test_float32_dots_follow_pytorch(monkeypatch):
    x = torch.empty(1, 1)
    for word, precision in [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")]:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda word=word: word)
        assert matching_triton._dots(x, x)["PRECISION"] == precision
        assert matching_triton._kind(x, x) == precision


def test_float32_dots_follow_the_newer_setting_too():
    code = (
        "import torch; from kernels import matching_triton as m; b = torch.backends;"
        "b.cuda.matmul.fp32_precision = 'tf32'; print(m._precision());"
        "b.cuda.matmul.fp32_precision = 'ieee'; print(m._precision())"
    )
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting only")
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert output.split() == ["tf32", "ieee"]


# --- match ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 9, 100), (20, 130, 32), (3, 1000, 16), (1, 1, 8)])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_match(launches, shape, dtype):
    features, prototypes, _, scale = make_case(*shape, 14.3, dtype=dtype)
    args = on_device((features, prototypes, scale))
    probs, expected, argmax = match(*args, impl="triton")
    exact = exact_logits(features.double(), prototypes.double(), scale.double()).softmax(1)
    torch.testing.assert_close(probs.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    mean = exact @ torch.arange(shape[1]).double()
    torch.testing.assert_close(expected.cpu().double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(argmax.cpu(), exact.argmax(1)) and launches == ["match_kernel"]


def test_match_has_no_gradient_and_auto_knows(launches):
    features, prototypes, _, scale = on_device(make_case(6, 4, 16))
    features.requires_grad_()
    match(features, prototypes, scale)[1].sum().backward()
    assert features.grad.any() and launches == []
    with torch.no_grad():
        assert match(features[:0], prototypes, scale, impl="triton")[0].shape == (0, 4)
    with pytest.raises(RuntimeError, match="use impl='torch'"):
        match(features, prototypes, scale, impl="triton")[1].sum().backward()


# --- PyTorch's machinery --------------------------------------------------------------------------


def test_opcheck():
    features, prototypes, labels, scale = on_device(make_case(20, 9, 16))
    leaves = [t.clone().requires_grad_() for t in (features, prototypes, scale)]
    ops = torch.ops.kernels_matching_triton
    args = (leaves[0], leaves[1], labels, leaves[2], True, True, True, "")
    torch.library.opcheck(ops.matching_forward.default, args)
    saved = ops.matching_forward(features, prototypes, labels, scale, True, True, True, "")
    one = torch.ones((), device=DEVICE)
    args = (
        one,
        None,
        features,
        prototypes,
        labels,
        scale,
        *saved[:4],
        True,
        True,
        True,
        False,
        True,
    )
    torch.library.opcheck(ops.matching_backward.default, args)
    torch.library.opcheck(ops.matching_probabilities.default, (features, prototypes, scale))


def test_plain_tensors_go_straight_to_the_launchers(launches, monkeypatch):
    def refuse(*args):
        raise AssertionError("an operator was called")

    for name in ("_forward", "_backward", "_match"):
        monkeypatch.setattr(matching_triton, name, refuse)
    features, prototypes, labels, scale = on_device(make_case(6, 4, 16))
    sum(
        matching_loss(features.requires_grad_(), prototypes, labels, scale, impl="triton")
    ).backward()
    match(features.detach(), prototypes, scale, impl="triton")
    assert launches == ["forward_kernel", "backward_kernel", "match_kernel"]


def test_fake_tensors_go_to_the_operators(launches):
    with FakeTensorMode():
        features, prototypes = torch.empty(6, 16, requires_grad=True), torch.empty(4, 16)
        labels, scale = torch.empty(6, dtype=torch.int64), torch.empty(())
        i2t, t2i = matching_triton.matching_loss(features, prototypes, labels, scale)
        (i2t + t2i).backward()
        probs, expected, _ = matching_triton.match(features.detach(), prototypes, scale)
    assert features.grad.shape == (6, 16) and i2t.shape == () and launches == []
    assert probs.shape == (6, 4) and expected.shape == (6,)


def test_two_copies_live_in_one_process(tmp_path):
    """A paper's code may hold the folder under a name of its own, beside this one."""
    shutil.copytree(
        ROOT / "kernels", tmp_path / "paper", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "import torch, kernels, paper; a = torch.randn(4, 8), torch.randn(3, 8), torch.tensor([0, 1, 2, 2]), 9.0\n"
    code += "print(torch.equal(*[torch.stack(k.matching_loss(*a, impl='torch')) for k in (kernels, paper)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}"))  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_whole_with_any_batch_size(launches, target):
    def both(features, prototypes, labels, scale):
        i2t, t2i = matching_loss(features, prototypes, labels, scale, target=target, impl="triton")
        return i2t + t2i

    backend = CompileCounterWithBackend("inductor" if CUDA else "aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=backend, dynamic=True)
    for num_images in (6, 9, 12):
        features, prototypes, labels, scale = on_device(make_case(num_images, 4, 16))
        features.requires_grad_()
        compiled(features, prototypes, labels, scale).backward()
        ours, features.grad = features.grad, None
        both(features, prototypes, labels, scale).backward()
        assert torch.equal(ours, features.grad)
    assert launches.count("forward_kernel") == launches.count("backward_kernel") == 6
    assert backend.frame_count == 1


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.skipif(CUDA, reason="gloo processes use the interpreter")
def test_two_processes_equal_one(tmp_path):
    check_two_processes(tmp_path, "triton")


@needs_cuda
def test_nothing_waits_for_the_gpu():
    case = on_device(make_case(256, 101, 64))
    gradients(case, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, impl="triton")
        matching_loss(case[0], case[1], case[2], 100.0, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_graph_capture_and_replay_with_other_data():
    features, prototypes, labels, scale = on_device(make_case(600, 101, 64))
    leaves = [t.requires_grad_() for t in (features, prototypes, scale)]

    def step():
        i2t, t2i = matching_loss(features, prototypes, labels, scale, impl="triton")
        return torch.stack([i2t, t2i]).detach(), torch.autograd.grad(i2t + t2i, leaves)

    step()  # the same gradients as under capture, where no kernel can be loaded
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        captured, gradient = step()
    for seed in (1, 2):
        other = on_device(make_case(600, 101, 64, seed=seed))
        with torch.no_grad():
            for mine, new in zip((features, prototypes, labels), other):
                mine.copy_(new)
        graph.replay()
        losses, grads = fused(other)
        assert torch.equal(captured, losses)
        assert all(torch.equal(a, b) for a, b in zip(gradient, grads))


@needs_cuda
def test_compiled_with_cuda_graphs():
    """mode="reduce-overhead" forbids memory that outlives its first run."""
    compiled = torch.compile(matching_loss, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        features, prototypes, labels, scale = on_device(make_case(600, 101, 64, seed=seed))
        losses, grads = fused((features, prototypes, labels, scale))
        leaves = [t.requires_grad_() for t in (features, prototypes, scale)]
        torch.compiler.cudagraph_mark_step_begin()
        i2t, t2i = compiled(features, prototypes, labels, scale, impl="triton")
        assert torch.equal(torch.stack([i2t, t2i]), losses)
        gradients_ = torch.autograd.grad(i2t + t2i, leaves)
        assert all(torch.equal(a, b) for a, b in zip(gradients_, grads))


@needs_cuda
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(
    "shape",
    [(4096, 101, 512), (5000, 101, 100), (4096, 61, 640), (4096, 300, 512), (20000, 101, 512)],
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


@needs_cuda
@pytest.mark.parametrize("num_images", [600, 5000])
def test_a_group_of_one_process_on_the_gpu(tmp_path, num_images):
    case = on_device(make_case(num_images, 101, 512, 14.3, dtype=BF16))
    alone = gradients(case, impl="triton")
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        losses, grads = gradients(case, impl="triton", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(losses, alone[0], rtol=1e-6, atol=1e-6)
    assert all(relative(a, b.cpu().double()) <= 1e-3 for a, b in zip(grads, alone[1]))


@needs_cuda
def test_streams_do_not_share_counters():
    cases = [on_device(make_case(4000, 101, 256, seed=seed)) for seed in (0, 1)]
    alone = [gradients(case, impl="triton") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for case, stream, result in zip(cases, streams, results):
            with torch.cuda.stream(stream):
                result.append(gradients(case, impl="triton")[0])
    torch.cuda.synchronize()
    for (losses, _), result in zip(alone, results):
        assert all(torch.equal(losses, other) for other in result)


# --- the compile gate -----------------------------------------------------------------------------
# Triton compiles for a GPU that is not there. Done in a process of its own, without the interpreter:
# `python tests/test_kernels.py BATCH` prints what each kernel of a batch of cases needs.

SHARED = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}  # bytes per program; 80: as sm_86 and sm_89
MULTIPLY = (
    "forward_kernel",
    "backward_kernel",
    "match_kernel",
    "image_gradient_kernel",
    "rank_sums_kernel",
)
SHIPPED = {
    "sample": [  # the longest first
        ((65536, 101, 512), BF16, "ieee", True),
        ((65536, 101, 512), FP32, "ieee", True),
        ((65536, 1000, 512), BF16, "ieee", False),
        ((256, 101, 1024), FP16, "ieee", True),
        ((32, 61, 512), FP32, "tf32", False),
        ((32, 61, 512), BF16, "ieee", False),
    ],
    "all": [
        (shape, dtype, precision, smooth)
        for shape in [(32, 61, 512), (256, 101, 1024), (65536, 5, 512), (65536, 101, 512)]
        + [
            (4096, 61, 640),
            (4096, 101, 100),
            (4097, 101, 100),
            (4097, 300, 101),
            (65536, 1000, 512),
            (300, 200, 512),
        ]
        for dtype, precision in [(BF16, "ieee"), (FP16, "ieee")]
        + [(FP32, precision) for precision in ("ieee", "tf32x3", "tf32")]
        for smooth in (False, True)
    ],
}


def planned(shape, dtype, precision, smooth, capability, everything):
    """Launches of a forward, also with a process group, a backward and a match, with tensors that have no memory."""
    module, calls = matching_triton, []
    module._launch = lambda kernel, grid, *args, **options: calls.append((kernel, args, options))
    module.gpu_generation = lambda device: capability // 10
    module._dots = lambda x, p: dict(PRECISION=precision, UPCAST=False)
    module._kind = lambda x, p: "half" if dtype != FP32 else precision
    (B, R, D), meta = shape, dict(device="meta")
    x, p = torch.empty(B, D, dtype=dtype, **meta), torch.empty(R, D, dtype=dtype, **meta)
    y, s = torch.empty(B, dtype=torch.long, **meta), torch.empty((), **meta)
    *saved, i2t, t2i = module.forward(x, p, y, s, smooth, True, True, "")
    module.backward(i2t, t2i, x, p, y, s, *saved, smooth, True, True, True, True)
    if everything or shape == (65536, 101, 512):
        module._groups["all"], module._gather = None, lambda part, group: part[None]
        module.forward(x, p, y, s, smooth, True, True, "all")
        module.probabilities(x, p, s)
    return calls


def compile_launch(kernel, args, options, capability):
    """Registers, stack and shared memory of one launch, specialised as Triton would do it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    target = dict(num_warps=options.pop("warps"), num_stages=options.pop("stages"))
    signature, constants, attributes = {}, dict(options), {}
    letters = {FP32: "fp32", FP16: "fp16", BF16: "bf16", torch.int64: "i64", torch.int32: "i32"}
    for i, (parameter, value) in enumerate(itertools.zip_longest(kernel.params, args)):
        name, divisible = parameter.name, True
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if name in constants or one:
            signature[name], divisible = "constexpr", False
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + letters[value.dtype]
        else:
            signature[name] = "i32"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target |= dict(enable_fp_fusion=True, debug=True, sanitize_overflow=False)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=target)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], text=True
        )
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {
        word.lower(): len(re.findall(rf"\b{word}", code)) for word in ("HGMMA", "HMMA", "LDL")
    }
    counts["waits"] = len(re.findall(r"WARPGROUP\.DEPBAR", code))  # for wgmma
    pending = max(map(int, re.findall(r"pendings = (\d+)", compiled.asm["ttgir"])), default=0)
    return dict(
        kernel=kernel.__name__, capability=capability, registers=int(registers), stack=int(stack),
        shared=compiled.metadata.shared, rows=constants.get("BM", constants.get("BR")), pending=pending, **counts,
    )  # fmt: skip


def compile_case(job):
    case, capability, everything = job
    reports = []
    for kernel, args, options in planned(*case, capability, everything):
        report = compile_launch(kernel, args, options, capability)
        shape, dtype, precision, smooth = case
        reports.append(
            report | dict(shape=shape, dtype=str(dtype)[6:], precision=precision, smooth=smooth)
        )
    return reports


def compile_shipped(batch, folder):
    """The reports of SHIPPED[batch], compiled by two processes at once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    output = subprocess.check_output([sys.executable, __file__, batch], env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def check_report(report):
    tuned = report["capability"] <= 90  # the others only have to work
    assert report["stack"] <= (0 if tuned else 128), f"spills registers: {report}"
    assert report["shared"] <= SHARED[report["capability"]], f"does not fit: {report}"
    assert report["pending"] == 0, f"a wgmma may read a buffer that is being filled again: {report}"
    if report["kernel"] in MULTIPLY and tuned:
        if report["precision"] != "ieee" or report["dtype"] != "float32":
            assert report["hgmma"] + report["hmma"], f"no tensor cores: {report}"
        if report["dtype"] != "float32" and report["capability"] == 90 and report["rows"] >= 64:
            assert report["hgmma"], f"no wgmma: {report}"
    if (
        report["kernel"] == "forward_kernel"
        and report["shape"][0] > matching_triton.AT_ONCE
        and report["hgmma"]
    ):
        assert report["waits"] < report["hgmma"], f"every wgmma is waited for: {report}"


def test_compile_gate(tmp_path):
    reports = compile_shipped("sample", tmp_path)
    assert {report["capability"] for report in reports} == {*SHARED}
    for report in reports:
        check_report(report)


@pytest.mark.full
def test_compile_gate_of_everything(tmp_path):
    for report in compile_shipped("all", tmp_path):
        check_report(report)


# --- the benchmark --------------------------------------------------------------------------------


def test_benchmark_runs_anywhere(tmp_path, capsys):
    bench.main(["--shapes", "8,5,16", "--dtypes", "fp32", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "forward + backward" in printed and "eager" in printed
    assert CUDA or "No GPU" in printed
    table = json.loads((tmp_path / "bench.json").read_text())["table"]
    assert all(row["ms_20"] <= row["ms"] <= row["ms_80"] for row in table)
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.benchmark
def test_benchmark(tmp_path):
    bench.main(["--out", str(tmp_path)])


if __name__ == "__main__":
    batch = sys.argv[1]
    work = [
        (case, capability, batch == "all") for case in SHIPPED[batch] for capability in (90, 80)
    ]
    work += [(case, capability, False) for case in SHIPPED[batch][::5] for capability in (100, 120)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(sum(pool.map(compile_case, work, chunksize=1), [])))
