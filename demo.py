"""`python demo.py`: in two minutes, draw a few hundred scenes of named shapes and textures, train a tiny DenseCLIP on
them from random weights, and write pictures of what it sees. Needs no download and no GPU."""

import argparse
import colorsys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clip_model import IGNORE_INDEX
from data import SegmentationDataset, TrainTransform, read_image, resize_to_fit, run_script
from denseclip import build_model, read_checkpoint, restore_model
from eval import evaluate, predict_probabilities, start_process
from heads import resize
from train import Recipe, train

RATES = {"lr": 1e-3, "backbone_lr_multiplier": 1.0, "warmup": 40}
RECIPE = Recipe(iterations=240, batch_size=8, short_side=128, reduce_zero_label=True, **RATES)
TEXTURES = {"stripes": (86, 180, 233), "checkerboard": (0, 114, 178), "dots": (204, 121, 167)}
SHAPES = {"circle": (230, 159, 0), "square": (200, 30, 30), "triangle": (0, 158, 115), "cross": (240, 228, 66)}
SHAPES["ring"] = (148, 52, 110)
CLASSES = {**TEXTURES, **SHAPES}  # name: color; in a mask the first is 1, and 0 is unlabeled, as in ADE20K
SIZES = ((192, 144), (144, 192), (160, 160), (208, 144))  # (width, height)
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # purple to yellow


# ------------------------------------------------------------------------------------------------ drawings


def draw_dataset(root: Path, train: int = 320, val: int = 40, seed: int = 0) -> None:
    """Draw {images,annotations}/{training,validation} and classes.txt in `root`; the same for the same seed."""
    random = np.random.default_rng(seed)
    for split, number in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            image, mask = draw_scene(random)
            image.save(root / "images" / split / f"drawing_{i:04d}.jpg", quality=92)
            mask.save(root / "annotations" / split / f"drawing_{i:04d}.png")
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

    on_image, on_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    taken = []
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


# ------------------------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_sheet(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, path: str) -> Image.Image:
    """A row of panels: image, ground truth and prediction over it, and the score maps of up to five classes present."""
    size, limits, names = label.shape, (2048, model.crop_size), model.class_names
    prediction = predict_probabilities(model, image, size, limits).argmax(0)  # (h, w)
    _, score_map, _ = model.encoder(resize_to_fit(image[None], limits))  # (1, K, h / 32, w / 32), Eq. (2)
    scores = resize(score_map, size)[0].numpy()  # (K, h, w)
    present = [k for k in range(len(names)) if (label == k).any()]
    low, high = scores[present].min(), scores[present].max()  # the same colors in all maps of an image

    picture = read_image(path).permute(1, 2, 0).numpy()  # (h, w, 3)
    gray, colors = picture.mean(2, keepdims=True), np.zeros((256, 3))
    colors[: len(names)] = list(CLASSES.values())
    panels = {"image": picture}
    for title, labels in {"ground truth": label.numpy(), "prediction": prediction.numpy()}.items():
        overlay = 0.3 * gray + 0.7 * colors[labels]
        panels[title] = np.where(labels[..., None] == IGNORE_INDEX, gray, overlay)  # ignored pixels stay gray
    for k in present[:5]:
        position = (scores[k] - low) / (high - low) * (len(HEAT) - 1)
        color = np.stack([np.interp(position, range(len(HEAT)), channel) for channel in HEAT.T], axis=2)
        panels[f'score map "{names[k]}"'] = 0.75 * color + 0.25 * gray

    width, height, gap = 2 * size[1], 2 * size[0], 10
    sheet = Image.new("RGB", (gap + len(panels) * (width + gap), height + 70), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (title, pixels) in enumerate(panels.items()):
        left = gap + i * (width + gap)
        draw.text((left, 8), title, "black", font)
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)).resize((width, height)), (left, 34))
    left = gap
    for k in sorted({*present, *prediction.unique().tolist()}):  # the legend of both overlays
        draw.rectangle((left, height + 44, left + 16, height + 60), fill=CLASSES[names[k]])
        draw.text((left + 22, height + 42), names[k], "black", font)
        left += 44 + int(draw.textlength(names[k], font))
    draw.text((gap + 3 * (width + gap), height + 42), f"cosine from {low:.2f} to {high:.2f}", "black", font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    out, names, (_, _, device) = parser.parse_args().out, list(CLASSES), start_process()

    draw_dataset(out / "data")
    torch.manual_seed(RECIPE.seed)
    model = build_model("tiny", names)

    def dataset(split: str, transform: TrainTransform | None = None) -> SegmentationDataset:
        folders = (out / "data" / kind / split for kind in ("images", "annotations"))
        return SegmentationDataset(*folders, len(names), transform, reduce_zero_label=True)

    train_set = dataset("training", TrainTransform(model.crop_size, (2048, RECIPE.short_side)))
    val_set = dataset("validation")
    evaluate_model = partial(evaluate, dataset=val_set, device=device, short_side=RECIPE.short_side)
    loop = {"workers": 2, "eval_every": 120, "save_every": 120, "log_every": 20}
    train(model, train_set, RECIPE, out, device, evaluate_model=evaluate_model, **loop)

    checkpoint = read_checkpoint(out / "best.pt")
    model = restore_model(checkpoint, out / "best.pt", build_model)
    (out / "pictures").mkdir(exist_ok=True)
    for image, label, path in map(val_set.__getitem__, range(8)):
        draw_sheet(model, image, label, path).save(out / "pictures" / f"{Path(path).stem}.png")
    print(f"""
mIoU {checkpoint["best"]:.1f} on {len(val_set)} drawings that were not used for training. The demo wrote
  {out}/data      the drawings and their masks, in ADE20K's layout
  {out}/best.pt   the trained model: weights, settings and class names
  {out}/pictures  image, ground truth, prediction, and score maps: cosine similarity of pixels and a class name, Eq. (2)
Next
  python eval.py --checkpoint {out}/best.pt --data {out}/data --multi-scale
  python train.py --model tiny --train IMAGES MASKS --val IMAGES MASKS --classes LIST --out runs/mine
  python data.py --root data && python train.py --out runs/rn50      (the paper's run; needs a GPU)""")


if __name__ == "__main__":
    run_script(main)
