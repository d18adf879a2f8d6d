"""Convert a checkpoint of the authors' release into one of ours, which eval.py, detect.py and load_checkpoint read.

    python convert.py AUTHORS.pth OURS.pt
    python convert.py AUTHORS.pth OURS.pt --unsafe         # it holds more than tensors, and you trust its source
    python convert.py AUTHORS.pth OURS.pt --classes coco   # it holds no class names

Reads DenseCLIP's and the CLIP baselines' Semantic FPN, RetinaNet and Mask R-CNN models."""

import argparse
import re
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

import denseclip
import detection
from clip_model import load_weights, read_architecture, read_tensors
from data import read_classes, run_script

CLASSIFIERS = {"segmentation": ("decode_head.conv_seg.weight", 1), "retinanet": ("bbox_head.retina_cls.weight", 9)}
CLASSIFIERS["mask_rcnn"] = ("roi_head.mask_head.conv_logits.weight", 1)  # in the release, and its outputs per class
RETINANET = {r"neck\.fpn_convs\.3\.conv": "neck.p6", r"neck\.fpn_convs\.4\.conv": "neck.p7"}  # elsewhere, 3 is P5's
NAMES = {  # names in the release, as regular expressions, and ours, where they differ
    r"bbox_head\.cls_convs\.(\d)\.conv": r"head.classification_head.conv.\1.0",
    r"bbox_head\.retina_cls": r"head.classification_head.cls_logits",
    r"bbox_head\.reg_convs\.(\d)\.conv": r"head.regression_head.conv.\1.0",
    r"bbox_head\.retina_reg": r"head.regression_head.bbox_reg",
    r"rpn_head\.rpn_conv": r"head.rpn.head.conv.0.0",
    r"rpn_head\.rpn_cls": r"head.rpn.head.cls_logits",
    r"rpn_head\.rpn_reg": r"head.rpn.head.bbox_pred",
    r"roi_head\.bbox_head\.shared_fcs\.0": r"head.roi_heads.box_head.fc6",
    r"roi_head\.bbox_head\.shared_fcs\.1": r"head.roi_heads.box_head.fc7",
    r"roi_head\.bbox_head\.fc_cls": r"head.roi_heads.box_predictor.cls_score",
    r"roi_head\.bbox_head\.fc_reg": r"head.roi_heads.box_predictor.bbox_pred",
    r"roi_head\.mask_head\.convs\.(\d)\.conv": r"head.roi_heads.mask_head.\1.0",
    r"roi_head\.mask_head\.upsample": r"head.roi_heads.mask_predictor.conv5_mask",
    r"roi_head\.mask_head\.conv_logits": r"head.roi_heads.mask_predictor.mask_fcn_logits",
}


def convert(source: Path, target: Path, class_names: list[str] | None = None, unsafe: bool = False) -> nn.Module:
    """Convert the authors' file `source` into `target`; return the model, in evaluation mode on the CPU.
    class_names: for files that do not hold them
    unsafe:      also unpickle arbitrary objects, which can run code; the "meta" of released files may hold some"""
    state_dict, names, colors = read_release(source, unsafe)
    task = next((task for task, (key, _) in CLASSIFIERS.items() if key in state_dict), None)
    if task is None:
        keys = " or ".join(key for key, _ in CLASSIFIERS.values())
        raise ValueError(f"{source}: expected a checkpoint of the authors' release, whose state_dict has {keys}")
    (classifier, outputs), names = CLASSIFIERS[task], class_names or names
    num_classes = state_dict[classifier].shape[:1].numel() // outputs
    if len(names) != num_classes:
        raise ValueError(f"{source}: a model of {num_classes} classes, but {len(names)} names; give --classes")
    build = denseclip.build_model if task == "segmentation" else detection.build_model
    name, settings = read_model(state_dict, task, source)
    try:
        model = build(name, names, **settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    load_weights(model, {rename(key, task): value for key, value in state_dict.items()}, str(source))
    # The authors' segmentation models were trained on ADE20K, in whose masks 0 is ignored and 1 is the first class.
    run = {"reduce_zero_label": True} if task == "segmentation" else {}
    denseclip.save_checkpoint(target, model, data={"colors": colors}, run=run)
    return model.eval()


def read_release(source: Path, unsafe: bool) -> tuple[dict[str, Tensor], list[str], list[tuple[int, int, int]]]:
    """State dict, class names and RGB colors of the authors' file; names and colors are empty if it has none."""
    checkpoint = None if unsafe and source.is_file() else read_tensors(source)
    try:
        if checkpoint is None:
            checkpoint = torch.load(source, map_location="cpu", weights_only=False)
        state_dict, meta = checkpoint["state_dict"], checkpoint.get("meta") or {}
        names, colors = meta.get("CLASSES") or [], meta.get("PALETTE") or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError("its CLASSES are not names")
        kinds = {(type(key), value.device.type, value.layout, value.is_quantized) for key, value in state_dict.items()}
        if kinds != {(str, "cpu", torch.strided, False)}:
            raise TypeError("its state_dict has more than names and plain tensors")
        return state_dict, list(names), [tuple(bytes((red, green, blue))) for red, green, blue in colors]
    except Exception as error:  # what a file may hold has no end
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{source}: expected a checkpoint of the authors' release ({reason})") from error


def read_model(state_dict: dict[str, Tensor], task: str, source: Path) -> tuple[str, dict]:
    """The preset and the settings of `build_model` that the authors' weights belong to."""
    as_clip = {k.replace("backbone.", "visual.", 1).removeprefix("text_encoder."): v for k, v in state_dict.items()}
    found = read_architecture(as_clip, str(source))
    presets = {name: preset.encoder for name, preset in detection.PRESETS.items() if name.startswith(task)}
    presets = presets or denseclip.PRESETS  # segmentation
    sizes = attrgetter("layers", "width", "patch_size")
    name = next((name for name, preset in presets.items() if sizes(preset.architecture) == sizes(found)), None)
    if name is None:
        raise ValueError(f"{source}: no model here has its image encoder ({found}): choose from {', '.join(presets)}")
    settings = {"prompting": "post", "context_length": found.context_length}
    settings = settings if found.text_width else {"prompting": "none"}
    if found.input_resolution:  # baselines on ResNets have no positional grid
        settings["crop_size"] = found.input_resolution
    return name, settings


def rename(key: str, task: str) -> str:
    """Our name of a tensor in the authors' checkpoint."""
    for theirs, ours in (RETINANET | NAMES if task == "retinanet" else NAMES).items():
        if re.match(theirs, key):
            return re.sub(theirs, ours, key, count=1)
    return key if key.startswith(("neck.", "decode_head.")) else f"encoder.{key}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="AUTHORS.pth")
    parser.add_argument("target", type=Path, metavar="OURS.pt")
    parser.add_argument("--classes", metavar="LIST", help="list in classes/ or file, if the checkpoint has no names")
    parser.add_argument("--unsafe", action="store_true", help="run whatever code it holds, if you trust its source")
    args = parser.parse_args()
    if args.target.exists():
        raise ValueError(f"{args.target} already exists; name another file")
    model = convert(args.source, args.target, read_classes(args.classes)[0] if args.classes else None, args.unsafe)
    print(f"{args.target}: {model.name}, {len(model.class_names)} classes, {model.settings.prompting}")


if __name__ == "__main__":
    run_script(main)
