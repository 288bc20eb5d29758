"""The Triton kernels of the matching op: forward, finish, backward, and match for prediction.

Formulas, and the symbols B, R, D, x_i, p_c, y_i, s, A_ic, n_c, hi_c, lo_c, V: `reference.py`.
Launched by `matching_triton.py`. R is at most RPAD = 64 or 128, so that a tile holds all ranks.

Forward: a program per tile of BM images. Along D it sums <x_i, p_c>, |x_i|^2 and |p_c|^2 together,
so that normalising costs no pass of its own. It leaves the cosines C_ic = A_ic / s, three numbers a
row, and a few numbers a column: one part, (7, RPAD), of

    0 max_i A_ic   1, 2 sum of exp(A_ic - max) over images of rank c, and over the others
    3 sum of A_ic - max over images of rank c   4 sum_i A_ic   5 n_c (int32)
    6 [sum of the row losses, number of images (int32)]

Finish: merges the parts, a program per 16 ranks; the last one to arrive writes both losses. With a
process group it first merges a process's parts into one, and then those of all processes.

Backward: each program computes G again from the cosines, for its slice of BD dimensions and its
chunk of images; the last one to arrive adds the chunks up in index order. r and q are sums over
ranks and images, not over D, so a slice needs no other.

    G_ic = B dL/dA_ic = g_i2t (p_ic - [y_i=c])                              p: softmax of the row
                      + g_t2i B/|V| [c in V] (q_ic - lo_c - [y_i=c] (hi_c - lo_c))  q: of a column
    r_i = sum_c G_ic C_ic                         q_c = sum_i G_ic C_ic
    dx_i = s / (B |x_i|) (sum_c G_ic p^_c - r_i x^_i)       x^, p^: divided by their length
    dp_c = s / (B |p_c|) (sum_i G_ic x^_i - q_c p^_c)       ds = 1/B sum_i r_i

A softmax is exp(A - max) times 1/sum, kept apart: the rounding of a log-sum-exp near 100 would be
an error of 4e-6 in each probability. At c = y_i, p - 1 is minus the sum of the other p, so that the
gradient of a row is as exact at a loss of 1e-8 as at 1. In a column, with E = exp(A_ic - max) and
h_c its mean over the images of rank c, q - hi = (E - h_c)/sum - (share of the other images)/n_c.

Only integers are added atomically, so results repeat bit for bit.
Needs triton>=3.6 and an NVIDIA GPU from compute capability 8.0 on, or TRITON_INTERPRET=1.
"""

import triton
import triton.language as tl

ZERO = tl.constexpr(1e-24)  # squared length below which a vector counts as zero: reference.EPS ** 2
E10 = tl.constexpr(22026.465794806718)  # e^10 of target="softmax10"
LOG2E = tl.constexpr(1.4426950408889634)
NEAR = tl.constexpr(1e-12)  # sums of exp(A - max) below it: another formula, nothing cancels
FP16_ROOM = tl.constexpr(2.5e4)  # G is scaled to at most twice this: fp16 is 6e-8 to 65504


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # bfloat16 in the interpreter, which multiplies its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _exp(x):
    """tl.exp also takes care of results below 1e-38, at three instructions more."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, exact where x is lost beside 1 (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _load(X, rows, columns, B, stride, D: tl.constexpr, BD: tl.constexpr, OPERAND: tl.constexpr):
    """Tile of a (B, D) matrix in the dtype of the dots, zero outside."""
    inside = (rows < B)[:, None]
    if D % BD:
        inside = inside & (columns < D)[None, :]
    at = X + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _squares(a, ROWS: tl.constexpr, BK: tl.constexpr):
    """(ROWS, BK) -> (ROWS, BK / 4): sums within a thread; whole rows would take shuffles."""
    a = a.to(tl.float32)
    return tl.sum(tl.reshape(a * a, [ROWS, BK // 4, 4]), 2)


@triton.jit
def _inverse(squares):
    """1/|a| of squared lengths, 0 for zero vectors."""
    return tl.where(squares > ZERO, tl.rsqrt(tl.maximum(squares, ZERO)), 0.0)


@triton.jit
def _cosines(X, P, rows, ranks, B, R, x_stride, p_stride, D: tl.constexpr, BM: tl.constexpr,
             RPAD: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """C (BM, RPAD) between rows of X (B, D) and of P (R, D), 1/|x| (BM,) and 1/|p| (RPAD,)."""
    acc = tl.zeros([BM, RPAD], tl.float32)
    xx = tl.zeros([BM, BK // 4], tl.float32)
    pp = tl.zeros([RPAD, BK // 4], tl.float32)
    for k in range(0, D, BK):
        columns = k + tl.arange(0, BK)
        x = _load(X, rows, columns, B, x_stride, D, BK, OPERAND)  # (BM, BK)
        p = _load(P, ranks, columns, R, p_stride, D, BK, OPERAND)  # (RPAD, BK)
        xx += _squares(x, BM, BK)
        pp += _squares(p, RPAD, BK)
        acc = _dot(x, tl.trans(p), acc, PRECISION, UPCAST)
    rx, rp = _inverse(tl.sum(xx, 1)), _inverse(tl.sum(pp, 1))
    return acc * rx[:, None] * rp[None, :], rx, rp


@triton.jit
def _arrive(COUNTER):
    """Number of programs that came before; what they stored until then can be read with `.cg`.

    The barriers make one thread's atomic speak for, and hold back, all threads of the program.
    """
    tl.debug_barrier()
    before = tl.atomic_add(COUNTER, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit(do_not_specialize=["B", "R"])
def forward_kernel(
    X,  # (B, D) features, rows x_stride apart
    P,  # (R, D) prototypes
    Y,  # (B,) labels, int64 or int32
    S,  # () scale, fp32
    COSINES,  # (B, cosine_stride) fp32 out, columns R.. unspecified
    ROWS,  # (3, B) fp32 out: max_c A_ic, 1 / sum_c exp(A_ic - max), 1/|x_i|
    COLUMNS,  # (6, RPAD) fp32 out, row 5: 1/|p_c|; the others: finish_kernel
    PARTS,  # (programs, 7, RPAD) fp32 out, see above
    COUNTERS,  # (SLICES,) int32 out: zeros, as the kernels that follow leave them
    B, R, x_stride, p_stride, cosine_stride,
    D: tl.constexpr, BM: tl.constexpr, RPAD: tl.constexpr, BK: tl.constexpr, SMOOTH: tl.constexpr,
    SLICES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program i owns images i BM .. and all ranks."""
    program = tl.program_id(0)
    rows = program * BM + tl.arange(0, BM)
    ranks = tl.arange(0, RPAD)
    inside = rows < B
    s = tl.load(S)
    label = tl.load(Y + rows, mask=inside, other=-1)
    y = tl.where((label >= 0) & (label < R), label.to(tl.int32), -1)  # of no rank: finish_kernel
    cosines, rx, rp = _cosines(
        X, P, rows, ranks, B, R, x_stride, p_stride, D, BM, RPAD, BK, OPERAND, PRECISION, UPCAST
    )
    at = COSINES + rows.to(tl.int64)[:, None] * cosine_stride + ranks[None, :]
    tl.store(at, cosines, mask=inside[:, None] & (ranks < cosine_stride)[None, :])
    if program == 0:
        tl.store(COLUMNS + 5 * RPAD + ranks, rp)
        tl.store(COUNTERS + tl.arange(0, SLICES), 0)

    a = cosines * s
    hit = y[:, None] == ranks[None, :]
    by_row = tl.where((ranks < R)[None, :], a, float("-inf"))
    m = tl.max(by_row, 1)
    others = tl.sum(tl.where(hit, 0.0, _exp(by_row - m[:, None])), 1)
    own = tl.sum(tl.where(hit, a, 0.0), 1)
    own_exp = _exp(own - m)
    loss = tl.where(own == m, _log1p(others), m - own + tl.log(others + own_exp))
    loss = tl.sum(tl.where(y >= 0, loss, 0.0))
    tl.store(ROWS + rows, m, mask=inside)
    tl.store(ROWS + B + rows, 1.0 / (others + tl.where(y >= 0, own_exp, 0.0)), mask=inside)
    tl.store(ROWS + 2 * B + rows, rx, mask=inside)

    by_column = tl.where(inside[:, None], a, float("-inf"))
    top = tl.max(by_column, 0)
    by_column -= top[None, :]
    e = _exp(by_column)
    part = PARTS + program.to(tl.int64) * (7 * RPAD)
    tl.store(part + ranks, top)
    tl.store(part + RPAD + ranks, tl.sum(tl.where(hit, e, 0.0), 0))
    tl.store(part + 2 * RPAD + ranks, tl.sum(tl.where(hit, 0.0, e), 0))
    tl.store(part + 3 * RPAD + ranks, tl.sum(tl.where(hit, by_column, 0.0), 0))
    if SMOOTH:
        tl.store(part + 4 * RPAD + ranks, tl.sum(a, 0))  # rows outside have cosine 0
    count = tl.histogram(y, RPAD, mask=y >= 0)  # tl.sum(hit, 0) takes 90 registers more
    tl.store(part + 5 * RPAD + ranks, count.to(tl.float32, bitcast=True))
    tl.store(part + 6 * RPAD, loss)
    tl.store(part + 6 * RPAD + 1, tl.minimum(B - program * BM, BM).to(tl.float32, bitcast=True))


@triton.jit
def _parts(PARTS, first, row, ranks, count, empty, RPAD: tl.constexpr, CHUNK: tl.constexpr):
    """Row `row` of parts first .. first + CHUNK - 1 at these ranks: (CHUNK, ranks)."""
    part = first + tl.arange(0, CHUNK)
    at = PARTS + part.to(tl.int64)[:, None] * (7 * RPAD) + row * RPAD + ranks[None, :]
    return tl.load(at, mask=(part < count)[:, None], other=empty)


@triton.jit(do_not_specialize=["count", "R"])
def finish_kernel(
    PARTS,  # (count, 7, RPAD) fp32, see above
    MERGED,  # (7, RPAD) fp32 out: one part of all; written unless FINISH
    COLUMNS,  # (6, RPAD) fp32 out: max_i A_ic (inf where c not in V), 1 / sum_i exp(A_ic - max);
    # q_ic - target is (E - row 2) row 1 - row 3 where y_i = c, E row 1 - row 4 elsewhere
    COUNTS,  # (2,) fp32 out: B, |V|, over all processes
    I2T,  # () fp32 out
    T2I,  # () fp32 out
    SUMS,  # (3, programs) fp32 scratch: t2i, |V|, labelled images (int32) of each program
    COUNTER,  # int32, zero before and after
    count, R, RPAD: tl.constexpr, SMOOTH: tl.constexpr, FINISH: tl.constexpr,
    RANKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program c owns ranks c RANKS ..; the last one to arrive owns the rest. See top for FINISH."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    ranks = program * RANKS + tl.arange(0, RANKS)
    tops = tl.full([CHUNK, RANKS], float("-inf"), tl.float32)
    for i in range(0, count, CHUNK):
        tops = tl.maximum(tops, _parts(PARTS, i, 0, ranks, count, float("-inf"), RPAD, CHUNK))
    top = tl.max(tops, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)  # where there are no images
    own = tl.zeros([CHUNK, RANKS], tl.float32)
    other, positive, total, n = own, own, own, tl.zeros([CHUNK, RANKS], tl.int32)
    for i in range(0, count, CHUNK):
        m = _parts(PARTS, i, 0, ranks, count, float("-inf"), RPAD, CHUNK) - shift[None, :]
        own += _parts(PARTS, i, 1, ranks, count, 0.0, RPAD, CHUNK) * _exp(m)
        other += _parts(PARTS, i, 2, ranks, count, 0.0, RPAD, CHUNK) * _exp(m)
        images = _parts(PARTS, i, 5, ranks, count, 0.0, RPAD, CHUNK).to(tl.int32, bitcast=True)
        positive += _parts(PARTS, i, 3, ranks, count, 0.0, RPAD, CHUNK)
        positive += tl.where(images > 0, images.to(tl.float32) * m, 0.0)
        if SMOOTH:
            total += _parts(PARTS, i, 4, ranks, count, 0.0, RPAD, CHUNK)
        n += images
    own, other, positive = tl.sum(own, 0), tl.sum(other, 0), tl.sum(positive, 0)
    total, n = tl.sum(total, 0), tl.sum(n, 0)

    row_loss = tl.zeros([512], tl.float32)
    images = tl.zeros([512], tl.int32)
    for i in range(0, count, 512):
        part = i + tl.arange(0, 512)
        at = PARTS + part.to(tl.int64) * (7 * RPAD) + 6 * RPAD
        row_loss += tl.load(at, mask=part < count, other=0.0)
        images += tl.load(at + 1, mask=part < count, other=0.0).to(tl.int32, bitcast=True)
    row_loss, images = tl.sum(row_loss), tl.sum(images)

    if not FINISH:
        tl.store(MERGED + ranks, top)
        tl.store(MERGED + RPAD + ranks, own)
        tl.store(MERGED + 2 * RPAD + ranks, other)
        tl.store(MERGED + 3 * RPAD + ranks, positive)
        tl.store(MERGED + 4 * RPAD + ranks, total)
        tl.store(MERGED + 5 * RPAD + ranks, n.to(tl.float32, bitcast=True))
        tl.store(MERGED + 6 * RPAD, row_loss)  # the same in all programs
        tl.store(MERGED + 6 * RPAD + 1, images.to(tl.float32, bitcast=True))
    else:
        in_v = (n > 0) & (ranks < R)
        labelled = tl.sum(n)  # a label outside 0..R-1 counts for no rank
        n = tl.maximum(n, 1).to(tl.float32)
        l = tl.where(in_v, own + other, 1.0)
        if SMOOTH:
            num_images = images.to(tl.float32)
            lo = 1.0 / (n * E10 + (num_images - n))
            hi = lo * E10
            q_log_q = n * hi * tl.log(hi) + (num_images - n) * lo * tl.log(lo)
            cross = (hi - lo) * positive + lo * (total - num_images * top)
            divergence = q_log_q - cross + tl.log(l)
            mean, at_positives = n * 0.0, hi
        else:
            near = own > NEAR  # elsewhere nothing cancels, and the quotient may overflow
            safe = tl.where(near, own, 1.0)
            lse = tl.log(safe / n) + _log1p(other / safe)
            divergence = tl.where(near, lse, tl.log(l / n)) - positive / n
            mean, at_positives, lo = own / n, other / (n * l), n * 0.0
        tl.store(COLUMNS + ranks, tl.where(in_v, top, float("inf")))
        tl.store(COLUMNS + RPAD + ranks, tl.where(in_v, 1.0 / l, 0.0))
        tl.store(COLUMNS + 2 * RPAD + ranks, tl.where(in_v, mean, 0.0))
        tl.store(COLUMNS + 3 * RPAD + ranks, tl.where(in_v, at_positives, 0.0))
        tl.store(COLUMNS + 4 * RPAD + ranks, tl.where(in_v, lo, 0.0))
        tl.store(SUMS + program, tl.sum(tl.where(in_v, divergence, 0.0)))
        tl.store(SUMS + programs + program, tl.sum(in_v.to(tl.float32)))
        tl.store(SUMS + 2 * programs + program, labelled.to(tl.float32, bitcast=True))
        if _arrive(COUNTER) == programs - 1:
            tl.store(COUNTER, 0)
            each = tl.arange(0, RPAD // RANKS)
            t2i = tl.sum(tl.load(SUMS + each, cache_modifier=".cg"))
            present = tl.sum(tl.load(SUMS + programs + each, cache_modifier=".cg"))
            labels = tl.load(SUMS + 2 * programs + each, cache_modifier=".cg")
            valid = tl.sum(labels.to(tl.int32, bitcast=True)) == images
            tl.device_assert(valid, "kernels.matching_loss: a label is outside 0..R-1")
            # nan, too, since assertions may be off
            present = tl.where(valid, tl.maximum(present, 1.0), float("nan"))
            divisor = tl.where(valid, tl.maximum(images, 1).to(tl.float32), float("nan"))
            tl.store(I2T, row_loss / divisor)
            tl.store(T2I, t2i / present)
            tl.store(COUNTS, divisor)
            tl.store(COUNTS + 1, present)


@triton.jit
def _upstream(COUNTS, G_I2T, G_T2I):
    """Three scalars: what multiplies the two halves of G, and what undoes their scaling.

    Whatever the upstream gradients are, |G| is at most twice FP16_ROOM; small ones stay in fp16.
    """
    images = tl.load(COUNTS)
    per_rank = images / tl.load(COUNTS + 1)  # B / |V|
    i2t, t2i = tl.load(G_I2T), tl.load(G_T2I)
    top = tl.maximum(tl.abs(i2t), tl.abs(t2i))
    top = tl.where(top > 0, top, 1.0)
    room = FP16_ROOM / per_rank
    return i2t / top * room, t2i / top * FP16_ROOM, top / room / images


@triton.jit
def _residual(Y, S, COSINES, ROWS, COLUMNS, rows, ranks, B, R, cosine_stride, by_row, by_column,
              RPAD: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """G and C (BM, RPAD), zero outside."""
    inside = rows < B
    at = COSINES + rows.to(tl.int64)[:, None] * cosine_stride + ranks[None, :]
    cosines = tl.load(at, mask=inside[:, None] & (ranks < cosine_stride)[None, :], other=0.0)
    hit = tl.load(Y + rows, mask=inside, other=-1).to(tl.int32)[:, None] == ranks[None, :]
    valid = inside[:, None] & (ranks < R)[None, :]
    # a select, so that product and difference are not fused: the forward rounded the product
    a = tl.where(valid, cosines * tl.load(S), 0.0)
    m = tl.load(ROWS + rows, mask=inside, other=0.0)
    inverse = tl.load(ROWS + B + rows, mask=inside, other=0.0)
    p = _exp(a - m[:, None]) * inverse[:, None]
    p = tl.where(hit, 0.0, tl.where(valid, p, 0.0))
    q = _exp(a - tl.load(COLUMNS + ranks)[None, :])
    q -= tl.where(hit, tl.load(COLUMNS + 2 * RPAD + ranks)[None, :], 0.0)
    q *= tl.load(COLUMNS + RPAD + ranks)[None, :]
    q -= tl.where(hit, tl.load(COLUMNS + 3 * RPAD + ranks)[None, :], 0.0)
    if SMOOTH:
        q -= tl.where(hit, 0.0, tl.load(COLUMNS + 4 * RPAD + ranks)[None, :])
    g = by_row * tl.where(hit, -tl.sum(p, 1)[:, None], p) + by_column * q
    return tl.where(valid, g, 0.0), cosines


@triton.jit(do_not_specialize=["B", "R", "tiles"])
def backward_kernel(
    X,  # (B, D)
    P,  # (R, D)
    Y,  # (B,)
    S,  # ()
    COSINES,  # (B, cosine_stride) fp32
    ROWS,  # (3, B) fp32, see forward_kernel
    COLUMNS,  # (6, RPAD) fp32, see finish_kernel and, for row 5, forward_kernel
    COUNTS,  # (2,) fp32: B, |V|
    G_I2T,  # () fp32 gradient of i2t
    G_T2I,  # () fp32 gradient of t2i
    DX,  # (B, D) out, dtype of X
    DP,  # (R, D) out, dtype of P
    DS,  # () fp32 out
    PARTS,  # (chunks, RPAD D + 16) fp32 scratch: dP, then ds, of each chunk of images
    COUNTERS,  # (programs in axis 0,) int32, zero before and after
    B, R, x_stride, p_stride, cosine_stride, tiles,
    D: tl.constexpr, BM: tl.constexpr, RPAD: tl.constexpr, BD: tl.constexpr, SMOOTH: tl.constexpr,
    ALONE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (j, i): dimensions j BD .., `tiles` tiles of BM images from i on, all ranks."""
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    ranks = tl.arange(0, RPAD)
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    by_row, by_column, back = _upstream(COUNTS, G_I2T, G_T2I)
    back_s = back * tl.load(S)
    rp = tl.load(COLUMNS + 5 * RPAD + ranks)

    q = tl.zeros([RPAD], tl.float32)
    dp = tl.zeros([RPAD, BD], tl.float32)
    ds = 0.0
    for t in range(0, tiles):
        rows = (chunk * tiles + t) * BM + tl.arange(0, BM)
        g, cosines = _residual(
            Y, S, COSINES, ROWS, COLUMNS, rows, ranks, B, R, cosine_stride, by_row, by_column, RPAD,
            SMOOTH,
        )  # fmt: skip
        r = tl.sum(g * cosines, 1)
        ds += tl.sum(r)
        narrow = g.to(OPERAND)
        rx = tl.load(ROWS + 2 * B + rows, mask=rows < B, other=0.0)
        p = _load(P, ranks, columns, R, p_stride, D, BD, OPERAND).to(tl.float32) * rp[:, None]
        dx = tl.zeros([BM, BD], tl.float32)
        dx = _dot(narrow, p.to(OPERAND), dx, PRECISION, UPCAST)
        x = _load(X, rows, columns, B, x_stride, D, BD, OPERAND).to(tl.float32) * rx[:, None]
        dx = (dx - r[:, None] * x) * (rx * back_s)[:, None]
        at = DX + rows.to(tl.int64)[:, None] * D + columns[None, :]
        mask = (rows < B)[:, None] & (columns < D)[None, :]
        tl.store(at, dx.to(DX.dtype.element_ty), mask=mask)
        q += tl.sum(g * cosines, 0)
        dp = _dot(tl.trans(narrow), x.to(OPERAND), dp, PRECISION, UPCAST)

    at_dp = ranks[:, None] * D + columns[None, :]
    inside_dp = (ranks < R)[:, None] & (columns < D)[None, :]
    first_slice = tl.program_id(0) == 0  # ds is the same in all of a chunk but for rounding
    p = _load(P, ranks, columns, R, p_stride, D, BD, OPERAND).to(tl.float32) * rp[:, None]
    dp = (dp - q[:, None] * p) * (rp * back_s)[:, None]
    ds *= back
    last = chunk == 0
    if not ALONE:
        at = PARTS + chunk * (RPAD * D + 16)
        tl.store(at + at_dp, dp, mask=inside_dp)
        tl.store(at + RPAD * D, ds, mask=first_slice)
        counter = COUNTERS + tl.program_id(0)
        last = _arrive(counter) == chunks - 1
        if last:
            tl.store(counter, 0)
            dp = tl.zeros([RPAD, BD], tl.float32)
            ds = 0.0
            for i in tl.range(0, chunks, loop_unroll_factor=4):
                at = PARTS + i * (RPAD * D + 16)
                dp += tl.load(at + at_dp, mask=inside_dp, other=0.0, cache_modifier=".cg")
                ds += tl.load(at + RPAD * D, first_slice, 0.0, cache_modifier=".cg")
    if last:
        tl.store(DP + at_dp, dp.to(DP.dtype.element_ty), mask=inside_dp)
        tl.store(DS, ds, mask=first_slice)


@triton.jit(do_not_specialize=["B", "R"])
def match_kernel(
    X,  # (B, D)
    P,  # (R, D)
    S,  # ()
    PROBS,  # (B, R) fp32 out
    EXPECTED,  # (B,) fp32 out
    ARGMAX,  # (B,) int64 out
    B, R, x_stride, p_stride,
    D: tl.constexpr, BM: tl.constexpr, RPAD: tl.constexpr, BK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program i owns images i BM .. and all ranks."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, RPAD)
    cosines, _, _ = _cosines(
        X, P, rows, ranks, B, R, x_stride, p_stride, D, BM, RPAD, BK, OPERAND, PRECISION, UPCAST
    )
    a = tl.where((ranks < R)[None, :], cosines * tl.load(S), float("-inf"))
    e = _exp(a - tl.max(a, 1)[:, None])
    probs = e / tl.sum(e, 1)[:, None]
    at = PROBS + rows.to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(at, probs, mask=(rows < B)[:, None] & (ranks < R)[None, :])
    mean = tl.sum(probs * ranks.to(tl.float32)[None, :], 1)
    tl.store(EXPECTED + rows, mean, mask=rows < B)
    tl.store(ARGMAX + rows, tl.argmax(a, 1).to(tl.int64), mask=rows < B)
