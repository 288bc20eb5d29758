"""The matching op in plain PyTorch against formulas written out in float64.

pytest tests/test_reference.py
"""

import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from matching_cases import (
    TARGETS,
    exact_gradients,
    exact_logits,
    gradients,
    make_case,
    make_confident_case,
    relative,
)
from processes import run_python, run_two

import kernels
from kernels import match, matching_loss, reference, which_impl

ROOT = Path(__file__).parents[1]


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("labels", ["uniform", "one", "half"])
@pytest.mark.parametrize("scale", [0.01, 14.3, 100.0])
def test_equals_the_formulas(target, labels, scale):
    case = make_case(37, 11, 24, scale, labels)
    weights = (0.7, 1.9)
    losses, grads = gradients(case, target, weights, impl="torch")
    exact_losses, exact_grads = exact_gradients(case, target, weights)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-6)
    for name, ours, exact in zip(("features", "prototypes", "scale"), grads, exact_grads):
        assert relative(ours, exact) < 1e-5, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 5, 8), (1, 1, 8), (9, 1, 8), (6, 40, 1)])
def test_degenerate_shapes(target, shape):
    case = make_case(*shape, scale=10.0)
    losses, grads = gradients(case, target)
    exact_losses, exact_grads = exact_gradients(case, target)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(grads, exact_grads):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_float64_stays_float64():
    features, prototypes, labels, scale = make_case(19, 7, 12)
    case = (features.double(), prototypes.double(), labels, scale.double())
    losses, grads = gradients(case)
    exact_losses, exact_grads = exact_gradients(case)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, exact_losses, rtol=1e-12, atol=1e-12)
    for ours, exact in zip(grads, exact_grads):
        assert ours.dtype == torch.float64 and relative(ours, exact) < 1e-11


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs_are_computed_in_float32(dtype, tolerance, autocast):
    """At scale 100 a half-precision logit would be off by up to 0.25 and the gradient by 3e-2."""
    case = make_case(64, 21, 32, dtype=dtype)
    losses, grads = gradients(case, autocast=dtype if autocast else None, impl="torch")
    exact_losses, exact_grads = exact_gradients(case)
    assert losses.dtype == torch.float32 and grads[0].dtype == dtype
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(grads, exact_grads):
        assert relative(ours, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_float32_features_alone(dtype):
    case = make_case(64, 21, 32)
    plain, under = gradients(case), gradients(case, autocast=dtype)
    for a, b in zip((plain[0], *plain[1]), (under[0], *under[1])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", TARGETS)
def test_zero_vectors_have_gradient_zero(target):
    features, prototypes, labels, scale = make_case(12, 5, 8)
    features[3], prototypes[2] = 0, 0
    losses, grads = gradients((features, prototypes, labels, scale), target)
    exact_losses, exact_grads = exact_gradients((features, prototypes, labels, scale), target)
    assert torch.isfinite(losses).all() and not grads[0][3].any() and not grads[1][2].any()
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(grads, exact_grads):
        assert relative(ours, exact) < 1e-5


def test_losses_vanish_for_perfect_features():
    """One image per rank, right on its prototype: both divergences are 0 up to rounding."""
    prototypes = torch.eye(6)
    i2t, t2i = matching_loss(prototypes.clone(), prototypes, torch.arange(6), 100.0)
    assert 0 <= i2t < 1e-6 and 0 <= t2i < 1e-6


def test_length_of_features_does_not_matter():
    features, prototypes, labels, scale = make_case(10, 4, 8)
    one = matching_loss(features, prototypes, labels, scale)
    other = matching_loss(1000 * features, prototypes / 7, labels, scale)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("loss", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("per_rank,weights", [(1, (1.0, 0.0)), (3, (1.0, 0.0)), (1, (0.0, 1.0))])
def test_confident_images_keep_their_precision(loss, scale, per_rank, weights):
    """With several images of a rank its column is exact to 1e-7 of a probability only."""
    case = make_confident_case(loss, scale, per_rank)
    losses, grads = gradients(case, weights=weights, impl="torch")
    exact_losses, exact_grads = exact_gradients(case, weights=weights)
    term = weights.index(1.0)
    assert abs(losses[term] - exact_losses[term]) < 2e-5 * exact_losses[term]
    assert all(relative(ours, exact) < 5e-5 for ours, exact in zip(grads, exact_grads))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_ranks,labels", [(5, [1, 1, 3]), (3, [2, 2, 2]), (1, [0, 0, 0])])
def test_second_derivatives_and_forward_mode(num_ranks, labels, target):
    """Also where a rank is absent, where no image is of another rank, and where there is no other."""
    random = torch.Generator().manual_seed(0)
    x, p = (torch.randn(n, 4, generator=random, dtype=torch.float64) for n in (3, num_ranks))
    leaves = x.requires_grad_(), p.requires_grad_(), torch.tensor(3.0, dtype=torch.float64)

    def losses(x, p, s):
        return matching_loss(x, p, torch.tensor(labels), s, target=target, impl="torch")

    assert torch.autograd.gradcheck(losses, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_empty_batch_gives_zero():
    features, prototypes = torch.zeros(0, 8), torch.randn(5, 8, requires_grad=True)
    i2t, t2i = matching_loss(features, prototypes, torch.zeros(0, dtype=torch.long), 100.0)
    (i2t + t2i).backward()
    assert i2t == 0 and t2i == 0 and not prototypes.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_labels_of_any_width(dtype):
    features, prototypes, labels, scale = make_case(10, 4, 8)
    same = matching_loss(features, prototypes, labels.to(dtype), scale)
    assert same == matching_loss(features, prototypes, labels, scale)


def test_scale_as_a_number():
    features, prototypes, labels, scale = make_case(10, 4, 8)
    same = matching_loss(features, prototypes, labels, 100)
    assert same == matching_loss(features, prototypes, labels, scale.reshape(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_match(dtype):
    features, prototypes, _, scale = make_case(23, 9, 16, 14.3, dtype=dtype)
    probs, expected, argmax = match(features, prototypes, scale)
    exact = exact_logits(features.double(), prototypes.double(), scale.double()).softmax(1)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-6)
    ranks = torch.arange(9).double()
    torch.testing.assert_close(expected.double(), exact @ ranks, rtol=1e-4, atol=1e-6)
    assert torch.equal(argmax, exact.argmax(1))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_whole_with_any_batch_size(target):
    def both(features, prototypes, labels, scale):
        i2t, t2i = matching_loss(features, prototypes, labels, scale, target=target)
        return i2t + t2i

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_images in (6, 9):
        features, prototypes, labels, scale = make_case(num_images, 4, 8)
        features.requires_grad_()
        compiled(features, prototypes, labels, scale).backward()
        ours, features.grad = features.grad, None
        both(features, prototypes, labels, scale).backward()
        torch.testing.assert_close(ours, features.grad, rtol=1e-5, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------

X, P, Y = torch.ones(4, 8), torch.ones(3, 8), torch.zeros(4, dtype=torch.long)
MISTAKES = [
    (dict(target="hard"), r"target='hard': expected one of normalized, softmax10"),
    (dict(impl="cuda"), r"impl='cuda': expected one of auto, torch, triton"),
    (dict(features=X[0]), r"got image_features \(8,\) and prototypes \(3, 8\); expected \(B, D\)"),
    (dict(prototypes=P[None]), r"prototypes \(1, 3, 8\); expected \(B, D\) and \(R, D\)"),
    (dict(prototypes=P[:0]), r"prototypes \(0, 8\); expected .* with R >= 1"),
    (dict(prototypes=torch.ones(3, 6)), "image_features have D=8, prototypes D=6"),
    (dict(features=X.long()), "image_features are torch.int64, prototypes torch.float32"),
    (dict(prototypes=P.to("meta")), "image_features are on cpu, prototypes on meta"),
    (dict(labels=Y[:3]), r"got labels \(3,\) for 4 images"),
    (dict(labels=Y[:, None]), r"got labels \(4, 1\) for 4 images"),
    (dict(labels=Y.float()), r"labels are torch.float32; expected integer"),
    (dict(labels=Y.bool()), r"labels are torch.bool; expected integer"),
    (dict(labels=Y.to("meta")), "labels are on meta, image_features on cpu"),
    (dict(labels=Y - 1), r"labels run from -1 to -1; expected rank indices 0..2"),
    (dict(labels=Y + 3), r"labels run from 3 to 3; expected rank indices 0..2"),
    (dict(scale=torch.ones(2)), r"scale has shape \(2,\); expected a number or a 0-dim tensor"),
    (
        dict(features=X.double(), impl="triton"),
        "impl='triton': the fused kernels compute in float32, this is float64",
    ),
]


@pytest.mark.parametrize("mistake,message", MISTAKES)
def test_mistakes_are_named(mistake, message):
    if mistake.get("impl") == "triton" and not kernels.HAS_TRITON:
        pytest.skip("triton is not installed")
    args = dict(features=X, prototypes=P, labels=Y, scale=1.0, target="normalized", impl="auto")
    args |= mistake
    with pytest.raises(ValueError, match=message):
        matching_loss(
            *(args[n] for n in ("features", "prototypes", "labels", "scale")),
            target=args["target"],
            impl=args["impl"],
        )


def test_labels_are_asserted_where_the_wrapper_cannot_look():
    """The compiled and the GPU path cannot read labels on the host; the op itself refuses them."""
    with pytest.raises(RuntimeError, match="labels outside 0..2"):
        reference.matching_loss(X, P, Y + 3, torch.tensor(1.0))


# --- which implementation -------------------------------------------------------------------------


def test_which_impl(monkeypatch):
    gpu = types.SimpleNamespace(gpu_generation=lambda device: 8, float32_dots=lambda: "tf32")
    monkeypatch.setattr(kernels, "matching_triton", gpu, raising=False)
    monkeypatch.setattr(kernels, "TRITON_UNAVAILABLE", "")
    assert which_impl("cpu")[0] == "torch" and "cpu" in which_impl("cpu")[1]
    assert which_impl("cpu", "triton") == ("triton", "asked for")
    assert which_impl("cuda") == ("triton", "fused kernels on CUDA")
    for dtype in (torch.float64, torch.float8_e4m3fn):
        assert which_impl("cuda", dtype=dtype) == (
            "torch", f"the fused kernels compute in float32, this is {str(dtype)[6:]}")  # fmt: skip
    gpu.gpu_generation = lambda device: 7
    assert which_impl("cuda") == (
        "torch",
        "the fused kernels need compute capability 8.0, this is 7.x",
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert which_impl("cuda") == ("torch", "the fused kernels are for NVIDIA's GPUs")


def test_auto_says_once_which_and_why(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_logged", set())
    for _ in range(3):
        matching_loss(X, P, Y, 1.0)
        match(X, P, 1.0)
    assert capsys.readouterr().err == (
        "kernels: the matching op runs on impl='torch': the fused kernels need CUDA, this is cpu\n"
    )
    matching_loss(X, P, Y, 1.0, impl="torch")
    assert not capsys.readouterr().err


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(kernels, "TRITON_UNAVAILABLE", "triton is not installed")
    assert which_impl("cuda") == ("torch", "triton is not installed")
    with pytest.raises(
        ImportError, match="impl='triton': triton is not installed; pip install 'triton>=3.6'"
    ):
        matching_loss(X, P, Y, 1.0, impl="triton")


IMPORT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import torch, kernels
one = kernels.matching_loss(torch.ones(2, 4), torch.eye(4), torch.tensor([0, 1]), 10.0)
print("imported", kernels.HAS_TRITON, len(one))
"""
OLD = """
import sys, types
sys.modules["triton"] = types.SimpleNamespace(__version__="3.5.1+git1", __spec__=None)
import kernels
print(kernels.HAS_TRITON, kernels.which_impl("cuda"))
"""


def test_only_a_missing_triton_is_forgiven():
    """Without Triton the package works; a Triton that is there but broken stays an error."""
    for module, forgiven in [("triton", True), ("triton.runtime.jit", not kernels.HAS_TRITON)]:
        run = run_python(IMPORT.format(module=module), ROOT)
        assert ("imported False 2" in run.stdout) == forgiven, run.stderr
        assert (run.returncode == 0) == forgiven


def test_an_old_triton_is_left_alone():
    run = run_python(OLD, ROOT)
    assert run.stdout == "False ('torch', 'triton is 3.5.1+git1, the fused kernels need 3.6')\n", (
        run.stderr
    )


# --- two processes --------------------------------------------------------------------------------

UNEVEN = [(40, 24), (64, 0), (33, 31)]  # images of process 0 and of process 1


def one_process_of_two(rank, folder, impl):
    """Every case of UNEVEN and both targets in this process; its results go to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = []
    for sizes in UNEVEN:
        features, prototypes, labels, scale = make_case(64, 11, 32, 10.0, "half")
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], 64)
        case = (features[mine], prototypes, labels[mine], scale)
        for target in TARGETS:
            results.append(gradients(case, target, (0.7, 1.9), impl=impl, group=dist.group.WORLD))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_two_processes(folder, impl):
    """Losses and gradients of two gloo processes equal those of the whole batch in one, to 1e-6."""
    run_two(one_process_of_two, str(folder), impl)
    halves = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    cases = [(sizes, target) for sizes in UNEVEN for target in TARGETS]
    for (sizes, target), first, second in zip(cases, *halves):
        whole = make_case(64, 11, 32, 10.0, "half")
        losses, grads = gradients(whole, target, (0.7, 1.9), impl=impl)
        assert torch.equal(first[0], second[0]), "all processes must see the same loss"
        assert relative(first[0], losses.double()) < 1e-6, (sizes, target)
        features = torch.cat([first[1][0], second[1][0]])
        assert relative(features, grads[0].double()) < 1e-6, (sizes, target)
        for i in (1, 2):  # prototypes, scale: each process has its share
            assert relative(first[1][i] + second[1][i], grads[i].double()) < 1e-6, (sizes, target)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_equal_one(tmp_path):
    check_two_processes(tmp_path, "torch")
