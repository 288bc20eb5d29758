"""`python -m kernels.bench`: without a GPU, a small version through Triton's interpreter.

pytest tests/test_bench.py
"""

import json
import os
import select

import pytest

pytest.importorskip("triton")

from kernels import bench


def test_the_steps_run_and_are_right(tmp_path, monkeypatch, capsys):
    plan = [["machine", 60], ["exact", 60, 3, 5, 16], ["exact", 60, 3, 129, 16]]
    monkeypatch.setattr(bench, "steps", lambda tiny: plan)
    bench.main(["--report", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"][0] for row in rows] == ["machine", *["exact"] * 6]
    assert rows[0]["torch"] and (rows[0]["gpu"] is None) == (bench.DEVICE == "cpu")
    assert all(row["ok"] and 0 < row["dX"] < 2e-2 for row in rows if row["step"][0] == "exact")
    table = (tmp_path / "report.md").read_text()
    assert "| dtype | target | i2t | t2i | dX | dP | ds | ok |" in table
    assert "Stopped: " in table and "up to 128 ranks" in table  # a step that fails costs itself
    assert ("through the interpreter" in capsys.readouterr().err) == (bench.DEVICE == "cpu")


def test_speed_and_training_step(capsys, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    bench.speed([2, 3, 16], "fp32", "fp32")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == [*bench.ways()]
    assert all(row["wall_us"] > 0 for row in rows)
    assert rows[0]["way"] == "ours" and rows[0]["error"] < 1e-4
    bench.memcheck(3, 5, 16), bench.gpu_tests()
    assert capsys.readouterr().out.count("needs a GPU") == 2
    bench.training_step("tiny", 2, 3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10 and all(row["images_per_s"] > 0 for row in rows)


def lose_gradient(x, p, y, s, target):
    p = p.clone()
    p.register_hook(lambda gradient: gradient * float("nan"))
    return bench.as_written(x, p, y, s)


def shift_loss(x, p, y, s, target):
    return [loss + 7 for loss in bench.as_written(x, p, y, s)]


def double_loss(x, p, y, s, target):
    return [2 * loss for loss in bench.as_written(x, p, y, s)]


@pytest.mark.parametrize("wrong", [lose_gradient, shift_loss, double_loss])
def test_a_wrong_way_is_not_timed(monkeypatch, capsys, wrong):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "ours", wrong)
    monkeypatch.setattr(bench, "ways", lambda: {"ours": (wrong, "normalized")})
    bench.speed([2, 3, 16], "fp32", "fp32")
    row = json.loads(capsys.readouterr().out)
    assert "not timed" in row["failed"] and "wall_us" not in row


def test_a_step_out_of_time_leaves_no_process(tmp_path, monkeypatch):
    script = tmp_path / "kernels" / "bench.py"
    script.parent.mkdir()
    script.write_text(
        "import subprocess; print('{not json'); print(7); print('{\"a\": 1}', flush=True)\n"
        f"subprocess.run(['sh', '-c', 'echo begun >&2; sleep 3; touch {tmp_path}/late'],\n"
        f"               stderr=open('{tmp_path}/alive', 'w'))\n"
    )
    os.mkfifo(tmp_path / "alive")  # at its end when no process has it open
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    record = dict(step=["machine"], rows=[], problem=None)
    assert [*bench.run_step(record, 2.0)] == record["rows"] == [dict(a=1)]
    assert record["problem"] == "out of time after 2 s"
    assert select.select([alive], [], [], 5)[0] and os.read(alive, 9) == b"begun\n"
    assert select.select([alive], [], [], 5)[0] and os.read(alive, 9) == b""
    os.close(alive)
    assert not (tmp_path / "late").exists()


@pytest.mark.full
def test_the_whole_command(tmp_path):
    bench.main(["--report", str(tmp_path)])
    assert "Stopped" not in (tmp_path / "report.md").read_text()


def test_no_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "steps", lambda tiny: [["machine", 60]])
    bench.report(tmp_path, 0.0)
    assert "Stopped: not started: no time left" in (tmp_path / "report.md").read_text()
