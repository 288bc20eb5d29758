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
import functools
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}  # of errors
MIXED = ("tf32", "tf32"), ("bf16", "fp32")  # dtypes of features and prototypes
SHAPES = [[32, 61, 512], [32, 101, 1024], [256, 101, 1024], [4096, 101, 512], [65536, 101, 512]]


def steps(tiny: bool) -> list[list]:
    """[function, seconds it may take, *arguments], the most valuable first."""
    batches = (3,) if tiny else (1, 32, 257, 5000, 65536)
    R, D = (5, 16) if tiny else (101, 512)
    plan = [["machine", 30]]
    plan += [["exact", 60, [B, R, D]] for B in batches]
    plan.append(["memcheck", 90, [3, 5, 16] if tiny else [300, 101, 512]])
    plan += [["speed", 60, shape, "bf16", "bf16"] for shape in ([[4, 5, 16]] if tiny else SHAPES)]
    if not tiny:
        plan += [["speed", 60, shape, *pair] for shape in SHAPES[-2:] for pair in MIXED]
    towers = ["tiny"] if tiny else ["RN50", "ViT-B/16"]
    plan += [["training_step", 100, tower, 4 if tiny else 32, R] for tower in towers]
    return plan + [["gpu_tests", 200]]


# --- ways to compute ---


def make_inputs(shape, x_dtype, p_dtype, device):
    import torch

    dtypes = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16)
    torch.set_float32_matmul_precision("high" if "tf32" in (x_dtype, p_dtype) else "highest")
    B, R, D = shape
    random = torch.Generator().manual_seed(B + R + D)
    x, p = torch.randn(B, D, generator=random), torch.randn(R, D, generator=random)
    y = torch.randint(R, (B,), generator=random)
    x, p = x.to(device, dtypes[x_dtype]), p.to(device, dtypes[p_dtype])
    s = torch.tensor(100.0, device=device)
    return x.requires_grad_(), p.requires_grad_(), y.to(device), s.requires_grad_()


def as_written(x, p, y, s, target="normalized"):
    """(i2t, t2i) as people write them; "softmax10" is the official code's formulation."""
    import torch
    import torch.nn.functional as F

    logits = s * F.normalize(x, dim=-1) @ F.normalize(p, dim=-1).t()  # (B, R)
    hit = F.one_hot(y, len(p)).t().to(logits.dtype)  # (R, B)
    present = hit.sum(1) > 0
    wanted = hit / hit.sum(1, keepdim=True).clamp_min(1)
    if target == "softmax10":
        wanted = (10 * hit).softmax(1)
    columns = F.kl_div(logits.t().log_softmax(1), wanted, reduction="none").sum(1)  # (R,)
    return F.cross_entropy(logits, y), torch.where(present, columns, 0.0).sum() / present.sum()


def ours(x, p, y, s, target="normalized"):
    from kernels import matching_loss

    return matching_loss(x, p, y, s, target=target, impl="triton")


def ways(device):
    """{name: (function, target)}"""
    import torch

    def autocast(x, p, y, s, target):
        with torch.autocast(device, torch.bfloat16):
            return as_written(x, p, y, s, target)

    def fp32(x, p, y, s, target):
        return as_written(x.float(), p.float(), y, s, target)

    found = {"ours": (ours, "normalized"), "fp32 eager": (fp32, "normalized")}
    found["bf16 autocast eager"] = autocast, "normalized"
    found["official formulation, bf16"] = autocast, "softmax10"
    if device == "cuda":
        found["torch.compile, bf16"] = torch.compile(autocast, dynamic=False), "normalized"
    return found


def errors(function, inputs, target):
    """Relative errors of both losses and of the gradients dX, dP, ds."""
    import torch

    x, p, y, s = inputs
    losses = function(x, p, y, s, target)
    grads = torch.autograd.grad(sum(losses), (x, p, s))
    doubles = [t.detach().double().requires_grad_() for t in (x, p, s)]
    exact = as_written(*doubles[:2], y, doubles[2], target)
    exact_grads = torch.autograd.grad(sum(exact), doubles)
    names = "i2t", "t2i", "dX", "dP", "ds"
    pairs = zip(names, (*losses, *grads), (*exact, *exact_grads))
    return {
        n: float((a.detach().double() - e.detach()).norm() / (e.detach().norm() or 1.0))
        for n, a, e in pairs
    }


# --- measuring ---


def wall_us(run, device, seconds=0.3):
    """Microseconds a call; the GPU is waited for every 50 calls, so that its queue stays short."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    blocks = []
    for _ in range(5):
        wait()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < seconds / 5:
            run()
            calls += 1
            if calls % 50 == 0:
                wait()
        wait()
        blocks.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(blocks)


def device_us(run):
    """(microseconds, launches) of a call, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not events:  # the profiler may not look at the GPU
        return None, None
    return sum(event.device_time_total for event in events) / 10, len(events) / 10


def graph_us(run, seconds=0.25):
    import torch

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return wall_us(graph.replay, "cuda", seconds)


# --- steps: each prints its rows, one JSON object a line ---


def emit(**row):
    print(json.dumps(row), flush=True)


def machine(device):
    import torch

    versions = dict(python=platform.python_version(), torch=torch.__version__)
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    git, commit = ["git", "-C", str(Path(__file__).parent)], None
    with contextlib.suppress(FileNotFoundError):
        describe = [*git, "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True) if device == "cuda" else None
    emit(gpu=gpu.stdout.strip() if gpu else None, cores=os.cpu_count(), **versions, commit=commit)


def exact(device, shape):
    for dtype, target in itertools.product(LIMITS, ("normalized", "softmax10")):
        row = errors(ours, make_inputs(shape, dtype, dtype, device), target)
        ok = all(error < LIMITS[dtype] for error in row.values())
        emit(dtype=dtype, target=target, **row, ok=ok)


def memcheck(device, shape):
    """Forward and backward under compute-sanitizer, each tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if device != "cuda" or not tool:
        return emit(skipped="needs a GPU and compute-sanitizer")
    code = json.dumps(["exact", shape])
    command = [tool, "--tool", "memcheck", sys.executable, "-m", "kernels.bench", "--step", code]
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    summary = [line for line in run.stdout.splitlines() if "ERROR SUMMARY" in line]
    summary = summary[-1].strip("= ") if summary else run.stderr[-200:]
    emit(summary=summary, returncode=run.returncode)


def speed(device, shape, x_dtype, p_dtype):
    import torch

    inputs = x, p, _, s = make_inputs(shape, x_dtype, p_dtype, device)
    limit = max(LIMITS[x_dtype], LIMITS[p_dtype])
    for name, (function, target) in ways(device).items():

        def both(function=function, target=target):
            return torch.autograd.grad(sum(function(*inputs, target)), (x, p, s))

        row = dict(way=name)
        try:
            wrong = errors(function, inputs, target)
            row["error"] = max(list(wrong.values())[2:])
            if name == "ours" and not all(error < limit for error in wrong.values()):
                raise ValueError(f"wrong, so not timed: {wrong}")
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both()
                torch.cuda.synchronize()
                row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row["wall_us"] = wall_us(both, device)
            with torch.no_grad():
                losses = functools.partial(function, *inputs, target)
                row["forward_us"] = wall_us(losses, device, 0.25)
            if device == "cuda":  # last: the profiler may slow down launches for good
                emit(**row)
                row = dict(way=name, graph_us=graph_us(both))
                row["device_us"], row["launches"] = device_us(both)
        except Exception as problem:  # one way's limits are a row of the table, not the end of it
            row["failed"] = f"{type(problem).__name__}: {problem}".split("\n")[0][:120]
        emit(**row)


def training_step(device, tower, B, R):
    """Images to optimiser step: ours, and with 77 tokens a prompt and the loss as written."""
    import torch

    import clip_model
    from kernels import matching_loss
    from ordinalclip import OrdinalCLIP, RankPrompts

    torch.manual_seed(0)
    text = dict(width=512, layers=12, quick_gelu=True)
    if tower == "tiny":
        clip = clip_model.tiny_clip()
    elif tower == "RN50":
        visual = clip_model.ModifiedResNet((3, 4, 6, 3), 1024, 224, width=64)
        clip = clip_model.CLIP(visual, embed_dim=1024, **text)
    else:
        visual = clip_model.VisionTransformer(224, 16, 768, 12, 512)
        clip = clip_model.CLIP(visual, embed_dim=512, **text)
    clip, size = clip.to(device), clip.image_size
    prompts = RankPrompts(clip, R, context=4 if tower == "tiny" else 10).to(device)
    model = OrdinalCLIP(clip.visual, prompts, clip.logit_scale).to(device).train()
    images = torch.randn(B, 3, size, size, device=device)
    labels = torch.randint(R, (B,), device=device)
    optimizer = torch.optim.RAdam([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def all_tokens():
        shared, own, eot = prompts.prompt_embeds()
        length = len(clip.positional_embedding)
        padding = clip.token_embedding.weight[0].detach()
        padding = padding.expand(R, length - len(shared) - own.shape[1], -1)
        x = torch.cat([shared.expand(R, -1, -1), own, padding], 1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x))  # (R, 77, W)
        return x[torch.arange(R, device=device), len(shared) + eot] @ clip.text_projection

    def official():
        features = model.image_encoder(images)
        scale, prototypes = model.logit_scale.exp(), all_tokens().float()
        return sum(as_written(features.float(), prototypes, labels, scale))

    def run(loss, autocast):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            total = loss()
        total.backward()
        optimizer.step()

    losses = {"ours": lambda: model.loss(images, labels)[0], "77 tokens": official}
    losses["image tower alone"] = lambda: model.image_encoder(images).float().square().mean()
    features = model.image_encoder(images).detach()

    def matching():
        x, p = features.requires_grad_(), prototypes.requires_grad_()
        return sum(matching_loss(x, p, labels, scale))

    def text_and_matching():
        return sum(matching_loss(features, prompts(), labels, model.logit_scale.exp()))

    prototypes, scale = prompts().detach(), model.logit_scale.exp().detach()
    losses["ours, text and matching alone"] = text_and_matching
    losses["ours, matching alone"] = matching
    if device == "cuda":
        losses["ours, compiled"] = torch.compile(losses["ours"])
    step_seconds = 2 if device == "cuda" else 0.1
    for (name, loss), precision in itertools.product(losses.items(), ("bf16", "fp32")):
        row = dict(way=name, precision=precision)
        step = functools.partial(run, loss, precision == "bf16")
        try:
            ms = wall_us(step, device, step_seconds) / 1e3
            row |= dict(step_ms=ms, images_per_s=1000 * B / ms)
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}".split("\n")[0][:120]
        emit(**row)


def gpu_tests(device):
    """The tests of the kernels, on the GPU."""
    if device != "cuda":
        return emit(skipped="needs a GPU")
    import importlib.util

    root = Path(__file__).parents[1]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    files = sorted(map(str, root.glob("tests/test_kernels*.py")))
    command = [sys.executable, "-m", "pytest", "-q", *parallel, *files]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    emit(result=lines[-1], failed=[line for line in lines if line.startswith("FAILED")])


# --- the report ---


def run_step(step, seconds, add_row):
    """A step in its own process; each row goes to add_row as it comes. Returns what stopped it."""
    command = [sys.executable, "-m", "kernels.bench", "--step", json.dumps(step)]
    with tempfile.TemporaryFile("w+") as messages:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )
        timer = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))  # and its children
        timer.start()
        for line in child.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # what libraries print
                if isinstance(row := json.loads(line), dict):
                    add_row(row)
        child.wait()
        in_time = timer.is_alive()
        timer.cancel()
        messages.seek(0)
        words = " ".join(messages.read().split())[-300:]
    if not in_time:
        return f"out of time after {seconds:.0f} s"
    return words or f"exit status {child.returncode}" if child.returncode else None


def markdown(records):
    """Rows of one step are a table, its columns those of all its rows."""
    lines = ["# Benchmark of the matching op", ""]
    for record in records:
        lines += [f"## {' '.join(map(str, record['step']))}", ""]
        rows = record["rows"]
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            cells = [[row.get(name, "") for name in names] for row in rows]
            cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in cells]
            lines += [f"| {' | '.join(row)} |" for row in cells]
        lines += ["", f"Stopped: {record['problem']}", ""] if record["problem"] else [""]
    return "\n".join(lines)


def report(folder: Path, minutes: float, device: str) -> list[dict]:
    """Run all steps within `minutes`; rows.jsonl and report.md in `folder` grow with each row."""
    folder.mkdir(parents=True, exist_ok=True)
    end, records = time.monotonic() + 60 * minutes, []
    with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
        for name, limit, *arguments in steps(tiny=device == "cpu"):
            record = dict(step=[name, *arguments], rows=[], problem=None)
            records.append(record)

            def add_row(row, record=record):
                record["rows"].append(row)
                print(json.dumps(dict(step=record["step"], **row)), file=file, flush=True)
                (folder / "report.md").write_text(markdown(records), encoding="utf-8")

            left = end - time.monotonic()
            record["problem"] = "not begun: no time left"
            if left > 5:
                record["problem"] = run_step(record["step"], min(left, limit), add_row)
            (folder / "report.md").write_text(markdown(records), encoding="utf-8")
            print(markdown([record]).split("\n", 2)[2], flush=True)
    return records


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--report", type=Path, default=Path("out/bench"), help="folder to write to")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all steps together")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.step:
        name, *arguments = json.loads(args.step)
        globals()[name](device, *arguments)
        return
    if device == "cpu":
        print("no GPU: small shapes through the interpreter; no time counts", file=sys.stderr)
        os.environ["TRITON_INTERPRET"] = "1"
    report(args.report, args.minutes, device)
    print(f"wrote {args.report / 'report.md'} and {args.report / 'rows.jsonl'}")


if __name__ == "__main__":
    main()
