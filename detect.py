"""Train, score and use the detectors, RetinaNet and Mask R-CNN, on COCO; by default with the paper's schedule.

    python detect.py train --model retinanet_rn50 --data data/coco --out runs/retinanet     # --accumulate 8 on one GPU
    torchrun --standalone --nproc_per_node 8 detect.py train --model mask_rcnn_rn50 --out runs/mask_rcnn
    python detect.py train --train IMAGES JSON --val IMAGES JSON --iterations 2000 --out runs/mine
    python detect.py eval --checkpoint runs/mask_rcnn/best.pt                               # or torchrun, as above
    python detect.py predict photo.jpg FOLDER "*.png" --checkpoint runs/mask_rcnn/best.pt   # pictures and JSON

Data is a folder of images and a JSON file in COCO's format, with polygons or RLE masks for Mask R-CNN; the file's
categories are the classes. The loop is train.py's: same options, --resume, files in --out. `train` and `eval` need
pycocotools; `predict` needs it only to write masks into its JSON."""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow down this job and others
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: less time to map memory for tensors

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import coco
from clip_model import replacing
from coco import CocoDetection, DetectionTransform, evaluate_detection, find_coco, format_ap_table
from data import default_colors, look_at_all, run_script, to_rgb
from denseclip import check_ranges, read_checkpoint, restore_model
from detection import PRESETS, Detector, Instances, build_model, load_checkpoint
from eval import start_process, this_process
from predict import find_images, for_each_image, open_photo, prepare_outputs
from train import LOOP, Recipe, add_options, choose_model, complete, find_run, start_model, train

# Released code: 12 epochs; learning rate 2e-4 for Mask R-CNN, otherwise 1e-4
RECIPE = Recipe(iterations=None, lr=None, batch_size=16, warmup=500, schedule="step", clip_grad=0.1)


def train_detector(args: argparse.Namespace) -> None:
    if args.train and not args.val:
        raise ValueError("--train also needs --val: a folder of images and a JSON file to score the model on")
    args.resume = find_run(args.out, args.resume)
    train_files = args.train or find_coco(args.data, "train")
    val_files = args.val or find_coco(args.data, "val")
    name, settings, weights = choose_model(PRESETS, vars(args))
    side, load_masks = settings.get("short_side", 800), name.startswith("mask")
    train_set = CocoDetection(*train_files, DetectionTransform(side, flip=0.5), load_masks=load_masks, train=True)
    names = train_set.class_names
    val_set = CocoDetection(*val_files, DetectionTransform(side), names, load_masks=load_masks)
    model, device = start_model(build_model, name, names, settings, weights, vars(args))
    (rank, world), batch_size = this_process(), args.batch_size or RECIPE.batch_size
    epoch = train_set.sampler(batch_size, 0, 0, 1, 0).size  # images
    lr = (2e-4 if load_masks else 1e-4) if args.lr is None else args.lr  # the paper's
    known = {"iterations": args.iterations or 12 * epoch // batch_size, "lr": lr, **weights}
    recipe = complete(RECIPE, vars(args) | known)
    if rank == 0:
        print(f"{train_set.summary()}\n{val_set.summary()}\n{model.name}, {world} x {device}")
        if args.check and not args.resume:
            look_at_all(train_set.check_size, len(train_set), "checking training images", args.workers)
            look_at_all(lambda i: val_set[i][2], len(val_set), "checking validation images", args.workers)
        print(f"writing to {args.out}; the same command with --resume continues an interrupted run")
    loop = {name: getattr(args, name) for name in LOOP}
    loop |= {"score": "box_ap", "data": {"val": [str(Path(path).resolve()) for path in val_files]}}
    evaluate_model = partial(evaluate_detection, dataset=val_set, device=device, workers=args.workers)
    metrics = train(model, train_set, recipe, args.out, device, evaluate_model=evaluate_model, **loop)
    if rank == 0:
        print(format_ap_table(metrics, names))
        print(f"weights: {args.out / 'best.pt'} (best box AP), {args.out / 'last.pt'}; log: {args.out / 'log.jsonl'}")


def score_detector(args: argparse.Namespace) -> None:
    rank, _, device = start_process(args.device)
    checkpoint = read_checkpoint(args.checkpoint)
    model = restore_model(checkpoint, args.checkpoint, build_model, backbone=args.backbone).to(device)
    files = args.val or (not args.data and checkpoint.get("data", {}).get("val"))
    files = files or find_coco(args.data or "data/coco", "val")
    if gone := [path for path in files if not Path(path).exists()]:
        raise FileNotFoundError(f"{gone[0]}: no such validation set; give --val IMAGES JSON")
    names, transform = model.class_names, DetectionTransform(args.short_side or model.short_side)
    dataset = CocoDetection(*files, transform, names, load_masks=model.name.startswith("mask"))
    if rank == 0:
        print(dataset.summary())
    metrics = evaluate_detection(model, dataset, device, save_results=args.save_results, workers=args.workers)
    if rank == 0:
        print(f"{format_ap_table(metrics, names)}\n\nbox AP {metrics['box_ap']:.2f} on {len(dataset)} images")


@torch.no_grad()
def predict(model: Detector, image: Image.Image, short_side: int | None = None) -> Instances:
    """What `model` finds in an image of any size, which is resized to the scale of training or to `short_side` pixels.
    image:  for example `open_photo("photo.jpg")`, which applies the EXIF orientation; PIL.Image.open does not
    return: in its pixels, best first: boxes (N, 4), scores (N,), labels (N,), and for Mask R-CNN masks (N, H, W)"""
    check_ranges({"short_side": short_side})
    pixels = torch.from_numpy(np.array(to_rgb(image, "the image"))).permute(2, 0, 1)  # (3, H, W) uint8
    resized, _ = DetectionTransform(short_side or model.short_side)(pixels, {"boxes": torch.zeros(0, 4)})  # (3, h, w)
    return model([resized.to(next(model.parameters()).device)], sizes=[pixels.shape[1:]])[0]


def draw_detections(photo: Image.Image, found: Instances, class_names: list[str]) -> Image.Image:
    """The photo with masks, boxes, class names and scores, the best on top. Lines and text grow with the photo, and one
    of fewer than 512 pixels is enlarged by a whole number, so that both can be read."""
    colors, pixels = default_colors(len(class_names)), np.array(photo)  # (H, W, 3)
    zoom = -(-512 // max(photo.size))
    boxes, labels, scores = (found["boxes"] * zoom).tolist(), found["labels"].tolist(), found["scores"].tolist()
    order = range(len(boxes))[::-1]  # the best last
    for i in order if "masks" in found else ():
        mask = found["masks"][i].cpu().numpy()  # (H, W)
        pixels[mask] = pixels[mask] // 2 + np.uint8(colors[labels[i]]) // 2
    picture = Image.fromarray(pixels).resize((photo.width * zoom, photo.height * zoom), Image.Resampling.NEAREST)
    draw, side = ImageDraw.Draw(picture), max(picture.size)
    line, font = round(side / 400), ImageFont.load_default(side / 50)  # pixels
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colors[labels[i]], width=line)
    for i in order:  # after all boxes, so that none crosses a name
        (x, y, _, _), color = boxes[i], colors[labels[i]]
        text, bright = f"{class_names[labels[i]]} {scores[i]:.2f}", np.dot(color, (0.299, 0.587, 0.114)) > 128
        _, _, width, height = (end + 2 * line for end in draw.textbbox((0, 0), text, font))
        x, y = max(min(x, picture.width - width), 0), y - height if y >= height else y  # above the box or inside it
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + line, y + line), text, "black" if bright else "white", font)
    return picture


def predict_files(args: argparse.Namespace) -> None:
    paths, file = find_images(args.paths), args.out / "detections.json"
    pictures = {path: args.out / f"{path.stem}.png" for path in paths}
    _, _, device = start_process(args.device)
    model = load_checkpoint(args.checkpoint, backbone=args.backbone).to(device)
    prepare_outputs(paths, [*pictures.values(), file])
    if there := [x for x in (file, *pictures.values()) if x.exists() and not args.overwrite]:
        raise ValueError(f"{there[0]} exists already: name another --out, or --overwrite what is there")
    names, ids = model.class_names, range(1, len(model.class_names) + 1)
    if model.name.startswith("mask") and coco.COCO is None:
        print(f"masks are drawn, but {file} will have none: they need pycocotools (pip install pycocotools)")
    images, annotations = [], []  # in COCO's format, so that whatever reads COCO's annotations reads them

    def work(path: Path) -> None:
        photo = open_photo(path)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            found = predict(model, photo, args.short_side)
        found = {name: value[found["scores"] >= args.threshold] for name, value in found.items()}
        results = coco.to_results(found, len(images) + 1, ids)
        with replacing(pictures[path]) as part:
            draw_detections(photo, found, names).save(part, "PNG")
        images.append({"id": len(images) + 1, "file_name": path.name, "width": photo.width, "height": photo.height})
        for x in results:
            annotations.append({"id": len(annotations) + 1, "area": x["bbox"][2] * x["bbox"][3], "iscrowd": 0, **x})

    try:
        failed = for_each_image(paths, work)
    finally:  # what was found before Ctrl-C, too
        if images:
            categories = [{"id": k, "name": name} for k, name in zip(ids, names, strict=True)]
            content = {"images": images, "categories": categories, "annotations": annotations}
            with replacing(file) as part:
                part.write_text(json.dumps(content), encoding="utf-8")
    where = f"; detections in {file}" if images else ""
    print(f"{len(images)} pictures written to {args.out}, {failed} images failed{where}")
    sys.exit(1 if failed else 0)


def main() -> None:
    work = {"train": train_detector, "eval": score_detector, "predict": predict_files}
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = argparse.ArgumentParser("detect.py", f"python detect.py {'|'.join(work)} [options]", **raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(work), prog="detect.py")
    raw["usage"] = "python %(prog)s [options]"
    training, scoring, predicting = (commands.add_parser(name, **raw) for name in work)
    files = {"nargs": 2, "metavar": ("IMAGES", "JSON"), "help": "folder and file, instead of --data"}
    first = training.add_argument_group("what most runs need").add_argument
    first("--train", **files)
    first("--val", **files)
    first("--data", default="data/coco", metavar="ROOT", help="data set (default: %(default)s)")
    add_options(training, first, PRESETS, RECIPE, "runs/detector")
    option = scoring.add_argument
    option("--data", metavar="ROOT", help="data set (default: training's validation set, or data/coco)")
    option("--val", **files)
    option("--save-results", type=Path, metavar="FILE", help="write the detections there, in COCO's JSON format")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="image readers (default: %(default)s)")
    option = predicting.add_argument
    option("paths", nargs="+", metavar="PATHS", help='images, folders and patterns such as "photos/*.jpg"')
    option("--out", type=Path, default=Path("detections"), metavar="DIR", help="(default: %(default)s)")
    option("--threshold", type=float, default=0.5, metavar="SCORE", help="lowest, from 0.05 (default: %(default)s)")
    option("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: %(default)s)")
    option("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    for command in (training, scoring, predicting):
        fit = "limit of the short side; the long side's is 5/3 of it (default: 800, later as in training)"
        command.add_argument("--short-side", type=int, metavar="PIXELS", help=fit)
    for option in (scoring.add_argument, predicting.add_argument):
        option("--checkpoint", type=Path, required=True, metavar="PATH", help="best.pt or last.pt, or from convert.py")
        option("--backbone", metavar="MODULE:FUNCTION", help="the checkpoint's backbone, if it is one of your own")
        option("--device", help="cuda, cuda:1, cpu, ... (default: cuda if available)")
    args = parser.parse_args()
    check_ranges(vars(args))
    work[args.command](args)


if __name__ == "__main__":
    run_script(main)
