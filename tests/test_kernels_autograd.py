"""Which path runs, and PyTorch's machinery around the fused kernels.

pytest tests/test_kernels_autograd.py
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from matching_cases import (
    BF16,
    CUDA,
    DEVICE,
    FP16,
    FP32,
    GATES,
    TARGETS,
    exact_gradients,
    fused,
    gradients,
    make_case,
    on_device,
    relative,
)
from processes import run_python
from test_reference import check_two_processes
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

import kernels  # noqa: E402
from kernels import match, matching_loss, matching_triton  # noqa: E402

ROOT = Path(__file__).parents[1]
STEP = ["forward_kernel", "finish_kernel", "backward_kernel"]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    names, launch = [], matching_triton._launch

    def record(kernel, *args, **options):
        names.append(kernel.__name__)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(matching_triton, "_launch", record)
    return names


# --- which path ran, and how often ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 9, 16), (32, 61, 512), (5000, 128, 16)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_three_launches_at_any_size(monkeypatch, shape, dtype):
    names = []
    record = lambda kernel, *a, **o: names.append(kernel.__name__)  # noqa: E731
    monkeypatch.setattr(matching_triton, "_launch", record)
    fused(make_case(*shape, dtype=dtype))
    assert names == (STEP if shape[0] else ["finish_kernel"])


def test_impl_torch_and_auto(launches):
    case = on_device(make_case(8, 3, 16, dtype=BF16))
    gradients(case, impl="torch")
    assert launches == []
    gradients(case, impl="auto")
    assert launches == (STEP if CUDA else [])


UNSUPPORTED = [  # features, prototypes, why
    (torch.ones(4, 24), torch.ones(3, 24), "take D in multiples of 16, this is 24"),
    (torch.ones(4, 16), torch.ones(129, 16), "take up to 128 ranks, these are 129"),
    (torch.ones(4, 8).half(), torch.ones(3, 8).bfloat16(), "take float16 only on both sides"),
    (torch.ones(4, 8), torch.ones(3, 8).half(), "take float16 only on both sides"),
    (torch.ones(4, 8).half(), torch.ones(3, 8).double(), "compute in float32, this is float64"),
]


@pytest.mark.parametrize("features,prototypes,why", UNSUPPORTED)
def test_what_the_kernels_do_not_take(monkeypatch, capsys, features, prototypes, why):
    """An error where they were asked for; PyTorch, with the reason, where they were not."""
    labels = torch.arange(4) % 3
    with pytest.raises(
        ValueError, match=f"impl='triton': the fused kernels {why}; use impl='auto'"
    ):
        matching_loss(features, prototypes, labels, 1.0, impl="triton")
    with pytest.raises(
        ValueError, match=f"impl='triton': the fused kernels {why}; use impl='auto'"
    ):
        match(features, prototypes, 1.0, impl="triton")
    monkeypatch.setattr(kernels, "which_impl", lambda *args: ("triton", "as if on CUDA"))
    monkeypatch.setattr(kernels, "_logged", set())
    assert matching_loss(features, prototypes, labels, 1.0)[0].isfinite()
    assert f"runs on impl='torch': the fused kernels {why}" in capsys.readouterr().err


def test_float32_without_tensor_cores_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "_unsupported_device", lambda device: "")
    for precision, name in [("ieee", "torch"), ("tf32", "triton")]:
        monkeypatch.setattr(matching_triton, "float32_dots", lambda precision=precision: precision)
        assert kernels.which_impl("cuda")[0] == name
        assert kernels.which_impl("cuda", dtype=BF16)[0] == "triton"


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "forward AD"])
def test_function_transforms(monkeypatch, transform, compiles):
    """As PyTorch's under "auto"; one line where the kernels were asked for."""
    features, prototypes, labels, scale = on_device(make_case(6, 4, 16, 14.3))

    def compute(impl):
        def loss(x):
            return sum(matching_loss(x, prototypes, labels, scale, impl=impl))

        if transform == "grad":
            return torch.func.grad(loss)(features)
        if transform == "vmap":
            return torch.func.vmap(loss)(torch.stack([features, -features]))
        if transform == "jvp":
            return torch.func.jvp(loss, (features,), (torch.ones_like(features),))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(features, torch.ones_like(features))
            return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent.clone()

    def run(impl):
        if not compiles:
            return compute(impl)
        return torch.compile(compute, backend="aot_eager")(impl)

    exact = run("torch")
    monkeypatch.setattr(kernels, "which_impl", lambda *args: ("triton", "as if on CUDA"))
    torch.testing.assert_close(run("auto"), exact)
    assert exact.any()
    monkeypatch.undo()
    message = "impl='triton': the fused kernels have no rules for torch.func"
    with pytest.raises(Exception if compiles else ValueError, match=message):  # dynamo's own type
        run("triton")


def test_batched_gradients_are_one_line():
    features, prototypes, labels, scale = on_device(make_case(6, 4, 16))
    loss = sum(matching_loss(features.requires_grad_(), prototypes, labels, scale, impl="triton"))
    with pytest.raises(RuntimeError, match="no batched gradients with impl='triton'"):
        torch.autograd.grad(loss, features, torch.ones(2, device=DEVICE), is_grads_batched=True)


def test_features_of_inference_mode_train_prototypes():
    case = features, prototypes, labels, scale = on_device(make_case(6, 4, 16))
    with torch.inference_mode():
        cached = features * 1
    prototypes.requires_grad_()
    sum(matching_loss(cached, prototypes, labels, scale, impl="triton")).backward()
    assert torch.equal(prototypes.grad, fused(case)[1][1])


def test_impl_triton_needs_cuda(monkeypatch):
    monkeypatch.setattr(matching_triton, "INTERPRET", False)
    features, prototypes, labels, scale = make_case(4, 3, 16)
    with pytest.raises(
        ValueError, match="impl='triton': the fused kernels need CUDA, this is cpu; use impl='auto'"
    ):
        matching_loss(features, prototypes, labels, scale, impl="triton")


def test_chunks_of_images_are_added_up(launches):
    case = make_case(700, 9, 16, 14.3)
    _, grads = fused(case)
    assert all(relative(a, b) <= GATES[FP32] for a, b in zip(grads, exact_gradients(case)[1]))
    assert launches == STEP


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("shape,dtype", [((40, 9, 32), FP32), ((700, 9, 16), FP16)])
def test_gradients_of_some_inputs(launches, needs, shape, dtype):
    case = on_device(make_case(*shape, scale=14.3, dtype=dtype))
    features, prototypes, labels, scale = case
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
    assert launches == STEP[: 2 + any(needs)]


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


@pytest.mark.parametrize("way", ["checkpoint", "save_on_cpu", "hooks"])
def test_saved_tensors_are_unpacked_once(way):
    """Checkpointing raises at a second reading; offloading copies again."""
    case = features, prototypes, labels, scale = on_device(make_case(40, 9, 32, 14.3))
    plain, counts = fused(case), {"pack": 0, "unpack": 0}

    def count(name):
        counts[name] += 1

    features.requires_grad_()
    arguments = features, prototypes, labels, scale
    if way == "checkpoint":
        losses = torch.utils.checkpoint.checkpoint(
            matching_loss, *arguments, impl="triton", use_reentrant=False
        )
    else:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (count("pack"), t)[1], lambda t: (count("unpack"), t)[1]
        )
        with torch.autograd.graph.save_on_cpu() if way == "save_on_cpu" else hooks:
            losses = matching_loss(*arguments, impl="triton")
    sum(losses).backward()
    assert torch.equal(features.grad, plain[1][0])
    assert counts["pack"] == counts["unpack"]


def test_float32_dots_follow_pytorch(monkeypatch):
    x = torch.empty(1, 4)
    before = torch.get_float32_matmul_precision()
    try:
        for word, precision in [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]:
            torch.set_float32_matmul_precision(word)
            assert matching_triton._dots(x, x)["PRECISION"] == precision
            assert matching_triton._dots(x, x.bfloat16())["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_dots_follow_the_newer_setting_too():
    code = (
        "import torch; from kernels import matching_triton as m; b = torch.backends;"
        "b.cuda.matmul.fp32_precision = 'tf32'; print(m.float32_dots());"
        "b.cuda.matmul.fp32_precision = 'ieee'; print(m.float32_dots())"
    )
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting only")
    process = run_python(code, ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["tf32", "ieee"]


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
    args = (leaves[0], leaves[1], labels, leaves[2], True, "")
    torch.library.opcheck(ops.matching_forward.default, args)
    saved = ops.matching_forward(features, prototypes, labels, scale, True, "")[:5]
    one = torch.ones((), device=DEVICE)
    args = (one, 2 * one, features, prototypes, labels, scale, *saved, True)
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
    assert launches == [*STEP, "match_kernel"]


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
    code = f"import sys; sys.path.append({str(ROOT)!r})\n"
    code += "import torch, kernels, paper; a = torch.randn(4, 8), torch.randn(3, 8), torch.tensor([0, 1, 2, 2]), 9.0\n"
    code += "print(torch.equal(*[torch.stack(k.matching_loss(*a, impl='torch')) for k in (kernels, paper)]))\n"
    code += "print(*[k.matching_triton._forward._qualname for k in (kernels, paper)])"
    done = run_python(code, tmp_path)
    same, ours, theirs = done.stdout.split()
    assert done.returncode == 0 and same == "True" and ours != theirs, done.stderr


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
