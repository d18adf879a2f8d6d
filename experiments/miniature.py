"""The paper's claim in miniature: a small CLIP, trained here on captioned drawings, and Table 2 measured with it.

    python -m experiments.miniature                    # everything; it continues where an earlier call stopped
    python -m experiments.miniature prompting          # Table 2; or another of the parts that --help names

Captions list what a drawing of the demo shows, in several wordings and any order, and never where. Then DenseCLIP is
trained on a few drawings with masks, five times per system: seed s draws the same drawings and shows them in the same
order in all systems, so differences are paired. Captions, retrieval, training, our choice of the number of masks and
validation, on which nothing is chosen, have drawings of their own. Files go to --out; results.jsonl has a line for
each run, which is not repeated. After a change of the code or of clip.pt, name another --out."""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: less time to map memory for tensors

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from clip_model import CLIP, load_clip, replacing
from data import SegmentationDataset, TrainTransform, find_split, normalize, run_script
from demo import CLASSES, draw_dataset, draw_scene
from denseclip import PRESETS, Settings, build_model
from eval import ConfusionMatrix, evaluate
from predict import TEMPLATES, score_map_model, zero_shot_model
from tokenizer import tokenize
from train import Recipe, complete, train

NAMES = list(CLASSES)
SIDE = 96  # pixels per side of the drawings in pre-training
ARCHITECTURE = replace(PRESETS["tiny"].architecture, input_resolution=SIDE)
WORDINGS = (*TEMPLATES, "a photo of a {}.", "a drawing of a {}.", "there is a {} in this picture.", "{}")
SEEDS = {"captions": 1, "retrieval": 2, "validation": 3, "choices": 4, "training": 100}  # training: + seed of the run
LABELS = 8  # drawings with masks: of 8, 32 and 128, where the start matters most, by the table "choices"
SCORED = 60  # drawings in each of the sets for validation and choices
SIDES = (96, 128, 160, 192)  # pixels of the short side, for score maps without training

# Each system: options of `build_model` and `Recipe` beside the defaults below, and the paper's mIoU of that row.
NONE, POST, FULL = {"prompting": "none"}, {"prompting": "post"}, {"backbone_lr_multiplier": 1.0}
RANDOM, LONG = NONE | {"clip": None} | FULL, {"times": 3}  # times: of --iterations
FINE = FULL | {"times": 4, "labels": 32, "short_side": 192}  # as in walkthrough.ipynb: maps of 6 x 8, not 4 x 6
TABLES = {
    "prompting": {  # Table 2, and Table 7
        "random start": (RANDOM, None),
        "CLIP, no language": (NONE, 39.6),
        "the same, image encoder x 1": (NONE | FULL, "under 30"),
        "+ template": ({"prompting": "template"}, None),
        "+ template, post-model": ({"prompting": "template+post"}, 42.9),
        "+ learned contexts": ({"prompting": "learned"}, 42.1),
        "+ pre-model": ({"prompting": "pre"}, 42.9),
        "+ post-model": (POST, 43.5),
    },
    "losses": {
        "auxiliary loss, score map joined": (POST, 43.5),
        "no auxiliary loss": (POST | {"aux_weight": 0.0}, None),
        "score map not joined": (POST | {"join_score_map": False}, None),
    },
    "gamma": {  # Table 8
        "learned from 1e-4": (POST, 43.5),
        "fixed at 1e-4": (POST | {"learn_gamma": False}, 42.6),
        "learned from 1.0": (POST | {"gamma": 1.0}, 42.8),
    },
    "rates": {  # Table 6: multipliers of the learning rate (text encoder, image encoder)
        "(0, 0.1)": (POST, 43.5),
        "(0, 1)": (POST | FULL, 42.6),
        "(0.1, 0.1)": (POST | {"text_lr_multiplier": 0.1}, 42.2),
    },
    "longer": {
        "CLIP, no language": (NONE | LONG, None),
        "post-model": (POST | LONG, None),
        "CLIP, no language, image encoder x 1": (NONE | LONG | FULL, None),
        "post-model, image encoder x 1": (POST | LONG | FULL, None),
    },
    "finer": {
        "CLIP, no language": (NONE | FINE, None),
        "template": ({"prompting": "template"} | FINE, None),
        "learned contexts": ({"prompting": "learned"} | FINE, None),
        "post-model": (POST | FINE, None),
    },
    "choices": {  # scored on drawings of their own
        f"{name}, {labels}": (options | {"labels": labels}, None)
        for name, options in {"random start": RANDOM, "CLIP, no language": NONE, "post-model": POST}.items()
        for labels in (8, 32, 128)
    },
}
RECIPE = Recipe(iterations=120, batch_size=8, lr=1e-3, warmup=12, reduce_zero_label=True)


# ------------------------------------------------------------------------------------------------ a small CLIP
def draw_scenes(number: int, seed: int) -> tuple[Tensor, list[list[str]]]:
    """Drawings (number, 3, SIDE, SIDE) uint8, and the names of what each shows."""
    random, images, contents = np.random.default_rng(seed), [], []
    for _ in tqdm(range(number), "drawing", leave=False, disable=None):
        image, mask = draw_scene(random)
        images.append(torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1))
        contents.append([NAMES[value - 1] for value in np.unique(np.asarray(mask)) if value])
    return torch.stack(images), contents


def write_caption(content: list[str], random: np.random.Generator) -> str:
    """All that a drawing shows, in any order: "a photo of a ring, stripes and dots."."""
    *names, last = random.permutation(content)
    return WORDINGS[random.integers(len(WORDINGS))].format(f"{', '.join(names)} and {last}")


def pretrain(path: Path, steps: int = 2_000, drawings: int = 8_000, batch_size: int = 32, lr: float = 1e-3) -> None:
    """Train a small CLIP with CLIP's loss and write its weights, under OpenAI's names, to `path`."""
    images, contents = draw_scenes(drawings, SEEDS["captions"])  # (N, 3, SIDE, SIDE)
    random = np.random.default_rng(SEEDS["captions"])
    torch.manual_seed(0)
    clip = CLIP(ARCHITECTURE).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.1, fused=True)
    bar, order = tqdm(range(steps), "pre-training", disable=None), []
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * (min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2)
        if len(order) < batch_size:
            order = random.permutation(drawings).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        flips = [axis for axis in (2, 3) if random.random() < 0.5]  # captions say nothing of places
        x = normalize(images[batch].flip(flips) / 255)  # (B, 3, SIDE, SIDE)
        tokens = tokenize([write_caption(contents[i], random) for i in batch], length=48)  # (B, L)
        logits, pairs = clip(x.to(memory_format=torch.channels_last), tokens), torch.arange(len(batch))  # (B, B), (B,)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clip.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix_str(f"loss {loss.item():.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        torch.save({name.removeprefix("text."): value for name, value in clip.state_dict().items()}, part)


# ------------------------------------------------------------------------------------------------ before any mask
@torch.no_grad()
def retrieval(clip_path: Path, number: int = 200) -> dict[str, float]:
    """Recall@1, in per cent, among `number` held-out drawings and their captions. Several may show the same things:
    the best possible is what a model reaches that knows exactly what every drawing shows."""
    clip, (images, contents) = load_clip(str(clip_path)), draw_scenes(number, SEEDS["retrieval"])
    texts = [f"a photo of a {', '.join(names[:-1])} and {names[-1]}." for names in contents]
    images = torch.cat([clip.encode_image(x) for x in normalize(images / 255).split(50)])  # (N, C)
    scores = F.normalize(images, dim=1) @ F.normalize(clip.encode_text(tokenize(texts)), dim=1).T  # (N, N)
    hits = [(scores.argmax(axis) == torch.arange(number)).float().mean().item() for axis in (1, 0)]
    best = statistics.mean(1 / contents.count(names) for names in contents)
    found = {"image to text": hits[0], "text to image": hits[1], "chance": 1 / number, "best possible": best}
    return {f"recall@1, {name}": 100 * value for name, value in found.items()}


def zero_shot(clip_path: Path, folders: tuple[Path, Path]) -> dict[str, list[float]]:
    """mIoU of score maps by what is compared with the class names, without any training on masks, for each of SIDES."""
    dataset = SegmentationDataset(*folders, len(NAMES), reduce_zero_label=True)
    scores, matrix, random = {}, ConfusionMatrix(len(NAMES)), torch.Generator().manual_seed(0)
    for _, label, _ in dataset:
        matrix.update(torch.randint(len(NAMES), label.shape, generator=random), label)
    scores["a random class for every pixel"] = [matrix.compute()["miou"]] * len(SIDES)
    paths = {  # what is compared, and a forward hook of the attention pool: (pool, (x4,), (z_bar, z)) -> (z_bar, z)
        "z, Eq. (1)": ("z", None),
        "z_bar at every position": ("z", lambda _, x, y: (y[0], y[0][:, :, None, None].expand_as(y[1]))),
        "x4 through the output projection": ("z", lambda p, x, y: (y[0], p.c_proj(x[0].movedim(1, 3)).movedim(3, 1))),
        "value projection": ("value", None),
    }
    for name, (dense, hook) in paths.items():
        model = zero_shot_model(str(clip_path), NAMES, dense).eval()
        if hook:
            model.encoder.backbone.attnpool.register_forward_hook(hook)
        for center in (False,) if "z_bar" in name else (False, True):  # less its mean, z_bar's map is 0
            model.center = center
            title = f"{name}, less each map's mean" if center else name
            scores[title] = [evaluate(model, dataset, "cpu", short_side=side)["miou"] for side in SIDES]
    return scores


# ------------------------------------------------------------------------------------------------ from a few masks
def run(out: Path, options: dict, seed: int, scored_on: str, iterations: int) -> dict:
    """Train one system once and score it; `options` are those of a row of TABLES."""
    start, options = time.perf_counter(), {"clip": str(out / "clip.pt")} | options
    recipe = complete(RECIPE, options | {"seed": seed, "iterations": iterations * options.get("times", 1)})
    settings = {"short_side": 144} | {name: options[name] for name in Settings.__annotations__ if name in options}
    folder, drawings = out / "run", out / "data" / f"training_{seed}_{options['labels']}"
    draw_dataset(drawings, options["labels"], 0, SEEDS["training"] + seed)
    torch.manual_seed(seed)
    model = build_model("tiny", NAMES, clip=options["clip"], crop_size=SIDE, **settings)
    transform = TrainTransform(model.crop_size, (2048, model.short_side))
    train_set = SegmentationDataset(*find_split(drawings, "train"), len(NAMES), transform, reduce_zero_label=True)
    val_set = SegmentationDataset(*find_split(out / "data" / scored_on, "val"), len(NAMES), reduce_zero_label=True)
    score, device = partial(evaluate, dataset=val_set, device="cpu"), torch.device("cpu")
    every = dict.fromkeys(("eval_every", "save_every", "log_every"), recipe.iterations) | {"workers": 0}
    record = {"miou": train(model, train_set, recipe, folder, device, evaluate_model=score, **every)["miou"]}
    if maps := score_map_model(model, NAMES, folder):
        maps.crop_size = model.crop_size  # the same windows
        record["score_map_miou"] = score(maps)["miou"]
    if getattr(model.encoder, "gamma", None) is not None:
        record["gamma"] = model.encoder.gamma.abs().mean().item()
    return record | {"seconds": time.perf_counter() - start}


def run_table(out: Path, table: str, seeds: int, iterations: int) -> dict[str, list[dict]]:
    """The records of each row of a table, one per seed. Runs whose record is in results.jsonl are not repeated."""
    file, scored_on, records = out / "results.jsonl", "choices" if table == "choices" else "validation", {}
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    runs = list(itertools.product(range(seeds), TABLES[table].items()))
    for seed, (row, (options, _)) in tqdm(runs, table, disable=None):
        what = {"options": {"labels": LABELS} | options, "seed": seed, "scored_on": scored_on, "iterations": iterations}
        record = next((record for record in known if what.items() <= record.items()), None)
        if record is None:
            record = what | run(out, **what)
            with open(file, "a", encoding="utf-8") as results:
                results.write(json.dumps(record) + "\n")
        records.setdefault(row, []).append(record)
    return records


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def markdown(head: list, rows: list[list]) -> str:
    """A Markdown table; cells that a row lacks at its end are empty."""
    rows = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def difference(runs: list[dict], others: list[dict]) -> str:
    """Of the mIoU, paired by seed; bold: beyond twice its standard error. (A 95 % interval of five runs is 2.8 of them;
    the error is over runs, not over the drawings that are scored.)"""
    mean, error = mean_and_error([a["miou"] - b["miou"] for a, b in zip(runs, others, strict=True)])
    return f"**{mean:+.1f} ± {error:.1f}**" if abs(mean) > 2 * error else f"{mean:+.1f} ± {error:.1f}"


def format_records(table: str, records: dict[str, list[dict]]) -> str:
    """A table in Markdown, and the differences, row less column."""
    rows, names = [], list(records)
    for row, runs in records.items():
        miou, maps = ([r[key] for r in runs if key in r] for key in ("miou", "score_map_miou"))
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(values)) if values else "" for values in (miou, maps)]
        gamma = f"{statistics.mean(r['gamma'] for r in runs):.2g}" if "gamma" in runs[0] else ""
        rows.append([row, *cells, gamma, TABLES[table][row][1] or ""])
    text = markdown(["system", "mIoU", "of the score maps alone", "gamma", "paper"], rows)
    rows = [[row, *(difference(records[row], records[names[j]]) for j in range(i))] for i, row in enumerate(names)]
    return text + "\n\n" + markdown(["row less column", *names[:-1]], rows[1:])


def plot(records: dict[str, list[dict]], path: Path) -> None:
    """A dot for each run, a bar for each mean; one line per system."""
    font, line, left, right = ImageFont.load_default(16), 30, 320, 800  # pixels
    scores = {row: [record["miou"] for record in runs] for row, runs in records.items()}
    low, high = 5 * math.floor(min(map(min, scores.values())) / 5), 5 * math.ceil(max(map(max, scores.values())) / 5)
    place, bottom = partial(np.interp, xp=(low, high), fp=(left, right)), line * len(scores)  # mIoU -> x
    picture = Image.new("RGB", (right + 40, bottom + 2 * line), "white")
    canvas = ImageDraw.Draw(picture)
    for i in range(low, high + 1, 5):
        canvas.line([(place(i), 0), (place(i), bottom)], "#dddddd")
        canvas.text((place(i), bottom + 4), str(i), "black", font, anchor="mt")
    canvas.text(((left + right) / 2, bottom + line), "mIoU", "black", font, anchor="mt")
    for i, (row, values) in enumerate(scores.items()):
        y, mean = line * (i + 0.5), place(statistics.mean(values))
        canvas.text((left - 10, y), row, "black", font, anchor="rm")
        for value in values:
            canvas.circle((place(value), y), 4, outline="#2b6cb0")
        canvas.line([(mean, y - 10), (mean, y + 10)], "#c53030", 3)
    picture.save(path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.miniature", None, __doc__, formatter_class=raw)
    parts = ("zero-shot", *TABLES)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each system (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=RECIPE.iterations, help="of each run (default: %(default)s)")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(parts):
        parser.error(f"no part named {wrong.pop()}: choose from {', '.join(parts)}")
    clip = args.out / "clip.pt"
    if not clip.exists():
        pretrain(clip)
    for name in ("choices", "validation"):
        draw_dataset(args.out / "data" / name, 0, SCORED, SEEDS[name])
    for part in args.parts or parts:
        start = time.perf_counter()
        if part == "zero-shot":
            text = markdown(["", "%"], [[name, f"{value:.1f}"] for name, value in retrieval(clip).items()])
            for drawings in ("choices", "validation"):
                scores = zero_shot(clip, find_split(args.out / "data" / drawings, "val"))
                rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in scores.items()]
                text += "\n\n" + markdown([f"{drawings}: mIoU at", *SIDES], rows)
        else:
            records = run_table(args.out, part, args.seeds, args.iterations)
            text = format_records(part, records)
            plot(records, args.out / f"{part}.png")
        (args.out / f"{part}.md").write_text(f"{text}\n", encoding="utf-8")
        print(f"\n{part}, {time.perf_counter() - start:.0f} s\n\n{text}")


if __name__ == "__main__":
    run_script(main)
