"""Score a segmentation checkpoint: mIoU, mean accuracy and pixel accuracy.

    python eval.py --checkpoint runs/rn50/best.pt                         # ADE20K val, single-scale, sliding window
    python eval.py --checkpoint runs/rn50/best.pt --multi-scale           # six scales, each also flipped
    torchrun --standalone --nproc_per_node 8 eval.py --checkpoint runs/rn50/best.pt

The checkpoint knows its model, class names, how masks were read, and training's validation set. The protocol is the
released one: fit the image in (2048, short side), average logits of windows, resize to the image's size, softmax."""

import argparse
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_model import IGNORE_INDEX, replacing
from data import SegmentationDataset, default_colors, find_split, is_ade20k, resize_to_fit, run_script
from denseclip import build_model, check_ranges, read_checkpoint, restore_model
from heads import resize

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the multi-scale protocol, each also flipped
SHORTEST = 32  # pixels that every model needs per side
WINDOWS_PER_BATCH = 4  # windows of one image that go through the model together
STRIP = 2**20  # probabilities that are computed at once, so that they fit in a processor's cache; on a GPU 64 times


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where the windows along one side start (pixels). The last one is moved back inside; a short side has one at 0."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def sliding_window(model: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, K, H, W), float32, of images (B, 3, H, W): averages over the square windows that hold a pixel.
    window, stride: pixels. A side shorter than the window is taken whole, without padding, unless it is shorter than
    SHORTEST: then its last row or column is repeated."""
    size = images.shape[-2:]
    rows, columns = (max(0, min(SHORTEST, window) - side) for side in size)
    images = nn.functional.pad(images, (0, columns, 0, rows), mode="replicate")
    height, width = images.shape[-2:]
    corners = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    if len(corners) == 1:
        return model(images)[:, :, : size[0], : size[1]].float()
    logits, count = 0, images.new_zeros(1, 1, height, width)
    for first in range(0, len(corners), WINDOWS_PER_BATCH):
        chunk = corners[first : first + WINDOWS_PER_BATCH]
        outputs = model(torch.cat([images[:, :, y : y + window, x : x + window] for y, x in chunk])).float()
        if first == 0:  # (B, K, H, W) in the layout of the outputs, or adding them would be slow
            logits = outputs.new_zeros(len(images), height, width, outputs.shape[1]).permute(0, 3, 1, 2)
        for (y, x), output in zip(chunk, outputs.split(len(images)), strict=True):
            logits[:, :, y : y + window, x : x + window] += output  # (B, K, window, window), or less at a short side
            count[:, :, y : y + window, x : x + window] += 1
    return logits.div_(count)[:, :, : size[0], : size[1]]


def predict_labels(model: nn.Module, image: Tensor, size: tuple[int, int], **protocol) -> Tensor:
    """The most probable class of each pixel, (H, W) int64, without all probabilities in memory at once."""
    return torch.cat([probabilities.argmax(0) for probabilities in probability_strips(model, image, size, **protocol)])


@torch.no_grad()
def probability_strips(
    model: nn.Module, image: Tensor, size: tuple[int, int], short_side: int | None = None, multi_scale: bool = False
) -> Iterator[Tensor]:
    """Class probabilities (K, rows, W) of one image, from top to bottom: means over its scaled and flipped variants.
    model:      in eval mode, with `crop_size`: the window's side in pixels; the stride is two thirds of it
    image:      (3, h, w) normalized
    size:       (H, W) of the result, usually that of the image file
    short_side: pixels; at scale 1, the image is resized to fit (2048, short_side). Default: the model's"""
    variants, stride = [], model.crop_size * 2 // 3  # Released code: windows of 512 move by 341, those of 640 by 426
    for scale in SCALES if multi_scale else (1.0,):
        limits = int(2048 * scale), int((short_side or model.short_side) * scale)
        scaled = resize_to_fit(image[None], limits)  # (1, 3, h', w')
        variants.append(sliding_window(model, scaled, model.crop_size, stride))  # (1, K, h', w')
        if multi_scale:
            flipped = sliding_window(model, scaled.flip(-1), model.crop_size, stride)  # (1, K, h', w')
            variants.append(flipped.flip(-1))
    if not sum(x.sum() for x in variants).isfinite():
        raise ValueError("the model's outputs are not finite: its weights are damaged, or its training diverged")
    rows = max(1, STRIP * (1 if image.device.type == "cpu" else 64) // (variants[0].shape[1] * size[1]))
    for top in range(0, size[0], rows):
        strip = range(top, min(top + rows, size[0]))
        # classes last, as convolutions leave them in memory: softmax and argmax are slow along another axis
        probabilities = (resize_rows(x, size, strip)[0].movedim(0, 2).softmax(dim=2) for x in variants)  # (rows, W, K)
        yield (sum(probabilities) / len(variants)).movedim(2, 0)  # (K, rows, W)


def resize_rows(x: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """These rows of `heads.resize(x, size)`: (1, K, h, w) -> (1, K, len(rows), W)."""
    if x.shape[2:] == size:
        return x[:, :, rows.start : rows.stop]
    y = (torch.arange(rows.start, rows.stop, device=x.device) + 0.5) * (x.shape[2] / size[0]) - 0.5  # rows of x
    above = y.clamp(0, x.shape[2] - 1).long()
    below, weight = (above + 1).clamp(max=x.shape[2] - 1), (y - above).clamp(0, 1)
    return resize(torch.lerp(x[:, :, above], x[:, :, below], weight[:, None]), (len(rows), size[1]))


class ConfusionMatrix:
    """Pixel counts (K, K), true class by predicted class; every score follows from them."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """prediction, label: (..., H, W) int64; labels outside [0, K), such as 255, do not count."""
        k = len(self.counts)
        valid = (label >= 0) & (label < k)
        self.counts += torch.bincount(k * label[valid] + prediction[valid], minlength=k * k).view(k, k)

    def compute(self) -> dict[str, float | Tensor]:
        """Scores in per cent: `miou, mean_accuracy, pixel_accuracy` and per class `iou` (K,), `accuracy` (K,).
        A class neither labeled nor predicted has no IoU (nan) and is left out of the mean; one that is predicted but
        never labeled counts as 0. Accuracy is defined for labeled classes only."""
        counts = self.counts.cpu().double()  # MPS has no float64
        hits, labeled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        if not labeled.sum():
            raise ValueError("nothing to score: all pixels are ignored; check --ignore-index and --reduce-zero-label")
        iou, accuracy = 100 * hits / (labeled + predicted - hits), 100 * hits / labeled  # 0 / 0 = nan: no such pixels
        means = {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item()}
        means["pixel_accuracy"] = (100 * hits.sum() / labeled.sum()).item()
        return {**means, "iou": iou, "accuracy": accuracy}


def format_table(metrics: dict, class_names: list[str]) -> str:
    """The scores as text: IoU and accuracy in per cent of each class that occurs ("-": not labeled), and the means."""
    width = max(map(len, [*class_names, "pixel accuracy"]))
    classes = zip(class_names, metrics["iou"].tolist(), metrics["accuracy"].tolist(), strict=True)
    rows = [row for row in classes if row[1] == row[1]]  # those with an IoU
    absent = len(class_names) - len(rows)
    rows += [("mean", metrics["miou"], metrics["mean_accuracy"]), ("pixel accuracy", metrics["pixel_accuracy"])]
    lines = [f"{'class':<{width}}{'IoU':>10}{'accuracy':>10}"]
    for title, *values in rows:
        lines.append(f"{title:<{width}}" + "".join(f"{'-' if v != v else format(v, '.2f'):>10}" for v in values))
    lines.insert(-2, "-" * (width + 20))
    lines += [f"({absent} of {len(class_names)} classes are neither labeled nor predicted)"] if absent else []
    return "\n".join(lines)


def to_json(metrics: dict) -> dict:
    """The same scores as built-in types, nan as None."""
    values = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in metrics.items()}
    return tree_map(lambda value: None if value != value else round(value, 4), values)


def evaluate(
    model: nn.Module, dataset: SegmentationDataset, device, workers: int = 0, save_masks=None, colors=None, **protocol
) -> dict[str, float | Tensor]:
    """Scores of `model` on `dataset`, as `ConfusionMatrix.compute` returns them.
    save_masks: folder for the predicted masks, PNGs with the data set's own label values and `colors`
    protocol:   short_side and multi_scale, see `probability_strips`
    Under torchrun the processes split the images and return the same scores. The model's mode is restored."""
    check_ranges({"workers": workers} | protocol)
    (rank, world), was_training = this_process(), model.training
    matrix = ConfusionMatrix(len(model.class_names), device)
    model.eval()
    own = torch.Generator()  # so that the loader does not draw from the random state of training
    options = {"sampler": range(rank, len(dataset), world), "num_workers": workers, "generator": own}
    loader = DataLoader(dataset, batch_size=None, worker_init_fn=leave_group, **options)  # one image at a time
    for image, label, path in tqdm(loader, "evaluating", leave=False, disable=rank > 0 or None):
        image, label = image.to(device), label.to(device)  # (3, h, w), (H, W)
        prediction = predict_labels(model, image, label.shape[-2:], **protocol)  # (H, W)
        matrix.update(prediction, label)
        if save_masks is not None:
            os.makedirs(save_masks, exist_ok=True)
            with replacing(Path(save_masks, Path(path).stem + ".png")) as part:
                label_image(prediction, colors, dataset.reduce_zero_label).save(part)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(matrix.counts)
    return matrix.compute()


def leave_group(_: int) -> None:
    """In a loader's worker: Ctrl-C, which the whole process group gets, must not end it before training has saved."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def label_image(labels: Tensor, colors: list[tuple[int, int, int]] | None, reduce_zero_label: bool) -> Image.Image:
    """Labels (H, W) as a palette image in `colors`; with reduce_zero_label, 1 is the first class, as in ADE20K."""
    image = Image.fromarray((labels + reduce_zero_label).to(torch.uint8).cpu().numpy())
    if colors:
        image.putpalette([v for color in [(0, 0, 0)] * reduce_zero_label + list(colors) for v in color])
    return image


def start_process(device: str | None = None) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if any; return: rank, number of processes, this process's device."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d\d?)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:1, for instance")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {device}: this PyTorch sees {count} CUDA devices; use --device cpu")
    if "LOCAL_RANK" in os.environ:
        if device.index is not None:
            raise ValueError(f"--device {device} puts every process of torchrun on one GPU: use --device cuda")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # an hour, for what one process does while the others wait: downloading weights, looking at all masks
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return *this_process(), device


def this_process() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", "python eval.py [options]", __doc__, formatter_class=raw)
    option = parser.add_argument
    option("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of train.py, or made by convert.py")
    option("--backbone", metavar="MODULE:FUNCTION", help="the checkpoint's backbone, if it is one of your own")
    option("--data", metavar="ROOT", help="data set (default: training's validation set, or ADE20K in data/)")
    option("--val", nargs=2, metavar=("IMAGES", "MASKS"), help="two folders, instead of --data")
    option("--ignore-index", type=int, metavar="VALUE", help="mask value to ignore (default: as in training)")
    option("--reduce-zero-label", action=argparse.BooleanOptionalAction, help="ignore 0 (default: as in training)")
    option("--multi-scale", action="store_true", help="scales 0.5 to 1.75, each also flipped")
    option("--short-side", type=int, metavar="PIXELS", help="fit images in (2048, this) (default: as in training)")
    option("--save-masks", metavar="DIR", help="write the predictions there, PNGs with the masks' own values")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="image readers (default: %(default)s)")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if available)")
    args = parser.parse_args()
    check_ranges(vars(args))
    rank, _, device = start_process(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    model = restore_model(checkpoint, args.checkpoint, build_model, backbone=args.backbone).to(device)
    names, known = model.class_names, checkpoint.get("data", {})  # of the data set in training
    folders = args.val or (None if args.data else known.get("val"))
    images, masks = folders or find_split(args.data or "data/ADEChallengeData2016", "val")
    if not args.val and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: the validation set of training is not here; give --val IMAGES MASKS")
    if args.save_masks and Path(args.save_masks).resolve() in (Path(images).resolve(), Path(masks).resolve()):
        raise ValueError(f"--save-masks {args.save_masks} holds the validation set: name another folder")
    run, labels = checkpoint.get("run", {}), {"ignore_index": IGNORE_INDEX, "reduce_zero_label": is_ade20k(masks)}
    labels = {k: run.get(k, v) if getattr(args, k) is None else getattr(args, k) for k, v in labels.items()}
    dataset = SegmentationDataset(images, masks, len(names), **labels)
    options = {name: getattr(args, name) for name in ("short_side", "multi_scale", "save_masks", "workers")}
    metrics = evaluate(model, dataset, device, colors=known.get("colors") or default_colors(len(names)), **options)
    if rank == 0:
        print(f"{format_table(metrics, names)}\n\nmIoU {metrics['miou']:.2f} on {len(dataset)} images of {images}")


if __name__ == "__main__":
    run_script(main)
