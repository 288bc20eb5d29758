"""The matching op as fused Triton kernels: launchers, autograd, operators for torch.compile.

    matching_loss    two launches forward (three and a gather with a process group), one backward
    match            one launch

for up to 128 ranks and D a multiple of 16, in float32, float16 or bfloat16. Where one side is in
bfloat16 and the other in float32, the latter is rounded to bfloat16 for the products, and gets its
gradient in float32. Saved for backward: 4 B (R rounded up to 16) + 12 B bytes. Results repeat bit
for bit.

Read next: `matching_kernels.py`. Formulas: `reference.py`. Needs torch>=2.4, triton>=3.6.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from .matching_kernels import backward_kernel, finish_kernel, forward_kernel, match_kernel

INTERPRET = not isinstance(forward_kernel, triton.JITFunction)
MAX_CHUNKS = 32  # of images, whose dP and ds the last program of the backward adds up one by one
FINISH = dict(RANKS=16, CHUNK=32)  # ranks of a program of finish_kernel, parts read at once
HOPPER = 9
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_groups: dict[str, dist.ProcessGroup] = {}  # an operator takes strings, not groups


def forward_config(x: Tensor, p: Tensor) -> dict[str, int]:
    """BM and BK of forward_kernel and match_kernel, num_warps, num_stages.

    BM below 64, so that no product is a wgmma: where the norms read its operands, too, Triton fills
    their buffers while it may still be reading (triton-lang/triton#6691).
    """
    (B, D), dots = x.shape, dot_type(x, p)
    if dots != "half":
        return dict(BM=16, BK=16, num_warps=4 if dots == "ieee" else 8, num_stages=2)
    BM = 32 if B > 2048 and D % 64 == 0 and x.dtype == p.dtype else 16
    is_wide = D % 64 == 0 and (BM == 16 or gpu_generation(x.device) == HOPPER)  # else: it spills
    return dict(BM=BM, BK=64 if is_wide else 32, num_warps=8, num_stages=3)


def backward_config(x: Tensor, p: Tensor) -> dict[str, int]:
    """BM and BD of backward_kernel, num_warps, num_stages.

    On sm_90 its products are wgmmas of N = 64: for N of 32 and less, illegal addresses were
    reported of kernels with several (triton-lang/triton#10486, #10573, #11366).
    """
    dots = dot_type(x, p)
    if gpu_generation(x.device) == HOPPER and dots != "ieee":
        is_wide = dots == "half" and (x.dtype == p.dtype or x.shape[1] % 64 == 0)  # else: it spills
        num_warps = 4 if len(p) <= 64 else 8
        return dict(BM=32 if is_wide else 16, BD=64, num_warps=num_warps, num_stages=1)
    # tiles of 32 images spill registers but for the smallest, and so do two stages of the largest
    is_mixed, is_large = x.dtype != p.dtype, len(p) > 64
    BM = 32 if dots == "half" and not is_mixed and not is_large else 16
    num_stages = 1 if is_mixed and is_large else 2
    return dict(BM=BM, BD=32 if dots == "half" else 16, num_warps=8, num_stages=num_stages)


@functools.cache
def gpu_generation(device: torch.device) -> int:
    """The first number of the compute capability."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132


def float32_dots() -> str:
    """How PyTorch is set to multiply float32 matrices: "tf32", or "ieee" on no tensor core."""
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # from torch 2.9 on
    if newer in ("ieee", "tf32"):
        return newer
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# What torch.compiler.assume_constant_result sets, without importing the compiler: dynamo then
# calls them as it traces.
gpu_generation._dynamo_marked_constant = float32_dots._dynamo_marked_constant = True


def dot_type(x: Tensor, p: Tensor) -> str:
    """ "half", "tf32" or "ieee"."""
    if x.dtype != torch.float32 or p.dtype != torch.float32:
        return "half"
    return float32_dots()


def _dots(x: Tensor, p: Tensor) -> dict:
    dtype = p.dtype if x.dtype == torch.float32 else x.dtype
    precision = dot_type(x, p)
    return dict(
        OPERAND=TRITON_DTYPES[dtype],
        PRECISION="ieee" if precision == "half" else precision,
        UPCAST=INTERPRET and dtype == torch.bfloat16,
    )


def _launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """debug keeps device_assert: labels are checked by the kernel itself, at no launch."""
    kernel[grid](*args, **constants, enable_fp_fusion=True, debug=True, sanitize_overflow=False)


def _aligned_rows(x: Tensor) -> Tensor:
    """Rows may be a multiple of 16 apart: each then begins where whole vectors can be loaded."""
    return x if x.stride(1) == 1 and x.stride(0) % 16 == 0 else x.contiguous()


def _device(x: Tensor):
    """Triton launches on the current device, PyTorch operators where their tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv checks its arguments for 2 us each time."""
    return -(-a // b)


def _rpad(R: int) -> int:
    return 64 if R <= 64 else 128


def _outputs(x: Tensor, R: int) -> tuple[Tensor, ...]:
    """COSINES, ROWS, COLUMNS, COUNTS, COUNTERS, I2T, T2I, not filled in."""
    B, D = x.shape
    shapes = ((B, _cdiv(R, 16) * 16), (3, B), (6, _rpad(R)), (2,), (), ())
    floats = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    counters = torch.empty(
        triton.next_power_of_2(max(16, int(D))) // 16, dtype=torch.int32, device=x.device
    )
    return (*floats[:4], counters, *floats[4:])


def forward(
    x: Tensor, p: Tensor, y: Tensor, s: Tensor, smooth: bool, group: str
) -> tuple[Tensor, ...]:
    """(cosines, rows, columns, counts, counters, i2t, t2i): see the kernels.

    group: key of _groups, or "".
    """
    x, p, y = _aligned_rows(x), _aligned_rows(p), y.contiguous()
    (B, D), R = x.shape, int(p.shape[0])
    RPAD, config = _rpad(R), forward_config(x, p)
    outputs = cosines, rows, columns, counts, counters, i2t, t2i = _outputs(x, R)
    programs = _cdiv(B, config["BM"])
    parts = x.new_empty(max(programs, 1), 7, RPAD, dtype=torch.float32)
    sums = x.new_empty(3, RPAD // FINISH["RANKS"], dtype=torch.float32)
    with _device(x):
        if B:
            _launch(
                forward_kernel, (programs,), x, p, y, s, cosines, rows, columns, parts, counters,
                B, R, x.stride(0), p.stride(0), cosines.stride(0), D=D, RPAD=RPAD, SMOOTH=smooth,
                SLICES=len(counters), **_dots(x, p), **config,
            )  # fmt: skip
        else:  # the part of no images
            parts.zero_()[:, 0] = float("-inf")
            columns.zero_()
            counters.zero_()
        for last in (False, True) if group else (True,):
            merged = parts if last else torch.empty_like(parts[0])
            _launch(
                finish_kernel, sums.shape[1:], parts, merged, columns, counts, i2t, t2i, sums,
                counters, len(parts), R, RPAD=RPAD, SMOOTH=smooth, FINISH=last,
                **FINISH, num_warps=4, num_stages=1,
            )  # fmt: skip
            if not last:  # the only communication there is
                parts = merged.new_empty(dist.get_world_size(_groups[group]), *merged.shape)
                dist.all_gather_into_tensor(parts.view(-1), merged.view(-1), group=_groups[group])
    return outputs


def backward(
    g_i2t: Tensor, g_t2i: Tensor, x: Tensor, p: Tensor, y: Tensor, s: Tensor, cosines: Tensor,
    rows: Tensor, columns: Tensor, counts: Tensor, counters: Tensor, smooth: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx (B, D), dp (R, D), ds ()), all three, since one launch computes them together."""
    x, p, y = _aligned_rows(x), _aligned_rows(p), y.contiguous()
    (B, D), R = x.shape, len(p)
    grads = dx, dp, ds = _empty_gradients(x, p, s)
    if not B:
        return dx, dp.zero_(), ds.zero_()
    RPAD, config = _rpad(R), backward_config(x, p)
    slices = _cdiv(D, config["BD"])
    num_tiles = _cdiv(B, config["BM"])
    chunks = min(num_tiles, max(num_multiprocessors(x.device) // slices, 1), MAX_CHUNKS)
    tiles = _cdiv(num_tiles, chunks)  # of each chunk; the last may have fewer
    chunks = _cdiv(num_tiles, tiles)
    alone = chunks == 1
    parts = s.new_empty(0 if alone else chunks * (RPAD * D + 16), dtype=torch.float32)
    with _device(x):
        _launch(
            backward_kernel, (slices, chunks), x, p, y, s, cosines, rows, columns, counts, g_i2t,
            g_t2i, *grads, parts, counters, B, R, x.stride(0), p.stride(0), cosines.stride(0),
            tiles, D=D, RPAD=RPAD, SMOOTH=smooth, ALONE=alone, **_dots(x, p), **config,
        )  # fmt: skip
    return grads


def _empty_gradients(x: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, p, s))  # rows side by side


def probabilities(x: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probs (B, R), expected (B,), argmax (B,))"""
    x, p = _aligned_rows(x), _aligned_rows(p)
    (B, D), R = x.shape, int(p.shape[0])
    config = forward_config(x, p)
    outputs = _empty_answers(x, p, s)
    if B:
        with _device(x):
            _launch(
                match_kernel, (_cdiv(B, config["BM"]),), x, p, s, *outputs, B, R, x.stride(0),
                p.stride(0), D=D, RPAD=_rpad(R), **_dots(x, p), **config,
            )  # fmt: skip
    return outputs


def _empty_answers(x: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, R = x.shape[0], p.shape[0]  # len() would fix them under torch.compile
    floats = dict(dtype=torch.float32, device=x.device)
    argmax = torch.empty(B, dtype=torch.int64, device=x.device)
    return torch.empty(B, R, **floats), torch.empty(B, **floats), argmax


# --- autograd, eagerly ---


class _Matching(torch.autograd.Function):
    """Calls the launchers directly; through an operator, a step takes the host twice as long."""

    @staticmethod
    def forward(ctx, x, p, y, s, *flags):
        *saved, i2t, t2i = forward(x, p, y, s, *flags)
        ctx.smooth = flags[0]
        ctx.save_for_backward(x, p, y, s, *saved)
        return i2t, t2i

    @staticmethod
    def backward(ctx, g_i2t, g_t2i):
        return _gradients(ctx, g_i2t, g_t2i)


def is_plain_eager(*tensors: Tensor) -> bool:
    """Nobody compiles or traces, and tensors are plain: the launchers can take them as they are."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    )


# --- operators, for torch.compile and whoever else traces ---


def _operator(name: str, schema: str, implementation, fake):
    """Opaque to torch.compile, which sees shapes only, not counters and scratch."""
    name = f"{__name__.replace('.', '_')}::{name}"  # copies in two packages do not meet
    operator = torch.library.custom_op(name, implementation, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_forward = _operator(
    "matching_forward",
    "(Tensor x, Tensor p, Tensor y, Tensor s, bool smooth, str group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    lambda x, p, *_: _outputs(x, int(p.shape[0])),
)
_backward = _operator(
    "matching_backward",
    "(Tensor g_i2t, Tensor g_t2i, Tensor x, Tensor p, Tensor y, Tensor s, Tensor cosines,"
    " Tensor rows, Tensor columns, Tensor counts, Tensor counters, bool smooth)"
    " -> (Tensor, Tensor, Tensor)",
    backward,
    lambda _i, _t, x, p, _y, s, *_: _empty_gradients(x, p, s),
)
_match = _operator(
    "matching_probabilities",
    "(Tensor x, Tensor p, Tensor s) -> (Tensor, Tensor, Tensor)",
    probabilities,
    _empty_answers,
)


def _save(ctx, inputs, output):
    x, p, y, s, ctx.smooth, _ = inputs
    ctx.save_for_backward(x, p, y, s, *output[:5])
    ctx.set_materialize_grads(False)  # of the cosines, (B, R)


def _gradients(ctx, *upstream):
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() or any(map(functorch.is_legacy_batchedtensor, upstream)):
        raise RuntimeError("no batched gradients with impl='triton'; use impl='torch'")
    saved = ctx.saved_tensors  # once: checkpointing and offloading count, and pay for, each reading
    # with create_graph the operator, which says that it has no derivative; compiled autograd traces
    direct = not torch.is_grad_enabled() and is_plain_eager(*saved)
    compute = backward if direct else _backward
    dx, dp, ds = compute(*upstream, *saved, ctx.smooth)
    return dx, dp, None, ds, None, None


def _operator_gradients(ctx, *upstream):
    i2t, t2i = upstream[-2:]
    zero = torch.zeros_like(t2i if i2t is None else i2t)  # of a loss that is not used
    return _gradients(ctx, zero if i2t is None else i2t, zero if t2i is None else t2i)


def _raise_no_gradient(ctx, *grads):
    raise RuntimeError("no such gradient with impl='triton'; use impl='torch'")


_forward.register_autograd(_operator_gradients, setup_context=_save)
_backward.register_autograd(_raise_no_gradient)  # no second derivatives
_match.register_autograd(_raise_no_gradient)


def matching_loss(
    image_features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    target: str = "normalized",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.matching_loss`, fused; see there."""
    if labels.dtype not in (torch.int64, torch.int32):
        labels = labels.long()
    tensors = image_features, prototypes, labels, scale.float()
    name = "" if group is None else group.group_name
    if group is not None:
        _groups[name] = group
    flags = target == "softmax10", name
    if is_plain_eager(*tensors):
        if needs_grad(tensors):  # features of a frozen tower may come from torch.inference_mode
            tensors = (t.clone() if t.is_inference() else t for t in tensors)
        return _Matching.apply(*tensors, *flags)
    *_, i2t, t2i = _forward(*tensors, *flags)
    return i2t, t2i


def match(
    image_features: Tensor, prototypes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.match`, fused and without gradients; see there."""
    tensors = image_features, prototypes, scale.float()
    direct = is_plain_eager(*tensors) and not needs_grad(tensors)  # the operator raises
    return (probabilities if direct else _match)(*tensors)


def needs_grad(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
