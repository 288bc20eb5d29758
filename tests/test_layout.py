"""pytest tests/test_layout.py -- imports, sizes of files, and the blocks of README.md and docs/*.md."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image
from processes import run_python, run_script

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "data", "training", "evaluation")
OURS = {
    "ordinalclip", "clip_model", "clip_weights", "tokenizer", "backbones", "train", "exported", "predict", *PACKAGES
}  # fmt: skip
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
TOP_LEVEL = [ROOT / f"{name}.py" for name in sorted(OURS.difference(PACKAGES))]  # not a user's own
MODULES = [*TOP_LEVEL, *(p for name in PACKAGES for p in sorted(ROOT.glob(f"{name}/*.py")))]


def module_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- imports ---

CLIP = {"clip_model", "clip_weights", "tokenizer"}
BELOW_TRAINING = {"ordinalclip", "backbones", "kernels", "data"} | CLIP
OPTIONAL = {"timm", "torchvision"}
ARROWS = {  # file or folder: (modules of ours, third-party packages) it may import
    "tokenizer.py": (set(), {"torch", "ftfy", "regex"}),
    "clip_model.py": ({"clip_weights"}, {"torch"}),
    "clip_weights.py": (set(), {"torch", "numpy", "huggingface_hub"}),
    "ordinalclip.py": ({"kernels"}, {"torch"}),
    "backbones.py": (set(), {"torch"} | OPTIONAL),
    "kernels": ({"kernels"}, {"torch", "triton"}),
    "kernels/bench.py": ({"kernels", "clip_model", "ordinalclip"}, {"torch", "triton"}),
    "data": ({"data"}, {"torch", "numpy", "PIL"}),
    "training": ({"training"} | BELOW_TRAINING, {"torch"}),
    "evaluation": ({"evaluation", "training"} | BELOW_TRAINING, {"torch"}),
    "evaluation/metrics.py": (set(), {"torch"}),
    "evaluation/plots.py": (set(), {"torch", "numpy", "PIL"}),
    "exported.py": (BELOW_TRAINING - {"tokenizer"}, {"torch"}),
    "train.py": (OURS - {"train", "predict"}, {"torch"}),
    "predict.py": (
        BELOW_TRAINING - {"tokenizer"} | {"evaluation", "exported"},
        {"torch", "numpy", "PIL", "onnx", "onnxscript"},
    ),
}


def imported_names(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, anywhere in it, without the standard library's."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            if name.split(".")[0] not in sys.stdlib_module_names:
                yield name.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_go_one_way(path):
    name = module_id(path)
    ours, third_party = ARROWS.get(name) or ARROWS[name.split("/")[0]]
    imported = set(imported_names(path))
    assert imported & OURS <= ours
    assert imported - OURS <= third_party


def test_predict_takes_only_the_pictures_from_evaluation():
    modules = re.findall(r"(?:from|import) (evaluation\S*)", (ROOT / "predict.py").read_text())
    assert set(modules) <= {"evaluation.plots"}


def test_requirements_are_exactly_these():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    names = {re.match(r"[a-z]+", line)[0] for line in lines}
    assert names == {"torch", "ftfy", "regex", "pillow", "numpy", "triton", "pytest"}
    assert "torch==2.13.0" in lines


def test_nothing_is_unpickled_freely():
    for path in MODULES:
        text = path.read_text()
        assert "weights_only=False" not in text and "import pickle" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True)"), path


# --- sizes ---

MAX_LINES, MAX_LINES_IN_ALL, MAX_COLUMNS = 450, 8790, 100


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_a_module_has_at_most_450_lines(path):
    assert num_lines(path) <= MAX_LINES


def test_top_level_modules_are_these_and_short_in_all():
    """Of the files under version control: a user's own beside them count for nothing."""
    command = ["git", "ls-files", "--", "*.py", *(f"{name}/*.py" for name in PACKAGES)]
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [path for path in map(Path, run.stdout.split()) if path.parts[0] != "tests"]
    assert {path.stem for path in tracked if len(path.parts) == 1} == OURS.difference(PACKAGES)
    sizes = [num_lines(ROOT / path) for path in tracked if path.parts[0] != "kernels"]
    assert sum(sizes) <= MAX_LINES_IN_ALL


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_lines_have_at_most_100_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= MAX_COLUMNS, f"{module_id(path)}:{number}"


# --- README.md and docs/*.md ---

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"  # its blocks are run in order, on a copy of the code
DOCS_BUT_EXTENDING = [path for path in DOCS if path != EXTENDING]


def code_blocks(language: str, paths: list[Path] = DOCS_BUT_EXTENDING) -> list[str]:
    """Contents of the fenced blocks of one language."""
    text = "\n".join(path.read_text() for path in paths)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def block_id(block: str) -> str:
    return block.splitlines()[0][:40]


@pytest.mark.parametrize("block", code_blocks("python"), ids=block_id)
def test_a_python_block_runs_and_prints_what_its_comments_say(block, tmp_path):
    for package, module in (
        ("open_clip", "open_clip"),
        ("import clip\n", "clip"),
        ("transformers", "transformers"),
        ("sklearn", "sklearn"),
        ("skimage", "skimage"),
    ):
        if package in block:
            pytest.importorskip(module)  # not a requirement
    example_run = "runs/demo-ordinalclip-linear-K3-seed1"
    if example_run in block:
        block = block.replace(example_run, str(exported_run(tmp_path)))
    writes_files = "sklearn" in block or "save_model" in block
    folder = tmp_path if writes_files else ROOT
    import_ours = f"import sys; sys.path.insert(1, {str(ROOT)!r})\n"
    check_printed_lines(block, run_python(import_ours + block, folder))


def check_printed_lines(block: str, process: CompletedProcess) -> None:
    assert process.returncode == 0, process.stderr
    expected = re.findall(r"print\(.*\)\s+# (.*)", block)
    assert expected and process.stdout.splitlines() == expected


def test_the_examples_of_extending_work(tmp_path):
    """A new data set, method and metric, each written to the file that its block names."""
    for path in MODULES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / VOCABULARY, tmp_path)
    changed = set()
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", EXTENDING.read_text(), re.S | re.M):
        target = re.match(r"# (\w+/\w+\.py), (a new file|at the end)\n", block)
        if target:
            path = tmp_path / target[1]
            assert path.exists() == (target[2] == "at the end")
            with open(path, "a") as file:
                file.write(block)
            changed.add(target[1])
        elif language == "python":
            check_printed_lines(block, run_python(block, tmp_path))
        else:
            for line in block.splitlines():
                process = run_script(shlex.split(line)[1:], tmp_path)
                assert process.returncode == 0, process.stderr
    assert changed == {"data/utkface.py", "training/methods.py", "evaluation/metrics.py"}


def exported_run(folder: Path) -> Path:
    """The folder of a short run on twelve plain images."""
    import train

    for rank in range(3):
        (folder / "gray" / str(rank)).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (96, 96), (60 * rank + i,) * 3)
            image.save(folder / "gray" / str(rank) / f"{i}.png")
    flags = "--clip tiny --image-encoder clip --epochs 1 --workers 0 --device cpu".split()
    train.main(["--data", str(folder / "gray"), "--out", str(folder / "run"), *flags])
    return folder / "run"


def train_commands() -> list[list[str]]:
    """The arguments of every `python train.py ...` in the documents."""
    lines = [
        line for block in code_blocks("sh") for line in block.replace("\\\n", " ").splitlines()
    ]
    for path in DOCS_BUT_EXTENDING:
        lines += re.findall(r"`(python train.py [^`]*)`", path.read_text())
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith("train.py")]
        commands += [words[i + 1 :] for i in scripts[:1]]
    return commands


def test_every_train_command_parses():
    import train

    assert len(train_commands()) >= 20
    for words in train_commands():
        if not {"--eval", "--resume", "--init", "--help"} & set(words):  # those need a run
            train.parse_args(words)


def test_every_predict_command_parses():
    import predict

    lines = [line for line in "".join(code_blocks("sh")).splitlines() if " predict.py " in line]
    assert len(lines) >= 3
    for line in lines:
        predict.parse_args(shlex.split(line, comments=True)[2:])


@pytest.mark.parametrize("path", DOCS, ids=module_id)
def test_a_document_links_to_files_that_exist(path):
    for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", DOCS, ids=module_id)
def test_a_document_names_files_that_exist(path):
    for name in re.findall(r"`((?:\w+/)?\w+\.py|(?:kernels|data|training|evaluation|docs)/[\w.]*)`",
                           path.read_text()):  # fmt: skip
        assert (ROOT / name).exists(), name


# --- modules that are copied elsewhere ---

ALONE = {  # files that are copied together, and what runs on them
    ("tokenizer.py", VOCABULARY):
        "from tokenizer import Tokenizer; print(tuple(Tokenizer()(['a cat']).shape))",
    ("clip_model.py", "clip_weights.py"):
        "from clip_model import tiny_clip; print((1, tiny_clip().context_length))",
    ("kernels",):
        "import torch; from kernels import match\n"
        "print(tuple(match(torch.randn(1, 8), torch.randn(77, 8), 9.0)[0].shape))",
    ("ordinalclip.py", "kernels"):
        "from ordinalclip import LinearPrototypes; print(tuple(LinearPrototypes(1, 77)().shape))",
    ("data",):
        "import torch, data; pixels = torch.zeros(1, 3, 1, 77, dtype=torch.uint8)\n"
        "print(tuple(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD)[0, :1, 0].shape))",
    ("backbones.py",):
        "import torch; from backbones import VGG16\n"
        "with torch.device('meta'): print(tuple(VGG16(77)(torch.zeros(1, 3, 224, 224)).shape))",
    ("evaluation/metrics.py",):
        "import torch; from metrics import expected_rank\n"
        "print((1, round(float(expected_rank(torch.eye(78)[77:])))))",
    ("evaluation/plots.py",):
        "import torch; from plots import draw_matrices\n"
        "names = [str(i) for i in range(5)]\n"
        "picture = draw_matrices({'title': torch.eye(5)}, names, ('x', 'y'))\n"
        "print((1, 77 * (picture.width > 77)))",
}  # fmt: skip


@pytest.mark.parametrize("files", ALONE, ids=lambda files: files[0])
def test_a_module_works_where_it_is_copied(files, tmp_path):
    for name in files:
        copy_to(tmp_path, name)
    process = run_python(ALONE[files], tmp_path)
    assert process.returncode == 0 and process.stdout.strip() == "(1, 77)", process.stderr


def copy_to(folder: Path, name: str) -> None:
    """A file, or the files (not the folders) in a folder, into `folder`."""
    source = ROOT / name
    if source.is_dir():
        (folder / name).mkdir()
        for path in source.glob("*.*"):
            if path.is_file():
                shutil.copy(path, folder / name)
    else:
        shutil.copy(source, folder)


@pytest.mark.parametrize("files", ALONE, ids=lambda files: files[0])
def test_the_readme_names_what_is_copied_together(files):
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].rstrip("/`").lstrip("`") == files[0] and len(cells) == 3:
            names = [name.rstrip("/") for name in re.findall(r"`([^`]+)`", cells[2])]
            assert names == list(files[1:])
            return
    pytest.fail(f"the README has no row for {files[0]}")
