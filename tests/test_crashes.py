"""A training run that is killed again and again ends like the same run left alone, and a long one keeps its memory:
experiments/crashes.py and long_run.py, in short."""

import signal
import sys

import pytest
import torch
from helpers import run
from PIL import Image

from experiments import crashes, long_run


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    """SIGKILLs at any time, in a save and in an evaluation, and a SIGTERM: weights and scores are equal."""
    report = crashes.crash(tmp_path, kills=3, terms=1, iterations=20)
    print(crashes.table(report))
    assert report.signals.total() == 4 and not report.faults
    assert report.runs >= 1 and report.scores >= 4


def test_differences_are_found(tmp_path):
    """The comparison itself: a status that a signal does not explain, and tensors that differ in a bit."""

    class Ended:
        returncode = 1

    assert "status 1" in crashes.check_end(Ended, "", signal.SIGKILL, "save", tmp_path)
    Ended.returncode = 130
    assert crashes.check_end(Ended, "interrupted", signal.SIGTERM, "any time", tmp_path) is None
    assert "Traceback" in crashes.check_end(Ended, "Traceback ...", signal.SIGTERM, "any time", tmp_path)
    states = {"a": [torch.tensor([1.0, 2.0])], "b": 3}
    assert crashes.same(states, {"a": [torch.tensor([1.0, 2.0])], "b": 3})
    assert not crashes.same(states, {"a": [torch.tensor([1.0, 2.0 + 2e-7])], "b": 3})


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_run_in_short(tmp_path, monkeypatch, capsys):
    """experiments/long_run.py with 80 steps: its records, table and picture; no file stays open."""
    run(long_run, monkeypatch, "--out", tmp_path, "--iterations", 80)
    records = long_run.read_records(tmp_path / "long_run.csv")
    assert records["iteration"] == [10, 20, 30, 40, 50, 60, 70]
    assert len(set(records["open_files"])) == 1 and min(records["workers_memory_mb"]) > 0
    assert max(records["memory_mb"]) < 1.05 * min(records["memory_mb"])
    assert capsys.readouterr().out.count("\n| ") == 1 + len(long_run.COLUMNS)
    with Image.open(tmp_path / "long_run.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
