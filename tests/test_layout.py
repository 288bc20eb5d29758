"""pytest tests/test_layout.py -- who imports whom, what the README shows, what the project promises to be."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"ordinalclip", "clip_model", "tokenizer", "kernels", "data", "backbones", "train", "predict"}
THIRD = {"torch", "ftfy", "regex", "PIL", "numpy", "triton"}
OPTIONAL = {"timm", "torchvision"}
PEERS = {"inf_cl", "cut_cross_entropy", "memeff", "open_clip", "liger_kernel"}  # kernels/bench.py only
ARROWS = {
    "tokenizer.py": (set(), {"torch", "ftfy", "regex"}),
    "clip_model.py": (set(), {"torch"}),
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
        assert found <= {"torch", "triton", "PIL", "numpy"} | (PEERS if path.name == "bench.py" else set())


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


def test_the_python_snippets_run_and_print_what_they_say(tmp_path):
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"print\(.*\)\s+# (.*)", snippet)
        assert printed and done.stdout.splitlines() == printed


def test_every_command_of_the_readme_parses():
    """Each `python train.py ...` line is understood by the parser, word for word."""
    import train

    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python train.py [^`]*)`", (ROOT / "README.md").read_text())
    lines = [shlex.split(line, comments=True) for line in lines if "train.py" in line]
    commands = [next(words[i + 1 :] for i, w in enumerate(words) if w.endswith("train.py")) for words in lines]
    assert len(commands) >= 5
    for words in commands:
        if not {"--eval", "--resume", "--help"} & set(words):  # those need a run
            train.parse_args(words)


def test_the_readme_names_files_that_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)|`(\w+\.py|kernels/\w+\.\w+|tests/\w+\.py)`",
                           (ROOT / "README.md").read_text()):  # fmt: skip
        assert (ROOT / (name[0] or name[1])).exists(), name
