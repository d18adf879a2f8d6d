"""Data: folders of images and masks, the released transforms, and `python data.py`, which downloads ADE20K to data/.

A data set is a folder of images, a folder of masks with the same file stems, and a class list (`classes/*.txt`). A mask
holds one class index per pixel. Once loaded, images are RGB, (3, H, W), float, normalized with CLIP's mean and standard
deviation; labels are (H, W), int64, in [0, K), or 255 for pixels that count neither in the loss nor in a score."""

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from clip_model import IGNORE_INDEX, MEAN, STD, download, one_at_a_time

CLASSES_DIR = Path(__file__).resolve().parent / "classes"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # others, whatever the suffix, may start a program (EPS)
MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif"}  # lossless formats only
ADE20K_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE20K_SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"


def read_classes(name_or_path: str | Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Class names and colors (RGB, 0..255) from "names, with, commas", a list in classes/ ("ade20k"), or a file:
    one class per line, just its name or name, R, G, B separated by tabs; the order of the lines is the class index."""
    if "," in str(name_or_path) and not os.path.isfile(name_or_path):
        names = [name.strip() for name in str(name_or_path).split(",")]
        return names, default_colors(len(names))
    shipped = CLASSES_DIR / f"{name_or_path}.txt"
    path = shipped if os.path.isfile(shipped) else Path(name_or_path)
    if not os.path.isfile(path):
        lists = ", ".join(sorted(file.stem for file in CLASSES_DIR.glob("*.txt")))
        raise FileNotFoundError(f'{path}: no such class list; give names such as "sky, grass", a file, or {lists}')
    colors, spare = {}, default_colors(256)  # name: color
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        name, *color = [field.strip() for field in line.split("\t")]
        is_rgb = len(color) == 3 and all(c.isdecimal() and len(c) <= 3 and int(c) <= 255 for c in color)
        if not 0 < len(name) < 300 or name in colors or "\N{REPLACEMENT CHARACTER}" in name or (color and not is_rgb):
            raise ValueError(f"{path}:{number}: {line!r}; expected UTF-8: name, or name, R, G, B with tabs; each once")
        colors[name] = tuple(map(int, color)) if color else spare[len(colors) % 256]
    if not colors:
        raise ValueError(f"{path}: the class list is empty; write one class name per line")
    return list(colors), list(colors.values())


def default_colors(number: int) -> list[tuple[int, int, int]]:
    """Colors for classes that have none: each the one farthest in RGB from black, white, gray and those before it."""
    grid = np.stack(np.meshgrid(*[np.linspace(30, 250, 8)] * 3), axis=-1).reshape(-1, 3).round().astype(int)  # (512, 3)
    colors, distance = [], np.min([np.linalg.norm(grid - gray, axis=1) for gray in (0, 128, 255)], axis=0)  # (512,)
    while len(colors) < number:
        colors.append(tuple(grid[distance.argmax()].tolist()))
        distance = np.minimum(distance, np.linalg.norm(grid - colors[-1], axis=1))
    return colors


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """The folders (images, masks) of a split, "train" or "val", in ADE20K's layout or the generic one."""
    ade20k = {"train": "training", "val": "validation"}[split]
    for folder, labels in ((ade20k, "annotations"), (split, "masks"), (split, "annotations"), (split, "labels")):
        images, masks = Path(root, "images", folder), Path(root, labels, folder)
        if images.is_dir() and masks.is_dir():
            return images, masks
    layouts = f"images/{split} and masks/{split}, or ADE20K's folders (python data.py --root data downloads it)"
    raise FileNotFoundError(f"{root}: no data set here; expected {layouts}; or give --{split} IMAGES MASKS")


def is_ade20k(masks: str | Path) -> bool:
    """Whether a folder of masks is in ADE20K's layout, where mask value 0 is ignored and 1 is the first class."""
    return Path(masks).parent.name == "annotations" and Path(masks).name in ("training", "validation")


def files_by_stem(folder: str | Path, suffixes: set[str]) -> dict[str, Path]:
    """The image files of a folder, sorted; files of other types are skipped."""
    files, visible = {}, sorted(p for p in Path(folder).glob("[!.]*") if p.is_file() or p.is_symlink())
    for path in (p for p in visible if p.suffix.lower() in suffixes):
        if path.stem in files:
            raise ValueError(f"{path}: same name as {files[path.stem].name}; images and masks are paired by name")
        files[path.stem] = path
    if not files:
        others = " ".join(sorted({p.suffix for p in visible})[:5])
        what = f"only {others} files" if others else "no images there" if Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}; expected {' '.join(sorted(suffixes))}")
    return files


def open_image(path: str | Path, decode: bool = True) -> Image.Image:
    """A Pillow image, decoded, or its size alone; a file that cannot be read raises a ValueError that names it."""
    if not Path(path).is_file():  # opening a pipe would wait for its other end
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if decode:
                image.load()
            return image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise ValueError(f"{path}: not readable as an image, remove or replace it ({error})") from error


def read_image(path: str | Path) -> Tensor:
    """Any image file as RGB, (3, H, W) uint8. EXIF orientation is not applied: masks refer to stored pixels."""
    return torch.from_numpy(np.array(to_rgb(open_image(path), path))).permute(2, 0, 1)  # channels last in memory: fast


def to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    """Gray, palette, CMYK and 1-bit images are converted, alpha is dropped, 16-bit gray is scaled to 8 bits."""
    values = np.asarray(image).astype(np.int64) if image.mode.startswith("I") else np.zeros(1)
    if image.mode in ("F", "LAB") or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{path}: its {image.mode} values have no standard RGB form; save it as RGB or 8-bit gray")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    via = image.convert("RGBA") if "transparency" in image.info else image  # or Pillow warns about palettes
    return via if via.mode == "RGB" else via.convert("RGB")


@dataclass(eq=False)
class SegmentationDataset(torch.utils.data.Dataset):
    """Images and masks paired by file stem: dataset[key] -> (image (3, h, w) float, label (h, w) int64, image's path).
    The key is an index, or (index, seed) as from IterationSampler: then the transform's randomness depends on the seed
    alone, whatever the number of workers and the iteration that training was resumed at."""

    image_dir: str | Path
    mask_dir: str | Path
    num_classes: int
    transform: Callable | None = None  # of image (3, H, W) and label (H, W), both uint8; None: eval_transform
    ignore_index: int = IGNORE_INDEX  # mask value of the pixels to ignore, in addition to 255
    reduce_zero_label: bool = False  # mask value 0 is ignored and 1..K are the classes 0..K-1, as in ADE20K

    def __post_init__(self):
        if not 2 <= self.num_classes <= 255:  # with one class, the loss is 0 and the score 100 whatever the model does
            raise ValueError(f"{self.num_classes} classes; 2 to 255 are possible, counting the background")
        images, masks = files_by_stem(self.image_dir, IMAGE_SUFFIXES), files_by_stem(self.mask_dir, MASK_SUFFIXES)
        for files, others, kind in ((images, masks, "mask"), (masks, images, "image")):
            if alone := [path for stem, path in files.items() if stem not in others]:
                folder = next(iter(others.values())).parent
                raise ValueError(f"{alone[0]}: no {kind} of this name in {folder}; {len(alone)} missing: add or remove")
        self.pairs = [(path, masks[stem]) for stem, path in images.items()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image = read_image(self.pairs[index][0])  # (3, H, W) uint8
        label = self.read_label(index, image.shape[1:])  # (H, W) uint8
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the GPU's generator
            return *(self.transform or eval_transform)(image, label), str(self.pairs[index][0])

    def count_labels(self, index: int) -> Tensor:
        """Pixels of each label in a mask, (256,); of its image, only the size is read, to compare."""
        label = self.read_label(index, open_image(self.pairs[index][0], decode=False).size[::-1])  # (H, W)
        return torch.bincount(label.flatten(), minlength=256)

    def sampler(self, batch_size: int, seed: int, rank: int, world: int, start: int) -> "IterationSampler":
        """The sampler for training; start: number of samples drawn before."""
        return IterationSampler(len(self), seed, rank, world, start)

    collate = staticmethod(torch.utils.data.default_collate)  # images (B, 3, H, W), labels (B, H, W), paths

    def read_label(self, index: int, size: tuple[int, int]) -> Tensor:
        """A mask of 1, 8 or 16 bits, or the indices of a palette image, as labels: (H, W) uint8 in [0, K) or 255. Its
        `size` must be the (H, W) of the image as stored: EXIF orientation is not applied."""
        (image_path, path), first = self.pairs[index], int(self.reduce_zero_label)
        mask = np.asarray(image := open_image(path))  # (H, W), or of gray values as RGB (H, W, 3)
        if image.mode in ("RGB", "RGBA") and (mask[..., :3] == mask[..., :1]).all():
            mask = mask[..., 0]
        elif image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ValueError(f"{path}: a mask in colors ({image.mode}), but masks hold class indices; see README.md")
        # for bytes, the usual case, a table is much faster: masks have hundreds of thousands of pixels
        values = np.arange(256) if mask.dtype == np.uint8 else mask.astype(np.int64)
        labels = np.where((values >= first) & (values < first + self.num_classes), values - first, -1)
        ignored = (values == IGNORE_INDEX) | (values == self.ignore_index) | ((values == 0) & self.reduce_zero_label)
        labels[ignored] = IGNORE_INDEX
        label = labels.astype(np.int16).take(mask) if mask.dtype == np.uint8 else labels  # (H, W)
        if label.min() < 0:
            wrong, last = ", ".join(map(str, np.unique(mask[label < 0])[:8])), self.num_classes - 1 + first
            what = f"value {wrong} is not a class; the classes are {first} to {last}, 255 is ignored"
            raise ValueError(f"{path}: {what}; see --ignore-index, and --reduce-zero-label for masks that begin at 1")
        if label.shape != size:
            what = f"{label.shape[1]} x {label.shape[0]} pixels, but {image_path} has {size[1]} x {size[0]} as stored"
            raise ValueError(f"{path}: {what}; they must be the same: replace or remove both")
        return torch.from_numpy(label.astype(np.uint8))


def look_at_all(look: Callable[[int], object], number: int, title: str, workers: int) -> list:
    """[look(0), ..., look(number - 1)] by threads, with a progress bar; ends with the first error."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(tqdm(pool.map(look, range(number)), title, number, leave=False, disable=None))


def check_data(train: SegmentationDataset, val: SegmentationDataset, class_names: list[str], workers: int) -> str:
    """Look at all masks and validation images before training; a ValueError names the first file that fails. Return
    each class's share of the training pixels, and warnings, as lines of text."""
    counts = sum(look_at_all(train.count_labels, len(train), "checking training masks", workers)).tolist()  # 256
    looked = look_at_all(lambda i: val[i][1].lt(IGNORE_INDEX).any(), len(val), "checking validation images", workers)
    pixels, ignored = dict(zip(class_names, counts, strict=False)), counts[IGNORE_INDEX]
    labeled, how = sum(pixels.values()), "check --ignore-index and --reduce-zero-label"
    for masks, any_label in ((train, labeled), (val, any(looked))):
        if not any_label:
            raise ValueError(f"{masks.pairs[0][1].parent}: all pixels of the masks are ignored; {how}")
    shares = ", ".join(f"{name} {100 * n / labeled:.1f}" for name, n in pixels.items())
    lines = [f"training pixels in %: {shares}; ignored: {100 * ignored / (ignored + labeled):.1f} % of all pixels"]
    if ignored and labeled == counts[0] and not train.reduce_zero_label:
        lines += ["warning: only values 0 and 255 occur, and 255 is ignored: masks of two classes hold 0 and 1"]
    if absent := [name for name, n in pixels.items() if n == 0]:
        lines += [f"warning: no training mask has {', '.join(absent[:10])} ({len(absent)} of {len(pixels)} classes)"]
    if counts[0] == 0 and not train.reduce_zero_label and train.ignore_index != 0:
        lines += ["warning: value 0 never occurs: are these 1-based masks? --reduce-zero-label makes 1 the first class"]
    return "\n".join(lines)


# Transforms as released, in the released order. What differs from the released code, all of it within rounding:
# - it rounds to 8 bits after every photometric step, and hue to 2 degrees; here they stay float, in [0, 1]
# - its bilinear resizing (OpenCV) has 11-bit weights and rounds once; PyTorch's for uint8 rounds after each axis.
#   Neither smooths before shrinking, because the released weights were trained and tested without.
# - for evaluation the float image is resized; the released code rounds to 8 bits before normalization
def resize_to_fit(image: Tensor, limits: tuple[int, int]) -> Tensor:
    """(..., H, W) to the largest size of its aspect ratio within (long side, short side); bilinear, no antialias."""
    (height, width), (long, short) = image.shape[-2:], limits
    factor = min(long / max(height, width), short / min(height, width))
    size = [max(int(side * factor + 0.5), 1) for side in (height, width)]
    return F.interpolate(image.view(-1, *image.shape[-3:]), size, mode="bilinear").view(*image.shape[:-2], *size)


def normalize(image: Tensor) -> Tensor:
    """RGB (3, H, W) in [0, 1] with CLIP's mean and standard deviation."""
    return (image - torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def coin() -> bool:
    return torch.rand(()).item() < 0.5


def eval_transform(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized image; image and label keep their size."""
    return normalize(image / 255).contiguous(), label.long()  # (3, H, W), (H, W)


@dataclass
class TrainTransform:
    """The released training pipeline: random resize, crop, flip, photometric distortion, normalization, padding."""

    crop_size: int = 512  # pixels per side of the square output
    limits: tuple[int, int] = (2048, 512)  # (long side, short side) in pixels to resize to, times U(0.5, 2)

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image (3, H, W) uint8, label (H, W) uint8 -> (3, crop, crop) float, (crop, crop) int64"""
        ratio = uniform(0.5, 2)
        image = resize_to_fit(image, (int(self.limits[0] * ratio), int(self.limits[1] * ratio)))
        label = F.interpolate(label[None, None], image.shape[1:])[0, 0]  # nearest
        top, left, height, width = random_crop_box(label, self.crop_size)
        image = image[:, top : top + height, left : left + width].contiguous()  # (3, height, width)
        label = label[top : top + height, left : left + width]  # (height, width)
        if coin():
            image, label = image.flip(-1), label.flip(-1)
        image = normalize(photometric_distortion(image / 255))  # (3, height, width)
        padding = [0, self.crop_size - width, 0, self.crop_size - height]  # left, right, top, bottom
        if any(padding):
            image = F.pad(image, padding, value=0)  # (3, crop, crop); after normalization 0 is the mean color
            label = F.pad(label, padding, value=IGNORE_INDEX)  # (crop, crop)
        return image, label.long()


def random_crop_box(label: Tensor, crop_size: int, max_share: float = 0.75, tries: int = 10) -> tuple[int, ...]:
    """(top, left, height, width) of a random crop of `label` (H, W), smaller than crop_size where the label is. Boxes
    are drawn until one holds several classes, none of them on `max_share` or more of the pixels that count. If the
    first `tries` boxes fail, the next one is used without checking."""
    height, width = min(crop_size, label.shape[0]), min(crop_size, label.shape[1])
    for _ in range(tries + 1):
        top = int(torch.randint(label.shape[0] - height + 1, ()))
        left = int(torch.randint(label.shape[1] - width + 1, ()))
        pixels = torch.bincount(label[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORE_INDEX]
        if (pixels > 0).sum() > 1 and pixels.max() / pixels.sum() < max_share:
            break
    return top, left, height, width


def photometric_distortion(image: Tensor) -> Tensor:
    """Random brightness, contrast, saturation and hue, each with probability 0.5, on (3, H, W) RGB in [0, 1]."""
    if coin():
        image = (image + uniform(-32, 32) / 255).clamp(0, 1)
    contrast_first = coin()
    if contrast_first and coin():
        image = (image * uniform(0.5, 1.5)).clamp(0, 1)
    if coin():
        image = scale_saturation(image, uniform(0.5, 1.5))
    if coin():
        image = shift_hue(image, uniform(-18, 18) / 180)  # OpenCV counts half degrees: 180 is the full circle
    if not contrast_first and coin():
        image = (image * uniform(0.5, 1.5)).clamp(0, 1)
    return image


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """HSV saturation times factor, at most 1: scales every channel's distance from the largest, which keeps H and V."""
    value = image.amax(0)  # (H, W)
    ratio = (value / (value - image.amin(0)).clamp_min(1e-6)).clamp_max(factor)  # (H, W)
    return value - (value - image) * ratio  # (3, H, W)


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """HSV hue plus `shift`, in full circles; saturation and value stay."""
    low, value = image.amin(0), image.amax(0)  # (H, W)
    chroma = value - low
    r, g, b = pure = (image - low).div_(chroma.clamp_min(1e-12))  # (3, H, W), the smallest channel 0, the largest 1
    above = (pure * 1e30).clamp_(max=1)  # (3, H, W), 0: the smallest channel; products are faster here than torch.where
    # in sixths of a circle, red at 0: one formula where blue is smallest, one where red is, one where green is
    hue = torch.lerp(g - r + 1, torch.lerp(b - g + 3, r - b + 5, above[0]), above[2]) + 6 * shift  # (H, W)
    hue -= (hue / 6).floor_().mul_(6)
    shifted = (hue - torch.tensor([3.0, 2.0, 4.0]).view(3, 1, 1)).abs_()  # (3, H, W)
    shifted[0] -= 1
    shifted[1:].neg_().add_(2)
    return shifted.clamp_(0, 1).mul_(chroma).add_(low)


class IterationSampler(torch.utils.data.Sampler):
    """An endless stream of (index, seed) for SegmentationDataset, the same for every number of processes.
    One random permutation of the data set after another, with a seed for each sample; sample n depends only on `seed`
    and n. Process `rank` of `world` takes samples start + rank, start + rank + world, ...; `start` were drawn before.
    Released code: drops the incomplete last batch of an epoch; here it is filled from the next epoch."""

    def __init__(self, size: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0):
        self.size, self.seed, self.rank, self.world, self.start = size, seed, rank, world, start

    def permutation(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = None
        for n in itertools.count(self.start + self.rank, self.world):
            if n // self.size != epoch:
                epoch = n // self.size
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = self.permutation(generator)
                seeds = torch.randint(2**32, (self.size,), generator=generator).tolist()
            yield order[n % self.size], seeds[n % self.size]


def download_ade20k(root: str | Path, url: str = ADE20K_URL, sha1: str = ADE20K_SHA1) -> Path:
    """Download, check and unpack ADE20K to root/ADEChallengeData2016, which appears only when it is complete."""
    root, name = Path(root), Path(url).stem
    folder, archive, unpacked = root / name, root / f"{name}.zip", root / f"{name}.unpacking"
    if (folder / "images").is_dir():
        return folder
    download(url, archive, sha1, "sha1")
    with one_at_a_time(unpacked / "lock"):  # another process may be unpacking; what an interrupted one left is replaced
        if not (folder / "images").is_dir():
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(unpacked, tqdm(zipped.namelist(), f"unpacking {name}", unit="file"))
            (unpacked / name).rename(folder)
            shutil.rmtree(unpacked)
    archive.unlink(missing_ok=True)
    return folder


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`; an error prints one line and exits with status 2, Ctrl-C and SIGTERM with 130."""
    if "LOCAL_RANK" not in os.environ:  # under torchrun, a process that waits for another could not react
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # leave together: a process that waits for one that has left may wait forever
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("DENSECLIP_DEBUG"):
            raise
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader's handler would raise again for a dead worker
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's own last flush of stdout would fail, too
        print(f"error: {(message := describe(error))}", file=sys.stderr)
        from torch.distributed.elastic.multiprocessing import errors

        errors.get_error_handler().record_exception(ValueError(message))  # for torchrun's summary of all processes
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def describe(error: Exception) -> str:
    """An error as one line: what happened and the way out."""
    # an error in a loader's worker arrives as a whole traceback, which ends with "Type: message"
    message = (str(error).strip() or repr(error)).rpartition(f"\n{type(error).__name__}: ")[2]
    if isinstance(error, ValueError | OSError) and not isinstance(error, ConnectionError):  # a user's mistake
        return "\\n".join(message.splitlines())  # a file's name may have several lines
    message = f"{type(error).__name__}: {message.partition(chr(10))[0]:.200}"
    ways_out = {  # by a part of the message; a loader's worker that was killed breaks its pipe
        "DataLoader worker|ConnectionRe|EOF": "memory may be short: use fewer --workers; --resume continues training",
        "BrokenPipe": "the output's reader exited, or a loader's worker: fewer --workers; --resume continues training",
        "emory": "a smaller --batch-size, --accumulate, --recompute and smaller images need less",
        "peer": "another process ended first, and its message says why",
        "": "please report this, with what is printed if DENSECLIP_DEBUG=1 is set",
    }
    return f"{message}; {next(how for pattern, how in ways_out.items() if re.search(pattern, message))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Download ADE20K (ADEChallengeData2016, 0.9 GB): resumable, checked.")
    parser.add_argument("--root", default="data", help="folder to put ADEChallengeData2016 in (default: data)")
    print(f"ADE20K is in {download_ade20k(parser.parse_args().root)}")


if __name__ == "__main__":
    run_script(main)
