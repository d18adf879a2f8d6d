"""Train and score the detectors: RetinaNet and Mask R-CNN, box and mask AP on COCO. By default `train` follows the
paper's schedule.

    python detect.py train --model retinanet_rn50 --data data/coco --out runs/retinanet     # --accumulate 8 on one GPU
    torchrun --standalone --nproc_per_node 8 detect.py train --model mask_rcnn_rn50 --out runs/mask_rcnn
    python detect.py train --train IMAGES JSON --val IMAGES JSON --iterations 2000 --warmup 100 --out runs/mine
    python detect.py eval --checkpoint runs/mask_rcnn/best.pt                               # or torchrun, as above

Data is a folder of images and a JSON file in COCO's format, with polygons or RLE masks for Mask R-CNN; the file's
categories are the classes. The loop is train.py's: same options, --resume, files in --out. Needs pycocotools.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from coco import CocoDetection, DetectionTransform, detection_limits, evaluate_detection, find_coco, format_ap_table
from data import run_script
from denseclip import read_checkpoint, restore_model
from detection import PRESETS, build_model
from eval import start_process, write_scores
from train import Recipe, add_options, fetch_weights, find_run, initial_weights, parse_settings, positive, train

# Released code: 12 epochs; learning rate 2e-4 for Mask R-CNN, otherwise 1e-4
RECIPE = Recipe(iterations=None, lr=None, batch_size=16, warmup=500, schedule="step", clip_grad=0.1, short_side=800)


def add_data_options(parser: argparse.ArgumentParser, training: bool) -> None:
    option = parser.add_argument_group("data").add_argument
    option("--data", default="data/coco", metavar="ROOT", help="data set (default: %(default)s)")
    if training:
        option("--train", nargs=2, metavar=("IMAGES", "JSON"), help="folder and file, instead of --data")
    option("--val", nargs=2, metavar=("IMAGES", "JSON"), help="folder and file, instead of --data")
    default = "800" if training else "as in training"
    option(
        "--short-side", type=positive, metavar="PIXELS", help=f"fit images in (5/3 of this, this) (default: {default})"
    )


def train_detector(args: argparse.Namespace) -> None:
    if args.train and not args.val:
        raise ValueError("--train also needs --val: a folder of images and a JSON file to score the model on")
    args.model = args.model or next(iter(PRESETS))
    resume, plain = find_run(args.out, args.resume), args.prompting == "none"
    short_side = args.short_side or RECIPE.short_side
    limits, load_masks = detection_limits(short_side), args.model.startswith("mask")
    train_files = args.train or find_coco(args.data, "train")
    val_files = args.val or find_coco(args.data, "val")
    train_set = CocoDetection(*train_files, DetectionTransform(limits, flip=0.5), load_masks=load_masks, train=True)
    names = train_set.class_names
    val_set = CocoDetection(*val_files, DetectionTransform(limits), names, load_masks=load_masks)

    options = {"prompting": args.prompting, "backbone": args.backbone, **parse_settings(args.set)}
    preset = PRESETS[args.model].encoder
    weights = initial_weights(preset, args.clip, args.backbone, args.backbone_weights, plain)
    if not resume:  # a resumed run has its own weights
        fetch_weights(args.backbone, **weights)
    rank, world, device = start_process(args.device)
    torch.manual_seed(args.seed)  # the same initial weights in every process
    if rank == 0 and not resume:  # one process reads weights, the others get its parameters
        options |= weights
    model = build_model(args.model, names, **options)

    epoch = train_set.sampler(args.batch_size, 0, 0, 1, 0).size  # images
    lr = (2e-4 if load_masks else 1e-4) if args.lr is None else args.lr  # the paper's
    known = {
        "short_side": short_side,
        "iterations": args.iterations or 12 * epoch // args.batch_size,
        "lr": lr,
        **weights,
    }
    recipe = replace(RECIPE, **{name: value for name, value in vars(args).items() if hasattr(Recipe, name)} | known)
    if rank == 0:
        print(f"{model.name}, {world} x {device}, writing to {args.out}\n{train_set.summary()}\n{val_set.summary()}")
        print("the same command with --resume continues an interrupted run")
    loop = {name: getattr(args, name) for name in ("accumulate", "workers", "eval_every", "save_every", "log_every")}
    evaluate_model = partial(evaluate_detection, dataset=val_set, device=device, workers=args.workers)
    options = {"evaluate_model": evaluate_model, "score": "box_ap", "resume": resume}
    metrics = train(model, train_set, recipe, args.out, device, **options, **loop)
    if rank == 0:
        print(format_ap_table(metrics, names))
        print(f"weights: {args.out / 'best.pt'} (best box AP), {args.out / 'last.pt'}; log: {args.out / 'log.jsonl'}")


def score_detector(args: argparse.Namespace) -> None:
    rank, _, device = start_process(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    model = restore_model(checkpoint, args.checkpoint, build_model, args.backbone).to(device)
    short_side = args.short_side or checkpoint.get("run", {}).get("short_side", RECIPE.short_side)
    files, limits = args.val or find_coco(args.data, "val"), detection_limits(short_side)
    names, load_masks = model.class_names, model.name.startswith("mask")
    dataset = CocoDetection(*files, DetectionTransform(limits), names, load_masks=load_masks)
    if rank == 0:
        print(dataset.summary())
    metrics = evaluate_detection(model, dataset, device, save_results=args.save_results, workers=args.workers)
    if rank == 0:
        print(f"{format_ap_table(metrics, names)}\n\nbox AP {metrics['box_ap']:.2f} on {len(dataset)} images")
        if args.json:
            write_scores(args.json, len(dataset), names, metrics)


def main() -> None:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = argparse.ArgumentParser("detect.py", "python detect.py train|eval [options]", **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|eval")
    training = commands.add_parser("train", prog="detect.py train", usage="python detect.py train [options]", **raw)
    add_options(training, PRESETS, RECIPE, "runs/detector")
    training.set_defaults(run=train_detector)
    add_data_options(training, training=True)

    scoring = commands.add_parser("eval", prog="detect.py eval", usage="python detect.py eval [options]", **raw)
    scoring.set_defaults(run=score_detector)
    option = scoring.add_argument
    option("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of training, or made by convert.py")
    option("--backbone", metavar="MODULE:FUNCTION", help="the checkpoint's backbone, if it is one of your own")
    add_data_options(scoring, training=False)
    option("--save-results", type=Path, metavar="FILE", help="write the detections there, in COCO's JSON format")
    option("--json", type=Path, metavar="FILE", help="write the scores there")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="image readers (default: %(default)s)")
    option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if available)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_script(main)
