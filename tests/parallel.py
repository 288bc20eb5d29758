"""The test files are shared by a process per core, forked after collection. Off with -s or --pdb.

pytest-xdist does the same for whoever has it (`-n 2`); the suite needs pytest alone.
"""

import itertools
import os
import signal
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import pytest
import torch

LONG = "kernels_compile kernels_autograd run_folder train checkpoints kernels own_code".split()


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """pytest's hook: runs all tests and returns True, or leaves that to pytest."""
    files = [[*items] for _, items in itertools.groupby(session.items, lambda item: item.path)]
    files.sort(key=rank_of_file)
    num_processes = min(num_cores(), len(files), 8)
    if num_processes < 2 or session.testsfailed or not may_fork(session.config):
        return None
    session.config._tmp_path_factory.getbasetemp()  # one for all processes: pytest removes it
    queue, writer = os.pipe()  # of numbers of files: one byte each, taken by whoever is free
    os.write(writer, bytes(range(len(files))))
    os.close(writer)
    running, processes = {}, []  # {connection: test that it runs}
    for _ in range(num_processes):
        ours, theirs = Pipe(duplex=False)
        process = os.fork()
        if process == 0:
            run_files(session, files, queue, theirs)
        theirs.close()
        processes.append(process)
        running[ours] = None
    try:
        while running:
            for connection in wait(list(running)):
                receive(session, connection, running)
    finally:
        for process in processes:
            if session.shouldfail or running:
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return True


def rank_of_file(items: list[pytest.Item]) -> int:
    """The long files come first, so that no process waits for another at the end."""
    name = items[0].path.stem.removeprefix("test_")
    return LONG.index(name) if name in LONG else len(LONG)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def may_fork(config: pytest.Config) -> bool:
    has_xdist = getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput")
    in_one = config.option.capture == "no" or config.option.usepdb or config.option.collectonly
    return not (has_xdist or in_one or torch.cuda.is_available())  # CUDA does not survive a fork


def receive(session, connection: Connection, running: dict) -> None:
    """One message of a process: the test it begins, a report, or None at its end."""
    try:
        message = connection.recv()
    except EOFError:
        session.shouldfail = f"the process that ran {running[connection]} died"
        raise session.Failed(session.shouldfail) from None
    if message is None:
        del running[connection]
    elif isinstance(message, str):
        running[connection] = message
    else:
        hook = session.config.hook
        report = hook.pytest_report_from_serializable(config=session.config, data=message)
        if session.config.option.verbose <= 0:
            report.node = None  # shown as xdist's reports: files alternate, so no heading for each
        hook.pytest_runtest_logreport(report=report)
        vars(report).pop("node", None)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)


def run_files(session, files, queue: int, connection: Connection) -> None:
    """In a forked process: runs files until none is left, and ends the process."""
    config, status = session.config, 1
    try:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # its files are shared with the other processes
        capture.start_global_capturing()
        capture.suspend_global_capture()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Sender(config, connection))
        number = os.read(queue, 1)
        while number:
            items = files[number[0]]
            for item, next_item in itertools.pairwise([*items, None]):
                if next_item is None and (number := os.read(queue, 1)):
                    next_item = files[number[0]][0]  # so that fixtures of the session stay
                config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
        connection.send(None)
        status = 0
    finally:
        os._exit(status)


class Sender:
    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self.config, self.connection = config, connection

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.connection.send(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        to_data = self.config.hook.pytest_report_to_serializable
        self.connection.send(to_data(config=self.config, report=report))
