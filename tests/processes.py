"""Python in a process of its own that does not wait for torch to be imported.

    run_python("import torch; print(1)", folder) -> CompletedProcess    as `python -c` in that folder
    run_script(["train.py", "--help"], folder)                          as `python train.py --help`

A server imports torch, nothing of this project, and forks for each call: 0.1 s instead of 1.5.

    run_two(step, folder)    step(0, folder) and step(1, folder), each in a process, at once

These and others of FORKSERVER start from a server that has imported train.py as well.
"""

import atexit
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import torch.multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "torch._dynamo"])  # the first step imports that: 1 s

SERVER = r"""
import gc, json, os, sys
import torch, numpy, PIL.Image
gc.freeze()  # the collection at the end of a call would copy all their objects: 0.3 s
for line in sys.stdin:
    call = json.loads(line)
    if (process := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()
null, out, err = (os.open(name, os.O_RDWR) for name in (os.devnull, call["out"], call["err"]))
for stream, file in enumerate((null, out, err)):
    os.dup2(file, stream)
os.chdir(call["folder"])
os.environ.update(call["env"])
torch.set_num_threads(1)
sys.argv, sys.path[0] = call["argv"], call["folder"]
namespace = dict(__name__="__main__")
exec(compile(call["code"], "<code>", "exec"), namespace)
"""


@functools.cache
def start_server() -> subprocess.Popen:
    command = [sys.executable, "-B", "-c", SERVER]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.kill)
    return server


def run_python(code: str, folder: Path, *argv: str, **env: str) -> CompletedProcess:
    """code as the main module, in `folder`, with more environment variables."""
    server, argv = start_server(), ["-c", *argv]
    with tempfile.TemporaryDirectory() as streams:
        files = {name: os.path.join(streams, name) for name in ("out", "err")}
        for path in files.values():
            open(path, "w").close()
        call = dict(files, code=code, folder=str(folder), argv=argv, env={**os.environ, **env})
        server.stdin.write(json.dumps(call) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        out, err = (Path(path).read_text(errors="replace") for path in files.values())
    return CompletedProcess(argv, returncode, out, err)


def run_two(function: Callable, *args) -> None:
    """function(rank, *args) in two processes; an error in one of them is raised here."""
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method="forkserver")


def run_script(words: list[str], folder: Path, **env: str) -> CompletedProcess:
    """`python SCRIPT ...` or `python -m MODULE ...`."""
    name, *argv = words[1:] if words[0] == "-m" else words
    code = f"import runpy, sys; sys.argv[0] = {name!r}\n"
    if words[0] == "-m":
        code += f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    else:
        code += f"runpy.run_path({name!r}, run_name='__main__')"
    return run_python(code, folder, *argv, **env)
