"""pytest tests/test_kills.py -- runs killed at random moments end like the uninterrupted one.

Three signals; every step writes last.pt, so that many kills fall into a write.
"""

import itertools
import os
import random
import signal
import time

import pytest
from conftest import TINY
from processes import FORKSERVER
from test_checkpoints import check_equal_runs

import train

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run_quietly(argv):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    train.torch.set_num_threads(1)
    train.main(argv)


def start(argv):
    process = FORKSERVER.Process(target=run_quietly, args=(argv,))
    process.start()
    return process


@pytest.mark.parametrize("num_kills", [2, pytest.param(40, marks=pytest.mark.full)])
def test_killed_runs_end_like_the_whole_one(stripes, tmp_path, num_kills):
    argv = ["--data", str(stripes), *TINY, "--epochs", "2", "--save-every", "0", "--out"]
    FORKSERVER.Process(target=int).start()  # the server, whose start is not timed
    started = time.time()
    process = start([*argv, str(tmp_path / "whole")])
    process.join()
    assert process.exitcode == 0
    seconds, rng, kills = time.time() - started, random.Random(num_kills), 0
    for i in itertools.count():
        if kills >= num_kills:
            break
        out = tmp_path / f"run{i}"
        for _ in range(rng.choice((1, 1, 2, 3))):  # some runs are killed more than once
            process = start([*argv, str(out)])
            time.sleep(rng.uniform(0, seconds))
            if process.is_alive() and not (out / "results.json").exists():
                os.kill(process.pid, rng.choice(SIGNALS))
                kills += 1
            process.join()
        if not (out / "results.json").exists():
            process = start([*argv, str(out)])
            process.join()
            assert process.exitcode == 0
        check_equal_runs(tmp_path / "whole", out)
