"""pytest tests/test_run_folder.py -- what is written where, and when a folder is refused."""

import pytest
import torch
from conftest import TINY

import data
import train


def test_a_finished_run_is_not_written_over(finished_run, stripes):
    out, _ = finished_run
    with pytest.raises(
        SystemExit, match="is finished, but with another --epochs: 3, not 5; give another --out"
    ):
        train.main(["--data", str(stripes), "--out", str(out), *TINY, "--epochs", "5"])
    with pytest.raises(
        SystemExit, match="holds a finished run; --eval .* tests it again, --out starts"
    ):
        train.main(["--data", str(stripes), "--out", str(out), *TINY, "--epochs", "3"])
    with pytest.raises(SystemExit, match="is finished, see .*results.json"):
        train.main(["--resume", str(out)])


def test_a_half_written_file_never_gets_the_name(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")

    def broken(part):
        part.write_bytes(b"ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.atomic_write(path, broken)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(
        SystemExit, match="is no checkpoint of this script for that use: it holds no 'settings'"
    ):
        train.main(["--eval", str(tmp_path / "x.pt")])


def test_a_checkpoint_away_from_its_run_is_told_plainly(finished_run, tmp_path):
    (tmp_path / "best.pt").write_bytes((finished_run[0] / "best.pt").read_bytes())
    with pytest.raises(SystemExit, match="No such file or directory: .*splits/"):
        train.main(["--eval", str(tmp_path / "best.pt")])


def test_a_run_cut_off_before_its_first_last_pt_is_begun_again(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "run")]
    results = train.main(argv)
    for name in ("results.json", "last.pt"):
        (tmp_path / "run" / name).unlink()
    assert train.main(argv)["test"] == results["test"]
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(
        SystemExit, match="holds a run; --resume .* goes on with it, --out elsewhere"
    ):
        train.main(argv)
    (tmp_path / "run" / "last.pt").rename(tmp_path / "run" / "thesis.txt")
    with pytest.raises(
        SystemExit,
        match="is not empty and is not a run folder .it holds thesis.txt.; choose another",
    ):
        train.main(argv)
