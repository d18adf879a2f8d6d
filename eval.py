"""Score a checkpoint: mIoU, mean accuracy and pixel accuracy of a segmentation model, COCO's AP of a detector.

    python eval.py --checkpoint runs/rn50/best.pt                         # ADE20K val, one scale, sliding window
    python eval.py --checkpoint runs/rn50/best.pt --multi-scale           # six scales, each also flipped
    python eval.py --checkpoint best.pt --val IMAGES MASKS --save-masks predicted
    python eval.py --checkpoint runs/mask_rcnn/best.pt --data data/coco   # or --val IMAGES ANNOTATIONS
    torchrun --standalone --nproc_per_node 8 eval.py --checkpoint runs/rn50/best.pt

The checkpoint holds the model's name, settings and class names, so only the data has to be said. The protocol is
the released code's: resize so that the image fits (2048, crop size), average the logits of overlapping windows,
bring them to the image's original size, softmax. In training, train.py calls `evaluate` from here.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import denseclip
import detection
from coco import CocoDetection, DetectionTransform, detection_limits, evaluate_detection, find_coco, format_ap_table
from data import EvalTransform, SegmentationDataset, find_split, made_up_colour, read_classes, resize_keep_ratio
from denseclip import read_checkpoint

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the multi-scale protocol, each also flipped
WINDOWS_AT_ONCE = 4  # windows of one image that go through the model together

# ------------------------------------------------------------------------------------------------ prediction


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where the windows along one side begin (pixels); the last is moved back inside, a short side has one at 0."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def sliding_window(model: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits of whole images from overlapping square windows, averaged where they overlap.

    images: (B, 3, H, W) normalised; a side shorter than the window is taken whole, without padding
    window, stride: pixels
    return: (B, K, H, W) logits
    """
    height, width = images.shape[-2:]
    h, w = min(window, height), min(window, width)
    corners = [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]
    logits, count = 0, images.new_zeros(1, 1, height, width)
    for first in range(0, len(corners), WINDOWS_AT_ONCE):
        chunk = corners[first : first + WINDOWS_AT_ONCE]
        outputs = model(torch.cat([images[:, :, y : y + h, x : x + w] for y, x in chunk]))  # (chunk * B, K, h, w)
        if first == 0:
            logits = outputs.new_zeros(len(images), outputs.shape[1], height, width)
        for (y, x), output in zip(chunk, outputs.split(len(images)), strict=True):
            logits[:, :, y : y + h, x : x + w] += output
            count[:, :, y : y + h, x : x + w] += 1
    return logits / count


@torch.no_grad()
def predict_probabilities(
    model: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    resize: tuple[int, int] | None = (2048, 512),
) -> Tensor:
    """Class probabilities of one image, the mean over its scaled and flipped variants.

    image:  (3, h, w) normalised; model in eval mode, with `crop_size` (window; the stride is two thirds of it)
    size:   (H, W) of the result, usually the size of the image file
    scales: factors on `resize`, in which (long side, short side) the image has to fit; None: as it is, times scale
    return: (K, H, W); every variant goes through the softmax before the mean is taken
    """
    long, short = resize or sorted(image.shape[-2:], reverse=True)
    total = 0
    for scale in scales:
        scaled = resize_keep_ratio(image[None], (int(long * scale), int(short * scale)))
        for flipped in (False, True) if flip else (False,):
            variant = scaled.flip(-1) if flipped else scaled
            logits = sliding_window(model, variant, model.crop_size, window_stride(model))
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
            probabilities = logits.softmax(dim=1)[0]
            total = total + (probabilities.flip(-1) if flipped else probabilities)
    return total / (len(scales) * (2 if flip else 1))


def window_stride(model: nn.Module) -> int:
    """Released code: windows of 512 move by 341, those of 640 by 426."""
    return model.crop_size * 2 // 3


# ---------------------------------------------------------------------------------------------------- metric


class ConfusionMatrix:
    """Pixel counts (K, K), true class by predicted class, from which every score follows."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """prediction, label: (..., H, W) int64; pixels labelled 255, or anything outside [0, K), do not count."""
        k = len(self.counts)
        valid = (label >= 0) & (label < k)
        self.counts += torch.bincount(k * label[valid] + prediction[valid], minlength=k * k).view(k, k)

    def all_reduce(self) -> None:
        """Sum over the processes of torchrun, if there are any."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)

    def compute(self) -> dict[str, float | Tensor]:
        """Scores in per cent: `miou, mean_accuracy, pixel_accuracy` and per class `iou` (K,), `accuracy` (K,).

        A class that is neither labelled nor predicted has no IoU (nan) and is left out of the mean; one that is
        predicted but nowhere labelled counts 0. Accuracy exists for the labelled classes.
        """
        counts = self.counts.double().cpu()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        if not labelled.sum():
            raise ValueError("nothing to score: every pixel of these masks is ignored; check the masks' values, "
                             "--ignore-index and --zero-ignored")
        iou = 100 * hits / (labelled + predicted - hits)  # 0 / 0 = nan: absent from both
        accuracy = 100 * hits / labelled
        return {
            "miou": iou.nanmean().item(),
            "mean_accuracy": accuracy.nanmean().item(),
            "pixel_accuracy": (100 * hits.sum() / labelled.sum()).item(),
            "iou": iou,
            "accuracy": accuracy,
        }


def is_ade20k(masks: str | Path) -> bool:
    """Whether a folder of masks lies where ADE20K's do, whose value 0 is ignored and whose first class is 1."""
    return Path(masks).parent.name == "annotations" and Path(masks).name in ("training", "validation")


def format_table(metrics: dict, class_names: list[str]) -> str:
    """The scores as text: a line per class with IoU and accuracy in per cent ("-": the class does not occur)."""
    width = max(len(name) for name in [*class_names, "pixel accuracy"])
    cells = lambda *values: "".join(f"{'-' if v != v else format(v, '.2f'):>10}" for v in values)  # noqa: E731
    lines = [f"{'class':<{width}}{'IoU':>10}{'accuracy':>10}", "-" * (width + 20)]
    for name, iou, accuracy in zip(class_names, metrics["iou"], metrics["accuracy"], strict=True):
        lines.append(f"{name:<{width}}{cells(float(iou), float(accuracy))}")
    lines += ["-" * (width + 20), f"{'mean':<{width}}{cells(metrics['miou'], metrics['mean_accuracy'])}"]
    return "\n".join([*lines, f"{'pixel accuracy':<{width}}{'':>10}{cells(metrics['pixel_accuracy'])}"])


def to_json(metrics: dict) -> dict:
    """The same scores as built-in types, nan as None."""
    number = lambda v: None if v != v else round(v, 4)  # noqa: E731
    return {k: [number(x) for x in v.tolist()] if isinstance(v, Tensor) else number(v) for k, v in metrics.items()}


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    device: torch.device | str,
    *,
    short_side: int | None = None,
    multi_scale: bool = False,
    save_masks: str | Path | None = None,
    colours: list[tuple[int, int, int]] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float | Tensor]:
    """Scores of `model` on `dataset`, as `ConfusionMatrix.compute` returns them.

    dataset:    gives (image, label, path) with images normalised and in their own size
    short_side: pixels; images are resized to fit (2048, short_side). Default: the model's crop size
    save_masks: folder for the predicted masks, PNG with the data set's own label values and `colours`
    Several processes take the images in turn, none twice, and return the same scores. The model's mode is restored.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    matrix = ConfusionMatrix(len(model.class_names), device)
    protocol = {"scales": SCALES, "flip": True} if multi_scale else {}
    resize = (2048, short_side or model.crop_size)
    was_training = model.training
    model.eval()
    # Its own generator: iterating must not draw from the random state that training goes on with.
    loader = DataLoader(dataset, batch_size=None, sampler=range(rank, len(dataset), world), num_workers=workers,
                        generator=torch.Generator())
    for image, label, path in tqdm(loader, "evaluating", leave=False, disable=None if progress and not rank else True):
        image, label = image.to(device), label.to(device)
        prediction = predict_probabilities(model, image, label.shape[-2:], resize=resize, **protocol).argmax(0)
        matrix.update(prediction, label)
        if save_masks is not None:
            save_mask(Path(save_masks, Path(path).stem + ".png"), prediction, colours, dataset.zero_ignored)
    model.train(was_training)
    matrix.all_reduce()
    return matrix.compute()


def save_mask(path: Path, prediction: Tensor, colours: list[tuple[int, int, int]] | None, zero_ignored: bool) -> None:
    """Write a (H, W) prediction as a palette PNG whose values mean what the data set's masks mean."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((prediction + int(zero_ignored)).to(torch.uint8).cpu().numpy())
    if colours:
        image.putpalette([v for colour in [(0, 0, 0)] * zero_ignored + list(colours) for v in colour])
    image.save(path)


# ------------------------------------------------------------------------------------------------- processes


def start_process(device: str | None = None) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did -> (rank, number of processes, this process's device)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this PyTorch sees no CUDA device; use --device cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: expected cpu, cuda or cuda:1, for instance") from None
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def run_script(main) -> None:
    """Run a script's `main()`: a user's mistake becomes one line and status 2, Ctrl-C status 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        # An error in a loader's worker arrives as a whole traceback, whose last line is "Type: message".
        message = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        print(f"error: {message.removeprefix(type(error).__name__ + ': ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="ours, or a released DenseCLIP .pth")
    parser.add_argument("--unsafe", action="store_true", help="unpickle all of a released file; only if you trust it")
    option = parser.add_argument_group("data").add_argument
    option("--data", metavar="ROOT", help="data set (default: data/ADEChallengeData2016; of a detector data/coco)")
    option("--val", nargs=2, metavar=("IMAGES", "MASKS"), help="two folders, instead of --data; for a detector a "
           "folder and a JSON file in COCO's format")
    option("--classes", metavar="LIST", help="a list in classes/ or a file; has to hold the checkpoint's classes")
    option("--ignore-index", type=int, default=255, metavar="VALUE", help="mask value to ignore, besides 255")
    option("--zero-ignored", action=argparse.BooleanOptionalAction,
           help="mask value 0 is ignored, 1 is the first class (default: only in ADE20K's layout)")
    option = parser.add_argument_group("protocol").add_argument
    option("--multi-scale", action="store_true", help="scales 0.5 to 1.75, each also flipped")
    option("--short-side", type=int, metavar="PIXELS", help="fit images in (2048, this) (default: as in training)")
    option = parser.add_argument_group("output and machine").add_argument
    option("--save-masks", metavar="DIR", help="write the predicted masks there as PNGs of class indices, in the "
           "colours of --classes or made-up ones")
    option("--save-results", metavar="FILE", help="write a detector's results there, in COCO's JSON format")
    option("--json", metavar="FILE", help="write the scores there")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read images (default: 4, "
           "or the number of cores if fewer)")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    args = parser.parse_args()

    rank, _, device = start_process(args.device)
    listed, colours = read_classes(args.classes) if args.classes else (None, None)
    checkpoint = read_checkpoint(args.checkpoint, args.unsafe)
    detects = detection.is_detector(checkpoint)
    meaningless = ("multi_scale", "save_masks", "ignore_index", "zero_ignored") if detects else ("save_results",)
    refuse_options(args, parser, meaningless, args.checkpoint)
    restore_model = detection.restore_model if detects else denseclip.restore_model
    model = restore_model(checkpoint, args.checkpoint, listed).to(device)  # a released file may hold no names
    names, trained = model.class_names, checkpoint.get("arguments", {})
    del checkpoint
    if listed:
        check_classes(args.checkpoint, names, args.classes, listed)
    colours = colours or [made_up_colour(k) for k in range(len(names))]
    short_side = args.short_side or trained.get("short_side")

    if detects:
        images, annotations = args.val or find_coco(args.data or "data/coco", "val")
        limits = detection_limits(short_side or 800)
        masks = model.name.startswith("mask")
        dataset = CocoDetection(images, annotations, DetectionTransform(limits), names, masks=masks)
        if rank == 0:
            print(dataset.summary())
        metrics = evaluate_detection(model, dataset, device, save_results=args.save_results, workers=args.workers)
        table, headline = format_ap_table(metrics, names), f"box AP {metrics['box_ap']:.4f}"
    else:
        images, masks = args.val or find_split(args.data or "data/ADEChallengeData2016", "val")
        zero_ignored = is_ade20k(masks) if args.zero_ignored is None else args.zero_ignored
        dataset = SegmentationDataset(images, masks, len(names), EvalTransform(None), args.ignore_index, zero_ignored)
        metrics = evaluate(model, dataset, device, short_side=short_side, multi_scale=args.multi_scale,
                           save_masks=args.save_masks, colours=colours, workers=args.workers)
        table, headline = format_table(metrics, names), f"mIoU {metrics['miou']:.2f}"
    if rank == 0:
        print(f"{table}\n\n{headline} on {len(dataset)} images of {images}")
        if args.json:
            scores = {"images": len(dataset), "class_names": names, **to_json(metrics)}
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def refuse_options(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: tuple[str, ...], what: str
) -> None:
    """A ValueError if one of these options was given, which have no meaning here."""
    given = [name for name in names if getattr(args, name) != parser.get_default(name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no meaning for {what}; leave it out")


def check_classes(checkpoint: str | Path, names: list[str], listed_in: str, listed: list[str]) -> None:
    """The class list that the user named must be the checkpoint's."""
    if names != listed:
        differences = [f"number {i} is {a!r} and {b!r}" for i, (a, b) in enumerate(zip(names, listed, strict=False), 1)
                       if a != b]
        raise ValueError(f"{checkpoint} has {len(names)} classes and {listed_in} has {len(listed)}, not the same"
                         f"{f' ({differences[0]})' if differences else ''}; give the list of its training, or none")


if __name__ == "__main__":
    run_script(main)
