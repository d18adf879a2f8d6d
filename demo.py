"""The data and the pictures of `python train.py --demo`: a few hundred drawings of named shapes and textures in
ADE20K's layout, and sheets that show what a model trained on them sees. Needs no download."""

import colorsys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import SegmentationDataset, read_image, resize_keep_ratio
from eval import predict_probabilities

# The demo's values of train.py's options. The encoder starts from random weights, so it learns at the full rate.
OPTIONS = {
    "model": "tiny", "clip": "none", "out": "runs/demo", "iterations": 240, "batch_size": 8, "lr": 1e-3,
    "backbone_lr_multiplier": 1.0, "warmup": 40, "eval_every": 120, "save_every": 120, "log_every": 20, "workers": 2,
}
TEXTURES = {"stripes": (86, 180, 233), "checkerboard": (0, 114, 178), "dots": (204, 121, 167)}
SHAPES = {
    "circle": (230, 159, 0), "square": (200, 30, 30), "triangle": (0, 158, 115), "cross": (240, 228, 66),
    "ring": (148, 52, 110),
}
CLASSES = {**TEXTURES, **SHAPES}  # name: colour; in a mask the first is 1, and 0 is unlabelled, as in ADE20K
SIZES = ((192, 144), (144, 192), (160, 160), (208, 144))  # (width, height)


def draw_dataset(root: Path, train: int = 320, val: int = 40, seed: int = 0) -> None:
    """Draw {images,annotations}/{training,validation} and classes.txt below `root`; the same for the same seed."""
    random = np.random.default_rng(seed)
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = draw_scene(random)
            image.save(root / "images" / split / f"drawing_{number:04d}.jpg", quality=92)
            mask.save(root / "annotations" / split / f"drawing_{number:04d}.png")
    lines = ["\t".join(map(str, (name, *colour))) for name, colour in CLASSES.items()]
    (root / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_scene(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Two textures that meet at a line, up to five shapes with unlabelled outlines, noise: image and mask.

    Textures have any two colours, each shape has hues of its own.
    """
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
    for _ in range(12):  # tries; shapes that would touch another are left out
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
    noisy = np.asarray(image) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), mask


def draw_texture(name: str, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A two-coloured pattern at a random angle and period, (width, height) pixels."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    angle, period = random.uniform(0, np.pi), random.uniform(7, 12)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period
    if name == "stripes":
        pattern = u % 2 < 1
    elif name == "checkerboard":
        pattern = (np.floor(u) + np.floor(v)) % 2 == 0
    else:  # dots
        pattern = (u % 1.5 - 0.75) ** 2 + (v % 1.5 - 0.75) ** 2 < 0.2
    dark, bright = random.integers(0, 140, 3), random.integers(140, 256, 3)
    return Image.fromarray(np.where(pattern[..., None], dark, bright).astype(np.uint8))


def draw_shape(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, angle: float, fill, edge
) -> None:
    """One shape around (x, y), with an edge of two pixels."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        draw.ellipse(box, fill=fill, outline=edge, width=2)
    elif name == "ring":  # what is behind shows through its middle
        draw.ellipse(box, outline=edge, width=int(0.45 * radius) + 4)
        draw.ellipse([box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2], outline=fill, width=int(0.45 * radius))
    else:
        if name == "cross":
            quarter = [(0.35, 1), (0.35, 0.35), (1, 0.35)]
            corners = [complex(*point) * 1j**-turn for turn in range(4) for point in quarter]
        else:
            sides = {"triangle": 3, "square": 4}[name]
            corners = [np.exp(2j * np.pi * side / sides) for side in range(sides)]
        corners = [radius * corner * np.exp(1j * angle) for corner in corners]
        draw.polygon([(x + c.real, y + c.imag) for c in corners], fill=fill, outline=edge, width=2)


# -------------------------------------------------------------------------------------------------- pictures


def show(model: torch.nn.Module, miou: float, dataset: SegmentationDataset, out: Path, count: int = 8) -> None:
    """Write sheets of the first `count` images of `dataset` below `out`, and say what there is and what comes next."""
    (out / "pictures").mkdir(exist_ok=True)
    for index in range(count):
        image, label, path = dataset[index]
        sheet = draw_sheet(model, image, label, read_image(path), list(CLASSES.values()))
        sheet.save(out / "pictures" / f"{Path(path).stem}.png")
    print(f"""
The demo reached mIoU {miou:.1f} on {len(dataset)} drawings that it was not trained on. It made
  {out}/data      the drawings and their masks, in ADE20K's layout
  {out}/best.pt   the trained model: weights, settings and class names
  {out}/pictures  {count} sheets: image, ground truth, prediction, and the score maps of Eq. (2): the cosine of
  {' ' * len(str(out))}           every pixel's embedding with each class name's
Next
  python eval.py --checkpoint {out}/best.pt --data {out}/data --multi-scale
  python train.py --model tiny --train IMAGES MASKS --val IMAGES MASKS --classes LIST --out runs/mine
  python data.py --root data && python train.py --out runs/rn50      (the paper's run; wants a GPU)""")


@torch.no_grad()
def draw_sheet(
    model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, picture: torch.Tensor,
    colours: list[tuple[int, int, int]], maps: int = 5,
) -> Image.Image:
    """A row of panels: the image, ground truth and prediction over it, and the score maps of the classes in it.

    image (3, h, w) normalised; label (h, w) in [0, K) or 255; picture (3, h, w) uint8, what is shown
    """
    size, limits = label.shape, (2048, model.crop_size)
    prediction = predict_probabilities(model, image, size, resize=limits).argmax(0)
    _, score_map, _ = model.encoder(resize_keep_ratio(image[None], limits))  # (1, K, h / 32, w / 32), Eq. (2)
    scores = F.interpolate(score_map, size=size, mode="bilinear", align_corners=False)[0]
    present = [k for k in range(len(colours)) if (label == k).any()]
    low, high = scores[present].min(), scores[present].max()  # one scale for all maps of an image

    panels = [("image", picture), ("ground truth", paint(picture, label, colours)),
              ("prediction", paint(picture, prediction, colours))]
    for k in present[:maps]:
        panels.append((f'score map "{model.class_names[k]}"', heat((scores[k] - low) / (high - low), picture)))

    width, height, gap = 2 * size[1], 2 * size[0], 10
    sheet = Image.new("RGB", (gap + len(panels) * (width + gap), height + 70), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (title, pixels) in enumerate(panels):
        left = gap + number * (width + gap)
        draw.text((left, 8), title, "black", font)
        sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height)), (left, 34))
    left = gap
    for k in sorted({*present, *prediction.unique().tolist()}):  # the legend of both overlays
        draw.rectangle((left, height + 44, left + 16, height + 60), fill=tuple(colours[k]))
        draw.text((left + 22, height + 42), model.class_names[k], "black", font)
        left += 44 + int(draw.textlength(model.class_names[k], font))
    low, high = low.item(), high.item()
    draw.text((gap + 3 * (width + gap), height + 42), f"cosine: purple {low:.2f}, yellow {high:.2f}", "black", font)
    return sheet


def paint(picture: torch.Tensor, label: torch.Tensor, colours: list[tuple[int, int, int]]) -> torch.Tensor:
    """picture (3, h, w) uint8 in grey under its classes' colours; ignored pixels stay as they are."""
    table = torch.zeros(256, 3)
    table[: len(colours)] = torch.tensor(colours, dtype=torch.float)
    over = 0.3 * picture.float().mean(0) + 0.7 * table[label].permute(2, 0, 1)
    return torch.where(label == 255, picture, over).to(torch.uint8)


def heat(values: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """values (h, w) in [0, 1] as a purple to yellow heat map, with the picture's outlines shining through."""
    stops = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]).float()
    position = values.clamp(0, 1) * (len(stops) - 1)
    below = position.long().clamp(max=len(stops) - 2)
    part = (position - below)[..., None]
    colour = ((1 - part) * stops[below] + part * stops[below + 1]).permute(2, 0, 1)
    grey = picture.float().mean(0, keepdim=True)
    return (0.75 * colour + 0.25 * grey).to(torch.uint8)
