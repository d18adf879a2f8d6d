"""Train DenseCLIP. The defaults are the paper's run: CLIP ResNet-50, Semantic FPN, ADE20K, 80,000 iterations.
With --model retinanet_rn50 and the like it trains a detector on COCO, by the paper's schedule for it.

    python train.py --demo                                                # draws its data; a minute or two on two cores
    python train.py --data data/ADEChallengeData2016 --out runs/rn50      # one GPU (--accumulate 4 if memory is short)
    torchrun --standalone --nproc_per_node 8 train.py --out runs/rn50     # eight GPUs, the same global batch
    python train.py --model tiny --train IMAGES MASKS --val IMAGES MASKS --classes LIST --out runs/mine
    python train.py --model mask_rcnn_rn50 --data data/coco --out runs/mask_rcnn    # or --train IMAGES ANNOTATIONS ...
    ... --resume                                                          # go on from last.pt, exactly

Writes into --out: last.pt (to resume from), best.pt (highest validation mIoU or box AP; all that eval.py needs),
log.jsonl (one JSON object a line; the first has the command, the versions and the seed) and, where TensorBoard is
installed, its event files.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import denseclip
import detection
from clip_model import ARCHITECTURES
from coco import CocoDetection, DetectionTransform, detection_limits, evaluate_detection, find_coco, format_ap_table
from data import EvalTransform, SegmentationDataset, TrainTransform, find_split, read_classes
from denseclip import HEADS, PROMPTING, build_encoder, read_checkpoint, save_checkpoint
from eval import (
    check_classes,
    evaluate,
    format_table,
    is_ade20k,
    refuse_options,
    run_script,
    start_process,
    to_json,
)


@dataclass
class Recipe:
    """What decides the trained weights, with the paper's values; a checkpoint carries it, --resume insists on it."""

    iterations: int = 80_000
    batch_size: int = 32  # images an iteration, over all processes and accumulation steps
    lr: float = 1e-4
    weight_decay: float = 1e-4
    backbone_lr_multiplier: float = 0.1
    warmup: int = 1_500  # iterations
    clip_grad: float = 0.0  # largest gradient norm, 0: no clipping
    precision: str = "fp32"
    seed: int = 0
    short_side: int = 512  # pixels; images are resized to fit (2048, short_side), in training times U(0.5, 2)
    schedule: str = "poly"  # detection: "step"
    ignore_index: int = 255  # of masks, see SegmentationDataset
    zero_ignored: bool = False
    text_lr_multiplier: float = 0.0  # 0: the text encoder is frozen


# ---------------------------------------------------------------------------------------------- optimisation


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, backbone_lr_multiplier: float, text_lr_multiplier: float = 0.0
) -> list[dict]:
    """Groups for AdamW: the image encoder learns slower, the context decoder's norms do not decay.

    Released code: the longest matching key decides, so a norm inside the backbone is "backbone" and does decay, and
    "norm" is found in the names of the context decoder's norm1..3 only. Frozen weights are in no group.
    """
    groups = {
        "backbone": {"params": [], "base_lr": lr * backbone_lr_multiplier, "weight_decay": weight_decay},
        "text_encoder": {"params": [], "base_lr": lr * text_lr_multiplier, "weight_decay": weight_decay},
        "norm": {"params": [], "base_lr": lr, "weight_decay": 0.0},
        "rest": {"params": [], "base_lr": lr, "weight_decay": weight_decay},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = next((key for key in groups if key in name), "rest")
            groups[key]["params"].append(parameter)
    return [{"name": key, "lr": group["base_lr"], **group} for key, group in groups.items() if group["params"]]


def learning_rate(iteration: int, base: float, total: int, warmup: int, schedule: str = "poly") -> float:
    """The rate of an iteration, from 0, in a group whose highest rate is `base`.

    "poly": decay with power 0.9 to 1e-6; "step": a tenth after 8 and again after 11 twelfths of the run.
    Linear warm-up from 1e-6 ("poly") or 1e-3 ("step") of it.
    """
    if schedule == "poly":
        rate, first = (base - 1e-6) * (1 - iteration / total) ** 0.9 + 1e-6, 1e-6
    else:
        rate, first = base * 0.1 ** ((12 * iteration >= 8 * total) + (12 * iteration >= 11 * total)), 1e-3
    if iteration < warmup:
        rate *= 1 - (1 - iteration / warmup) * (1 - first)
    return rate


# ----------------------------------------------------------------------------------------------- checkpoints


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random state: dropout draws from it. (Every sample has a seed of its own, from the sampler.)"""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather(value: object) -> list:
    """One object of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_resume(path: Path, checkpoint: dict, model: nn.Module, recipe: Recipe, images: int) -> None:
    """A run goes on only as the run it was: same model, classes, recipe and data."""
    if "optimizer" not in checkpoint:
        raise ValueError(f"{path} holds no optimiser state; --resume needs the last.pt that train.py wrote")
    check_classes(path, checkpoint["class_names"], "--classes", model.class_names)
    there = {"model": checkpoint["name"], **checkpoint["settings"], **checkpoint["arguments"]}
    here = {"model": model.name, **model.settings, **asdict(recipe), "images": images}
    differences = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
                   for key in here | there if there.get(key) != here.get(key)]
    if differences:
        raise ValueError(f"{path} belongs to another run: {'; '.join(differences)}; "
                         "repeat that run's options, or start a new run in another --out")


# -------------------------------------------------------------------------------------------------- the loop


def train(
    model: nn.Module,
    train_set: SegmentationDataset | CocoDetection,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    *,
    evaluate: Callable[[nn.Module], dict],
    score: str = "miou",
    accumulate: int = 1,
    workers: int = 4,
    eval_every: int = 8_000,
    save_every: int = 1_000,
    log_every: int = 50,
    resume: Path | None = None,
) -> dict:
    """Train `model` by `recipe`, writing checkpoints and the log into `out`; returns the last evaluation's scores.

    model(images, labels) in train mode has to return a dict of losses, whose sum is minimised. The data set says how to
    sample it and how to make batches; evaluate(model) gives scores, of which `score` decides what best.pt is.
    Every process of torchrun calls this with the same arguments; the batch is divided among them.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    micro_batch, remainder = divmod(recipe.batch_size, world * accumulate)
    if remainder or not micro_batch:
        raise ValueError(f"--batch-size {recipe.batch_size} does not divide over {world} process(es) x "
                         f"--accumulate {accumulate}")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.backends.cudnn.benchmark = isinstance(train_set, SegmentationDataset)  # a detector's sizes always change
    if world > 1 and device.type == "cuda":  # SyncBatchNorm has no CPU version: there, each process has its own
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last).train()  # the layout convolutions prefer
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.backbone_lr_multiplier,
                              recipe.text_lr_multiplier)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))

    start, best = 0, -1.0
    torch.manual_seed(recipe.seed + rank)
    if resume:
        # Order: weights, optimiser, position in the schedule and the samples, and at last the random states.
        checkpoint = read_checkpoint(resume)
        check_resume(resume, checkpoint, model, recipe, len(train_set))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, best = checkpoint["iteration"], checkpoint["best"] if resume.parent == out else -1.0
        if len(checkpoint["random_states"]) == world:
            restore_random_state(checkpoint["random_states"][rank], device)
        elif rank == 0:
            print(f"{resume} is from {len(checkpoint['random_states'])} processes, these are {world}: schedule and "
                  "samples go on as they would have, dropout draws anew")

        del checkpoint

    sampler = train_set.sampler(recipe.batch_size, recipe.seed, rank, world, start * recipe.batch_size)
    loader = DataLoader(train_set, micro_batch, sampler=sampler, num_workers=workers, collate_fn=train_set.collate,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    batches = iter(loader)
    network = model
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    board = summary_writer(out) if rank == 0 else None
    sums, clock, last_logged, metrics = {}, time.perf_counter(), start, {}

    bar = tqdm(range(start, recipe.iterations), "training", recipe.iterations, initial=start, disable=rank > 0 or None)
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, group["base_lr"], recipe.iterations, recipe.warmup, recipe.schedule)

        for step in range(accumulate):
            images, labels, paths = next(batches)
            images, labels = to_device(images, device), to_device(labels, device)
            # Gradients are averaged over the processes once an iteration, in the last step's backward.
            with contextlib.nullcontext() if network is model or step == accumulate - 1 else network.no_sync():
                with autocast:
                    losses = network(images, labels)
                loss = sum(losses.values())
                if not math.isfinite(loss.item()):
                    raise ValueError(f"loss is {loss.item()} at iteration {iteration}; checkpoints are as they were; a "
                                     f"lower --lr or --clip-grad may help; the batch's files are {' '.join(paths)}")
                (loss / accumulate).backward()
            for name, value in {"total": loss, **losses}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

        done = iteration + 1
        if rank == 0 and (done % log_every == 0 or done == recipe.iterations):
            seconds = (time.perf_counter() - clock) / (done - last_logged)  # an iteration, evaluation not counted
            record = {
                "iteration": done,
                **{name: value / accumulate / (done - last_logged) for name, value in sums.items()},
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "images_per_second": recipe.batch_size / seconds,
                "memory_mb": memory(device),
                "eta_seconds": seconds * (recipe.iterations - done),
            }
            write_log(out, record, board)
            tqdm.write(" | ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                                  for name, value in record.items()))
            sums, clock, last_logged = {}, time.perf_counter(), done

        evaluating = done % eval_every == 0 or done == recipe.iterations
        if evaluating or done % save_every == 0:
            paused = time.perf_counter()
            extra = {"iteration": done, "arguments": {**asdict(recipe), "images": len(train_set)}}
            if evaluating:
                if world > 1:  # each CPU process has its own BatchNorm statistics: take those that will be saved
                    for buffer in model.buffers():
                        dist.broadcast(buffer, 0)
                metrics = evaluate(model)
                if rank == 0:
                    write_log(out, {"iteration": done, **to_json(metrics)}, board)
                    tqdm.write(f"iteration {done} | {score} {metrics[score]:.4g} | best before {max(best, 0):.4g}")
                if metrics[score] > best:
                    best = metrics[score]
                    save(out / "best.pt", model, rank, best=best, **extra)
            save(out / "last.pt", model, rank, best=best, **extra, optimizer=optimizer.state_dict(),
                 random_states=gather(random_state(device)))
            clock += time.perf_counter() - paused
    if board:
        board.close()
    return metrics


def save(path: Path, model: nn.Module, rank: int, **extra) -> None:
    """Write a checkpoint from the first process, unless an update has just broken the weights."""
    if rank == 0:
        broken = next((name for name, value in model.named_parameters() if not torch.isfinite(value).all()), None)
        if broken:
            raise ValueError(f"{broken} is not finite after iteration {extra['iteration'] - 1}; {path} is as it was; a "
                             "lower --lr or --clip-grad may help")
        save_checkpoint(path, model, **extra)


def to_device(batch: Tensor | list | dict, device: torch.device) -> Tensor | list | dict:
    """The tensors of a batch, also in lists and dictionaries of them, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, list) else batch


def memory(device: torch.device) -> float:
    """Highest memory use so far in MiB: the GPU's, or this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def summary_writer(out: Path):
    """TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out))


def write_log(out: Path, record: dict, board=None) -> None:
    """Append one line to log.jsonl, and its numbers to TensorBoard."""
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    for name, value in record.items() if board else ():
        if isinstance(value, (int, float)) and name != "iteration":
            board.add_scalar(name, value, record["iteration"])


# ---------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="draw a data set, train on it, show what came out")
    option = parser.add_argument_group("model").add_argument
    option("--model", default="rn50", metavar="NAME",
           help=f"{', '.join([*denseclip.PRESETS, *detection.PRESETS])} (default: %(default)s)")
    option("--clip", metavar="NAME", help="CLIP weights: a name such as RN50, a file, or none: random (default: the "
           "preset's)")
    option("--crop-size", type=int, metavar="PIXELS", help="training crop and test window (default: the preset's)")
    option("--prompting", choices=PROMPTING, default="post", help="none: no language, the baseline; otherwise how the "
           "text is made (default: %(default)s)")
    option("--backbone", metavar="NAME", help="resnet18, resnet50, resnet101, swin_t or swin_s in the place of CLIP's "
           "image encoder")
    option("--backbone-weights", default="IMAGENET1K_V1", metavar="NAME", help="of --backbone: torchvision's name for "
           "them, a file, or none: random (default: %(default)s)")
    option("--head", choices=HEADS, default="fpn", help="default: %(default)s")
    option("--set", nargs="+", default=[], metavar="NAME=VALUE", help="more settings of denseclip.build_encoder, such "
           "as num_contexts=16 decoder_layers=6 gamma=1.0 learn_gamma=false score_map=false")
    option = parser.add_argument_group("data").add_argument
    option("--data", default="data/ADEChallengeData2016", metavar="ROOT", help="data set (default: %(default)s)")
    option("--train", nargs=2, metavar=("IMAGES", "MASKS"), help="two folders, instead of --data; for a detector a "
           "folder and a JSON file in COCO's format")
    option("--val", nargs=2, metavar=("IMAGES", "MASKS"), help="likewise")
    option("--classes", metavar="LIST", help="a list in classes/ or a file (default: ROOT/classes.txt, or ade20k in "
           "ADE20K's layout); a detector takes the JSON file's categories")
    option("--ignore-index", type=int, default=255, metavar="VALUE", help="mask value to ignore, besides 255")
    option("--zero-ignored", action=argparse.BooleanOptionalAction,
           help="mask value 0 is ignored, 1 is the first class (default: only in ADE20K's layout)")
    option("--short-side", type=int, metavar="PIXELS", help="fit images in (2048, this), in training times U(0.5, 2) "
           "(default: the crop size); for a detector in (5/3 of this, this) (default: 800)")
    option = parser.add_argument_group("recipe").add_argument
    option("--iterations", type=int, default=Recipe.iterations, help="default: %(default)s; for a detector 12 epochs")
    option("--batch-size", type=int, default=Recipe.batch_size, metavar="IMAGES",
           help="an iteration, over all processes and accumulation steps (default: %(default)s)")
    option("--lr", type=float, default=Recipe.lr, help="highest learning rate (default: %(default)s)")
    option("--weight-decay", type=float, default=Recipe.weight_decay, help="default: %(default)s")
    option("--backbone-lr-multiplier", type=float, default=Recipe.backbone_lr_multiplier, metavar="FACTOR",
           help="of the image encoder (default: %(default)s)")
    option("--text-lr-multiplier", type=float, default=Recipe.text_lr_multiplier, metavar="FACTOR",
           help="of the text encoder (default: %(default)s, frozen)")
    option("--warmup", type=int, default=Recipe.warmup, metavar="ITERATIONS", help="default: %(default)s")
    option("--clip-grad", type=float, default=Recipe.clip_grad, metavar="NORM", help="0: off (default)")
    option("--precision", choices=["fp32", "bf16"], default=Recipe.precision, help="default: %(default)s")
    option("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    option = parser.add_argument_group("run").add_argument
    option("--out", default="runs/denseclip", metavar="DIR", help="default: %(default)s")
    option("--resume", nargs="?", const="", metavar="PATH", help="go on from last.pt in --out, or from PATH")
    option("--accumulate", type=int, default=1, metavar="STEPS", help="an iteration's batch in so many parts")
    option("--eval-every", type=int, default=8_000, metavar="ITERATIONS", help="default: %(default)s")
    option("--save-every", type=int, default=1_000, metavar="ITERATIONS", help="last.pt (default: %(default)s)")
    option("--log-every", type=int, default=50, metavar="ITERATIONS", help="default: %(default)s")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes for each process "
           "(default: 4, or the number of cores if fewer)")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    args = parser.parse_args()
    if args.model in detection.PRESETS:
        meaningless = ("demo", "classes", "ignore_index", "zero_ignored", "head", "crop_size")
        refuse_options(args, parser, meaningless, f"--model {args.model}")
    if args.demo:  # the demo's values are defaults as well: options given beside --demo win
        import demo

        parser.set_defaults(**demo.OPTIONS)
        args = parser.parse_args()
        args.data, args.classes, args.train, args.val = f"{args.out}/data", f"{args.out}/data/classes.txt", None, None
    elif args.model in detection.PRESETS:  # the released schedule for COCO; its 12 epochs as iterations: see main
        parser.set_defaults(data="data/coco", batch_size=16, iterations=0, warmup=500, clip_grad=0.1, short_side=800,
                            lr=2e-4 if args.model.startswith("mask") else 1e-4)
        args = parser.parse_args()
    return args


def parse_settings(pairs: list[str], build: Callable) -> dict:
    """["gamma=1.0", "score_map=false"] -> {"gamma": 1.0, "score_map": False}, in build_model's names and types."""
    own_options = {"head", "prompting", "backbone", "backbone_weights"}
    parameters = {**inspect.signature(build).parameters, **inspect.signature(build_encoder).parameters}
    known = {n: p.annotation for n, p in parameters.items() if p.kind == p.KEYWORD_ONLY and n not in own_options}
    settings = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known:
            raise ValueError(f"--set {pair}: no setting named {name!r}; choose from {', '.join(sorted(known))}")
        kind = known[name]
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        value = float(text) if type(text) is int and isinstance(0.0, kind) else text
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"--set {pair}: {name} is {getattr(kind, '__name__', kind)}")
        settings[name] = value
    return settings


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    detects = args.model in detection.PRESETS
    if not detects and args.model not in denseclip.PRESETS:
        raise ValueError(f"--model {args.model}: choose one of {', '.join([*denseclip.PRESETS, *detection.PRESETS])}")
    if args.train and not args.val:
        raise ValueError("--train needs --val, too: two folders of images and masks to score the model on")
    for name in ("iterations", "batch_size", "accumulate", "eval_every", "save_every", "log_every"):
        if getattr(args, name) < (0 if detects and name == "iterations" else 1):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it has to be at least 1")
    resume = Path(args.resume) if args.resume else out / "last.pt" if args.resume == "" else None
    if resume and not resume.is_file():
        raise FileNotFoundError(f"--resume: {resume} does not exist; leave --resume out to start this run")
    drawn = args.demo and (out / "data").is_dir()  # an earlier demo may be written over
    if not resume and not drawn and (out / "last.pt").exists():
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or name another --out")
    rank, world, device = start_process(args.device)
    if args.demo:
        import demo

        if rank == 0:
            demo.draw_dataset(Path(args.data))
        gather(None)  # the other processes wait for the drawings

    torch.manual_seed(args.seed)  # the same initial weights in every process
    preset = denseclip.PRESETS[detection.PRESETS[args.model].encoder if detects else args.model]
    clip = args.clip or next((name for name, a in ARCHITECTURES.items() if a == preset.architecture), "none")
    unused = args.backbone and args.prompting == "none"  # neither of CLIP's encoders
    # One process fetches and reads weights, the others get them from it; a resumed run has its own.
    reads = rank == 0 and not resume
    clip = clip if reads and clip != "none" and not unused else None
    settings = {
        "prompting": args.prompting, "backbone": args.backbone,
        "backbone_weights": args.backbone_weights if reads and args.backbone_weights != "none" else None,
        **({} if detects else {"head": args.head, "crop_size": args.crop_size}),
        **parse_settings(args.set, detection.build_model if detects else denseclip.build_model),
    }
    train_images, train_labels = args.train or (find_coco if detects else find_split)(args.data, "train")
    val_images, val_labels = args.val or (find_coco if detects else find_split)(args.data, "val")
    args.schedule = "step" if detects else "poly"
    args.short_side = args.short_side or settings.get("crop_size") or preset.crop_size
    if args.zero_ignored is None:
        args.zero_ignored = not detects and is_ade20k(train_labels)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})

    if detects:
        limits, masks = detection_limits(recipe.short_side), args.model.startswith("mask")
        transform = DetectionTransform(limits, flip=0.5)
        train_set = CocoDetection(train_images, train_labels, transform, masks=masks, train=True)
        class_names = train_set.class_names
        val_set = CocoDetection(val_images, val_labels, DetectionTransform(limits), class_names, masks=masks)
        model = detection.build_model(args.model, class_names, clip, **settings)
        if not recipe.iterations:
            epoch = train_set.sampler(recipe.batch_size, 0, 0, 1, 0).size
            recipe = replace(recipe, iterations=12 * epoch // recipe.batch_size)

        def score_model(model: nn.Module) -> dict:
            return evaluate_detection(model, val_set, device, workers=args.workers)
    else:
        listed = Path(args.data) / "classes.txt"
        if args.classes is None and (args.train or not (listed.is_file() or is_ade20k(train_labels))):
            raise ValueError(f"--classes is missing: the names of the classes in {train_labels}, a file of one a line")
        class_names, _ = read_classes(args.classes or (listed if listed.is_file() else "ade20k"))
        model = denseclip.build_model(args.model, class_names, clip, **settings)
        transform = TrainTransform(model.crop_size, (2048, recipe.short_side))
        meaning = (recipe.ignore_index, recipe.zero_ignored)
        train_set = SegmentationDataset(train_images, train_labels, len(class_names), transform, *meaning)
        val_set = SegmentationDataset(val_images, val_labels, len(class_names), EvalTransform(None), *meaning)

        def score_model(model: nn.Module) -> dict:
            return evaluate(model, val_set, device, short_side=recipe.short_side, workers=args.workers)
    val_set[0]  # a wrong set is found here, not at the first evaluation
    if args.text_lr_multiplier and args.prompting != "none":
        model.encoder.text_encoder.requires_grad_()

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_log(out, {
            "command": shlex.join(sys.argv),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__},
            "seed": args.seed, "device": str(device), "processes": world, "accumulate": args.accumulate,
            "model": model.name, "settings": model.settings, "clip": clip, "class_names": class_names,
            "recipe": asdict(recipe), "train": [str(train_images), str(train_labels)],
            "val": [str(val_images), str(val_labels)],
        })
        print(f"{model.name}, {len(class_names)} classes, {len(train_set)} training and {len(val_set)} validation "
              f"images, {world} x {device}, writing to {out}")
        if recipe.zero_ignored and not args.demo:
            print("mask value 0 is ignored and 1 is the first class; --no-zero-ignored if yours begin with 0")
        for dataset in (train_set, val_set) if detects else ():
            print(dataset.summary())  # what had to be left out or repaired
    try:
        metrics = train(
            model, train_set, recipe, out, device, evaluate=score_model, score="box_ap" if detects else "miou",
            accumulate=args.accumulate, workers=args.workers, eval_every=args.eval_every,
            save_every=args.save_every, log_every=args.log_every, resume=resume,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on from {out / 'last.pt'} by the same command with --resume"
                                if (out / "last.pt").exists() else "nothing was saved yet") from None
    if rank == 0:
        if metrics:
            print((format_ap_table if detects else format_table)(metrics, class_names))
        print(f"weights: {out / 'best.pt'} (best score), {out / 'last.pt'}; log: {out / 'log.jsonl'}")
        if args.demo:
            best = read_checkpoint(out / "best.pt")
            demo.show(denseclip.restore_model(best, out / "best.pt"), best["best"], val_set, out)


if __name__ == "__main__":
    run_script(main)
