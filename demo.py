"""`python demo.py`: in two to three minutes, draw a few hundred scenes of named shapes and textures, train a tiny
DenseCLIP on them from random weights, and write pictures of what it sees. Needs no download and no GPU."""

import argparse
import colorsys
import os
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: less time to map memory for tensors

import numpy as np
import torch
from PIL import Image, ImageDraw

from clip_model import replacing
from data import SegmentationDataset, TrainTransform, find_split, resize_to_fit, run_script
from denseclip import build_model, read_checkpoint, restore_model
from eval import ConfusionMatrix, evaluate, predict_labels, start_process
from predict import draw_sheet
from train import Recipe, train

RECIPE = Recipe(iterations=480, batch_size=8, lr=1e-3, backbone_lr_multiplier=1.0, warmup=40, reduce_zero_label=True)
TEXTURES = {"stripes": (86, 180, 233), "checkerboard": (0, 114, 178), "dots": (204, 121, 167)}
SHAPES = {"circle": (230, 159, 0), "square": (200, 30, 30), "triangle": (0, 158, 115), "cross": (240, 228, 66)}
SHAPES["ring"] = (148, 52, 110)
CLASSES = {**TEXTURES, **SHAPES}  # name: color; in a mask the first is 1, and 0 is unlabeled, as in ADE20K
SIZES = ((192, 144), (144, 192), (160, 160), (208, 144))  # (width, height)


def draw_dataset(root: Path, train: int = 320, val: int = 40, seed: int = 0) -> None:
    """Draw {images,annotations}/{training,validation} and classes.txt in `root`; the same for the same seed."""
    random = np.random.default_rng(seed)
    for split, number in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            image, mask = draw_scene(random)
            with replacing(root / "images" / split / f"drawing_{i:04d}.jpg") as part:
                image.save(part, quality=92)
            with replacing(root / "annotations" / split / f"drawing_{i:04d}.png") as part:
                mask.save(part)
    lines = ["\t".join(map(str, (name, *color))) for name, color in CLASSES.items()]
    (root / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_scene(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Image and mask: two textures that meet at a line, and up to five shapes, each kind in its own range of hues."""
    width, height = size = SIZES[random.integers(len(SIZES))]
    names = list(CLASSES)
    first, second = random.permutation(len(TEXTURES))[:2]
    image, mask = draw_texture(names[first], size, random), Image.new("L", size, int(first) + 1)
    a, b = random.uniform(0.25, 0.75, 2)  # where the line crosses two opposite sides
    half = [(0, a * height), (width, b * height), (width, height), (0, height)]
    if random.random() < 0.5:
        half = [(a * width, 0), (b * width, height), (width, height), (width, 0)]
    region = Image.new("L", size, 0)
    ImageDraw.Draw(region).polygon(half, fill=255)
    image.paste(draw_texture(names[second], size, random), mask=region)
    mask.paste(int(second) + 1, mask=region)

    on_image, on_mask, taken = ImageDraw.Draw(image), ImageDraw.Draw(mask), []
    for _ in range(12):  # attempts; a shape that would touch another is left out
        radius = random.uniform(18, 36)
        x, y = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
        if len(taken) < 5 and all(np.hypot(x - u, y - v) > radius + r + 4 for u, v, r in taken):
            taken.append((x, y, radius))
            index = len(TEXTURES) + int(random.integers(len(SHAPES)))
            shape = (names[index], x, y, radius, random.uniform(0, 2 * np.pi))
            hue = (index - len(TEXTURES) + random.uniform(-0.2, 0.2)) / len(SHAPES) % 1
            fill = colorsys.hsv_to_rgb(hue, random.uniform(0.6, 1), random.uniform(0.6, 1))
            draw_shape(on_image, *shape, fill=tuple(round(255 * value) for value in fill), edge=(20, 20, 20))
            draw_shape(on_mask, *shape, fill=index + 1, edge=0)
    pixels = np.asarray(image) + random.normal(0, 6, (height, width, 3))  # noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def draw_texture(name: str, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A two-colored pattern of (width, height) pixels at a random angle and period."""
    x, y = np.meshgrid(*map(np.arange, size))
    angle, period = random.uniform(0, np.pi), random.uniform(7, 12)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period
    pattern = {
        "stripes": u % 2 < 1,
        "checkerboard": (np.floor(u) + np.floor(v)) % 2 == 0,
        "dots": (u % 1.5 - 0.75) ** 2 + (v % 1.5 - 0.75) ** 2 < 0.2,
    }[name]
    dark, bright = random.integers(0, 140, 3), random.integers(140, 256, 3)
    return Image.fromarray(np.where(pattern[..., None], dark, bright).astype(np.uint8))


def draw_shape(draw: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, angle: float, fill, edge):
    """A shape around (x, y), with an edge of two pixels."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        draw.ellipse(box, fill=fill, outline=edge, width=2)
    elif name == "ring":  # the background shows through its middle
        draw.ellipse(box, outline=edge, width=int(0.45 * radius) + 4)
        draw.ellipse([box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2], outline=fill, width=int(0.45 * radius))
    else:
        corners = {
            "triangle": [np.exp(2j * np.pi * i / 3) for i in range(3)],
            "square": [1j**i for i in range(4)],
            "cross": [c * 1j**-i for i in range(4) for c in (0.35 + 1j, 0.35 + 0.35j, 1 + 0.35j)],
        }[name]
        corners = [radius * corner * np.exp(1j * angle) for corner in corners]
        draw.polygon([(x + c.real, y + c.imag) for c in corners], fill=fill, outline=edge, width=2)


@torch.no_grad()
def write_sheets(model: torch.nn.Module, dataset: SegmentationDataset, folder: Path, number: int = 8) -> None:
    """Image, ground truth, prediction and score maps of the drawings that agree most with the truth, the best first.
    Drawings of at least five classes come before the others, which are easy."""
    found = []
    for i, (image, truth, _) in enumerate(dataset):
        labels, matrix = predict_labels(model, image, truth.shape), ConfusionMatrix(dataset.num_classes)  # (H, W)
        matrix.update(labels, truth)
        found.append((matrix.counts.sum(1).count_nonzero() < 5, -matrix.compute()["miou"], i, labels))  # easy ones last
    folder.mkdir(exist_ok=True)
    for rank, (_, _, i, labels) in enumerate(sorted(found)[:number], start=1):
        image, truth, path = dataset[i]
        score_map = model.encoder(resize_to_fit(image[None], (2048, model.short_side)))[1][0]  # (K, h / 32, w / 32)
        shown = [k for k in range(dataset.num_classes) if (truth == k).any()][:5]
        maps = {model.class_names[k]: score_map[k] for k in shown}
        sheet = draw_sheet(Image.open(path), labels, model.class_names, list(CLASSES.values()), maps, truth)
        sheet.save(folder / f"{rank}_{Path(path).stem}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    out, names, (_, _, device) = parser.parse_args().out, list(CLASSES), start_process()
    if any(out.glob("*.pt")) and not (out / "data" / "classes.txt").exists():
        raise ValueError(f"{out} already holds a run that is not the demo's: name another --out")
    draw_dataset(out / "data")
    torch.manual_seed(RECIPE.seed)
    model = build_model("tiny", names, short_side=192)  # larger than the crops of 128, so that corners survive
    train_folders, val_folders = (find_split(out / "data", split) for split in ("train", "val"))
    transform = TrainTransform(model.crop_size, (2048, model.short_side))
    train_set = SegmentationDataset(*train_folders, len(names), transform, reduce_zero_label=True)
    val_set = SegmentationDataset(*val_folders, len(names), reduce_zero_label=True)
    evaluate_model = partial(evaluate, dataset=val_set, device=device)
    loop = {"workers": 2, "eval_every": 240, "save_every": 240, "log_every": 20}
    loop["data"] = {"colors": list(CLASSES.values()), "val": [str(folder.resolve()) for folder in val_folders]}
    train(model, train_set, RECIPE, out, device, evaluate_model=evaluate_model, **loop)
    checkpoint = read_checkpoint(out / "best.pt")
    write_sheets(restore_model(checkpoint, out / "best.pt", build_model), val_set, out / "pictures")
    print(f"""
mIoU {checkpoint["best"]:.1f} on {len(val_set)} drawings that were not used for training. {out}/pictures shows the best:
image, truth, prediction and score maps, Eq. (2). The model is {out}/best.pt, the drawings are in {out}/data. Next:
  python eval.py --checkpoint {out}/best.pt --multi-scale
  python predict.py {out}/data/images/validation --checkpoint {out}/best.pt --score-maps all
  python train.py --model tiny --train IMAGES MASKS --val IMAGES MASKS --classes LIST --out runs/mine""")


if __name__ == "__main__":
    run_script(main)
