"""The matching op as fused Triton kernels: one launch forward and one backward, a few more for many images or ranks.

Formulas, and the symbols B, R, D, x_i, p_c, y_i, s, A_ic, lse, n_c, hi_c, lo_c, V: `reference.py`.

Forward. One program per tile of BM images; it walks over all ranks in tiles of BR. Along D it accumulates
<x_i, p_c>, |x_i|^2 and |p_c|^2 together, so normalising costs no pass of its own (beyond 4,096 images a launch
before brings |p_c|, and checks the labels). It leaves behind the row lse, the logits divided by s, and a few
numbers per column (PARTS). Whoever arrives last of a group of programs merges their columns in a fixed order;
whoever arrives last of these merges the groups and writes both losses.

Backward, from the stored C_ic = A_ic / s (a gradient for s then needs no division by s). A column keeps its
maximum and exp(max - lse_c) apart: the rounding of lse_c itself would be one error shared by all images.

    G_ic = B dL/dA_ic = g_i2t (exp(A_ic - lse_i) - [y_i=c])
                      + g_t2i B/|V| [c in V] (exp(A_ic - lse_c) - lo_c - [y_i=c] (hi_c - lo_c))
    r_i = sum_c G_ic C_ic                         q_c = sum_i G_ic C_ic
    dx_i = s / (B |x_i|) (sum_c G_ic p^_c - r_i x^_i)       x^, p^: divided by their length
    dp_c = s / (B |p_c|) (sum_i G_ic x^_i - q_c p^_c)       ds = 1/B sum_i r_i

At most 4,096 images and 128 ranks (64 in tf32x3): since r and q do not sum over D, a program finishes its own
slice of BD dimensions alone. Its dP stays in registers over a chunk of images; whoever arrives last adds the
chunks up in index order. Each slice computes G again, which is cheap where launches are what costs.
Beyond: G is computed once and kept (B RPAD elements, for the time of the backward), then come two products with
it (rank_sums_kernel does both where a tile holds all ranks, else image_gradient_kernel goes before it), then the
sum over chunks.

Only integers are added atomically, so results repeat bit for bit. Saved for backward: 4 B R + 8 B bytes.

Copy-paste: needs torch>=2.4, triton>=3.6 (compiled with 3.6 and 3.9), an NVIDIA GPU from sm_80 on; formulas in
kernels/reference.py.
"""

import contextlib
import functools
import math

import torch
import torch.distributed as dist
import triton
import triton.language as tl

ZERO = tl.constexpr(1e-24)  # squared length below which a vector counts as zero: reference.EPS ** 2
E10 = tl.constexpr(22026.465794806718)  # e^10 of target="softmax10"
LOG2E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(8)  # parts read at once while merging
FP16_ROOM = tl.constexpr(3e4)  # G is scaled to stay below this, fp16 ends at 65504

# --- kernels: shared pieces -----------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # X and P of different dtypes; bfloat16 in the interpreter, which multiplies its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _exp(x):
    """tl.exp also takes care of results below 1e-38, at three instructions more."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _operand(a, X, UPCAST: tl.constexpr):
    """fp32 values as X holds them, for a dot."""
    return a if UPCAST else a.to(X.dtype.element_ty)


@triton.jit
def _load(X, rows, columns, B, stride, D: tl.constexpr, WHOLE: tl.constexpr):
    """Tile of a (B, D) matrix, zero outside; WHOLE: no column is outside, so no mask along D."""
    inside = (rows < B)[:, None]
    if not WHOLE:
        inside = inside & (columns < D)[None, :]
    return tl.load(X + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _squares(a, ROWS: tl.constexpr, BK: tl.constexpr):
    """(ROWS, BK) -> (ROWS, BK / 4) fp32: sums that stay within a thread, where whole rows take shuffles."""
    a = a.to(tl.float32)
    return tl.sum(tl.reshape(a * a, [ROWS, BK // 4, 4]), 2)


@triton.jit
def _inverse(squares):
    """1/|a| of squared lengths, 0 for zero vectors."""
    return tl.where(squares > ZERO, tl.rsqrt(squares), 0.0)


@triton.jit
def _cosines(X, P, LENGTHS, rows, ranks, B, R, x_stride, p_stride, D: tl.constexpr, BM: tl.constexpr,
             BR: tl.constexpr, BK: tl.constexpr, KNOWN: tl.constexpr, PRECISION: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """C (BM, BR) between rows of X (B, D) and ranks of P (R, D), 1/|x| (BM,) and 1/|p| (BR,); KNOWN: from LENGTHS."""
    acc = tl.zeros([BM, BR], tl.float32)
    xx = tl.zeros([BM, BK // 4], tl.float32)
    pp = tl.zeros([BR, BK // 4], tl.float32)
    for k in range(0, D, BK):
        columns = k + tl.arange(0, BK)
        x = _load(X, rows, columns, B, x_stride, D, D % BK == 0)  # (BM, BK)
        p = _load(P, ranks, columns, R, p_stride, D, D % BK == 0)  # (BR, BK)
        xx += _squares(x, BM, BK)
        if not KNOWN:
            pp += _squares(p, BR, BK)
        acc = _dot(x, tl.trans(p), acc, PRECISION, UPCAST)
        if BM >= 64:
            # The norms read x and p too, and Triton then gives their buffers no third place for the wgmma that is
            # still reading (triton-lang/triton#6691). Touching acc makes it wait; the compile gate looks for that.
            # For sm_100 Triton 3.9 aborts on this line, so forward_config has no tiles of 64 there.
            acc = tl.where(k < D, acc, 0.0)
    rx = _inverse(tl.sum(xx, 1))
    rp = tl.load(LENGTHS + ranks) if KNOWN else _inverse(tl.sum(pp, 1))
    return acc * rx[:, None] * rp[None, :], rx, rp


@triton.jit
def _arrive(COUNTER):
    """How many programs were here before; what they stored until then can be read with `.cg`.

    The barriers make one thread's atomic speak for, and hold back, all threads of the program.
    """
    tl.debug_barrier()
    before = tl.atomic_add(COUNTER, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def _merge_column(PARTS, first, count, ranks, RPAD: tl.constexpr, BR: tl.constexpr, SMOOTH: tl.constexpr):
    """Column statistics (BR,) of parts first .. first + count - 1."""
    zero = tl.zeros([CHUNK, BR], tl.float32)
    m, l, positive, total = zero - float("inf"), zero, zero, zero
    n = tl.zeros([CHUNK, BR], tl.int32)
    for i in range(0, count, CHUNK):  # row k: parts k, k + CHUNK, ..
        part = i + tl.arange(0, CHUNK)
        at = PARTS + first.to(tl.int64) * (6 * RPAD) + part[:, None] * (6 * RPAD) + ranks[None, :]
        some = (part < count)[:, None]
        part_m = tl.load(at, mask=some, other=float("-inf"), cache_modifier=".cg")
        part_l = tl.load(at + RPAD, mask=some, other=0.0, cache_modifier=".cg")
        positive += tl.load(at + 2 * RPAD, mask=some, other=0.0, cache_modifier=".cg")
        n += _count(at + 3 * RPAD, some)
        if SMOOTH:
            total += tl.load(at + 4 * RPAD, mask=some, other=0.0, cache_modifier=".cg")
        new = tl.maximum(m, part_m)
        l = _share(l, m, new) + _share(part_l, part_m, new)
        m = new
    top = tl.max(m, 0)
    l = tl.sum(_share(l, m, top[None, :]), 0)
    return top, l, tl.sum(positive, 0), tl.sum(n, 0), tl.sum(total, 0)


@triton.jit
def _count(at, mask):
    """Counts in PARTS are int32, in the bits of its fp32, so that they are exact beyond 2^24 images."""
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)


@triton.jit
def _share(l, m, new):
    """l = sum of exp(A - m) for another maximum: sum of exp(A - new). Parts without images have m = -inf."""
    return l * _exp(m - tl.where(new == float("-inf"), 0.0, new))


@triton.jit
def _merge_rows(PARTS, first, count, RPAD: tl.constexpr):
    """(sum of lse_i - A_i,y_i, number of images) of the same parts."""
    loss = tl.zeros([CHUNK], tl.float32)
    images = tl.zeros([CHUNK], tl.int32)
    for i in range(0, count, CHUNK):
        part = i + tl.arange(0, CHUNK)
        at = PARTS + (first + part).to(tl.int64) * (6 * RPAD) + 5 * RPAD
        loss += tl.load(at, mask=part < count, other=0.0, cache_modifier=".cg")
        images += _count(at + 1, part < count)
    return tl.sum(loss), tl.sum(images)


@triton.jit
def _store_part(PARTS, part, ranks, m, l, positive, n, total, RPAD: tl.constexpr, SMOOTH: tl.constexpr):
    at = PARTS + part.to(tl.int64) * (6 * RPAD) + ranks
    tl.store(at, m)
    tl.store(at + RPAD, l)
    tl.store(at + 2 * RPAD, positive)
    tl.store(at + 3 * RPAD, n.to(tl.float32, bitcast=True))
    if SMOOTH:
        tl.store(at + 4 * RPAD, total)


@triton.jit
def _store_rows(PARTS, part, loss, images, RPAD: tl.constexpr):
    """What _merge_rows reads of one part."""
    at = PARTS + part.to(tl.int64) * (6 * RPAD) + 5 * RPAD
    tl.store(at, loss)
    tl.store(at + 1, images.to(tl.float32, bitcast=True))


@triton.jit
def _merge(PARTS, first, count, to, RPAD: tl.constexpr, BR: tl.constexpr, SMOOTH: tl.constexpr):
    """Parts first .. first + count - 1 become one, part number `to`."""
    loss, images = _merge_rows(PARTS, first, count, RPAD)
    _store_rows(PARTS, to, loss, images, RPAD)
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        m, l, positive, n, total = _merge_column(PARTS, first, count, ranks, RPAD, BR, SMOOTH)
        _store_part(PARTS, to, ranks, m, l, positive, n, total, RPAD, SMOOTH)


@triton.jit
def _require(valid):
    """A device-side assertion; it is a call, which costs in kernels with wgmma: see prepare_kernel."""
    tl.device_assert(valid, "kernels.matching_loss: a label is outside 0..R-1")


@triton.jit
def _finish(PARTS, COLUMNS, COUNTS, I2T, T2I, first, count, R, RPAD: tl.constexpr, BR: tl.constexpr,
            SMOOTH: tl.constexpr, REQUIRE: tl.constexpr):  # fmt: skip
    """Both losses, and what the backward needs of each column, from parts first .. first + count - 1.

    REQUIRE: assert that labels are in 0..R-1; without, the losses are NaN where one is not.
    """
    loss, images = _merge_rows(PARTS, first, count, RPAD)
    t2i, present, labelled = 0.0, 0.0, 0
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        m, l, positive, n, total = _merge_column(PARTS, first, count, ranks, RPAD, BR, SMOOTH)
        lse = m + tl.log(l)
        labelled += tl.sum(n)  # a label outside 0..R-1 counts for no rank
        here = (n > 0) & (ranks < R)
        n = tl.maximum(n, 1).to(tl.float32)
        if SMOOTH:
            others = images.to(tl.float32) - n
            z = n * E10 + others
            lo = 1.0 / z
            hi = lo * E10
            entropy = n * hi * tl.log(hi) + others * lo * tl.log(lo)
            divergence = entropy - (hi - lo) * positive - lo * total + lse
        else:
            hi, lo = 1.0 / n, n * 0.0
            divergence = lse - tl.log(n) - hi * positive
        t2i += tl.sum(tl.where(here, divergence, 0.0))
        present += tl.sum(here.to(tl.float32))
        tl.store(COLUMNS + ranks, tl.where(here, m, float("inf")))
        tl.store(COLUMNS + 4 * RPAD + ranks, tl.where(here, 1.0 / tl.where(here, l, 1.0), 0.0))
        tl.store(COLUMNS + RPAD + ranks, tl.where(here, hi - lo, 0.0))
        tl.store(COLUMNS + 2 * RPAD + ranks, tl.where(here, lo, 0.0))
    valid = labelled == images  # the assertion reports it, NaN keeps it from passing where it is off
    if REQUIRE:
        _require(valid)
    images = tl.where(valid, tl.maximum(images, 1).to(tl.float32), float("nan"))
    present = tl.where(valid, tl.maximum(present, 1.0), float("nan"))
    tl.store(I2T, loss / images)
    tl.store(T2I, t2i / present)
    tl.store(COUNTS, images)
    tl.store(COUNTS + 1, present)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "group_size"])
def forward_kernel(
    X,  # (B, D) features, rows x_stride apart
    P,  # (R, D) prototypes, same dtype or another
    Y,  # (B,) labels, any integer dtype
    S,  # () scale, any float dtype
    COSINES,  # (B, cosine_stride) fp32 out, columns R.. unspecified; written if SAVE
    ROWS,  # (2, B) fp32 out: lse_i, 1/|x_i|
    COLUMNS,  # (5, RPAD) fp32 out: max_c (inf where c not in V), hi_c - lo_c, lo_c, 1/|p_c|, exp(max_c - lse_c)
    COUNTS,  # (2,) fp32 out: B, |V|, over all processes
    I2T,  # () fp32 out
    T2I,  # () fp32 out
    PARTS,  # (programs + groups + 1, 6, RPAD) fp32 scratch, a part: column max, sum of exp(A - max),
    #         sum of positives, count (int32), sum (SMOOTH), [row loss, images (int32)]; programs first, then groups
    COUNTERS,  # (1 + groups,) int32, zero before and after
    B, R, x_stride, p_stride, cosine_stride, group_size,
    D: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, RPAD: tl.constexpr, BK: tl.constexpr,
    PREPARED: tl.constexpr, SMOOTH: tl.constexpr, SAVE: tl.constexpr, ALONE: tl.constexpr, FINISH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program i owns images i BM .. and all ranks. FINISH: the last one writes losses and COLUMNS.

    PREPARED: prepare_kernel has run, so 1/|p_c| is in COLUMNS and the labels are checked.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows = program * BM + tl.arange(0, BM)
    inside = rows < B
    s = tl.load(S).to(tl.float32)

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    own = tl.zeros([BM], tl.float32)
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        label = tl.load(Y + rows, mask=inside, other=0)
        y = tl.where(inside & (label >= 0) & (label < R), label.to(tl.int32), -1)  # anything else is of no rank
        cosines, rx, rp = _cosines(
            X, P, COLUMNS + 3 * RPAD, rows, ranks, B, R, x_stride, p_stride, D, BM, BR, BK, PREPARED, PRECISION, UPCAST
        )
        if SAVE:
            at = COSINES + rows.to(tl.int64)[:, None] * cosine_stride + ranks[None, :]
            tl.store(at, cosines, mask=inside[:, None] & (ranks < cosine_stride)[None, :])
            tl.store(ROWS + B + rows, rx, mask=inside)
        if not PREPARED:
            if program == 0:
                tl.store(COLUMNS + 3 * RPAD + ranks, rp)
        a = cosines * s
        positive = tl.where(y[:, None] == ranks[None, :], a, 0.0)
        own += tl.sum(positive, 1)
        by_row = tl.where((ranks < R)[None, :], a, float("-inf"))
        new = tl.maximum(m, tl.max(by_row, 1))
        l = l * _exp(m - new) + tl.sum(_exp(by_row - new[:, None]), 1)
        m = new
        by_column = tl.where(inside[:, None], a, float("-inf"))
        top = tl.max(by_column, 0)
        hits = tl.histogram(y - c, BR, mask=(y >= c) & (y < c + BR))  # tl.sum of y = rank takes 90 registers more
        _store_part(
            PARTS, program, ranks, top, tl.sum(_exp(by_column - top[None, :]), 0), tl.sum(positive, 0),
            hits, tl.sum(a, 0), RPAD, SMOOTH,
        )  # fmt: skip
    lse = m + tl.log(l)
    if SAVE:
        tl.store(ROWS + rows, lse, mask=inside)
    _store_rows(PARTS, program, tl.sum(tl.where(inside, lse - own, 0.0)), tl.minimum(B - program * BM, BM), RPAD)

    groups = tl.cdiv(programs, group_size)
    group = program // group_size
    first = group * group_size
    count = tl.minimum(group_size, programs - first)
    if ALONE:
        tl.debug_barrier()
        last = program == 0
    else:
        last = _arrive(COUNTERS + 1 + group) == count - 1
        if last:
            tl.store(COUNTERS + 1 + group, 0)
            if groups > 1:
                _merge(PARTS, first, count, programs + group, RPAD, BR, SMOOTH)
                last = _arrive(COUNTERS) == groups - 1
                first, count = programs, groups
                if last:
                    tl.store(COUNTERS, 0)
    if last:
        if FINISH:
            _finish(PARTS, COLUMNS, COUNTS, I2T, T2I, first, count, R, RPAD, BR, SMOOTH, not PREPARED)
        else:
            _merge(PARTS, first, count, programs + groups, RPAD, BR, SMOOTH)


@triton.jit(do_not_specialize=["B"])
def prepare_kernel(
    P,  # (R, D)
    Y,  # (B,)
    COLUMNS,  # (5, RPAD) fp32 out, row 3: 1/|p_c|, 0 from R on
    B, R, p_stride, D: tl.constexpr, RPAD: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    """Program c owns rank c and a share of the labels: what forward_kernel leaves out with PREPARED.

    There each program would add up the same |p_c|^2, and the assertion on labels is a call, with which ptxas waits
    after every single wgmma of a kernel (its warning C7510).
    """
    rank = tl.program_id(0)
    columns = tl.arange(0, DPAD)
    inside = columns < tl.where(rank < R, D, 0)
    p = tl.load(P + rank.to(tl.int64) * p_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(COLUMNS + 3 * RPAD + rank, _inverse(tl.sum(p * p)))
    wrong = tl.zeros([1024], tl.int32)
    for i in range(rank * 1024, B, RPAD * 1024):
        images = i + tl.arange(0, 1024)
        label = tl.load(Y + images, mask=images < B, other=0)
        wrong += ((label < 0) | (label >= R)).to(tl.int32)
    _require(tl.sum(wrong) == 0)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    PARTS,  # (count, 6, RPAD) fp32, one part of each process, see forward_kernel
    COLUMNS,  # (5, RPAD) fp32 out, row 3 excepted
    COUNTS,  # (2,) fp32 out
    I2T,  # () fp32 out
    T2I,  # () fp32 out
    count, R, RPAD: tl.constexpr, BR: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The end of forward_kernel, after the parts of all processes were gathered. One program."""
    first = tl.full([], 0, tl.int32)
    _finish(PARTS, COLUMNS, COUNTS, I2T, T2I, first, count, R, RPAD, BR, SMOOTH, True)


@triton.jit
def _upstream(COUNTS, G_I2T, G_T2I, HAS_I2T: tl.constexpr, HAS_T2I: tl.constexpr):
    """Three scalars: what multiplies the two halves of G, and what undoes their scaling.

    |G| stays below FP16_ROOM + 1 whatever the upstream gradients are.
    """
    images = tl.load(COUNTS)
    per_rank = images / tl.load(COUNTS + 1)  # B / |V|
    i2t, t2i = 0.0, 0.0
    if HAS_I2T:
        i2t = tl.load(G_I2T).to(tl.float32)
    if HAS_T2I:
        t2i = tl.load(G_T2I).to(tl.float32)
    top = tl.maximum(tl.abs(i2t), tl.abs(t2i))
    top = tl.where(top > 0, top, 1.0)
    shrink = 1.0 / tl.maximum(per_rank / FP16_ROOM, 1.0)
    return i2t / top * shrink, t2i / top * shrink * per_rank, top / shrink / images


@triton.jit
def _row_values(Y, ROWS, COLUMNS, rows, inside, R, by_row, by_column, RPAD: tl.constexpr):
    """y_i, lse_i and what is taken from G at c = y_i, all (BM,)."""
    y = tl.load(Y + rows, mask=inside, other=0).to(tl.int32)
    lse_i = tl.load(ROWS + rows, mask=inside, other=0.0)
    gap = tl.load(COLUMNS + RPAD + y, mask=(y >= 0) & (y < R), other=0.0)  # hi - lo
    return y, lse_i, by_row + by_column * gap


@triton.jit
def _residual(COSINES, COLUMNS, rows, ranks, inside, y, lse_i, own, s, R, cosine_stride, by_row, by_column,
              RPAD: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """G and C (BM, BR), zero outside."""
    at = COSINES + rows.to(tl.int64)[:, None] * cosine_stride + ranks[None, :]
    cosines = tl.load(at, mask=inside[:, None] & (ranks < cosine_stride)[None, :], other=0.0)
    top_c, share_c = tl.load(COLUMNS + ranks), tl.load(COLUMNS + 4 * RPAD + ranks)
    g = by_row * _exp(cosines * s - lse_i[:, None])
    g += (by_column * share_c)[None, :] * _exp(cosines * s - top_c[None, :])
    if SMOOTH:
        g -= (by_column * tl.load(COLUMNS + 2 * RPAD + ranks))[None, :]
    g = tl.where(y[:, None] == ranks[None, :], g - own[:, None], g)
    return tl.where(inside[:, None] & (ranks < R)[None, :], g, 0.0), cosines


@triton.jit
def _unit(X, rows, columns, inverse, B, stride, D: tl.constexpr, BD: tl.constexpr):
    """Tile (rows, BD) of x^ or p^, fp32; inverse (rows,): 1/|x_i| or 1/|p_c|."""
    return _load(X, rows, columns, B, stride, D, D % BD == 0).to(tl.float32) * inverse[:, None]


@triton.jit
def _store_dx(DX, products, x, r, factor, rows, columns, B, D: tl.constexpr):
    """Tile (rows, columns) of dX from sum_c G_ic p^_c and x^; r, and factor s / (B |x_i|): (rows,)."""
    dx = (products - r[:, None] * x) * factor[:, None]
    at = DX + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(at, dx.to(DX.dtype.element_ty), mask=(rows < B)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["B", "tiles"])
def backward_kernel(
    X,  # (B, D)
    P,  # (R, D)
    Y,  # (B,)
    S,  # ()
    COSINES,  # (B, cosine_stride) fp32
    ROWS,  # (2, B) fp32: lse_i, 1/|x_i|
    COLUMNS,  # (5, RPAD) fp32, see forward_kernel
    COUNTS,  # (2,) fp32: B, |V|
    G_I2T,  # () fp32 gradient of i2t, read if HAS_I2T
    G_T2I,  # () fp32 gradient of t2i, read if HAS_T2I
    DX,  # (B, D) out, dtype of X
    DP,  # (R, D) out, dtype of P
    DS,  # () out, dtype of S
    PARTS,  # (chunks, RPAD D + 16) fp32 scratch: dP, then ds, of each chunk of images
    COUNTERS,  # (programs in axis 0,) int32, zero before and after
    B, R, x_stride, p_stride, cosine_stride, tiles,
    D: tl.constexpr, BM: tl.constexpr, RPAD: tl.constexpr, BD: tl.constexpr,
    NEED_X: tl.constexpr, NEED_P: tl.constexpr, NEED_S: tl.constexpr,
    HAS_I2T: tl.constexpr, HAS_T2I: tl.constexpr, SMOOTH: tl.constexpr, ALONE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (j, i): dimensions j BD .., `tiles` tiles of BM images from i on, all ranks."""
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    ranks = tl.arange(0, RPAD)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    s = tl.load(S).to(tl.float32)
    by_row, by_column, back = _upstream(COUNTS, G_I2T, G_T2I, HAS_I2T, HAS_T2I)

    q = tl.zeros([RPAD], tl.float32)
    dp = tl.zeros([RPAD, BD], tl.float32)
    ds = 0.0
    for t in range(0, tiles):
        rows = (chunk * tiles + t) * BM + tl.arange(0, BM)
        inside = rows < B
        y, lse_i, own = _row_values(Y, ROWS, COLUMNS, rows, inside, R, by_row, by_column, RPAD)
        rx = tl.load(ROWS + B + rows, mask=inside, other=0.0)
        g, cosines = _residual(
            COSINES, COLUMNS, rows, ranks, inside, y, lse_i, own, s, R, cosine_stride, by_row, by_column, RPAD, SMOOTH
        )
        r = tl.sum(g * cosines, 1)
        ds += tl.sum(r)
        narrow = _operand(g, X, UPCAST)
        if NEED_X:
            p = _unit(P, ranks, columns, tl.load(COLUMNS + 3 * RPAD + ranks), R, p_stride, D, BD)
            dx = _dot(narrow, _operand(p, X, UPCAST), tl.zeros([BM, BD], tl.float32), PRECISION, UPCAST)
            x = _unit(X, rows, columns, rx, B, x_stride, D, BD)
            _store_dx(DX, dx, x, r, rx * (s * back), rows, columns, B, D)
        if NEED_P:
            q += tl.sum(g * cosines, 0)
            x = _unit(X, rows, columns, rx, B, x_stride, D, BD)
            dp = _dot(tl.trans(narrow), _operand(x, X, UPCAST), dp, PRECISION, UPCAST)

    if NEED_P:
        rp = tl.load(COLUMNS + 3 * RPAD + ranks)
        p = _unit(P, ranks, columns, rp, R, p_stride, D, BD)
        dp = (dp - q[:, None] * p) * (rp * (s * back))[:, None]
        at_dp = ranks[:, None] * D + columns[None, :]
        inside_dp = (ranks < R)[:, None] & (columns < D)[None, :]
    ds *= back
    last = chunk == 0
    if not ALONE:
        at = PARTS + chunk * (RPAD * D + 16)
        if NEED_P:
            tl.store(at + at_dp, dp, mask=inside_dp)
        if NEED_S:  # the same in all programs of a chunk but for rounding: that of program 0 counts
            tl.store(at + RPAD * D, ds, mask=tl.program_id(0) == 0)
        counter = COUNTERS + tl.program_id(0)
        last = _arrive(counter) == chunks - 1
        if last:
            tl.store(counter, 0)
            dp = tl.zeros([RPAD, BD], tl.float32)
            ds = 0.0
            for i in tl.range(0, chunks, loop_unroll_factor=4):
                at = PARTS + i * (RPAD * D + 16)
                if NEED_P:
                    dp += tl.load(at + at_dp, mask=inside_dp, other=0.0, cache_modifier=".cg")
                if NEED_S:
                    ds += tl.load(at + RPAD * D, tl.program_id(0) == 0, 0.0, cache_modifier=".cg")
    if last:
        if NEED_P:
            tl.store(DP + at_dp, dp.to(DP.dtype.element_ty), mask=inside_dp)
        if NEED_S:
            tl.store(DS, ds.to(DS.dtype.element_ty), mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["B"])
def residual_kernel(
    Y,  # (B,)
    S,  # ()
    COSINES,  # (B, cosine_stride) fp32
    ROWS,  # (2, B) fp32: lse_i, 1/|x_i|
    COLUMNS,  # (5, RPAD) fp32, see forward_kernel
    COUNTS,  # (2,) fp32: B, |V|
    G_I2T,  # () fp32, read if HAS_I2T
    G_T2I,  # () fp32, read if HAS_T2I
    G,  # (B, RPAD) out, dtype of the operands, scaled, see _upstream; written if STORE
    ROW_SUMS,  # (B,) fp32 out: r_i
    DS_PARTS,  # (programs,) fp32 out: sum of r_i of each program
    BACK,  # () fp32 out: what undoes the scaling of G and r_i, s apart
    B, R, cosine_stride,
    BM: tl.constexpr, BR: tl.constexpr, RPAD: tl.constexpr, HAS_I2T: tl.constexpr, HAS_T2I: tl.constexpr,
    SMOOTH: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Program i owns images i BM .. and all ranks."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < B
    s = tl.load(S).to(tl.float32)
    by_row, by_column, back = _upstream(COUNTS, G_I2T, G_T2I, HAS_I2T, HAS_T2I)
    y, lse_i, own = _row_values(Y, ROWS, COLUMNS, rows, inside, R, by_row, by_column, RPAD)
    r = tl.zeros([BM], tl.float32)
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        g, cosines = _residual(
            COSINES, COLUMNS, rows, ranks, inside, y, lse_i, own, s, R, cosine_stride, by_row, by_column, RPAD, SMOOTH
        )
        r += tl.sum(g * cosines, 1)
        if STORE:
            at = G + rows.to(tl.int64)[:, None] * RPAD + ranks[None, :]
            tl.store(at, g.to(G.dtype.element_ty), mask=inside[:, None])
    tl.store(ROW_SUMS + rows, r, mask=inside)
    tl.store(DS_PARTS + tl.program_id(0), tl.sum(r))
    if tl.program_id(0) == 0:
        tl.store(BACK, back)


@triton.jit(do_not_specialize=["B"])
def image_gradient_kernel(
    X,  # (B, D)
    P,  # (R, D)
    S,  # ()
    ROWS,  # (2, B) fp32
    COLUMNS,  # (5, RPAD) fp32
    G,  # (B, RPAD), see residual_kernel
    ROW_SUMS,  # (B,) fp32
    BACK,  # () fp32, see residual_kernel
    DX,  # (B, D) out, dtype of X
    B, R, x_stride, p_stride,
    D: tl.constexpr, RPAD: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i: tile of BM images by BD dimensions; those of one tile of images follow each other."""
    slices: tl.constexpr = (D + BD - 1) // BD
    rows = tl.program_id(0) // slices * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % slices * BD + tl.arange(0, BD)
    inside = rows < B
    dx = tl.zeros([BM, BD], tl.float32)
    for c in range(0, RPAD, BK):
        ranks = c + tl.arange(0, BK)
        g = tl.load(G + rows.to(tl.int64)[:, None] * RPAD + ranks[None, :], mask=inside[:, None], other=0.0)
        p = _unit(P, ranks, columns, tl.load(COLUMNS + 3 * RPAD + ranks), R, p_stride, D, BD)
        dx = tl.dot(g, p.to(g.dtype), dx, input_precision=PRECISION)
    rx = tl.load(ROWS + B + rows, mask=inside, other=0.0)
    x = _unit(X, rows, columns, rx, B, x_stride, D, BD)
    r = tl.load(ROW_SUMS + rows, mask=inside, other=0.0)
    _store_dx(DX, dx, x, r, rx * (tl.load(S).to(tl.float32) * tl.load(BACK)), rows, columns, B, D)


@triton.jit(do_not_specialize=["B", "tiles"])
def rank_sums_kernel(
    X,  # (B, D)
    P,  # (R, D), read if WITH_X, as are S, COLUMNS, ROW_SUMS and BACK
    S,  # ()
    ROWS,  # (2, B) fp32
    COLUMNS,  # (5, RPAD) fp32
    G,  # (B, RPAD), see residual_kernel
    ROW_SUMS,  # (B,) fp32
    BACK,  # () fp32, see residual_kernel
    DX,  # (B, D) out if WITH_X, dtype of X
    SUMS,  # (chunks, RPAD, D) fp32 out: sum_i G_ic x^_i over each chunk of images
    B, R, x_stride, p_stride, tiles,
    D: tl.constexpr, RPAD: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    WITH_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (j, i, k): dimensions j BD .., `tiles` tiles of BK images from i on, ranks k BR ...

    WITH_X (BR = RPAD): also what image_gradient_kernel does, while x and G are here.
    """
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    if WITH_X:
        p = _unit(P, ranks, columns, tl.load(COLUMNS + 3 * RPAD + ranks), R, p_stride, D, BD).to(G.dtype.element_ty)
    sums = tl.zeros([BR, BD], tl.float32)
    for t in range(0, tiles):
        rows = (tl.program_id(1) * tiles + t) * BK + tl.arange(0, BK)
        g = tl.load(G + rows.to(tl.int64)[:, None] * RPAD + ranks[None, :], mask=(rows < B)[:, None], other=0.0)
        rx = tl.load(ROWS + B + rows, mask=rows < B, other=0.0)
        x = _unit(X, rows, columns, rx, B, x_stride, D, BD)
        sums = tl.dot(tl.trans(g), x.to(g.dtype), sums, input_precision=PRECISION)
        if WITH_X:
            dx = tl.dot(g, p, input_precision=PRECISION)
            r = tl.load(ROW_SUMS + rows, mask=rows < B, other=0.0)
            _store_dx(DX, dx, x, r, rx * (tl.load(S).to(tl.float32) * tl.load(BACK)), rows, columns, B, D)
    at = SUMS + (tl.program_id(1) * RPAD + ranks)[:, None] * D + columns[None, :]
    tl.store(at, sums, mask=(columns < D)[None, :])


@triton.jit(do_not_specialize=["chunks", "programs"])
def prototype_gradient_kernel(
    P,  # (R, D)
    S,  # ()
    COLUMNS,  # (5, RPAD) fp32
    SUMS,  # (chunks, RPAD, D) fp32, see rank_sums_kernel; read if NEED_P
    DS_PARTS,  # (programs,) fp32, see residual_kernel; read if NEED_S
    BACK,  # () fp32, see residual_kernel
    DP,  # (R, D) out, dtype of P
    DS,  # () out, dtype of S
    p_stride, chunks, programs,
    D: tl.constexpr, RPAD: tl.constexpr, DPAD: tl.constexpr, NEED_P: tl.constexpr, NEED_S: tl.constexpr,
):  # fmt: skip
    """Program c owns rank c, whole, so that q_c = <sum_i G_ic x^_i, p^_c> costs nothing more."""
    rank = tl.program_id(0).to(tl.int64)
    back = tl.load(BACK)
    if NEED_P:
        columns = tl.arange(0, DPAD)
        inside = columns < D
        parts = tl.zeros([16, DPAD], tl.float32)
        for i in range(0, chunks, 16):  # chunks read at once
            chunk = i + tl.arange(0, 16)
            at = SUMS + (chunk * RPAD + rank)[:, None] * D + columns[None, :]
            parts += tl.load(at, mask=(chunk < chunks)[:, None] & inside[None, :], other=0.0)
        sums = tl.sum(parts, 0)
        rp = tl.load(COLUMNS + 3 * RPAD + rank)
        p = tl.load(P + rank * p_stride + columns, mask=inside, other=0.0).to(tl.float32) * rp
        dp = (sums - tl.sum(sums * p) * p) * (rp * (tl.load(S).to(tl.float32) * back))
        tl.store(DP + rank * D + columns, dp.to(DP.dtype.element_ty), mask=inside)
    if NEED_S:
        if tl.program_id(0) == 0:
            ds = tl.zeros([1024], tl.float32)
            for i in range(0, programs, 1024):
                part = i + tl.arange(0, 1024)
                ds += tl.load(DS_PARTS + part, mask=part < programs, other=0.0)
            tl.store(DS, (tl.sum(ds) * back).to(DS.dtype.element_ty))


@triton.jit(do_not_specialize=["B"])
def match_kernel(
    X,  # (B, D)
    P,  # (R, D)
    S,  # ()
    PROBS,  # (B, R) fp32 out
    EXPECTED,  # (B,) fp32 out
    ARGMAX,  # (B,) int64 out
    B, R, x_stride, p_stride,
    D: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, RPAD: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program i owns images i BM .. and all ranks; logits wait in PROBS until their sum is known."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    s = tl.load(S).to(tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    best = tl.zeros([BM], tl.int32)
    at = PROBS + rows.to(tl.int64)[:, None] * R
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        cosines, _, _ = _cosines(
            X, P, P, rows, ranks, B, R, x_stride, p_stride, D, BM, BR, BK, False, PRECISION, UPCAST
        )
        a = tl.where((ranks < R)[None, :], cosines * s, float("-inf"))
        tl.store(at + ranks[None, :], a, mask=(rows < B)[:, None] & (ranks < R)[None, :])
        top = tl.max(a, 1)
        best = tl.where(top > m, c + tl.argmax(a, 1), best)
        new = tl.maximum(m, top)
        e = _exp(a - new[:, None])
        l = l * _exp(m - new) + tl.sum(e, 1)
        mean = mean * _exp(m - new) + tl.sum(e * ranks.to(tl.float32)[None, :], 1)
        m = new
    tl.store(EXPECTED + rows, mean / l, mask=rows < B)
    tl.store(ARGMAX + rows, best.to(tl.int64), mask=rows < B)
    tl.debug_barrier()
    for c in range(0, RPAD, BR):
        ranks = c + tl.arange(0, BR)
        mask = (rows < B)[:, None] & (ranks < R)[None, :]
        a = tl.load(at + ranks[None, :], mask=mask, other=0.0)
        tl.store(at + ranks[None, :], _exp(a - m[:, None]) / l[:, None], mask=mask)


# --- launchers ------------------------------------------------------------------------------------

INTERPRET = not isinstance(forward_kernel, triton.JITFunction)
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
HOPPER = 9
AT_ONCE = 4096  # images up to which forward and backward are one launch each
MOST_CHUNKS = 32  # of images, whose dP and ds the last program of that launch adds up one by one
RESIDUAL_TILE = 32, 128  # BM and at most BR of residual_kernel
_counters = {}  # (device, stream) -> int32 zeros
_groups = {}  # name -> process group: an operator takes strings, not groups


def forward_config(B, R, D, kind, generation):
    """(BM, BR, BK, num_warps, num_stages) of forward_kernel and match_kernel; kind: see _kind."""
    BR = 64 if R <= 64 else 128
    if kind == "ieee":
        return 16, BR if R <= 128 else 64, 16, 4, 2
    if kind != "half":
        return 16, 64 if kind == "tf32x3" and R > 128 else BR, 16, 8, 2
    if D % 64:  # rows that cannot be copied 16 bytes at a time
        return 16, BR if R <= 128 else 64, 32, 8, 3
    if B <= 2048:  # many small programs
        return 16 if R <= 128 else 32, BR, 64, 8, 3
    if generation in (10, 11):  # no tiles of 64, see _cosines
        return 32, BR, 64, 8, 3
    if R <= 128:
        return 64, BR, 64, BR // 16, 3
    return (64, 128, 64, 8, 3) if generation == HOPPER else (64, 64, 64, 8, 3)


def backward_config(B, R, D, kind, generation):
    """(BM, BD, num_warps, num_stages) of backward_kernel."""
    if kind != "half":
        return 16, 16, 8, 1
    BM = 32 if B <= 2048 else 64
    return (BM, 64, 8, 1) if generation == HOPPER and D % 64 == 0 else (BM, 32, 8, 2)


def image_gradient_config(R, D, kind):
    """(BM, BD, BK, num_warps, num_stages) of image_gradient_kernel; rows of odd length are read element by element."""
    if kind != "half":
        return 64, 128, 16, 8, 2
    return (128, 64, 64, 4, 3) if R <= 128 or D % 2 else (128, 128, 64, 8, 2)


def rank_sums_config(kind, with_x, generation):
    """(BR at most, BD, BK, num_warps, num_stages) of rank_sums_kernel."""
    if with_x and generation != HOPPER:
        return 128, 64, 32, 8, 3
    return (128, 128, 64, 8, 3) if kind == "half" else (64, 128, 16, 8, 2)


@functools.cache
def gpu_generation(device):
    """The first number of the compute capability."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _launch(kernel, grid, *args, warps, stages, **constants):
    """`debug` keeps device_assert: labels are checked by the kernel itself, at no launch."""
    kernel[grid](
        *args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True, debug=True,
        sanitize_overflow=False,
    )  # fmt: skip


def _precision():
    """input_precision of fp32 dots: what torch.set_float32_matmul_precision says."""
    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # it was set through the newer torch.backends...fp32_precision
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _dots(x, p):
    """How to multiply; different dtypes meet in fp32."""
    upcast = x.dtype != p.dtype or (INTERPRET and x.dtype == torch.bfloat16)
    return dict(PRECISION=_precision(), UPCAST=upcast)


def _kind(x, p):
    """What limits the tiles: "half", or the fp32 precision, whose operands take more registers."""
    return "half" if x.dtype == p.dtype != torch.float32 else _precision()


def _rows(x):
    """Rows may be any distance apart, their elements not."""
    return x if x.stride(1) == 1 else x.contiguous()


def _zeros(device, count, shared):
    """int32 counters, zero before and after each kernel. Launches on one stream take turns and share
    a buffer. A graph may be replayed beside others and keeps its own, and so does compiled code, which
    torch.compile(mode="reduce-overhead") runs once in a memory pool where nothing may stay behind."""
    cuda = device.type == "cuda"
    if not shared or (cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    counters = _counters.get((device, stream))
    if counters is None or len(counters) < count:
        size = max(1024, triton.next_power_of_2(count))
        _counters[device, stream] = counters = torch.zeros(size, dtype=torch.int32, device=device)
    return counters


def _on(x):
    """Triton launches on the current device, PyTorch operators where their tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _cdiv(a, b):
    """a / b rounded up; triton.cdiv checks its arguments for 2 us each time."""
    return -(-a // b)


def _split(tiles, most):
    """(chunks, tiles of each): at most `most` chunks, the last may be shorter."""
    each = _cdiv(tiles, max(min(tiles, most), 1))
    return _cdiv(tiles, each), each


def _padded(R):
    """RPAD: R rounded up to whole tiles of any configuration."""
    return 64 if R <= 64 else _cdiv(R, 128) * 128


def _sizes(x, p):
    """B, R, D, RPAD, and what tiles go by besides: kind of dots, generation of GPU."""
    R = int(p.shape[0])
    return len(x), R, x.shape[1], _padded(R), _kind(x, p), gpu_generation(x.device)


def _saved(x, R, RPAD, save):
    """COSINES, ROWS, COLUMNS, COUNTS, I2T, T2I, not filled in."""
    B, empty = x.shape[0] if save else 0, dict(dtype=torch.float32, device=x.device)
    shapes = ((B, _cdiv(R, 16) * 16), (2, B), (5, RPAD), (2,), (), ())
    return tuple(torch.empty(shape, **empty) for shape in shapes)


def forward(x, p, y, s, smooth, save, shared, group):
    """(cosines, rows, columns, counts, i2t, t2i), see forward_kernel; group: a key of _groups or ""."""
    x, p, y = _rows(x), _rows(p), y.contiguous()
    B, R, D, RPAD, kind, generation = _sizes(x, p)
    BM, BR, BK, warps, stages = forward_config(B, R, D, kind, generation)
    saved = cosines, rows, columns, counts, i2t, t2i = _saved(x, R, RPAD, save)
    programs = _cdiv(B, BM)
    group_size = max(programs, 1) if programs <= 16 else triton.next_power_of_2(math.isqrt(programs))
    groups = _cdiv(programs, group_size)
    parts = torch.empty(programs + groups + 1, 6, RPAD, dtype=torch.float32, device=x.device)
    options = dict(RPAD=RPAD, BR=BR, SMOOTH=smooth, warps=warps, stages=stages)
    alone, prepared = programs == 1, B > AT_ONCE
    with _on(x):
        if prepared:
            _prepare(p, y, columns)
        if B:
            _launch(
                forward_kernel, (programs,), x, p, y, s, *saved, parts,
                parts if alone else _zeros(x.device, 1 + groups, shared),
                B, R, x.stride(0), p.stride(0), cosines.stride(0), group_size, D=D, BM=BM, BK=BK, PREPARED=prepared,
                SAVE=save, ALONE=alone, FINISH=not group, **_dots(x, p), **options,
            )  # fmt: skip
        else:  # the part of no images
            parts.zero_()[:, 0] = float("-inf")
            columns.zero_()
        if group:
            parts = _gather(parts[-1], _groups[group])
        if group or not B:
            outputs = columns, counts, i2t, t2i
            _launch(finish_kernel, (1,), parts, *outputs, len(parts), R, **options)
    return saved


def _prepare(p, y, columns):
    """1/|p_c| into columns[3], and a look at the labels."""
    (R, D), RPAD = p.shape, columns.shape[1]
    DPAD = triton.next_power_of_2(D)
    _launch(
        prepare_kernel, (RPAD,), p, y, columns, len(y), R, p.stride(0), D=D, RPAD=RPAD, DPAD=DPAD, warps=4, stages=1
    )


def _gather(part, group):
    """(6, RPAD) of this process -> (processes, 6, RPAD), the only communication there is."""
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather_into_tensor(parts.view(-1), part.view(-1), group=group)
    return parts


def backward(g_i2t, g_t2i, x, p, y, s, cosines, rows, columns, counts, smooth, shared,
             need_x, need_p, need_s):  # fmt: skip
    """(dx (B, D), dp (R, D), ds ()), empty where not needed."""
    x, p, y = _rows(x), _rows(p), y.contiguous()
    needs = (x, need_x), (p, need_p), (s, need_s)
    grads = dx, dp, ds = tuple(t.new_empty(t.shape if need else 0) for t, need in needs)
    if not len(x):
        return dx, dp.zero_(), ds.zero_()
    flags = dict(HAS_I2T=g_i2t is not None, HAS_T2I=g_t2i is not None, SMOOTH=smooth)
    inputs = x, p, y, s, cosines, rows, columns, counts, g_i2t, g_t2i
    at_once = len(x) <= AT_ONCE and len(p) <= (64 if _kind(x, p) == "tf32x3" else 128)
    with _on(x):
        if at_once:
            _backward_at_once(inputs, grads, flags, shared, need_x, need_p, need_s)
        else:
            _backward_in_steps(inputs, grads, flags, need_x, need_p, need_s)
    return grads


def _backward_at_once(inputs, grads, flags, shared, need_x, need_p, need_s):
    """One launch of backward_kernel; each slice of D computes G again."""
    x, p, _, s, cosines, *_ = inputs
    B, R, D, RPAD, kind, generation = _sizes(x, p)
    BM, BD, warps, stages = backward_config(B, R, D, kind, generation)
    slices = _cdiv(D, BD) if need_x or need_p else 1
    chunks, tiles = _split(_cdiv(B, BM), min(_multiprocessors(x.device) // slices, MOST_CHUNKS))  # one fits on each
    alone = chunks == 1
    parts = s.new_empty(0 if alone else chunks * (RPAD * D + 16), dtype=torch.float32)
    counters = parts if alone else _zeros(x.device, slices, shared)
    _launch(
        backward_kernel, (slices, chunks), *inputs, *grads, parts, counters, B, R, x.stride(0), p.stride(0),
        cosines.stride(0), tiles, D=D, BM=BM, RPAD=RPAD, BD=BD, NEED_X=need_x, NEED_P=need_p, NEED_S=need_s,
        ALONE=alone, **flags, **_dots(x, p), warps=warps, stages=stages,
    )  # fmt: skip


def _backward_in_steps(inputs, grads, flags, need_x, need_p, need_s):
    """G once, in memory; two products with it; the sum over chunks of images. Inputs and grads as in `backward`."""
    x, p, y, s, cosines, rows, columns, counts, g_i2t, g_t2i = inputs
    dx, dp, ds = grads
    B, R, D, RPAD, kind, generation = _sizes(x, p)
    dots = _dots(x, p)
    dtype = torch.float32 if dots["UPCAST"] else x.dtype
    shape, strides = dict(D=D, RPAD=RPAD), (x.stride(0), p.stride(0))

    BM, BR = RESIDUAL_TILE
    programs, store = _cdiv(B, BM), need_x or need_p
    g = x.new_empty(B * store, RPAD, dtype=dtype)
    row_sums, ds_parts, back = (s.new_empty(shape, dtype=torch.float32) for shape in (B, programs, ()))
    _launch(
        residual_kernel, (programs,), *inputs[2:], g, row_sums, ds_parts, back, B, R, cosines.stride(0),
        BM=BM, BR=min(RPAD, BR), RPAD=RPAD, STORE=store, **flags, warps=8, stages=1,
    )  # fmt: skip
    together = need_x and need_p and R <= 128 and kind == "half"
    if need_x and not together:
        BM, BD, BK, warps, stages = image_gradient_config(R, D, kind)
        _launch(
            image_gradient_kernel, (_cdiv(B, BM) * _cdiv(D, BD),), x, p, s, rows, columns, g, row_sums, back, dx,
            B, R, *strides, BM=BM, BD=BD, BK=BK, **shape, PRECISION=dots["PRECISION"], warps=warps, stages=stages,
        )  # fmt: skip
    chunks, sums = 0, ds_parts
    if need_p:
        BR, BD, BK, warps, stages = rank_sums_config(kind, together, generation)
        BR = min(BR, RPAD)
        slices, rank_tiles = _cdiv(D, BD), RPAD // BR
        fit = _multiprocessors(x.device) * (1 if together else 2)  # programs that run at once
        chunks, tiles = _split(_cdiv(B, BK), fit // (slices * rank_tiles))
        sums = s.new_empty(chunks, RPAD, D, dtype=torch.float32)
        _launch(
            rank_sums_kernel, (slices, chunks, rank_tiles), x, p, s, rows, columns, g, row_sums, back, dx, sums,
            B, R, *strides, tiles, BR=BR, BD=BD, BK=BK, **shape, WITH_X=together, PRECISION=dots["PRECISION"],
            warps=warps, stages=stages,
        )  # fmt: skip
    if need_p or need_s:
        DPAD = triton.next_power_of_2(D)
        _launch(
            prototype_gradient_kernel, (R if need_p else 1,), p, s, columns, sums, ds_parts, back, dp, ds,
            p.stride(0), chunks, programs, DPAD=DPAD, **shape, NEED_P=need_p, NEED_S=need_s,
            warps=16, stages=1,
        )  # fmt: skip


def probabilities(x, p, s):
    """(probs, expected, argmax), see match_kernel."""
    x, p = _rows(x), _rows(p)
    B, R, D, RPAD, kind, generation = _sizes(x, p)
    BM, BR, BK, warps, stages = forward_config(B, R, D, kind, generation)
    out = _answers(x, p)
    if B:
        with _on(x):
            _launch(
                match_kernel, (_cdiv(B, BM),), x, p, s, *out, B, R, x.stride(0), p.stride(0),
                D=D, BM=BM, BR=BR, RPAD=RPAD, BK=BK, **_dots(x, p), warps=warps, stages=stages,
            )  # fmt: skip
    return out


def _answers(x, p):
    B, R = x.shape[0], p.shape[0]  # len() would fix them under torch.compile
    floats = dict(dtype=torch.float32, device=x.device)
    argmax = torch.empty(B, dtype=torch.int64, device=x.device)
    return torch.empty(B, R, **floats), torch.empty(B, **floats), argmax


# --- autograd, eagerly ----------------------------------------------------------------------------


class _Matching(torch.autograd.Function):
    """The launchers with nothing between: at small B the host decides, and an operator costs it twice as much."""

    @staticmethod
    def forward(ctx, x, p, y, s, *flags):
        *saved, i2t, t2i = forward(x, p, y, s, *flags)
        ctx.smooth, _, ctx.shared, _ = flags
        ctx.save_for_backward(x, p, y, s, *saved)
        ctx.set_materialize_grads(False)
        return i2t, t2i

    @staticmethod
    def backward(ctx, g_i2t, g_t2i):
        # with create_graph the operator, which says that it has no derivative; compiled autograd traces
        direct = not torch.is_grad_enabled() and _eager(*ctx.saved_tensors)
        return _gradients(ctx, g_i2t, g_t2i, backward if direct else _backward)


def _eager(*tensors):
    """Nobody compiles or traces, and tensors are plain: the launchers can take them as they are."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    )


# --- operators, for torch.compile and whoever else traces -----------------------------------------


def _operator(name, schema, implementation, fake):
    """Opaque to torch.compile, which sees shapes only, so counters and scratch stay out of its plans."""
    name = f"{__name__.replace('.', '_')}::{name}"  # copies in two packages do not meet
    operator = torch.library.custom_op(name, implementation, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _forward_fake(x, p, y, s, smooth, save, shared, group):
    R = int(p.shape[0])
    return _saved(x, R, _padded(R), save)


def _backward_fake(g_i2t, g_t2i, x, p, y, s, cosines, rows, columns, counts, smooth, shared, *needs):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, p, s), needs))


_forward = _operator(
    "matching_forward",
    "(Tensor x, Tensor p, Tensor y, Tensor s, bool smooth, bool save, bool shared, str group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    _forward_fake,
)
_backward = _operator(
    "matching_backward",
    "(Tensor? g_i2t, Tensor? g_t2i, Tensor x, Tensor p, Tensor y, Tensor s,"
    " Tensor cosines, Tensor rows, Tensor columns, Tensor counts, bool smooth,"
    " bool shared, bool need_x, bool need_p, bool need_s)"
    " -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
_match = _operator(
    "matching_probabilities",
    "(Tensor x, Tensor p, Tensor s) -> (Tensor, Tensor, Tensor)",
    probabilities,
    lambda x, p, s: _answers(x, p),
)


def _save(ctx, inputs, output):
    x, p, y, s, ctx.smooth, _, ctx.shared, _ = inputs
    ctx.save_for_backward(x, p, y, s, *output[:4])
    ctx.set_materialize_grads(False)


def _gradients(ctx, g_i2t, g_t2i, compute):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if g_i2t is None and g_t2i is None:
        return (None,) * 8
    grads = compute(g_i2t, g_t2i, *ctx.saved_tensors, ctx.smooth, ctx.shared, *needs)
    dx, dp, ds = (grad if need else None for grad, need in zip(grads, needs))
    return dx, dp, None, ds, None, None, None, None


def _operator_gradients(ctx, _cosines, _rows, _columns, _counts, g_i2t, g_t2i):
    return _gradients(ctx, g_i2t, g_t2i, _backward)


def _none(ctx, *grads):
    raise RuntimeError("no such gradient with impl='triton'; use impl='torch'")


_forward.register_autograd(_operator_gradients, setup_context=_save)
_backward.register_autograd(_none)  # no second derivatives
_match.register_autograd(_none)


def matching_loss(image_features, prototypes, labels, scale, *, target="normalized", group=None):
    """As `reference.matching_loss`, fused; see there."""
    tensors = image_features, prototypes, labels, scale
    save = _tracked(tensors)
    name = "" if group is None else group.group_name
    if group is not None:
        _groups[name] = group
    flags = target == "softmax10", save, not torch.compiler.is_compiling(), name
    if _eager(*tensors):
        return _Matching.apply(*tensors, *flags)
    *_, i2t, t2i = _forward(*tensors, *flags)
    return i2t, t2i


def match(image_features, prototypes, scale):
    """As `reference.match`, fused and without gradients; see there."""
    tensors = image_features, prototypes, scale
    direct = _eager(*tensors) and not _tracked(tensors)  # else the operator, which says that it has no gradient
    return (probabilities if direct else _match)(*tensors)


def _tracked(tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
