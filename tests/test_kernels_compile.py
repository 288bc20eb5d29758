"""The compile gate: what the launchers launch, compiled for GPUs that are not there.

pytest tests/test_kernels_compile.py            each value of each constant, sm_80 and sm_90
pytest tests/test_kernels_compile.py -m full    every launch, also sm_86, sm_89; pairs: others

Compiling needs a process without the interpreter: this file run as a script prints what each
kernel needs.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
triton = pytest.importorskip("triton")

from kernels import matching_triton  # noqa: E402

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program may have
TUNED = (80, 86, 89, 90)  # no spill; the others only have to work
AXES = dict(
    B=[32, 700, 5000],
    R=[1, 2, 61, 101, 128],
    D=[512, 640, 768, 1024, 48, 1008],
    dtypes=[(FP32, FP32, "tf32"), (FP32, FP32, "ieee"), (FP16, FP16, ""), (BF16, BF16, "")]
    + [(FP32, BF16, ""), (BF16, FP32, "")],
    smooth=[False, True],
    group=["", "all"],
    labels=[torch.int64, torch.int32],
    stride=[0, 1, 16],  # that many numbers between the rows of the features
)


def launches(capability, B, R, D, dtypes, smooth, group, labels, stride):
    """[(kernel, arguments, options)] of a forward, its backward, and a prediction."""
    module, calls = matching_triton, []
    module._launch = lambda kernel, grid, *args, **options: calls.append((kernel, args, options))
    module.gpu_generation = lambda device: capability // 10
    module.float32_dots = lambda: dtypes[2]
    module.dist.get_world_size = lambda group: 2
    module.dist.all_gather_into_tensor = lambda *args, **options: None
    module._groups["all"] = None
    x = torch.empty(B, D + stride, dtype=dtypes[0], device="meta")[:, :D]
    p = torch.empty(R, D, dtype=dtypes[1], device="meta")
    y, s = torch.empty(B, dtype=labels, device="meta"), torch.empty((), device="meta")
    *saved, i2t, t2i = module.forward(x, p, y, s, smooth, group)
    module.backward(i2t, t2i, x, p, y, s, *saved, smooth)
    module.probabilities(x, p, s)
    return calls


def specialise(kernel, args, options):
    """(signature, constants, divisible arguments, options) as Triton would compile the launch."""
    options = dict(options)
    compiler = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, divisible = {}, dict(options), []
    letters = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
    letters |= {torch.int64: "i64", torch.int32: "i32"}
    for i, (parameter, value) in enumerate(itertools.zip_longest(kernel.params, args)):
        name, plain = parameter.name, not parameter.do_not_specialize
        if name in constants or value is None or (plain and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + letters[value.dtype] if tensor else "i32"
        if tensor or (plain and value % 16 == 0):
            divisible.append(i)
    return signature, constants, divisible, compiler


def values(kernel, args, options):
    """{"kernel.constant=value"}: all that makes one compiled kernel differ from another."""
    signature, constants, divisible, compiler = specialise(kernel, args, options)
    texts = {name: str(value) for name, value in (constants | compiler).items()}
    texts |= {f"*{name}": text for name, text in signature.items() if text != "constexpr"}
    texts |= {f"{kernel.params[i].name}%16": "0" for i in divisible}
    return frozenset(f"{kernel.__name__}.{name}={text}" for name, text in texts.items())


def cover(capability, size):
    """Launches that together have every `size` values that occur together, chosen greedily; with
    size 0 all launches of AXES."""
    generator, launched = random.Random(0), {}
    calls = itertools.product(*AXES.values())
    if size:
        count = 600 if size == 1 else 6000
        calls = (map(generator.choice, AXES.values()) for _ in range(count))
    for call in calls:
        for launch in launches(capability, **dict(zip(AXES, call))):
            launched.setdefault(values(*launch), launch)
    if not size:
        return set(), [*launched.values()]
    covered, chosen = set(), []
    for named, launch in launched.items():
        combinations = set(itertools.combinations(sorted(named), size))
        if not combinations <= covered:
            covered |= combinations
            chosen.append(launch)
    return covered, chosen


def compile_launch(job):
    """What one launch needs on a GPU of one generation."""
    capability, index, size = job
    kernel, args, options = cover_once(capability, size)[1][index]
    signature, constants, divisible, compiler = specialise(kernel, args, options)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiler |= dict(enable_fp_fusion=True, debug=True, sanitize_overflow=False)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=compiler)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        registers, stack = re.search(
            r"REG:(\d+) STACK:(\d+)", subprocess.check_output(usage, text=True)
        ).groups()
    ptx = compiled.asm["ptx"]
    pending = map(int, re.findall(r"pendings = (\d+)", compiled.asm["ttgir"]))
    wgmma = map(int, re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k", ptx))
    return dict(
        kernel=kernel.__name__, capability=capability, registers=int(registers), stack=int(stack),
        shared=compiled.metadata.shared, pending=max(pending, default=0),
        narrowest_wgmma=min(wgmma, default=None), tensor_cores="mma" in ptx,
        values=sorted(values(kernel, args, options)),
    )  # fmt: skip


COVERS = {}


def cover_once(capability, size):
    if (capability, size) not in COVERS:
        COVERS[capability, size] = cover(capability, size)
    return COVERS[capability, size]


def check(report):
    assert report["pending"] == 0, f"a wgmma may read a buffer that is being filled: {report}"
    assert report["shared"] <= 1024 * SHARED[report["capability"]], f"does not fit: {report}"
    narrowest = report["narrowest_wgmma"]  # triton-lang/triton#10486: illegal addresses below 64
    assert narrowest is None or narrowest >= 64, f"narrow wgmma: {report}"
    if report["capability"] in TUNED:
        assert report["stack"] == 0, f"spills registers: {report}"
        multiplies = report["kernel"] != "finish_kernel"
        ieee = f"{report['kernel']}.PRECISION=ieee" in report["values"]
        ieee = ieee and f"{report['kernel']}.OPERAND=fp32" in report["values"]
        if multiplies and not ieee and report["capability"] <= 90:
            assert report["tensor_cores"], f"no tensor cores: {report}"


def compiled(folder, size, *capabilities):
    """Reports of the cover, compiled by two processes at once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, __file__, str(size), *map(str, capabilities)]
    output = subprocess.check_output(command, env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def test_compile_gate(tmp_path):
    reports = compiled(tmp_path, 1, 80, 90)
    for report in reports:
        check(report)
    assert {r["kernel"] for r in reports} == {f"{n}_kernel" for n in ("forward", "finish", "backward", "match")}  # fmt: skip
    assert {r["capability"] for r in reports} == {80, 90}


@pytest.mark.full
@pytest.mark.parametrize("capability", SHARED)
def test_compile_gate_of_combinations(capability, tmp_path):
    """Spills were seen that take four values: two dtypes, ranks and the label's type, say."""
    for report in compiled(tmp_path, 0 if capability in TUNED else 2, capability):
        check(report)


def lacking(capability):
    """Constants that some launch has, of any B and R, and that no launch of the cover has."""
    covered, generator, rest = cover_once(capability, 1)[0], random.Random(1), set()
    for _ in range(300):
        call = {name: generator.choice(axis) for name, axis in AXES.items()}
        call |= dict(B=generator.randint(1, 9000), R=generator.randint(1, 128))
        for launch in launches(capability, **call):
            rest |= {value for value in values(*launch) if (value,) not in covered}
    return rest


if __name__ == "__main__":
    size, capabilities = int(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    jobs = []
    for capability in capabilities:
        if rest := lacking(capability):
            sys.exit(f"the gate lacks {sorted(rest)}")
        jobs += [(capability, i, size) for i in range(len(cover_once(capability, size)[1]))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(json.dumps(pool.map(compile_launch, jobs, chunksize=1)))
