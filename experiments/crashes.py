"""Kill a training run again and again, and compare what it ends with to the same run left alone.

    python -m experiments.crashes                                         # 20 SIGKILLs and 10 SIGTERMs, about 7 minutes

Draws a small data set and trains the tiny model by train.py, with loader workers and frequent evaluation: once
unbroken, then with a signal in each start until all were sent, every next start with --resume. Signals come at a
random time, or in the middle of a save, in an evaluation, while the script starts, or go to a loader worker. After
each, last.pt must be loadable, or not exist yet; when a run is through, its weights, optimizer and random states must
equal the unbroken run's bit for bit, and so must the scores in log.jsonl. Prints a table in Markdown; status 1 if
something differed.
Needs Linux's /proc.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from demo import draw_dataset
from denseclip import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2  # of the loader
AIMS = {  # in turn
    signal.SIGKILL: ("any time", "save", "evaluation", "any time", "loader worker"),
    signal.SIGTERM: ("any time", "evaluation", "any time", "save", "start-up"),
}


@dataclass
class Report:
    """What came of all signals."""

    signals: Counter = field(default_factory=Counter)  # (name, aim) -> number
    checkpoints: Counter = field(default_factory=Counter)  # "loadable" or "none yet" -> number
    runs: int = 0  # broken runs that reached their end and were compared
    scores: int = 0  # evaluations compared
    faults: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ one start


def start(data: Path, out: Path, iterations: int, stderr) -> subprocess.Popen:
    """train.py on `data`, continued if `out` holds a checkpoint."""
    command = [sys.executable, ROOT / "train.py", "--data", data, "--out", out, "--model", "tiny", "--device", "cpu"]
    command += ["--set", "crop_size=64", "--iterations", iterations, "--batch-size", 4, "--lr", 1e-3, "--warmup", 5]
    command += ["--eval-every", 5, "--log-every", 5, "--workers", WORKERS]  # every evaluation is preceded by a save
    command += ["--resume"] if (out / "last.pt").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stderr, env=environment)


def children(process: subprocess.Popen) -> list[int]:
    """Process ids of the loader workers."""
    try:
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def strike(process: subprocess.Popen, out: Path, number: signal.Signals, aim: str, chance: random.Random) -> bool:
    """Send a signal at the moment that `aim` says; False if the run ended before."""
    if aim == "start-up":
        time.sleep(chance.uniform(0, 4))
    else:
        if not wait_for(lambda: len(children(process)) >= WORKERS, process):
            return False
        time.sleep(chance.uniform(0, 2.5))
    if aim == "save":
        if not wait_for((out / ".part-last.pt").exists, process):
            return False
        time.sleep(chance.uniform(0, 0.02))
    if aim == "evaluation":  # which has workers of its own
        if not wait_for(lambda: len(children(process)) > WORKERS, process):
            return False
        time.sleep(chance.uniform(0, 0.1))
    workers = children(process)
    if process.poll() is not None or aim == "loader worker" and not workers:
        return False
    os.kill(chance.choice(workers) if aim == "loader worker" else process.pid, number)
    return True


def check_end(process: subprocess.Popen, errors: str, number: signal.Signals, aim: str, out: Path) -> str | None:
    """What was wrong with how a process ended after a signal, None if nothing."""
    status = process.returncode
    if aim == "loader worker":
        expected = status not in (0, -signal.SIGKILL) and "worker" in errors
    elif number == signal.SIGKILL:
        expected = status == -signal.SIGKILL
    else:  # while Python itself starts, there is no handler yet
        expected = status == 130 or aim == "start-up" and status == -signal.SIGTERM
        expected = expected and "Traceback" not in errors
        if "saved at iteration" in errors:
            saved = int(errors.partition("saved at iteration ")[2].partition(";")[0])
            expected = expected and read_checkpoint(out / "last.pt")["iteration"] == saved
    return None if expected else f"{number.name} at {aim}: status {status}, {errors.strip()[-300:]!r}"


# ------------------------------------------------------------------------------------------------ comparison


def same(a: object, b: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def scores(out: Path) -> list[tuple[int, dict]]:
    """The evaluations in a log: iteration, scores."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record.pop("iteration"), record) for record in records if "miou" in record]


def compare(whole: Path, broken: Path, report: Report) -> None:
    """Note in the report where a run that was interrupted differs from the one that was not."""
    for file in ("last.pt", "best.pt"):
        ours, theirs = (read_checkpoint(out / file) for out in (broken, whole))
        different = [key for key in theirs if not same(ours.get(key), theirs[key])]
        if different or ours.keys() != theirs.keys():
            report.faults.append(
                f"{broken / file}: {', '.join(different) or 'its keys'} differ from the unbroken run's"
            )
    expected, found = dict(scores(whole)), scores(broken)  # an interrupted evaluation is repeated
    if {iteration for iteration, _ in found} != expected.keys():
        report.faults.append(f"{broken}: an evaluation is missing in the log")
    if wrong := [iteration for iteration, values in found if values != expected[iteration]]:
        report.faults.append(f"{broken}: scores at iterations {wrong} differ from the unbroken run's")
    if parts := list(broken.glob(".part-*")):
        report.faults.append(f"{broken}: {parts[0].name} is left")
    report.runs, report.scores = report.runs + 1, report.scores + len(found)


def crash(root: Path, kills: int, terms: int, iterations: int = 100, seed: int = 0) -> Report:
    """Train in folders below `root`, with so many SIGKILLs and SIGTERMs."""
    chance, report = random.Random(seed), Report()
    plan = [(signal.SIGKILL, AIMS[signal.SIGKILL][i % 5]) for i in range(kills)]
    plan += [(signal.SIGTERM, AIMS[signal.SIGTERM][i % 5]) for i in range(terms)]
    chance.shuffle(plan)
    data, whole, workers = root / "data", root / "whole", []
    draw_dataset(data, train=16, val=3)
    with open(root / "whole.log", "w+") as stderr:
        if start(data, whole, iterations, stderr).wait():
            raise RuntimeError(f"the unbroken run failed, see {stderr.name}")

    bar = tqdm(total=len(plan), desc="signals", disable=None)
    for run in itertools.count(1):  # until all signals were sent: a run has room for some of them
        out, ended = root / f"broken{run}", False
        while not ended:
            with open(root / "broken.log", "w+") as stderr:
                process = start(data, out, iterations, stderr)
                sent = bool(plan) and strike(process, out, *plan[0], chance)
                workers += children(process)
                try:
                    process.wait(timeout=300)
                except subprocess.TimeoutExpired:
                    report.faults.append(f"{plan[:1]}: still running 300 s later")
                    process.kill()
                    process.wait()
                stderr.seek(0)
                errors = stderr.read()
            ended = process.returncode == 0
            if sent and not ended:  # (a signal may arrive too late to matter)
                number, aim = plan.pop(0)
                report.signals[number.name, aim] += 1
                bar.update()
                if fault := check_end(process, errors, number, aim, out):
                    report.faults.append(fault)
                for file in ("last.pt", "best.pt"):
                    there = (out / file).exists() and read_checkpoint(out / file)  # raises if it cannot be loaded
                    report.checkpoints[file, "loadable" if there else "none yet"] += 1
            elif not ended:
                raise RuntimeError(f"{out} could not be continued: {errors.strip()[-1000:]}")
        compare(whole, out, report)
        if not plan:
            break
    bar.close()
    deadline = time.monotonic() + 15  # workers look every five seconds whether the process that started them is there
    while (left := [pid for pid in workers if "train.py" in command_line(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    report.faults += [f"loader workers outlived their process: {left}"] if left else []
    return report


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def table(report: Report) -> str:
    lines = ["| signal | in, or to | number |", "|---|---|---|"]
    lines += [f"| {name} | {aim} | {number} |" for (name, aim), number in sorted(report.signals.items())]
    found = ", ".join(f"{file} {state} {number}" for (file, state), number in sorted(report.checkpoints.items()))
    lines += ["", f"After {report.signals.total()} signals: {found}."]
    equal = "; ".join(report.faults) or "weights, optimizer, random states and scores equal the unbroken run's"
    lines += [f"Resumed to the end, {report.runs} time(s), with {report.scores} evaluations: {equal}."]
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.crashes", None, __doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--terms", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder to keep everything in (default: none)")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.out or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        report = crash(root, args.kills, args.terms, seed=args.seed)
    print(table(report))
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
