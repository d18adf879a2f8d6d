"""A long training run of the tiny model, to see that memory, open files and time per step stay flat.

    python -m experiments.long_run --out runs/long                        # 20,000 steps, about 20 minutes on one core
    python -m experiments.long_run --out runs/long --draw                 # the figures and the picture once more

Draws a small data set and trains on it through train.train(), with a loader worker, evaluation and saving every 1,000
steps. Every 200 steps, it writes to long_run.csv what Linux says of the training process and of its loader worker;
at the end, a table in Markdown compares the run's first quarter with its last, and long_run.png shows all of it.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: less time to map memory for tensors

import torch
from PIL import Image, ImageDraw

from data import SegmentationDataset, TrainTransform, find_split, run_script
from demo import CLASSES, draw_dataset
from denseclip import build_model
from eval import evaluate
from train import Recipe, train

SIDE = 32  # pixels of the crops, the least that the model takes: the run is about the loop, not about the model
COLUMNS = {  # of long_run.csv after "iteration", with the titles of the plots
    "memory_mb": "resident memory of training, MiB",
    "workers_memory_mb": "resident memory of its loader workers, MiB",
    "open_files": "open files of training",
    "step_ms": "time per step, median, ms",
    "cpu_ms": "processor time per step, median, ms",  # hardly depends on what else the machine does
}

# ------------------------------------------------------------------------------------------------ the run


def resident_mb(process: int | str) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Recorder:
    """A forward hook that counts training steps and writes a line every `every` of them."""

    def __init__(self, path: Path, every: int):
        self.path, self.every, self.step, self.starts = path, every, 0, []
        self.path.write_text(",".join(["iteration", *COLUMNS]) + "\n")

    def __call__(self, model: torch.nn.Module, _) -> None:
        if not model.training:
            return
        self.starts.append((time.perf_counter(), time.process_time()))
        self.step += 1
        if len(self.starts) > self.every:
            clocks = zip(*self.starts, strict=True)
            step, cpu = (1000 * statistics.median(b - a for a, b in pairwise(clock)) for clock in clocks)
            workers = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
            files = len(list(Path("/proc/self/fd").iterdir()))
            record = [resident_mb("self"), sum(map(resident_mb, workers)), files, step, cpu]
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(",".join([str(self.step - 1), *(f"{value:.2f}" for value in record)]) + "\n")
            self.starts = self.starts[-1:]


def long_run(out: Path, iterations: int) -> None:
    draw_dataset(out / "data", train=64, val=8)
    names, device = list(CLASSES), torch.device("cpu")
    torch.manual_seed(0)
    model = build_model("tiny", names, crop_size=SIDE)
    train_folders, val_folders = (find_split(out / "data", split) for split in ("train", "val"))
    transform = TrainTransform(SIDE, (2048, SIDE))
    train_set = SegmentationDataset(*train_folders, len(names), transform, reduce_zero_label=True)
    val_set = SegmentationDataset(*val_folders, len(names), reduce_zero_label=True)
    model.register_forward_pre_hook(Recorder(out / "long_run.csv", min(200, iterations // 8)))
    every = max(iterations // 20, 1)
    loop = {"workers": 1, "eval_every": every, "save_every": every, "log_every": every}
    recipe = Recipe(iterations=iterations, batch_size=2, lr=1e-3, warmup=0)
    score = partial(evaluate, dataset=val_set, device=device, workers=1)
    train(model, train_set, recipe, out, device, evaluate_model=score, **loop)


# ------------------------------------------------------------------------------------------------ what it shows


def read_records(path: Path) -> dict[str, list[float]]:
    """Each column of long_run.csv."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def summary(records: dict[str, list[float]]) -> str:
    """Medians of the first and the last quarter as a table in Markdown."""
    quarter = max(len(records["iteration"]) // 4, 1)
    lines = ["|  | first quarter | last quarter | change | least to most |", "|---|---|---|---|---|"]
    for name, title in COLUMNS.items():
        values = records[name]
        first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        extremes = f"{min(values):.1f} to {max(values):.1f}"
        lines.append(f"| {title} | {first:.1f} | {last:.1f} | {100 * (last / first - 1):+.1f} % | {extremes} |")
    return "\n".join(lines)


def draw_plots(records: dict[str, list[float]], path: Path) -> None:
    """One panel for each column, from 0 to a round number above its largest value."""
    width, height, left, top = 900, 180, 70, 28  # of a panel, and its margins, in pixels
    picture = Image.new("RGB", (width, height * len(COLUMNS)), "white")
    draw, end = ImageDraw.Draw(picture), records["iteration"][-1] + records["iteration"][0]
    for panel, (name, title) in enumerate(COLUMNS.items()):
        values, floor = records[name], (panel + 1) * height - 24
        digit = 10 ** math.floor(math.log10(max(*values, 1)))
        high = math.ceil(1.05 * max(*values, 1) / digit) * digit
        scale_x, scale_y = (width - left - 20) / end, (floor - panel * height - top) / high
        draw.text((left, panel * height + 8), title, "black")
        for share in (0, 0.5, 1):
            y, x = floor - share * high * scale_y, left + share * end * scale_x
            draw.line([(left, y), (width - 20, y)], "#dddddd")
            draw.text((left - 8, y), f"{share * high:.0f}", "black", anchor="rm")
            draw.text((x, floor + 6), f"{share * end:,.0f}", "black", anchor="rt" if share else "lt")
        steps = zip(records["iteration"], values, strict=True)
        draw.line([(left + step * scale_x, floor - value * scale_y) for step, value in steps], "#2b6cb0", 2)
    picture.save(path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.long_run", None, __doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("runs/long"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=20_000, help="at least 80 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--draw", action="store_true", help="only read long_run.csv in --out")
    args = parser.parse_args()
    if args.iterations < 80:
        parser.error("--iterations must be at least 80")
    torch.set_num_threads(args.threads)
    if not args.draw:
        if not sys.platform.startswith("linux"):
            raise ValueError("this experiment reads /proc, which only Linux has")
        long_run(args.out, args.iterations)
    records = read_records(args.out / "long_run.csv")
    draw_plots(records, args.out / "long_run.png")
    print(f"\n{summary(records)}\n\n{args.out / 'long_run.csv'}, {args.out / 'long_run.png'}")


if __name__ == "__main__":
    run_script(main)
