"""Any image encoder will do: all of CLIP's, with patch and crop sizes that do not match, torchvision's ResNets and
Swins, whose weights mean the same here, and a reader's own module, as in the README."""

import json
import re
import sys
import urllib.error

import pytest
import timm
import torch
import torchvision
from helpers import NAMES, check_round_trip, error_line, images, make_folders, readme_block, run, train_steps
from torch import nn
from torch.nn import functional as F

import backbones
import demo
import eval as evaluation
import train
from backbones import PYRAMIDS, AttentionPoolBackbone, SwinPyramid, build_backbone, load_torchvision
from clip_model import ARCHITECTURES, CLIP, MEAN, STD, Architecture
from denseclip import PRESETS, Preset, build_model, load_checkpoint, save_checkpoint


def slow_unless(quick, names):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


# ------------------------------------------------------------------------------------------------ CLIP's


def test_every_clip_has_a_preset_whose_crop_is_whole_patches():
    assert set(ARCHITECTURES.values()) <= {preset.architecture for preset in PRESETS.values()}
    assert all(preset.crop_size % (preset.architecture.patch_size or 32) == 0 for preset in PRESETS.values())


@pytest.mark.parametrize("name", slow_unless(("rn50x4", "vitl14_336"), PRESETS))
def test_every_preset_builds_and_trains_in_full_size(name):
    with torch.device("meta"):  # shapes alone, in no memory
        model = build_model(name, NAMES).train()
        x = torch.empty(2, 3, model.crop_size, model.crop_size)
        losses = model(x, torch.zeros(2, model.crop_size, model.crop_size, dtype=torch.long))
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".text_encoder." in key), key


@pytest.mark.parametrize(
    "architecture, crop_size",
    [
        (Architecture(64, 28, 4, 64, 14, 64, 2), 64),
        (Architecture(64, 28, 4, 64, 14, 64, 2), 70),
        (Architecture(64, 64, 4, 64, 32, 64, 2), 80),
        (Architecture(64, 32, 4, 64, 16, 64, 2), 72),
        (Architecture(80, 96, (2, 1, 1, 1), 20, 0, 64, 2), 64),  # as RN50x4: 80 is 64 * 1.25
    ],
    ids=["14-64", "14-70", "32-80", "16-72", "resnet"],
)
def test_other_widths_patches_and_crops_train(architecture, crop_size, monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "odd", Preset(architecture, crop_size, channels=32, decoder_width=32))
    torch.manual_seed(0)
    model = build_model("odd", NAMES)
    if patch_size := architecture.patch_size:
        grid = crop_size // patch_size
        with torch.no_grad():
            pyramid = model.encoder.backbone(images(1, crop_size, crop_size))[0]
        assert [x.shape[-1] for x in pyramid] == [4 * grid, 2 * grid, grid, grid // 2]
    history = train_steps(model)
    assert sum(history[-1].values()) < sum(history[0].values())
    check_round_trip(model, tmp_path / "model.pt", size=(107, 75))


# ------------------------------------------------------------------------------------------------ torchvision's


@pytest.mark.parametrize("name", slow_unless(("resnet18", "swin_t"), PYRAMIDS))
@torch.no_grad()
def test_pyramids_at_odd_sizes(name):
    backbone = AttentionPoolBackbone(build_backbone(name), embed_dim=32, input_resolution=64).eval()
    pyramid, z_bar, z = backbone(images(1, 75, 97))
    sizes = (
        [(19, 25), (10, 13), (5, 7), (3, 4)] if name != "vit_b_16" else [(16, 24), (8, 12), (4, 6), (2, 3)]
    )  # 4 x 6 patches
    assert [tuple(x.shape[1:]) for x in pyramid] == [(c, *s) for c, s in zip(backbone.channels, sizes, strict=True)]
    assert z_bar.shape == (1, 32) and z.shape == (1, 32, *sizes[3])


def torchvision_twin(name, folder):
    """torchvision's network, and a backbone with its weights from a file."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    torch.save(net.state_dict(), folder / f"{name}.pth")
    return net, AttentionPoolBackbone(build_backbone(name, str(folder / f"{name}.pth")), 0, 64).eval()


@torch.no_grad()
def test_resnet_is_torchvisions_on_imagenets_normalization(tmp_path):
    net, backbone = torchvision_twin("resnet18", tmp_path)
    rgb = images() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    expected = net(torchvision.transforms.functional.normalize(rgb, backbones.IMAGENET_MEAN, backbones.IMAGENET_STD))
    pyramid, z_bar, z = backbone(images())
    assert torch.allclose(net.fc(pyramid[-1].mean(dim=(2, 3))), expected, atol=1e-4)
    assert z_bar is None and z is None  # embed_dim=0: no projection to the text's space


@torch.no_grad()
def test_swin_is_torchvisions(tmp_path):
    net, backbone = torchvision_twin("swin_t", tmp_path)
    x, (pyramid, _, _) = images(1) * backbone.scale + backbone.shift, backbone(images(1))
    for i, norm in enumerate(backbone.module.norms):
        x = net.features[2 * i : 2 * i + 2](x)  # (B, H_i, W_i, C_i)
        assert torch.allclose(pyramid[i], norm(x).permute(0, 3, 1, 2), atol=1e-5)


def test_errors_about_weights(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file; .* resnet18 .*IMAGENET1K_V1"):
        load_torchvision("resnet18", "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth: it holds more than tensors and built-in types, or is damaged"):
        load_torchvision("resnet18", str(tmp_path / "text.pth"))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: the weights do not fit the model: features"):
        SwinPyramid("swin_t", str(tmp_path / "other.pth"))

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(backbones.torchvision.models, "get_model", offline)
    with pytest.raises(ValueError, match="https://download.pytorch.org/models/resnet18.*no route.*give its path"):
        load_torchvision("resnet18", "IMAGENET1K_V1")


# ------------------------------------------------------------------------------------------------ attention pool


class Pyramid(nn.Module):
    """Convolutions with these output channels, kernels and strides."""

    def __init__(self, channels, strides=(4, 2, 2, 2)):
        super().__init__()
        steps = zip((3, *channels), channels, strides, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, stride, stride) for a, b, stride in steps)

    def forward(self, images):
        return [images := stage(images) for stage in self.stages]


def test_attention_pool_is_on_the_last_map():
    module = Pyramid((4, 4, 4, 128)).train()
    backbone = AttentionPoolBackbone(module, embed_dim=16, input_resolution=64)
    pyramid, z_bar, z = backbone(images(2, 128, 192))
    z.sum().backward()
    assert all(stage.weight.grad.abs().max() > 0 for stage in module.stages)  # the score map's gradients reach them
    expected = backbone.attnpool(pyramid[3])
    assert torch.equal(z_bar, expected[0]) and torch.equal(z, expected[1]) and z.shape == (2, 16, 4, 6)
    assert backbone.channels == [4, 4, 4, 128] and module.training and backbone.training
    assert backbone.attnpool.heads == 2 and len(backbone.attnpool.positional_embedding) == 1 + 2 * 2


@pytest.mark.parametrize(
    "module, message",
    [
        (Pyramid((4, 4, 64)), r"Pyramid: expected four maps .* got \[\(1, 4, 16, 16\), .*\(1, 64, 4, 4\)\]"),
        (Pyramid((4, 4, 4, 64), (4, 2, 1, 2)), r"Pyramid: expected four .* halve in size each time, got \[\(1, 4, 16"),
        (nn.Linear(7, 7), "Linear fails on an image of 64 x 64 pixels: .*mat1 and mat2 shapes"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(module, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model("tiny", NAMES, backbone=module, crop_size=64)
    assert "\n" not in str(error.value)


def test_modules_may_return_dictionaries_and_expect_clips_normalization(tmp_path):
    net = torchvision.models.resnet18()
    layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    module = torchvision.models.feature_extraction.create_feature_extractor(net, layers)
    model = build_model("tiny", NAMES, backbone=module, crop_size=64, imagenet_normalize=False).eval()
    with torch.no_grad():
        assert torch.equal(model.encoder.backbone(images())[0][3], module(images())["4"])
    save_checkpoint(tmp_path / "own.pt", model)
    with pytest.raises(ValueError, match="no backbone named 'ResNet'.* load_checkpoint.path, backbone=module"):
        load_checkpoint(tmp_path / "own.pt")
    loaded = load_checkpoint(tmp_path / "own.pt", backbone=module)
    with torch.no_grad():
        assert torch.equal(loaded(images(1, 75, 53)), model(images(1, 75, 53)))


@torch.no_grad()
def test_language_guides_another_backbone(tmp_path):
    """Only the text encoder is CLIP's; score maps are cosines, joined to the last map."""
    torch.manual_seed(5)
    clip = {key.removeprefix("text."): value for key, value in CLIP(PRESETS["tiny"].architecture).state_dict().items()}
    torch.save(clip, tmp_path / "clip.pt")
    model = build_model("tiny", NAMES, clip=str(tmp_path / "clip.pt"), backbone="resnet18", crop_size=64).eval()
    assert torch.equal(model.encoder.text_encoder.text_projection, clip["text_projection"])

    pyramid, score_map, texts = model.encoder(images())
    z = model.encoder.backbone(images())[2]
    expected = F.cosine_similarity(z[:, None], texts[..., None, None], dim=2)
    assert torch.allclose(score_map, expected, atol=1e-5) and torch.equal(pyramid[3][:, 512:], score_map)


@pytest.fixture
def mynets(tmp_path, monkeypatch):
    """The README's file mynets.py on the path, with random weights instead of a download."""
    (tmp_path / "mynets.py").write_text(readme_block("timm"))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    yield "mynets:regnet"
    sys.modules.pop("mynets", None)


@pytest.mark.slow
def test_backbone_of_ones_own_by_option(mynets, monkeypatch, tmp_path, capsys):
    """The README's third-party network by train.py, eval.py and Python; a checkpoint alone never imports its code."""
    folders, path = make_folders(tmp_path / "set", 2), tmp_path / "run" / "best.pt"
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    data = ["--val", *folders, "--workers", 0, "--device", "cpu"]
    options = ["--train", *folders, "--classes", tmp_path / "classes.txt", "--model", "tiny", "--clip", "none"]
    options += ["--set", "crop_size=64", "--iterations", 1, "--batch-size", 2, "--out", tmp_path / "run"]
    run(train, monkeypatch, *data, *options, "--backbone", mynets)
    sys.modules.pop("mynets")
    line = error_line(evaluation, capsys, monkeypatch, "--checkpoint", path, *data)
    assert f"best.pt: its backbone is code that is not in the file; --backbone {mynets} imports it" in line
    assert "mynets" not in sys.modules
    run(evaluation, monkeypatch, "--checkpoint", path, *data, "--backbone", mynets)
    model = load_checkpoint(path, backbone=sys.modules["mynets"].regnet())
    assert model.encoder.backbone.channels == [48, 120, 336, 888] and model.encoder.backbone.attnpool.heads == 12
    for name, message in (
        ("mynets:resnet", "has no attribute 'resnet'; modules are looked for here and on PYTHONPATH"),
        ("nowhere:net", "No module named 'nowhere'; modules are looked for here"),
        ("mynets:regnet --backbone-weights file.pth", "file.pth would have no effect"),
    ):
        line = error_line(train, capsys, monkeypatch, *data, *options, "--out", "other", "--backbone", *name.split())
        assert message in line


ROWS = {  # of the paper's Tables 7, 5 and 1, and beyond
    "learned contexts": ["--model", "tiny"],
    "template": ["--model", "tiny", "--prompting", "template+post"],
    "Swin-T": ["--backbone", "swin_t"],
    "ViT-B": ["--backbone", "vit_b_16"],
    "timm's RegNet": ["--backbone", "mynets:regnet"],
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_ten_iterations_on_the_demos_drawings(row, mynets, monkeypatch, tmp_path):
    demo.draw_dataset(tmp_path / "data", train=20, val=2)
    loop, trained = train.train, []
    monkeypatch.setattr(
        train, "train", lambda model, *_, **options: trained.append(model) or loop(model, *_, **options)
    )
    options = ["--data", tmp_path / "data", "--out", tmp_path, "--clip", "none", "--set", "crop_size=64"]
    options += [] if "--model" in ROWS[row] else ["--model", "tiny_vit"]  # its text encoder
    options += ["--iterations", 10, "--batch-size", 4, "--warmup", 0, "--log-every", 1, "--lr", 1e-3]
    options += ["--backbone-lr-multiplier", 1, "--workers", 0, "--device", "cpu"]
    weights = ["--backbone-weights", "none"] if "vit_b_16" in ROWS[row] or "swin_t" in ROWS[row] else []
    run(train, monkeypatch, *options, *weights, *ROWS[row])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert len(losses) == 10 and min(losses[5:]) < losses[0]
    loaded = load_checkpoint(tmp_path / "last.pt", backbone=mynets if mynets in ROWS[row] else None)
    model = trained[0].eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(1, 75, 53)), model(images(1, 75, 53)))


def test_swin_defaults_to_its_authors_upernet():
    with torch.device("meta"):
        model = build_model("vitb16", NAMES, backbone="swin_t")
    assert model.settings.head == "upernet" and model.crop_size == 512 and model.fcn_head is not None
    rates = [module.p for module in model.modules() if isinstance(module, torchvision.ops.StochasticDepth)]
    assert len(rates) == 12 * 2 or len(rates) == 12
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3)
    with torch.device("meta"):
        baseline = build_model("vitb16", NAMES, prompting="none")
    drop_paths = [block.drop_path for block in baseline.encoder.backbone.transformer.resblocks]
    assert not any(drop_paths)  # Released code: only DenseCLIP's ViT has drop path


def test_heads_of_the_pool_divide_any_width():
    backbone = AttentionPoolBackbone(Pyramid((8, 8, 8, 440)), embed_dim=16, input_resolution=64)  # RegNet's width
    assert backbone.attnpool.heads == 5 and backbone(images())[2].shape == (2, 16, 2, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": {f"module.encoder_q.{k}": v for k, v in w.items()} | {"module.queue": torch.zeros(3)}},
        lambda w: {"state_dict": {f"backbone.{k}": v for k, v in w.items()}, "epoch": 200},
        lambda w: {"model": dict(w)},
    ],
)
def test_weights_of_other_projects_are_unwrapped(wrap, tmp_path):
    """MoCo's, DenseCL's and other files, whose networks are torchvision's."""
    net = torchvision.models.resnet18(weights=None)
    torch.save(wrap(net.state_dict()), tmp_path / "file.pth")
    loaded = load_torchvision("resnet18", str(tmp_path / "file.pth"))
    assert torch.equal(loaded.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


@torch.no_grad()
@pytest.mark.slow
def test_vit_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.vit_b_16(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    backbone = AttentionPoolBackbone(build_backbone("vit_b_16", str(tmp_path / "vit.pth")), 0, 224).eval()
    outputs = []
    for i in (3, 5, 7, 11):
        net.encoder.layers[i].register_forward_hook(lambda _, __, output: outputs.append(output))
    rgb = images(1, 224, 224) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    net(torchvision.transforms.functional.normalize(rgb, *imagenet))
    pyramid = backbone(images(1, 224, 224))[0]
    assert [x.shape[-1] for x in pyramid] == [56, 28, 14, 7]
    expected = backbone.module.fpn3(outputs[2][:, 1:].transpose(1, 2).unflatten(2, (14, 14)))
    assert torch.allclose(pyramid[2], expected, atol=1e-4)


@pytest.mark.parametrize(
    "code, expected",
    [
        ("def net(:", "SyntaxError: invalid syntax"),
        ("def net():\n    raise KeyError('x')", "KeyError: 'x'"),
        ("def net():\n    return {}", "it returned a dict, expected a module"),
        ("net = 5", "TypeError: 'int' object is not callable"),
        ("", "modules are looked for here and on PYTHONPATH"),
    ],
)
def test_backbone_code_that_fails_is_named(code, expected, tmp_path, monkeypatch):
    (tmp_path / "badnets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "badnets", raising=False)
    with pytest.raises(ValueError, match=r"--backbone badnets:net: .*" + re.escape(expected)):
        build_backbone("badnets:net")
