"""A frozen segmentation model is one graph: torch.compile finds no break in it, and what `predict.export` writes gives
eager's logits for any batch and size, in onnxruntime, too. What cannot be exported is refused in one line."""

import json

import onnxruntime
import pytest
import torch
from helpers import NAMES, images
from test_clip_model import RESNET, VIT
from torch import nn

from clip_model import CLIP, TextEncoder
from denseclip import PROMPTING, build_model
from predict import export, zero_shot_model

OLD = torch.__version__.startswith("2.6.")  # the oldest that this project runs on
SIZES = [(64, 64), (75, 107), (160, 96), (256, 320)]
slow = pytest.mark.slow


def randomize(model):
    """Give every norm, bias and gamma a random value: initial zeros and ones could hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5 if "weight" in name else 0.0, 0.2)
    return model.eval()


def random_model(name, **settings):
    torch.manual_seed(0)
    return randomize(build_model(name, NAMES, **settings))


@torch.no_grad()
def check_export(model, path):
    """The graph in the file and the model agree within rounding at every size, for batches of 1 and 3."""
    export(model, path)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map

        def run(x):
            return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    else:
        facts = {"class_names": "", "short_side": ""}
        run = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["class_names"]) == model.class_names
    assert json.loads(facts["short_side"]) == model.short_side
    for size in SIZES:
        for batch in (1, 3):
            x = images(batch, *size)
            expected = model(x)
            assert expected.shape == (batch, len(model.class_names), *size)
            bound = 5e-5 * (1 + expected.abs().max())  # 1: cosines / tau, of which the mean is subtracted, are small
            assert (run(x) - expected).abs().max() < bound, (size, batch)


@slow
@pytest.mark.parametrize("name, suffix", [("tiny", ".pt2"), ("tiny", ".onnx"), ("tiny_vit", ".onnx")])
def test_exported_models_give_eager_logits(name, suffix, tmp_path):
    if OLD and suffix == ".onnx":
        pytest.skip("torch 2.6 cannot write sizes that vary to ONNX")
    model = random_model(name, decoder_layers=1)
    check_export(model, tmp_path / f"model{suffix}")
    assert isinstance(model.encoder.text_encoder, TextEncoder)  # a copy was frozen


@slow
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "tiny_vit"},
        {"name": "tiny", "head": "upernet"},
        {"name": "tiny", "backbone": "resnet18"},
        {"name": "tiny_vit", "backbone": "vit_b_16"},
        {"name": "tiny_vit", "prompting": "none"},
        {"name": "tiny_vit", "prompting": "template+post", "join_score_map": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_other_models_export_too(settings, tmp_path):
    check_export(random_model(**settings), tmp_path / "model.pt2")


@slow
@pytest.mark.skipif(OLD, reason="torch 2.6 cannot write sizes that vary to ONNX")
@pytest.mark.parametrize("architecture", [RESNET, VIT], ids=["resnet", "vit"])
def test_zero_shot_score_maps_export(architecture, tmp_path):
    torch.manual_seed(0)
    clip = randomize(CLIP(architecture))
    weights = {key.removeprefix("text."): value for key, value in clip.state_dict().items()}
    torch.save(weights, tmp_path / "clip.pt")
    model = zero_shot_model(str(tmp_path / "clip.pt"), ["sky|clouds", "grass"]).eval()
    check_export(model, tmp_path / "model.onnx")


CASES = [(name, prompting) for name in ("tiny_vit", "tiny") for prompting in PROMPTING if prompting != "pre"]


@slow
@pytest.mark.parametrize("name, prompting", CASES)
@torch.no_grad()
def test_frozen_models_compile_without_a_graph_break(name, prompting):
    model = random_model(name, prompting=prompting).freeze_text()
    torch.compiler.reset()
    # torch 2.6 takes a module's integers, too, for sizes that vary.
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=None if OLD else True)
    for size in [(75, 107), (128, 96)]:
        assert torch.equal(compiled(images(2, *size)), model(images(2, *size)))


class Branching(nn.Module):
    """Four maps that depend on the image's content by an `if`, which no graph can express."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 1, stride=stride) for stride in (4, 8, 16, 32))

    def forward(self, x):
        return [conv(x if x.mean() > 0 else -x) for conv in self.convs]


@pytest.mark.parametrize(
    "settings, file, message",
    [
        ({}, "model.pt", r"model.pt: expected a name that ends in .pt2 \(torch.export\) or .onnx"),
        ({"prompting": "pre"}, "model.onnx", r"pre-model prompting needs the text encoder: .* Eq. \(4\)"),
        ({"head": "upernet"}, "model.onnx", r"model.onnx: UperNet's pooling to .*; use .pt2"),
        ({"backbone": "swin_t", "head": "fpn"}, "model.pt2", "model.pt2: Swin's windows shift"),
        pytest.param(
            {"backbone": Branching()},
            "model.pt2",
            "model.pt2: PyTorch .* cannot export this model: ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(settings, file, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        export(build_model("tiny", NAMES, crop_size=64, **settings), tmp_path / file)
    assert "\n" not in str(error.value) and not (tmp_path / file).exists()


def test_a_full_disk_keeps_the_graph_that_was_there(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "model.pt2").write_bytes(b"before")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="model.pt2 was left as it was: writing failed, is the disk full"):
        export(build_model("tiny", NAMES), tmp_path / "model.pt2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt2", b"before")]


def test_onnx_names_the_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        export(build_model("tiny", NAMES), tmp_path / "model.onnx")
