"""tests/parallel.py, with a suite of its own: nothing is lost between the processes.

pytest tests/test_parallel.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import os, pathlib, pytest

@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    (pathlib.Path({folder!r}) / f"made by {{os.getpid()}}").touch()

@pytest.mark.parametrize("i", range(4))
def test_right(shared, i, capsys):
    print(i)
    assert capsys.readouterr().out == f"{{i}}\\n"
"""
WRONG = "def test_wrong():\n    print('said before')\n    assert 1 == 2\n"
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

def set_num_threads(number):
    pass
"""
DIES = "import os\ndef test_dies():\n    os._exit(3)\n"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text("from parallel import pytest_runtestloop\n")
    (folder / "torch.py").write_text(TORCH)  # all that parallel.py asks of it, and no second each
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_tests_are_run_and_reported(tmp_path):
    for name in "abcdef":
        (tmp_path / f"test_{name}.py").write_text(SUITE.format(folder=str(tmp_path)))
    passing = run(tmp_path)
    assert passing.returncode == 0 and "24 passed" in passing.stdout, passing.stdout
    assert len([*tmp_path.glob("made by *")]) <= len(os.sched_getaffinity(0))
    (tmp_path / "test_wrong.py").write_text(WRONG)
    failing = run(tmp_path)
    assert failing.returncode == 1 and "1 failed, 24 passed" in failing.stdout
    assert "said before" in failing.stdout and "assert 1 == 2" in failing.stdout
    (tmp_path / "test_wrong.py").write_text(DIES)
    dying = run(tmp_path)
    assert dying.returncode != 0 and "test_wrong.py::test_dies died" in dying.stdout
