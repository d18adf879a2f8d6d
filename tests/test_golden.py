"""The numbers are the released code's: its segmentation checkpoints, loaded, give its features, logits and gradients.

Each checkpoint is filled from its names (fill.py); golden/ holds what the released code computed on it, in float32 on
a CPU. Bounds: every tensor within 1e-3 of its standard deviation (seen: 1e-5), losses 1e-4, gradient norms 1e-2, in
the median 1e-3, relative.
"""

from pathlib import Path
from statistics import median

import fill
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data import read_classes
from denseclip import load_checkpoint
from eval import sliding_window, window_stride

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=["denseclip_rn50", "denseclip_vitb", "clip_rn50"])
def released(request, tmp_path_factory):
    """The golden file and the model of a released checkpoint that was saved and loaded."""
    golden = torch.load(GOLDEN / f"{request.param}.pt", weights_only=True)
    path = tmp_path_factory.mktemp("released") / f"{request.param}.pth"
    weights = {key: fill.tensor(key, shape) for key, shape in golden["keys"].items()}
    meta = {"CLASSES": tuple(read_classes("ade20k")[0]), "PALETTE": [[0, 0, 0]]}
    torch.save({"state_dict": weights, "meta": meta}, path)
    return golden, load_checkpoint(path)


def size_of(key):
    return tuple(int(n) for n in key.split("x"))


def difference(x, golden):
    """Largest absolute difference to the kept values, in the tensor's standard deviations."""
    assert list(x.shape) == list(golden["shape"])
    return (fill.sample(x) - golden["sample"]).abs().max().item() / golden["std"]


def agreement(scores, golden):
    """Share of equal classes among the pixels kept."""
    classes = fill.sample(scores.argmax(1), len(golden["argmax"]))
    return (classes == golden["argmax"].long()).float().mean().item()


@torch.no_grad()
def test_every_stage_equals_the_released_code(released):
    golden, model = released
    for key, expected in golden["eval"].items():
        images = fill.tensor("input.image", size_of(key))
        pyramid, global_embedding, visual_embeddings = model.encoder.backbone(images)
        found = {"features": list(pyramid)}
        if "score_map" in expected:
            pyramid, score_map, text_embeddings = model.encoder(images)
            found |= {
                "global_embedding": global_embedding,
                "visual_embeddings": visual_embeddings,
                "text_embeddings_plain": model.encoder.embed_class_names(global_embedding[:, None]),
                "text_embeddings": text_embeddings,
                "score_map": score_map,
            }
        found["fpn"] = model.neck(pyramid)
        found["head_logits"] = model.decode_head(found["fpn"])
        found["logits"] = model(images)
        for name in expected.keys() - {"argmax"}:
            values, kept = found[name], expected[name]
            for x, k in zip(values, kept, strict=True) if isinstance(kept, list) else [(values, kept)]:
                assert difference(x, k) < 1e-3, f"{name} at {key}"
        assert agreement(found["logits"], expected) >= 0.999


@torch.no_grad()
def test_sliding_window_equals_the_released_code(released):
    golden, model = released
    assert golden["test_cfg"]["crop_size"] == [model.crop_size] * 2
    assert golden["test_cfg"]["stride"] == [window_stride(model)] * 2
    for key, expected in golden["slide"].items():  # "512x683->300x400 flip": size in, size out, a flipped image
        sizes, _, flip = key.partition(" ")
        size, out = (size_of(part) for part in sizes.split("->"))
        images = fill.tensor("input.image", (1, 3, *size))
        logits = sliding_window(model, images, model.crop_size, window_stride(model))
        probabilities = F.interpolate(logits, size=out, mode="bilinear", align_corners=False).softmax(1)
        probabilities = probabilities.flip(-1) if flip else probabilities
        assert difference(probabilities, expected["prob"]) < 1e-3, key
        assert agreement(probabilities, expected) >= 0.999


def test_losses_and_gradients_equal_the_released_code(released):
    golden, model = released
    (key, expected), *_ = golden["train"].items()
    batch, _, height, width = size_of(key)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0
        if hasattr(module, "drop_path"):
            module.drop_path = 0
    losses = model(fill.tensor("input.image", size_of(key)), fill.labels(batch, height, width))
    names = {"loss": "decode.loss_ce", "aux_loss": "aux_identity.loss_ce"}
    assert {names[name]: loss.item() for name, loss in losses.items()} == {
        name: pytest.approx(value, rel=1e-4) for name, value in expected["losses"].items() if "loss" in name
    }
    sum(losses.values()).backward()
    model.eval()

    gradients = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("text_encoder" in name), name
        if parameter.grad is not None:
            gradients[name.removeprefix("encoder.")] = parameter.grad.norm().item()
    assert gradients.keys() == expected["grad_norm"].keys()
    # Zero in theory, rounding in practice: the bias of attention's keys, and one that a batch norm takes away.
    zero = [name for name in gradients if name.endswith("k_proj.bias") or name == "backbone.fpn1.1.bias"]
    assert all(gradients.pop(name) < 1e-3 for name in zero)
    relative = {name: abs(gradients[name] / expected["grad_norm"][name] - 1) for name in gradients}
    assert max(relative.values()) < 1e-2, max(relative, key=relative.get)
    assert median(relative.values()) < 1e-3
