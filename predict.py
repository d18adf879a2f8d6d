"""Pictures of what a segmentation model sees in any photo.

    python predict.py photo.jpg --checkpoint runs/mine/best.pt            # predictions/photo.png, labels over the photo
    python predict.py photos "more/*.jpg" --checkpoint best.pt --score-maps road sky --sheet
    python predict.py photo.jpg --checkpoint best.pt --classes "sky|clouds, grass, my dog"      # from the score maps
    python predict.py photo.jpg --clip RN50 --classes "dog, grass, sky"                         # CLIP, nothing trained

Writes for each image, to --out: NAME.png, the labels over the photo; NAME_labels.png, the labels as a palette image, as
by eval.py --save-masks; and if asked for, NAME_score_CLASS.png, a class's score map of Eq. (2), and NAME_sheet.png,
everything side by side. EXIF orientation is applied here, but not in eval.py."""

import argparse
import contextlib
import copy
import glob
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import denseclip
from clip_model import IGNORE_INDEX, MEAN, STD, load_clip, replacing
from denseclip import DenseCLIP, LanguageGuidedEncoder, build_model, read_checkpoint, restore_model
from eval import label_image, predict_labels, probability_strips, sliding_window, start_process
from heads import resize

# Seven that suffice, say CLIP's authors: github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb
TEMPLATES = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.")
TEMPLATES += ("a {} in a video game.", "art of the {}.", "a photo of the small {}.")
ONE_WINDOW = 4096  # pixels, more than any resized image's longer side
Photo = Image.Image | str | Path
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # purple to yellow
HEAT = np.stack([np.interp(np.linspace(0, 4, 255), range(5), channel) for channel in HEAT.T], 1).astype(int).tolist()


# ------------------------------------------------------------------------------------------------ score maps as a model
class ScoreMapModel(nn.Module):
    """Segmentation by the score map of Eq. (2) alone, without a head: images (B, 3, H, W) -> s / tau (B, K, H, W).
    encoder: a LanguageGuidedEncoder whose class names are those of all groups, one after another
    groups:  the names of each class; the score of one with several is the largest of theirs
    sizes:   crop_size (of the windows) and short_side, in pixels
    center:  subtract from the map of each name its mean over the image"""

    def __init__(self, encoder: nn.Module, groups: list, tau: float, sizes: tuple[int, int], center: bool = False):
        super().__init__()
        self.encoder, self.tau, self.center = encoder, tau, center
        self.crop_size, self.short_side = sizes
        self.class_names, self.counts = [names[0] for names in groups], [len(names) for names in groups]

    def forward(self, images: Tensor) -> Tensor:
        _, score_map, _ = self.encoder(images)  # (B, number of names, H4, W4), Eq. (2)
        if self.center:
            score_map = score_map - score_map.mean((2, 3), keepdim=True)  # (B, number of names, H4, W4)
        scores = [names.amax(1) for names in score_map.split(self.counts, dim=1)]  # K times (B, H4, W4)
        scores = torch.stack(scores, dim=3).movedim(3, 1)  # (B, K, H4, W4), channels last in memory, as from a head
        return resize(scores / self.tau, images.shape[-2:])  # (B, K, H, W)


def score_map_model(model: DenseCLIP, class_names: list[str], source: str | Path) -> ScoreMapModel | None:
    """A trained model's score maps, for other class names, too; None if it was trained without language."""
    settings, trained = model.settings, class_names == model.class_names
    if settings.prompting == "none" and trained:
        return None
    if settings.prompting == "none" or settings.stored_text and not trained:
        why = "freeze_text dropped its text encoder" if settings.stored_text else "it was trained without language"
        raise ValueError(f"{source}: {why}, so all it can do is predict its own {len(model.class_names)} classes")
    groups = [[name] for name in class_names]  # "sky|clouds" is one name if it was one in training
    if not trained:
        groups = [re.split(r"\s*\|\s*", names.strip()) for names in class_names]
        model.encoder.set_class_names(sum(groups, []), any_number=True)
    # Labels come from windows of training's size; maps that are only looked at have no seams in one window.
    sizes = ONE_WINDOW if trained else model.crop_size, model.short_side
    return ScoreMapModel(model.encoder, groups, settings.tau or 0.07, sizes)  # None: no auxiliary loss


def zero_shot_model(clip: str, class_names: list[str] | None, dense: str = "value") -> ScoreMapModel:
    """CLIP's own encoders, nothing trained. clip: a name or a file, see `clip_model.load_clip`.
    dense: what is compared with the names: "z", Eq. (1), or "value", each position's own value projection, without
           attention. Not the paper's but MaskCLIP's (Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022):
           CLIP's last attention mixes all positions, so that before training z says little about where things are.
           Each name's mean over the image is subtracted, without which one name covers almost everything"""
    if not class_names:
        raise ValueError('CLIP alone has no classes: name some, such as --classes "dog, grass, sky"')
    model, groups = load_clip(clip), [re.split(r"\s*\|\s*", names.strip()) for names in class_names]
    options = {"num_contexts": 0, "templates": TEMPLATES, "join_score_map": False}
    encoder = LanguageGuidedEncoder(model.visual, model.text, sum(groups, []), **options)
    if dense == "value" and hasattr(model.visual, "transformer"):
        model.visual.transformer.resblocks[-1].register_forward_hook(value_block)
    elif dense == "value":
        model.visual.attnpool.register_forward_hook(value_pool)
    # At twice CLIP's resolution, objects are not much larger than those it was trained on, and a ResNet's map has 14
    # cells along the short side instead of 7. One window, since CLIP was trained on whole images. tau is CLIP's own.
    sizes = ONE_WINDOW, 2 * model.architecture.input_resolution
    return ScoreMapModel(encoder, groups, tau=0.01, sizes=sizes, center=dense == "value")


def value_block(block: nn.Module, inputs: tuple, _: Tensor) -> Tensor:
    """Forward hook of a ViT's last block, in which every token attends to itself alone."""
    x, attn = inputs[0], block.attn  # (B, N, D)
    weight, bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]  # v_proj: (D, D), (D,)
    x = x + attn.out_proj(F.linear(block.ln_1(x), weight, bias))  # (B, N, D)
    return x + block.mlp(block.ln_2(x))  # (B, N, D)


def value_pool(pool: nn.Module, inputs: tuple, output: tuple) -> tuple[Tensor, Tensor]:
    """Forward hook of a ResNet's attention pool, without its positional embeddings."""
    values = pool.c_proj(pool.v_proj(inputs[0].flatten(2).transpose(1, 2)))  # (B, HW, C)
    return output[0], values.transpose(1, 2).unflatten(2, inputs[0].shape[-2:])  # z_bar (B, C), (B, C, H, W)


# ------------------------------------------------------------------------------------------------ prediction
@dataclass(eq=False)
class Predictor:
    """Labels, probabilities and score maps of photos of any size: Pillow images as they are, or paths of files. The
    labels for other classes than the checkpoint's come from the score maps, since its head knows only its own."""

    checkpoint: str | Path | None = None  # of train.py; or instead clip
    class_names: list[str] | None = None  # default: the checkpoint's; or any others, "|" between the names of one class
    clip: str | None = None  # CLIP's weights by name or file, for zero-shot prediction
    dense: str | None = None  # with clip: "z" or "value" (the default), see `zero_shot_model`
    short_side: int | None = None  # pixels; images are resized to fit (2048, short_side). Default: as in training
    multi_scale: bool = False  # labels and probabilities are averaged over six scales, each also flipped
    device: str | torch.device | None = None  # default: cuda if available
    backbone: str | nn.Module | None = None  # your own, see `denseclip.restore_model`

    def __post_init__(self):
        if (self.checkpoint is None) == (self.clip is None):
            raise ValueError("expected a model, one of the two: --checkpoint FILE or --clip NAME")
        if self.clip and self.backbone or self.checkpoint and self.dense:
            raise ValueError("--dense is for CLIP alone, --backbone for a checkpoint whose backbone is your own")
        denseclip.check_ranges(vars(self))
        denseclip.keep_memory()
        saved = {}
        if self.clip is not None:
            self.model = self.scores = zero_shot_model(self.clip, self.class_names, self.dense or "value")
        else:
            saved = read_checkpoint(self.checkpoint)
            self.model = restore_model(saved, self.checkpoint, build_model, backbone=self.backbone)
            own = self.model.class_names
            self.scores = score_map_model(self.model, list(self.class_names or own), self.checkpoint)
            if self.class_names and list(self.class_names) != own:
                self.model, saved = self.scores, {}
        self.class_names = self.model.class_names
        if len(self.class_names) > IGNORE_INDEX:
            raise ValueError(f"{len(self.class_names)} classes, but images of labels have room for {IGNORE_INDEX}")
        self.colors = saved.get("data", {}).get("colors") or data.default_colors(len(self.class_names))
        self.reduce_zero_label = bool(saved.get("run", {}).get("reduce_zero_label"))
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device).eval()
        self.short_side = self.model.short_side = self.short_side or self.model.short_side
        self.protocol = {"short_side": self.short_side, "multi_scale": self.multi_scale}

    def labels(self, photo: Photo) -> Tensor:
        """The most probable class of each pixel, (H, W) int64, on the CPU."""
        return predict_labels(self.model, *self.read(photo), **self.protocol).cpu()

    def probabilities(self, photo: Photo) -> Tensor:
        """(K, H, W) on the CPU; all classes of a large photo need much memory."""
        return torch.cat(list(probability_strips(self.model, *self.read(photo), **self.protocol)), dim=1).cpu()

    @torch.no_grad()
    def score_maps(self, photo: Photo, small: bool = False) -> Tensor:
        """Cosine similarity of every pixel and every class, Eq. (2), (K, H, W) on the CPU; small: (K, h, w), before
        they are resized to the photo's size. With dense="value", each map less its mean."""
        if self.scores is None:
            raise ValueError(f"{self.checkpoint}: it was trained without language, so it has no score maps")
        (image, size), window = self.read(photo), self.scores.crop_size  # (3, H, W), (H, W), pixels
        resized = data.resize_to_fit(image[None], (2048, self.short_side))  # (1, 3, h, w)
        maps = self.scores.tau * sliding_window(self.scores, resized, window, window * 2 // 3).cpu()  # (1, K, h, w)
        return maps[0] if small else resize(maps, size)[0]

    def overlay(self, photo: Photo, labels: Tensor | None = None) -> Image.Image:
        """The labels in their colors over the photo, with a legend below."""
        photo, labels = open_photo(photo), self.labels(photo) if labels is None else labels
        legend = [(self.colors[k], self.class_names[k]) for k in classes_present(labels)]
        return add_legend(paint(photo, labels, self.colors), legend)

    def read(self, photo: Photo) -> tuple[Tensor, tuple[int, int]]:
        """The photo (3, H, W), normalized, and its size (H, W)."""
        pixels = torch.from_numpy(np.array(open_photo(photo))).permute(2, 0, 1)  # (3, H, W) uint8
        return data.normalize(pixels / 255).contiguous().to(self.device), pixels.shape[-2:]


# ------------------------------------------------------------------------------------------------ pictures
def classes_present(labels: Tensor) -> list[int]:
    """The classes that occur in labels, the largest first."""
    pixels = torch.bincount(labels.flatten(), minlength=IGNORE_INDEX)[:IGNORE_INDEX]
    return pixels.argsort(descending=True)[: (pixels > 0).sum()].tolist()


def paint(photo: Image.Image, indices: Tensor, colors: list, strength: float = 0.6) -> Image.Image:
    """Colors over the gray photo. indices: (h, w), any size, into colors, or 255: ignored, stays gray."""
    gray = photo.convert("L").convert("RGB")
    indices = Image.fromarray(indices.to(torch.uint8).numpy()).resize(photo.size, Image.Resampling.NEAREST)
    ignored = indices.point([0] * IGNORE_INDEX + [255])
    indices.putpalette([int(value) for color in colors for value in color])
    picture = Image.blend(gray, indices.convert("RGB"), strength)  # in 8 bits: photos may have 24 million pixels
    picture.paste(gray, mask=ignored)
    return picture


def paint_scores(photo: Image.Image, score_map: Tensor, low: float, high: float) -> Image.Image:
    """A score map (h, w), any size, as heat over the gray photo."""
    scores = resize(score_map[None, None], (photo.height, photo.width))[0, 0]  # (H, W)
    return paint(photo, ((scores - low) / max(high - low, 1e-6) * 254).round().clamp(0, 254), HEAT, 0.75)


def heat_legend(low: float, high: float) -> list:
    digits = 2 if high - low > 0.1 else 4
    return [(HEAT[i], f"{low + (high - low) * i / 254:.{digits}f}") for i in (0, 63, 127, 191, 254)]


def add_legend(picture: Image.Image, entries: list) -> Image.Image:
    """The picture with a legend below it, in rows and columns; letters grow with it. entries: (color or None, text)"""
    em = max(14, max(picture.size) // 60)  # pixels
    font = ImageFont.load_default(em)
    row, column = 3 * em // 2, 3 * em + int(max(font.getlength(text) for _, text in entries))
    columns = max(1, picture.width // column)
    height = picture.height + em // 2 + -(-len(entries) // columns) * row
    canvas = Image.new("RGB", (max(picture.width, column), height), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for i, (color, text) in enumerate(entries):
        x, y = em // 2 + i % columns * column, picture.height + em // 2 + i // columns * row
        if color is not None:
            draw.rectangle((x, y, x + em, y + em), fill=tuple(color), outline="black")
        draw.text((x + row, y + em // 2), text, "black", font, anchor="lm")
    return canvas


def draw_sheet(photo: Image.Image, labels: Tensor, class_names: list, colors: list, score_maps: dict, truth=None):
    """Image, ground truth if given, prediction and score maps as panels, four in a row, with a legend.
    labels, truth: (H, W), class indices, or 255: ignored; score_maps: class name: (h, w), all of one size."""
    photo = ImageOps.contain(photo, (384, 384))
    labeled = ({} if truth is None else {"ground truth": truth}) | {"prediction": labels}
    panels = {"image": photo} | {title: paint(photo, x, colors, 0.7) for title, x in labeled.items()}
    present = sorted(classes_present(torch.cat([x.flatten() for x in labeled.values()])))
    if score_maps:
        scores = torch.stack(list(score_maps.values()))  # (number of maps, h, w)
        low, high = scores.min().item(), scores.max().item()
        panels |= {f'score map "{name}"': paint_scores(photo, x, low, high) for name, x in score_maps.items()}
    font, columns = ImageFont.load_default(22), min(4, len(panels))
    width = max([photo.width, *(int(font.getlength(title)) for title in panels)]) + 10
    height, rows = photo.height + 40, -(-len(panels) // columns)
    sheet = Image.new("RGB", (10 + columns * width, rows * height), "white")
    for i, (title, panel) in enumerate(panels.items()):
        x, y = 10 + i % columns * width, i // columns * height
        ImageDraw.Draw(sheet).text((x, y + 20), title, "black", font, anchor="lm")
        sheet.paste(panel, (x, y + 40))
    sheet = add_legend(sheet, [(colors[k], class_names[k]) for k in present])
    return add_legend(sheet, [(None, "score maps:"), *heat_legend(low, high)]) if score_maps else sheet


# ------------------------------------------------------------------------------------------------ files and export
def find_images(paths: list[str]) -> list[Path]:
    """The image files that files, folders and patterns such as "photos/*.jpg" name, in order, each once."""
    files: dict[Path, None] = {}
    for path in map(Path, (path or "''" for path in paths)):  # an empty name is not this folder
        pattern = f"{glob.escape(str(path))}/*" if path.is_dir() else str(path)
        there = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        found = [p for p in there if p.suffix.lower() in data.IMAGE_SUFFIXES and p.is_file() and p.name[:6] != ".part-"]
        if not found:
            others = " ".join(sorted({p.suffix if p.is_file() and p.suffix else p.name for p in there})[:5])
            what = f"no image, only {others}" if others else "no such image, or a folder without any"
            raise FileNotFoundError(f"{path}: {what}; expected files of type {' '.join(sorted(data.IMAGE_SUFFIXES))}")
        files |= dict.fromkeys(found)
    return list(files)


def open_photo(photo: Photo) -> Image.Image:
    """RGB; a file's EXIF orientation is applied, as a person sees it. (Training applies none: masks have none.)"""
    if isinstance(photo, Image.Image):
        return data.to_rgb(photo, "the photo")
    return data.to_rgb(ImageOps.exif_transpose(data.open_image(photo)), photo)


def for_each_image(paths: list[Path], work: Callable[[Path], None]) -> int:
    """Call work(path) for every image, with a progress bar; files that fail are named and counted, the others done."""
    failed = 0
    for path in tqdm(paths, "predicting", unit="image", disable=None):
        try:
            work(path)
        except Exception as error:  # whatever it is
            if os.environ.get("DENSECLIP_DEBUG"):
                raise
            failed += 1
            name, message = "\\n".join(str(path).splitlines()), data.describe(error)
            tqdm.write(f"error: {message if name in message else f'{name}: {message}'}", file=sys.stderr)
    return failed


def prepare_outputs(images: list[Path], outputs: list[Path]) -> None:
    """Make the folders of the outputs. A ValueError if one of them cannot be written, or if an output would replace an
    image, or another output because their images have one name."""
    used = Counter(map(os.path.abspath, [*images, *outputs]))
    if twice := [file for file, times in used.items() if times > 1]:
        raise ValueError(f"{twice[0]} would be written twice, or over an image: rename one, or name another --out")
    for folder in {file.parent for file in outputs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{folder}: not a folder that can be written ({error.strerror}); name another") from None


def draw_pictures(predictor: Predictor, photo: Image.Image, shown: list[int], sheet: bool) -> Iterator[Image.Image]:
    """A photo's pictures, one at a time: overlay, labels, sheet if asked for, score maps of the classes shown."""
    labels, names, colors = predictor.labels(photo), predictor.class_names, predictor.colors  # (H, W)
    yield predictor.overlay(photo, labels)
    yield label_image(labels, colors, predictor.reduce_zero_label)
    maps, chosen = {}, shown or sorted(classes_present(labels)[:5])
    if shown or sheet and predictor.scores is not None:
        scores = predictor.score_maps(photo, small=True)[chosen]  # (number chosen, h, w)
        maps, low, high = dict(zip(chosen, scores, strict=True)), scores.min().item(), scores.max().item()
    if sheet:
        yield draw_sheet(photo, labels, names, colors, {names[k]: x for k, x in maps.items()})
    for k in shown:
        yield add_legend(paint_scores(photo, maps[k], low, high), [(None, names[k]), *heat_legend(low, high)])


@torch.no_grad()
def export(model: nn.Module, path: str | Path) -> None:
    """Write a model as one graph that runs without this code: .pt2 by torch.export, .onnx by ONNX.
    model:  DenseCLIP or ScoreMapModel, which stays as it is: the text of a copy is frozen, see `freeze_text`
    images: (B, 3, H, W) float32, the graph's input: RGB normalized with CLIP's mean and std. Any B; H and W of at
            least 64 pixels (a ViT: 4 patches). Resizing, sliding windows and softmax are not part of the graph
    logits: (B, K, H, W) float32, its output
    Class names, mean, std and short side are in ONNX's metadata and in the extra files of a .pt2, as JSON."""
    path, onnx = Path(path), Path(path).suffix == ".onnx"
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: expected a name that ends in .pt2 (torch.export) or .onnx")
    if onnx and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ValueError(f"{path}: ONNX needs two more packages: pip install onnx onnxscript")
    if onnx and any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size not in (1, (1, 1)) for m in model.modules()):
        raise ValueError(f"{path}: UperNet's pooling to a fixed number of bins is not in ONNX for any size; use .pt2")
    if any(type(part).__name__ == "SwinPyramid" for part in model.modules()):
        raise ValueError(f"{path}: Swin's windows shift by image size in Python, so no graph of it fits every size")
    prepare_outputs([], [path])
    model = copy.deepcopy(model).cpu().eval()
    if isinstance(model.encoder, LanguageGuidedEncoder):
        model.encoder.freeze_text()
    facts = {"class_names": model.class_names, "mean": MEAN, "std": STD, "short_side": model.short_side}
    facts = {name: json.dumps(fact) for name, fact in facts.items()}
    example, sizes = (torch.zeros(2, 3, 256, 320),), dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    names |= {"dynamic_shapes": {"images": {0: "batch", 2: "height", 3: "width"}}}
    try:
        program = torch.export.export(model, example, dynamic_shapes={"images": sizes}, strict=False)
        program = torch.onnx.export(program, dynamo=True, verbose=False, **names) if onnx else program
    except Exception as error:  # torch's messages run over many lines
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: PyTorch {torch.__version__} cannot export this model: {reason}") from error
    with replacing(path) as part:
        if onnx:
            program.model.metadata_props.update(facts)
            program.save(part)
        else:
            torch.export.save(program, buffer := io.BytesIO(), extra_files=facts)
            part.write_bytes(buffer.getbuffer())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("predict.py", "python predict.py PATHS... [options]", __doc__, formatter_class=raw)
    option = parser.add_argument
    option("paths", nargs="*", metavar="PATHS", help='images, folders and patterns such as "photos/*.jpg"')
    option("--checkpoint", metavar="PATH", help="best.pt or last.pt of train.py, or made by convert.py")
    option("--backbone", metavar="MODULE:FUNCTION", help="the checkpoint's backbone, if it is one of your own")
    option("--clip", metavar="NAME", help="instead of a checkpoint: CLIP alone, RN50, ViT-B/16 or another name or file")
    names = 'class names with commas between them, "|" between names of one class; or a list in classes/, or a file'
    option("--classes", metavar="NAMES", help=f"{names} (default: the checkpoint's)")
    option("--dense", choices=("z", "value"), help="with --clip: Eq. (1)'s z, or MaskCLIP's value (default: value)")
    option("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s")
    option("--score-maps", nargs="+", default=[], metavar="NAME", help="classes to write score maps of, or all")
    option("--sheet", action="store_true", help="also write everything side by side; by default five score maps")
    option("--multi-scale", action="store_true", help="labels from scales 0.5 to 1.75, each also flipped")
    option("--short-side", type=int, metavar="PIXELS", help="resize the shorter side to this (default: as in training)")
    option("--export", type=Path, metavar="FILE", help="write the model as one graph, .onnx or .pt2, see `export`")
    option("--overwrite", action="store_true", help="replace what is there; photos with pictures are skipped otherwise")
    option("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if available)")
    args = parser.parse_args()
    if not args.paths and not args.export:
        raise ValueError("no images: name files, folders or patterns, before --score-maps and its names")
    if args.export and args.export.exists() and not args.overwrite:
        raise ValueError(f"{args.export} already exists: --overwrite replaces it")
    paths, (_, _, device) = find_images(args.paths), start_process(args.device)
    names, colors = data.read_classes(args.classes) if args.classes is not None else (None, None)
    same = ("clip", "dense", "short_side", "multi_scale", "backbone")
    predictor = Predictor(args.checkpoint, names, device=device, **{name: getattr(args, name) for name in same})
    if args.export:
        export(predictor.model, args.export)
        print(f"{args.export}: images (B, 3, H, W), normalized with CLIP's mean and std -> logits (B, K, H, W)")
        if not paths:
            return
    if colors and "," not in args.classes:  # a list's
        predictor.colors = colors
    names = predictor.class_names
    if predictor.model is predictor.scores:
        print("these labels come from the score maps of the names, softmax(s / tau): no head was trained for them")
    if args.score_maps and predictor.scores is None:
        raise ValueError(f"{args.checkpoint}: it was trained without language, so it has no score maps")
    if unknown := [name for name in args.score_maps if name not in [*names, "all"]]:
        raise ValueError(f"--score-maps {unknown[0]}: no such class; the classes are {', '.join(names)}")
    shown = [k for k, name in enumerate(names) if {name, "all"} & set(args.score_maps)]
    endings = ["", "_labels", *["_sheet"] * args.sheet]
    endings += ["_score_" + re.sub(r"\W+", "_", names[k])[:40] for k in shown]  # safe in file names
    files = {path: [args.out / f"{path.stem}{ending}.png" for ending in endings] for path in paths}
    prepare_outputs(paths, [file for outputs in files.values() for file in outputs])
    todo = [path for path in paths if args.overwrite or not any(map(os.path.exists, files[path]))]
    if skipped := len(paths) - len(todo):
        where = f"with pictures in {args.out}, perhaps of another model"
        print(f"skipping {skipped} of {len(paths)} photos {where}; --overwrite replaces them, another --out keeps them")

    def work(path: Path) -> None:
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        with bf16, contextlib.ExitStack() as stack:  # all of a photo's pictures or none: it is not skipped next time
            parts = [stack.enter_context(replacing(file)) for file in files[path]]
            for picture, part in zip(draw_pictures(predictor, open_photo(path), shown, args.sheet), parts, strict=True):
                picture.save(part, "PNG")

    failed = for_each_image(todo, work)
    print(f"pictures of {len(todo) - failed} photos written to {args.out}, {skipped} skipped, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    data.run_script(main)
