"""pytest tests/test_layout.py -- who imports whom, what the README shows, what the project promises to be."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {
    "ordinalclip",
    "clip_model",
    "clip_weights",
    "tokenizer",
    "kernels",
    "data",
    "backbones",
    "train",
    "predict",
}
THIRD = {"torch", "ftfy", "regex", "PIL", "numpy", "triton"}
OPTIONAL = {"timm", "torchvision"}
PEERS = {
    "inf_cl",
    "cut_cross_entropy",
    "memeff",
    "open_clip",
    "liger_kernel",
}  # kernels/bench.py only
ARROWS = {
    "tokenizer.py": (set(), {"torch", "ftfy", "regex"}),
    "clip_model.py": ({"clip_weights"}, {"torch"}),
    "clip_weights.py": (set(), {"torch"}),
    "ordinalclip.py": ({"kernels"}, {"torch"}),
    "data.py": (set(), {"torch", "numpy", "PIL"}),
    "backbones.py": (set(), {"torch"} | OPTIONAL),
    "train.py": (OURS - {"train"}, {"torch"}),
    "predict.py": (
        {"data", "backbones", "ordinalclip", "clip_model", "kernels"},
        {"torch", "numpy", "PIL", "onnx", "onnxscript"},
    ),
}


def imports(path):
    """Top-level names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_go_one_way(name):
    ours, third = ARROWS[name]
    found = set(imports(ROOT / name)) - sys.stdlib_module_names
    assert found & OURS <= ours and found - OURS <= third, found


def test_the_kernels_import_nothing_of_the_project():
    for path in (ROOT / "kernels").glob("*.py"):
        found = set(imports(path)) - sys.stdlib_module_names - {"kernels"}
        assert found <= {"torch", "triton", "PIL", "numpy"} | (
            PEERS if path.name == "bench.py" else set()
        )


def test_requirements_are_exactly_these():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    names = {re.match(r"[a-z]+", line)[0] for line in lines}
    assert names == {"torch", "ftfy", "regex", "pillow", "numpy", "triton", "pytest"}
    assert "torch==2.13.0" in lines


def test_nothing_is_unpickled_freely():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if "tests" not in path.parts and ".venv" not in path.parts:
            assert "weights_only" + "=False" not in text and "import pickle" not in text, path
            assert text.count("torch.load(") == text.count("weights_only=True)"), path


# --------------------------------------------------------------------------------------------- README


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def snippet_id(snippet):
    return snippet.splitlines()[0][:40]


@pytest.mark.parametrize("snippet", blocks("python"), ids=snippet_id)
def test_the_python_snippets_run_and_print_what_they_say(snippet, tmp_path):
    for package, module in (("open_clip", "open_clip"), ("import clip\n", "clip")):
        if package in snippet:
            pytest.importorskip(module)  # no requirement of ours
    if "runs/demo" in snippet:
        snippet = snippet.replace(
            "runs/demo-ordinalclip-linear-K3-seed1", str(exported_run(tmp_path))
        )
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"print\(.*\)\s+# (.*)", snippet)
    assert printed and done.stdout.splitlines() == printed


def exported_run(folder):
    """A run of the demo at toy size."""
    import data
    import train

    data._make_demo(folder / "demo", (60, 30, 30))
    argv = [
        "--data",
        "demo",
        "--data-root",
        str(folder / "demo"),
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    train.main([*argv, "--device", "cpu", "--out", str(folder / "run")])
    return folder / "run"


VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
ALONE = {  # files that are copied together, and what runs on them
    ("tokenizer.py", VOCABULARY): "from tokenizer import Tokenizer; print(tuple(Tokenizer()(['a cat']).shape))",
    ("clip_model.py", "clip_weights.py"): "from clip_model import tiny_clip; c = tiny_clip(); "
                        "print((1, c.context_length))",
    ("kernels",): "import torch; from kernels import match; print(tuple(match(torch.randn(1, 8), torch.randn(77, 8), 9.)[0].shape))",
    ("ordinalclip.py", "kernels"): "from ordinalclip import LinearPrototypes; print(tuple(LinearPrototypes(1, 77)().shape))",
    ("data.py",): "import torch, data; print(tuple(data.normalize(torch.zeros(1, 3, 1, 77, dtype=torch.uint8), "
                  "data.CLIP_MEAN, data.CLIP_STD)[0, :1, 0].shape))",
    ("backbones.py",): "import torch; from backbones import VGG16\n"
                       "with torch.device('meta'): print(tuple(VGG16(77)(torch.zeros(1, 3, 224, 224)).shape))",
}  # fmt: skip


@pytest.mark.parametrize("files", ALONE, ids=lambda files: files[0])
def test_a_module_pasted_alone_works(files, tmp_path):
    for name in files:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", ALONE[files]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "(1, 77)", done.stderr


def test_every_command_of_the_readme_parses():
    """Each `python train.py ...` line is understood by the parser, word for word."""
    import train

    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python train.py [^`]*)`", (ROOT / "README.md").read_text())
    lines = [shlex.split(line, comments=True) for line in lines if "train.py" in line]
    commands = [
        next(words[i + 1 :] for i, w in enumerate(words) if w.endswith("train.py"))
        for words in lines
    ]
    assert len(commands) >= 5
    for words in commands:
        if not {"--eval", "--resume", "--help"} & set(words):  # those need a run
            train.parse_args(words)


def test_the_readme_names_files_that_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)|`(\w+\.py|kernels/\w+\.\w+|tests/\w+\.py)`",
                           (ROOT / "README.md").read_text()):  # fmt: skip
        assert (ROOT / (name[0] or name[1])).exists(), name
