"""Is the fused matching op right, and is it faster? One command for a machine with a GPU:

    python -m kernels.bench --report DIR [--minutes 6]

DIR/rows.jsonl gets each row as it is measured, DIR/report.md is rewritten after each, so a cut
leaves the best figures; each step is a process of its own, so an illegal access costs one row.
Nothing is timed before its losses and gradients agree with float64. Without a GPU the same steps
run small, through Triton's interpreter: that shows that they run, its times mean nothing.

Columns of a speed row, for each way to compute the sum of both losses and its gradients to
features, prototypes and scale:

    wall_us     host time of a step, without waiting for the GPU between steps (median of 5 blocks)
    forward_us  the same of the losses alone, without gradients
    device_us   sum of the kernels' times of a step, by the profiler
    graph_us    a step replayed as a CUDA graph
    launches    kernels of a step, PyTorch's own included
    peak_mb     peak memory above the inputs
    error       largest relative error of the three gradients, against float64

fp32 is without TF32; tf32 with it, by `torch.set_float32_matmul_precision("high")`.

Needs the project, whose models the training steps build, and torch>=2.4.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from . import matching_loss

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16)
LIMITS = dict(fp32=1e-4, tf32=1e-2, bf16=2e-2)  # of errors
SHAPES = [[32, 61, 512], [32, 101, 1024], [256, 101, 1024], [4096, 101, 512], [65536, 101, 512]]
MIXED = [["tf32", "tf32"], ["bf16", "fp32"]]  # dtypes of features and prototypes


def steps(tiny: bool) -> list[list]:
    """[function, seconds it may take, *arguments], the most valuable first."""
    if tiny:
        return [["machine", 60], ["exact", 60, 3, 5, 16], ["memcheck", 60, 3, 5, 16],
                ["speed", 60, [4, 5, 16], "bf16", "bf16"],
                ["training_step", 100, "tiny", 4, 5], ["gpu_tests", 60]]  # fmt: skip
    plan = [["machine", 30]]
    plan += [["exact", 60, B, 101, 512] for B in (1, 32, 257, 5000, 65536)]
    plan += [["memcheck", 90, 300, 101, 512]]
    plan += [["speed", 60, shape, "bf16", "bf16"] for shape in SHAPES]
    plan += [["speed", 60, shape, *dtypes] for shape in SHAPES[-2:] for dtypes in MIXED]
    plan += [["training_step", 100, tower, 32, 101] for tower in ("RN50", "ViT-B/16")]
    return plan + [["gpu_tests", 200]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--report", type=Path, default=Path("out/bench"), help="folder to write to")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all steps together")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        name, *arguments = json.loads(args.step)
        globals()[name](*arguments)
        return
    if DEVICE == "cpu":
        print("no GPU: small shapes through the interpreter; no time counts", file=sys.stderr)
        os.environ["TRITON_INTERPRET"] = "1"
    report(args.report, args.minutes)
    print(f"wrote {args.report / 'report.md'} and {args.report / 'rows.jsonl'}")


# --- the report ---


def report(folder: Path, minutes: float) -> None:
    """Run all steps within `minutes`; rows.jsonl and report.md in `folder` grow with each row."""
    folder.mkdir(parents=True, exist_ok=True)
    end, records = time.monotonic() + 60 * minutes, []
    for name, limit, *arguments in steps(tiny=DEVICE == "cpu"):
        record = dict(step=[name, *arguments], rows=[], problem=None)
        records.append(record)
        seconds = min(limit, end - time.monotonic())
        if seconds > 5:
            for row in run_step(record, seconds):
                with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(dict(step=record["step"]) | row) + "\n")
                (folder / "report.md").write_text(markdown(records), encoding="utf-8")
        else:
            record["problem"] = "not started: no time left"
        (folder / "report.md").write_text(markdown(records), encoding="utf-8")
        print(markdown([record]), flush=True)


def run_step(record, seconds):
    """A step in a process of its own, whose children end with it: yields its rows as they come."""
    step = [sys.executable, "-m", "kernels.bench", "--step", json.dumps(record["step"])]
    command = ["timeout", "--signal=KILL", str(seconds), *step]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    words, start = "", time.monotonic()
    with subprocess.Popen(command, **output) as child:
        for line in child.stdout:
            row = None
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
            if isinstance(row, dict):
                record["rows"].append(row)
                yield row
            else:  # what libraries print
                words = f"{words} {line.strip()}"[-300:]
    if child.returncode:
        is_late = time.monotonic() - start >= seconds
        record["problem"] = f"out of time after {seconds:.0f} s" if is_late else words


def markdown(records):
    """Rows of one step are a table, its columns those of all its rows."""
    lines = []
    for record in records:
        lines += [f"## {' '.join(map(str, record['step']))}", ""]
        names = list(dict.fromkeys(name for row in record["rows"] for name in row))
        if names:
            lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in record["rows"]:
            cells = [row.get(name, "") for name in names]
            cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
            lines += [f"| {' | '.join(cells)} |"]
        lines += ["", f"Stopped: {record['problem']}", ""] if record["problem"] else [""]
    return "\n".join(lines)


# --- steps: each prints its rows, one JSON object a line ---


def emit(**row):
    print(json.dumps(row), flush=True)


def machine():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    row = dict(gpu=None, commit=None, cores=os.cpu_count(), python=platform.python_version())
    for name, command in dict(gpu=query, commit=git).items():
        with contextlib.suppress(FileNotFoundError):
            row[name] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    import triton

    emit(**row, torch=torch.__version__, triton=triton.__version__)


def exact(B, R, D):
    for dtype, target in itertools.product(LIMITS, ("normalized", "softmax10")):
        row = errors(ours, make_inputs([B, R, D], dtype, dtype), target)
        ok = all(error < LIMITS[dtype] for error in row.values())
        emit(dtype=dtype, target=target, **row, ok=ok)


def memcheck(B, R, D):
    """Forward and backward under compute-sanitizer, each tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if DEVICE == "cpu" or not tool:
        return emit(skipped="needs a GPU and compute-sanitizer")
    step = ["-m", "kernels.bench", "--step", json.dumps(["exact", B, R, D])]
    run = subprocess.run(
        [tool, "--tool", "memcheck", sys.executable, *step],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    )
    summary = [line for line in run.stdout.splitlines() if "ERROR SUMMARY" in line]
    emit(summary=summary[-1].strip("= ") if summary else run.stderr[-200:], code=run.returncode)


def speed(shape, x_dtype, p_dtype):
    """Two rows for each way: the host's times, then, since profiling slows launches, the GPU's."""
    inputs = x, p, _, s = make_inputs(shape, x_dtype, p_dtype)
    limit = max(LIMITS[x_dtype], LIMITS[p_dtype])

    def both(losses):
        return torch.autograd.grad(sum(losses()), (x, p, s))

    def on_host(function, target):
        wrong = errors(function, inputs, target)
        if function is ours and not all(error < limit for error in wrong.values()):
            raise ValueError(f"wrong, so not timed: {wrong}")
        losses = partial(function, *inputs, target)
        row = dict(error=max(wrong[name] for name in ("dX", "dP", "ds")))
        row["peak_mb"] = peak_mb(partial(both, losses))
        row["wall_us"] = wall_us(partial(both, losses))
        with torch.no_grad():
            return row | dict(forward_us=wall_us(losses))

    def on_gpu(function, target):
        run = partial(both, partial(function, *inputs, target))
        return dict(graph_us=graph_us(run)) | device_us(run)

    measures = (on_host, on_gpu) if DEVICE == "cuda" else (on_host,)
    for measure, (name, way) in itertools.product(measures, ways().items()):
        emit_or_fail(dict(way=name), partial(measure, *way))


def emit_or_fail(row, measure):
    """One way's limits, such as its memory, are a row of the table, not the end of it."""
    try:
        row |= measure()
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {problem}".split("\n")[0][:120]
    emit(**row)


def training_step(tower, B, R):
    """Images to optimiser step: ours, and with 77 tokens a prompt and the loss as written."""
    from clip_model import CLIP, ModifiedResNet, VisionTransformer, tiny_clip
    from ordinalclip import OrdinalCLIP, RankPrompts

    torch.manual_seed(0)
    text = dict(width=512, layers=12, quick_gelu=True)
    if tower == "tiny":
        clip = tiny_clip()
    elif tower == "RN50":
        visual = ModifiedResNet((3, 4, 6, 3), 1024, 224, width=64)
        clip = CLIP(visual, embed_dim=1024, **text)
    else:
        clip = CLIP(VisionTransformer(224, 16, 768, 12, 512), embed_dim=512, **text)
    prompts = RankPrompts(clip, R, context=4 if tower == "tiny" else 10)
    model = OrdinalCLIP(clip.visual, prompts, clip.logit_scale).to(DEVICE).train()
    clip = clip.to(DEVICE)
    images = torch.randn(B, 3, clip.image_size, clip.image_size, device=DEVICE)
    labels = torch.randint(R, (B,), device=DEVICE)
    optimizer = torch.optim.RAdam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    features, prototypes = model.image_encoder(images).detach(), prompts().detach()
    features.requires_grad_(), prototypes.requires_grad_()

    def with_77_tokens():
        shared, own, eot = prompts.prompt_embeds()
        padding = clip.token_embedding.weight[0].detach()
        padding = padding.expand(R, len(clip.positional_embedding) - len(shared) - own.shape[1], -1)
        x = torch.cat([shared.expand(R, -1, -1), own, padding], 1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x))  # (R, 77, W)
        rows = x[torch.arange(R, device=DEVICE), len(shared) + eot]  # (R, W)
        p, x = (rows @ clip.text_projection).float(), model.image_encoder(images).float()
        return sum(as_written(x, p, labels, model.logit_scale.exp()))

    def matching(p):
        return sum(matching_loss(features, p, labels, model.logit_scale.exp()))

    losses = {
        "ours": lambda: model.loss(images, labels)[0],
        "77 tokens": with_77_tokens,
        "image tower alone": lambda: model.image_encoder(images).float().square().mean(),
        "ours, text and matching alone": lambda: matching(prompts()),
        "ours, matching alone": lambda: matching(prototypes),
    }
    if DEVICE == "cuda":
        losses["ours, compiled"] = torch.compile(losses["ours"])

    def step(loss, autocast):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            total = loss()
        total.backward()
        optimizer.step()

    def times(loss, precision):
        seconds = 2 if DEVICE == "cuda" else 0.1
        ms = wall_us(partial(step, loss, precision == "bf16"), seconds) / 1e3
        return dict(step_ms=ms, images_per_s=1000 * B / ms)

    for (name, loss), precision in itertools.product(losses.items(), ("bf16", "fp32")):
        emit_or_fail(dict(way=name, precision=precision), partial(times, loss, precision))


def gpu_tests():
    """The tests of the kernels, on the GPU."""
    if DEVICE == "cpu":
        return emit(skipped="needs a GPU")
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    files = sorted(map(str, ROOT.glob("tests/test_kernels*.py")))
    command = [sys.executable, "-m", "pytest", "-q", *parallel, *files]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    emit(result=lines[-1], failed=[line for line in lines if line.startswith("FAILED")])


# --- ways to compute ---


def make_inputs(shape, x_dtype, p_dtype):
    torch.set_float32_matmul_precision("high" if "tf32" in (x_dtype, p_dtype) else "highest")
    B, R, D = shape
    random = torch.Generator().manual_seed(B + R + D)
    x, p = torch.randn(B, D, generator=random), torch.randn(R, D, generator=random)
    y = torch.randint(R, (B,), generator=random).to(DEVICE)
    x, p = x.to(DEVICE, DTYPES[x_dtype]), p.to(DEVICE, DTYPES[p_dtype])
    return (
        x.requires_grad_(),
        p.requires_grad_(),
        y,
        torch.tensor(100.0, device=DEVICE).requires_grad_(),
    )


def as_written(x, p, y, s, target="normalized"):
    """(i2t, t2i) as people write them; "softmax10" is the official code's formulation."""
    logits = s * F.normalize(x, dim=-1) @ F.normalize(p, dim=-1).t()  # (B, R)
    hit = F.one_hot(y, len(p)).t().to(logits.dtype)  # (R, B)
    present = hit.sum(1) > 0
    wanted = hit / hit.sum(1, keepdim=True).clamp_min(1)
    if target == "softmax10":
        wanted = (10 * hit).softmax(1)
    columns = F.kl_div(logits.t().log_softmax(1), wanted, reduction="none").sum(1)  # (R,)
    return F.cross_entropy(logits, y), torch.where(present, columns, 0.0).sum() / present.sum()


def autocast(x, p, y, s, target):
    with torch.autocast(DEVICE, torch.bfloat16):
        return as_written(x, p, y, s, target)


def fp32(x, p, y, s, target):
    return as_written(x.float(), p.float(), y, s, target)


def ours(x, p, y, s, target):
    return matching_loss(x, p, y, s, target=target, impl="triton")


def ways():
    """{name: (function, target)}"""
    table = {"ours": (ours, "normalized"), "fp32 eager": (fp32, "normalized")}
    table["bf16 autocast eager"] = autocast, "normalized"
    table["official formulation, bf16"] = autocast, "softmax10"
    if DEVICE == "cuda":
        table["torch.compile, bf16"] = torch.compile(autocast, dynamic=False), "normalized"
    return table


def errors(function, inputs, target):
    """Relative errors of both losses and of the gradients dX, dP, ds."""
    x, p, y, s = inputs
    losses = function(x, p, y, s, target)
    doubles = [t.detach().double().requires_grad_() for t in (x, p, s)]
    exact = as_written(*doubles[:2], y, doubles[2], target)
    values = *losses, *torch.autograd.grad(sum(losses), (x, p, s))
    exact = *exact, *torch.autograd.grad(sum(exact), doubles)
    names = "i2t", "t2i", "dX", "dP", "ds"
    with torch.no_grad():
        return {n: float((v - e).norm() / (e.norm() or 1)) for n, v, e in zip(names, values, exact)}


# --- measuring ---


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def wall_us(run, seconds=0.3):
    """Microseconds a call; the GPU is waited for every 50 calls, so that its queue stays short."""
    run()
    blocks = []
    for _ in range(5):
        synchronize()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < seconds / 5:
            run()
            calls += 1
            if calls % 50 == 0:
                synchronize()
        synchronize()
        blocks.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(blocks)


def peak_mb(run):
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_us(run):
    """Microseconds and launches of a call, by the profiler; None where it may not look."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        return dict(device_us=None, launches=None)
    device_us = sum(event.device_time_total for event in events) / 10
    return dict(device_us=device_us, launches=len(events) / 10)


def graph_us(run):
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return wall_us(graph.replay)


if __name__ == "__main__":
    main()
