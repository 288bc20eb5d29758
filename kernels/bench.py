"""Times of the matching op: ours, PyTorch, and the peers that compute the same loss.

    python -m kernels.bench                     the table, bench.json and bench.png in out/bench
    python -m kernels.bench --quick             two small shapes
    python -m kernels.bench --shapes 32,61,512 --dtypes bf16 --out somewhere

Everything is timed as the sum of both losses with gradients to features, prototypes and scale. Columns:
median of the repetitions with their 20 % and 80 % quantiles, ratio to ours, floor / time (the least that
traffic and arithmetic with stored logits allow, for GPUs whose rates are known), kernel launches, peak
memory beyond the inputs, error of the features' gradient against float64. Peers are imported only when
installed. Without a GPU the PyTorch paths are timed alone.

Copy-paste: needs the folder kernels/, torch>=2.4, pillow.
"""

import argparse
import importlib.util
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import torch

from kernels import HAS_TRITON, matching_loss, reference, unit

SHAPES = [  # B, R, D
    (32, 61, 512),
    (256, 101, 1024),
    (4096, 101, 512),
    (65536, 101, 512),
    (65536, 101, 1024),
    (65536, 1000, 512),
]
SQUARE = [
    (256, 256, 512),
    (1024, 1024, 512),
]  # image i belongs to prototype i: what CLIP trains with
SWEEP = [2**k for k in range(5, 18)]  # B of the picture, at R=101, D=512
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes per second and operations per second (half, fp32) assumed for the floor. Not measured here.
RATES = {"H200": (4.3e12, 790e12, 66.9e12), "H100": (3.0e12, 790e12, 66.9e12)}
OURS = "triton"


# --- contestants: (features, prototypes, labels, scale) -> scalar loss ----------------------------


def ours(features, prototypes, labels, scale):
    return sum(matching_loss(features, prototypes, labels, scale, impl="triton"))


def eager(features, prototypes, labels, scale):
    return sum(reference.matching_loss(features, prototypes, labels, scale))


def from_lse(x, p, labels, row_lse, column_lse):
    """The loss (target="normalized") from x = s * unit features, unit p and both log-sum-exps."""
    own = (x * p[labels]).sum(1)  # (B,)
    count = torch.bincount(labels, minlength=len(p))  # (R,)
    positive = torch.zeros_like(column_lse).index_add(0, labels, own)
    n = count.clamp_min(1)
    t2i = torch.where(count > 0, column_lse - n.log() - positive / n, 0.0).sum() / (count > 0).sum()
    return (row_lse - own).mean() + t2i


def inf_cl(features, prototypes, labels, scale):
    """Inf-CL's log-sum-exp, once over rows and once over columns; tf32 and fp32 inside."""
    from inf_cl.flash import FlashProb

    x, p = scale * unit(features), unit(prototypes)
    heads = [t.view(len(t), -1, 256) for t in (x, p)]
    return from_lse(x, p, labels, FlashProb.apply(*heads), FlashProb.apply(*heads[::-1]))


def cut_cross_entropy(features, prototypes, labels, scale):
    """CCE over the rows, and over the columns with image 0 as their label, which gives their lse."""
    from cut_cross_entropy import linear_cross_entropy

    x, p = (scale * unit(features)), unit(prototypes)
    half = [t.to(features.dtype) for t in (x, p)]
    first = torch.zeros(len(p), dtype=torch.long, device=p.device)
    options = dict(reduction="none", filter_eps=None)
    row_lse = linear_cross_entropy(*half, labels, **options).float() + (x * p[labels]).sum(1)
    column_lse = linear_cross_entropy(*half[::-1], first, **options).float() + p @ x[0]
    return from_lse(x, p, labels, row_lse, column_lse)


def liger_rows(features, prototypes, labels, scale):
    """Half of the work: the rows alone."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    x, p = (scale * unit(features)).to(features.dtype), unit(prototypes).to(features.dtype)
    loss = LigerFusedLinearCrossEntropyFunction.apply(x, p, labels)
    return loss[0] if isinstance(loss, tuple) else loss


def open_clip(features, prototypes, labels, scale):
    """Square case: CLIP's loss is half the sum of ours."""
    from open_clip.loss import ClipLoss

    return 2 * ClipLoss()(unit(features), unit(prototypes), scale)


def memeff(features, prototypes, labels, scale):
    """Square case. Its temperature is a number, so there is no gradient to the scale."""
    from memeff import MemoryEfficientCLIPLoss

    x, p = unit(features).to(features.dtype), unit(prototypes).to(features.dtype)
    return 2 * MemoryEfficientCLIPLoss(temperature=1 / 14.3, stable=False)(x, p) + 0 * scale


PEERS = {  # name: (function, package, square case only)
    "inf-cl": (inf_cl, "inf_cl", False),
    "cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy", False),
    "liger (rows only)": (liger_rows, "liger_kernel", False),
    "open_clip": (open_clip, "open_clip", True),
    "memeff": (memeff, "memeff", True),
}


def contestants(device, square):
    found = {"eager": eager}
    if device == "cuda":
        torch._dynamo.reset()
        graphs = dict(mode="reduce-overhead")
        if HAS_TRITON:
            found = {OURS: ours, "triton, graphs": torch.compile(ours, **graphs)} | found
        found |= {
            "compile": torch.compile(eager),
            "compile, graphs": torch.compile(eager, **graphs),
        }
        for name, (function, package, square_only) in PEERS.items():
            if importlib.util.find_spec(package) and square >= square_only:
                found[name] = function
    return found


# --- measuring ------------------------------------------------------------------------------------


def make_inputs(shape, dtype, device, square):
    B, R, D = shape
    random = torch.Generator().manual_seed(0)
    features, prototypes = torch.randn(B, D, generator=random), torch.randn(R, D, generator=random)
    labels = torch.arange(B) if square else torch.randint(R, (B,), generator=random)
    leaves = [t.to(device, dtype).requires_grad_() for t in (features, prototypes)]
    return *leaves, labels.to(device), torch.tensor(14.3, device=device, requires_grad=True)


def step(function, inputs, backward):
    loss = function(*inputs)
    if backward:
        return loss, torch.autograd.grad(loss, (inputs[0], inputs[1], inputs[3]))
    return loss.detach(), None


def milliseconds(run, device, budget=0.3):
    """[median, 20 %, 80 %]. On a GPU by events, with its L2 cache emptied before each run."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
    times, start = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < budget:
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    times = torch.tensor(times[len(times) // 5 :])  # the first ones warm up
    return times.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def count_launches(run):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.device_time > 0)


def floor_ms(shape, dtype, backward, device_name):
    """Read inputs, write gradients, write and read fp32 logits once, and no wasted arithmetic."""
    rates = next((r for name, r in RATES.items() if name in device_name), None)
    if rates is None:
        return None
    (B, R, D), size = shape, dtype.itemsize
    padded = max(16, 2 ** math.ceil(math.log2(R)))
    operands, logits = (B + R) * D * size, 4 * B * R
    rate = rates[2] if dtype == torch.float32 else rates[1]
    forward = max((operands + 16 * B + logits) / rates[0], 2 * B * padded * D / rate)
    if not backward:
        return 1000 * forward
    return 1000 * (
        forward + max((2 * operands + 16 * B + logits) / rates[0], 4 * B * padded * D / rate)
    )


def exact_gradient(inputs):
    """Of the features, in float64."""
    doubles = [t.detach().double().requires_grad_() for t in (inputs[0], inputs[1], inputs[3])]
    loss = sum(reference.matching_loss(doubles[0], doubles[1], inputs[2], doubles[2]))
    return torch.autograd.grad(loss, doubles[0])[0]


def measure(name, function, inputs, exact, backward, device):
    """One row of the table; a contestant that fails says why instead."""

    def run():
        return step(function, inputs, backward)

    row = dict(name=name)
    try:
        for _ in range(3):  # compiles, records graphs
            result = run()
        if backward:
            row["error"] = float((result[1][0].double() - exact).norm() / exact.norm())
        del result
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            row["launches"] = count_launches(run)
        row["ms"], row["ms_20"], row["ms_80"] = milliseconds(run, device)
    except Exception as error:  # a peer's own limits: report them in the table, do not stop
        row["failed"] = f"{type(error).__name__}: {error}".split("\n")[0][:90]
    return row


def compare(shape, dtype_name, device, device_name, square=False):
    """Rows of all contestants, forward and forward + backward, at one shape and dtype."""
    inputs = make_inputs(shape, DTYPES[dtype_name], device, square)
    exact = exact_gradient(inputs)
    rows = []
    for backward in (False, True):
        functions = contestants(device, square)
        group = [measure(n, f, inputs, exact, backward, device) for n, f in functions.items()]
        base = next((row["ms"] for row in group if row["name"] == OURS and "ms" in row), None)
        floor = floor_ms(shape, DTYPES[dtype_name], backward, device_name)
        for row in group:
            row |= dict(shape=shape, dtype=dtype_name, backward=backward)
            if "ms" in row:
                row["ratio"] = row["ms"] / base if base else None
                row["of_floor"] = floor / row["ms"] if floor else None
        rows += group
    return rows


# --- the report -----------------------------------------------------------------------------------


def show(rows):
    head = f"{'':20}{'ms':>9}{'20 %':>9}{'80 %':>9}{'ratio':>7}{'floor':>7}{'launches':>9}{'MB':>8}{'error':>9}"
    title = None
    for row in rows:
        work = "forward + backward" if row["backward"] else "forward"
        this = f"\nB, R, D = {tuple(row['shape'])}, {row['dtype']}, {work}"
        if this != title:
            print(f"{this}\n{head}")
            title = this
        if "failed" in row:
            print(f"{row['name']:20} {row['failed']}")
            continue
        cells = [
            (row["ms"], "9.4f"), (row["ms_20"], "9.4f"), (row["ms_80"], "9.4f"),
            (row["ratio"], "7.2f"), (row["of_floor"], "7.1%"), (row.get("launches"), "9d"),
            (row.get("peak_mb"), "8.1f"), (row.get("error"), "9.1e"),
        ]  # fmt: skip
        text = ["-".rjust(int(spec[0])) if v is None else f"{v:{spec}}" for v, spec in cells]
        print(f"{row['name']:20}" + "".join(text))


def draw(rows, path, title):
    """Time against B, both logarithmic: a line for each contestant and one for the floor."""
    from PIL import Image, ImageDraw, ImageFont

    lines = {}
    for row in rows:
        if row["backward"] and "ms" in row:
            lines.setdefault(row["name"], []).append((row["shape"][0], row["ms"]))
            if row["of_floor"]:
                lines.setdefault("floor", []).append((row["shape"][0], row["ms"] * row["of_floor"]))
    points = [point for line in lines.values() for point in line]
    low = [math.log10(min(p[i] for p in points)) - 0.1 for i in (0, 1)]
    high = [math.log10(max(p[i] for p in points)) + 0.1 for i in (0, 1)]
    width, height, margin = 900, 560, 70

    def place(point):
        x, y = ((math.log10(point[i]) - low[i]) / (high[i] - low[i]) for i in (0, 1))
        return margin + x * (width - 260), height - margin - y * (height - 2 * margin)

    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(16)
    pen.text((margin, 20), title, "black")
    pen.text((margin, height - 30), "milliseconds, forward + backward, against images B", "black")
    for axis in (0, 1):
        powers = range(math.floor(low[axis]), math.ceil(high[axis]) + 1)
        for tick in (digit * 10.0**power for power in powers for digit in (1, 2, 5)):
            if not low[axis] <= math.log10(tick) <= high[axis]:
                continue
            ends = [[10 ** low[0], 10 ** low[1]], [10 ** high[0], 10 ** high[1]]]
            ends[0][axis] = ends[1][axis] = tick
            start, end = place(ends[0]), place(ends[1])
            pen.line([start, end], "#dddddd")
            label = (start[0] - 8, height - margin + 6) if axis == 0 else (14, start[1] - 9)
            pen.text(label, f"{tick:g}", "black")
    colors = [
        "#c62828",
        "#ef8a62",
        "#1565c0",
        "#2e7d32",
        "#6a1b9a",
        "#00838f",
        "#f9a825",
        "#5d4037",
    ]
    for (name, line), color in zip(sorted(lines.items()), colors * 3):
        color = "black" if name == "floor" else color
        line = sorted(set(line))
        pen.line([place(p) for p in line], color, width=1 if name == "floor" else 3)
        pen.text((place(line[-1])[0] + 8, place(line[-1])[1] - 9), name, color)
    picture.save(path)


def environment(device):
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    if HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    return dict(device=name, commit=commit.stdout.strip() or None, **versions)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shapes", nargs="*", help="B,R,D ... instead of the standard ones")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--quick", action="store_true", help="two small shapes, a short sweep")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="for bench.json, bench.png"
    )
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device)
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    shapes, square, sweep = SHAPES, SQUARE, SWEEP
    if device == "cpu":
        print(
            "No GPU: only the PyTorch path is timed, at the smaller shapes. Nothing here is a claim."
        )
        shapes, square, sweep = SHAPES[:3], [], SWEEP[:6]
    if args.quick:
        shapes, square, sweep = SHAPES[:2], [], SWEEP[:3]
    if args.shapes:
        shapes, square = [tuple(int(n) for n in shape.split(",")) for shape in args.shapes], []

    rows = []
    for dtype in args.dtypes:
        for shape in shapes + square:
            rows += compare(shape, dtype, device, about["device"], square=shape in square)
    show(rows)
    swept = []
    for B in sweep:
        swept += compare((B, 101, 512), args.dtypes[0], device, about["device"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(
        json.dumps(dict(environment=about, table=rows, sweep=swept), indent=1) + "\n"
    )
    draw(swept, args.out / "bench.png", f"{about['device']}, R=101, D=512, {args.dtypes[0]}")
    print(f"\nwrote {args.out / 'bench.json'} and {args.out / 'bench.png'}")
    return rows


if __name__ == "__main__":
    main()
