"""Every system of the paper is a switch: each prompting variant differs from the default where it should and nowhere
else, and trains, evaluates at an odd size, saves and reloads with every image encoder; so do both heads, all of CLIP's
encoders, patch and crop sizes that do not match, torchvision's networks and a reader's own module."""

import json
import re
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import backbones
import denseclip
import train
from backbones import PYRAMIDS, ImageNetNormalize, SwinPyramid, WithAttentionPool, build_backbone, load_torchvision
from clip_model import ARCHITECTURES, CLIP, MEAN, STD, Architecture, TextEncoder
from denseclip import PRESETS, PROMPTING, Preset, UperNetHead, build_model, load_checkpoint, save_checkpoint
from tokenizer import tokenize

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["sky", "tree", "wooden bridge"]


def images(batch=2, height=64, width=64, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def build(name="tiny", class_names=NAMES, **settings):
    torch.manual_seed(0)
    return build_model(name, class_names, crop_size=64, **settings).eval()


def train_steps(model, steps=3):
    """AdamW on the same two images, without dropout; the losses at each step."""
    x, labels = images(), torch.arange(64).div(22, rounding_mode="floor").expand(2, 64, 64).contiguous()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    model.train()
    history = []
    for _ in range(steps):
        losses = model(x, labels)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        history.append({key: value.item() for key, value in losses.items()})
        assert all(torch.isfinite(torch.tensor(list(history[-1].values()))))
    return history


def check_round_trip(model, path, size=(75, 53)):
    """Logits at an odd size, the same from a saved and reloaded model."""
    x = images(1, *size)
    save_checkpoint(path, model)
    again = load_checkpoint(path)
    with torch.no_grad():
        logits = model.eval()(x)
        assert logits.shape == (1, len(model.class_names), *size) and logits.isfinite().all()
        assert torch.equal(logits, again(x))
    assert again.settings == model.settings and again.class_names == model.class_names
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


# ------------------------------------------------------------------------------------------------ all combinations

IMAGE_ENCODERS = {
    "rn": {"name": "tiny"},
    "vit": {"name": "tiny_vit"},
    "resnet18": {"name": "tiny", "backbone": "resnet18"},
    "swin_t": {"name": "tiny_vit", "backbone": "swin_t"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three images and masks of an odd size."""
    root = tmp_path_factory.mktemp("data")
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for i in range(3):
        pixels = (images(1, 75, 53, seed=i)[0] * 60 + 120).clamp(0, 255).byte().permute(1, 2, 0)
        mask = torch.arange(53).div(18, rounding_mode="floor").expand(75, 53).roll(i, dims=1).byte()
        Image.fromarray(pixels.numpy()).save(root / "images" / f"{i}.png")
        Image.fromarray(mask.contiguous().numpy()).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def run_train(monkeypatch, folders, out, *options):
    """train.py with these options for three iterations of batches of two.

    return: the model as reloaded from its checkpoint, seen to give the trained one's logits; the log's last losses
    """
    data = [str(folders / "images"), str(folders / "masks")]
    arguments = ["--train", *data, "--val", *data, "--classes", str(folders / "classes.txt"), "--clip", "none"]
    arguments += ["--crop-size", "64", "--iterations", "3", "--batch-size", "2", "--warmup", "1", "--lr", "3e-4"]
    arguments += ["--workers", "0", "--log-every", "3", "--device", "cpu", "--out", str(out), *options]
    loop, trained = train.train, []
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    monkeypatch.setattr(train, "train", lambda model, *args, **kw: trained.append(model) or loop(model, *args, **kw))
    train.main()
    x, model = images(1, 75, 53), load_checkpoint(out / "best.pt")
    with torch.no_grad():
        logits, again = trained[0].eval().to(memory_format=torch.contiguous_format)(x), model(x)
    assert logits.shape == (1, 3, 75, 53) and logits.isfinite().all()
    if "--text-lr-multiplier" in options:  # torch's attention rounds otherwise where a weight requires a gradient
        assert torch.allclose(again, logits, atol=1e-5)
    else:
        assert torch.equal(again, logits)
    return model, next(record for record in map(json.loads, open(out / "log.jsonl")) if "loss" in record)


def slow_unless(quick, *values):
    """Parameters of a test whose other cases, of the same code, are left to the slow tests."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    "image_encoder, prompting",
    [slow_unless(e in ("rn", "vit") or p == "post", e, p) for e in IMAGE_ENCODERS for p in PROMPTING],
)
def test_trains_evaluates_and_reloads_by_options(image_encoder, prompting, monkeypatch, folders, tmp_path):
    settings = IMAGE_ENCODERS[image_encoder]
    options = ["--model", settings["name"], "--prompting", prompting]
    if "backbone" in settings:
        options += ["--backbone", settings["backbone"], "--backbone-weights", "none"]
    model, losses = run_train(monkeypatch, folders, tmp_path, *options)
    assert ("aux_loss" in losses) == (prompting != "none")
    assert model.settings["prompting"] == prompting and model.settings["backbone"] == settings.get("backbone")


@pytest.mark.parametrize("prompting", ["post", "none"])
@pytest.mark.parametrize("image_encoder", ["vit", "resnet18"])
def test_upernet_trains_and_reloads(image_encoder, prompting, tmp_path):
    model = build(**IMAGE_ENCODERS[image_encoder], prompting=prompting, head="upernet")
    history = train_steps(model)
    assert sum(history[-1].values()) < sum(history[0].values())
    check_round_trip(model, tmp_path / "model.pt")


@pytest.mark.slow
def test_upernet_by_option(monkeypatch, folders, tmp_path):
    options = ["--model", "tiny", "--backbone", "swin_t", "--backbone-weights", "none", "--head", "upernet"]
    model, _ = run_train(monkeypatch, folders, tmp_path, *options)
    assert isinstance(model.decode_head, UperNetHead)


def test_every_ablation_by_options(monkeypatch, folders, tmp_path):
    options = ["--set", "num_contexts=4", "decoder_layers=1", "gamma=0.5", "learn_gamma=false", "score_map=false"]
    model, losses = run_train(monkeypatch, folders, tmp_path, "--model", "tiny", *options)
    encoder = model.encoder
    assert "aux_loss" in losses and encoder.contexts.shape == (1, 4, 64) and not encoder.join_score_map
    assert not encoder.gamma.requires_grad and (encoder.gamma == 0.5).all()
    assert len(encoder.context_decoder.decoder) == 1


@pytest.mark.parametrize("option, message", [
    ("contexts=4", "no setting named 'contexts'"), ("learn_gamma=0", "learn_gamma is bool"),
    ("gamma=large", "gamma is float"), ("num_contexts=2.5", "num_contexts is int"), ("gamma=true", "gamma is float"),
    ("decoder_layers=abc", "decoder_layers is int | None"), ("prompting=pre", "no setting named 'prompting'"),
])  # fmt: skip
def test_wrong_settings(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.parse_settings([option], build_model)


@pytest.mark.parametrize("multiplier", [0.0, 0.1])
def test_text_encoder_learns_if_it_should(multiplier, monkeypatch, folders, tmp_path):
    torch.manual_seed(0)
    before = build_model("tiny", NAMES, crop_size=64).encoder.text_encoder.state_dict()  # --seed is 0 as well
    options = ["--model", "tiny", "--text-lr-multiplier", str(multiplier)]
    after = run_train(monkeypatch, folders, tmp_path, *options)[0].encoder.text_encoder.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert bool(moved) == bool(multiplier)


def test_text_encoder_has_a_rate_of_its_own():
    model = build()
    groups = {group["name"]: group for group in train.parameter_groups(model, 1e-4, 1e-4, 0.1, text_lr_multiplier=0.2)}
    assert "text_encoder" not in groups  # frozen
    model.encoder.text_encoder.requires_grad_()
    groups = {group["name"]: group for group in train.parameter_groups(model, 1e-4, 1e-4, 0.1, text_lr_multiplier=0.2)}
    assert groups["text_encoder"]["base_lr"] == pytest.approx(2e-5)
    assert len(groups["text_encoder"]["params"]) == len(list(model.encoder.text_encoder.parameters()))


@pytest.mark.parametrize("setting", [
    {"score_map": False}, {"aux_weight": 0.0}, {"num_contexts": 4}, {"decoder_layers": 1}, {"learn_gamma": False},
    {"gamma": 1.0}, {"score_temperature": 0.07}, {"drop_path": 0.2}, {"double_class_embedding": False},
])  # fmt: skip
def test_each_setting_reloads(setting, tmp_path):
    model = build("tiny_vit", **setting)
    train_steps(model, steps=1)
    check_round_trip(model, tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------------ prompting


def texts_of(model, x):
    with torch.no_grad():
        return model.encoder(x)[2]


def test_template_has_no_contexts_and_is_plain_clip():
    model = build(prompting="template")
    assert model.encoder.contexts is None and model.encoder.context_decoder is None and model.encoder.gamma is None
    expected = model.encoder.text_encoder(tokenize([f"a photo of a {name}." for name in NAMES]))
    found = texts_of(model, images())
    assert torch.allclose(found, expected.expand(2, -1, -1), atol=1e-6)


def test_learned_text_does_not_depend_on_the_image():
    model = build(prompting="learned")
    a, b = texts_of(model, images(1, seed=1)), texts_of(model, images(1, seed=2))
    assert torch.equal(a, b)
    with torch.no_grad():
        model.encoder.contexts += 1  # but on the contexts
    assert not torch.allclose(texts_of(model, images(1, seed=1)), a)


def test_post_depends_on_the_image_behind_the_text_encoder():
    model = build(prompting="post", gamma=1.0)
    runs = []
    model.encoder.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    a, b = texts_of(model, images(1, seed=1)), texts_of(model, images(1, seed=2))
    assert not torch.allclose(a, b) and len(runs) == 1


def test_pre_depends_on_the_image_in_front_of_the_text_encoder():
    model = build(prompting="pre")
    contexts = []
    model.encoder.text_encoder.register_forward_hook(lambda module, inputs, output: contexts.append(inputs[1]))
    a = texts_of(model, images(2, seed=1))
    texts_of(model, images(2, seed=1))
    assert len(contexts) == 2 and contexts[0].shape == (2, 8, 64)  # the text encoder runs for every batch
    assert not torch.allclose(contexts[0][0], contexts[0][1], rtol=1e-5) and not torch.allclose(a[0], a[1], rtol=1e-5)
    assert model.encoder.contexts is None and model.encoder.context_decoder is None
    # One at a time, each image gives what it gave in the batch.
    alone = texts_of(model, images(2, seed=1)[1:])
    assert torch.allclose(alone[0], a[1], atol=1e-5)


def test_gamma_zero_makes_post_equal_learned():
    post, learned = build(prompting="post", gamma=0.0), build(prompting="learned")
    missing = learned.load_state_dict(post.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith(("encoder.context_decoder.", "encoder.gamma")) for key in missing.unexpected_keys)
    with torch.no_grad():
        assert torch.equal(post(images()), learned(images()))
        post.encoder.gamma.fill_(1.0)
        assert not torch.allclose(post(images()), learned(images()))


def test_gamma_and_its_start():
    fixed, one, default = build(learn_gamma=False), build(gamma=1.0), build()
    assert not fixed.encoder.gamma.requires_grad and default.encoder.gamma.requires_grad
    assert default.encoder.gamma.unique().item() == pytest.approx(1e-4) and one.encoder.gamma.unique().item() == 1
    before = fixed.encoder.gamma.clone()
    train_steps(fixed, steps=2)
    assert torch.equal(fixed.encoder.gamma, before)


def test_without_the_score_map_the_neck_gets_clips_own_maps():
    model = build(score_map=False)
    assert model.encoder.channels == model.encoder.backbone.channels
    with torch.no_grad():
        pyramid, score_map, _ = model.encoder(images())
        own = model.encoder.backbone(images())[0]
    assert all(torch.equal(a, b) for a, b in zip(pyramid, own, strict=True))
    assert score_map.shape == (2, 3, 2, 2)
    assert "aux_loss" in train_steps(model, steps=1)[0]


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
def test_with_the_score_map_only_its_level_grows(name):
    model = build(name, score_temperature=0.5)
    level = model.encoder.backbone.score_level
    with torch.no_grad():
        pyramid, score_map, _ = model.encoder(images())
        own = model.encoder.backbone(images())[0]
    for i, (found, expected) in enumerate(zip(pyramid, own, strict=True)):
        assert torch.equal(found[:, : expected.shape[1]], expected)
        assert found.shape[1] - expected.shape[1] == (3 if i == level else 0)
    assert torch.allclose(pyramid[level][:, -3:], score_map / 0.5)


def test_auxiliary_loss_is_a_weight():
    half, full = build(aux_weight=0.5), build(aux_weight=1.0)
    a, b = train_steps(half, steps=1)[0], train_steps(full, steps=1)[0]
    assert a["aux_loss"] * 2 == pytest.approx(b["aux_loss"]) and a["loss"] == pytest.approx(b["loss"])
    assert "aux_loss" not in train_steps(build(aux_weight=0.0), steps=1)[0]


@pytest.mark.parametrize("prompting", ["template", "learned", "post", "pre"])
def test_permuted_class_names_permute_the_logits(prompting):
    """Where the head allows it: its weights for the scores' channels and for the classes are permuted alike."""
    order = [2, 0, 1]
    model = build(prompting=prompting)
    other = build(prompting=prompting, class_names=[NAMES[i] for i in order])
    weights = model.state_dict()
    lateral = weights["neck.lateral_convs.3.conv.weight"]
    weights["neck.lateral_convs.3.conv.weight"] = torch.cat([lateral[:, :-3], lateral[:, -3:][:, order]], dim=1)
    for key in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
        weights[key] = weights[key][order]
    other.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(other.encoder(images())[1], model.encoder(images())[1][:, order], atol=1e-5)
        assert torch.allclose(other(images()), model(images())[:, order], atol=1e-4)


def test_number_of_contexts_and_layers():
    assert build(num_contexts=5).encoder.contexts.shape == (1, 5, 64)
    assert build(num_contexts=5, prompting="pre").encoder.queries.shape == (1, 5, 128)
    assert len(build().encoder.context_decoder.decoder) == 3
    assert len(build(decoder_layers=2).encoder.context_decoder.decoder) == 2
    assert len(build(prompting="pre").encoder.prompt_decoder.decoder) == 6


@pytest.mark.parametrize("setting, message", [
    ({"prompting": "both"}, "post, pre, learned"), ({"head": "fcn"}, "fpn, upernet"),
    ({"backbone": "resnet7"}, "resnet18, resnet50"),
])  # fmt: skip
def test_unknown_choices_name_the_known_ones(setting, message):
    with pytest.raises(ValueError, match=message):
        build(**setting)


# ------------------------------------------------------------------------------------------------ CLIP's encoders


@pytest.mark.parametrize("name", [slow_unless(name not in ("rn50x16", "rn50x64", "vitl14"), name) for name in PRESETS])
def test_every_preset_builds_and_trains_in_full_size(name):
    with torch.device("meta"):  # shapes alone, in no memory
        model = build_model(name, NAMES).train()
        x = torch.empty(2, 3, model.crop_size, model.crop_size)
        losses = model(x, torch.zeros(2, model.crop_size, model.crop_size, dtype=torch.long))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for key, p in model.named_parameters() if ".text_encoder." in key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_clip_has_a_preset(name):
    assert ARCHITECTURES[name] in [preset.architecture for preset in PRESETS.values()]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_see_their_whole_crop(name):
    preset = PRESETS[name]
    assert preset.crop_size % (preset.architecture.patch_size or 32) == 0


@pytest.mark.parametrize("patch_size, crop_size", [(14, 64), (14, 70), (32, 64), (32, 80), (16, 72)])
def test_patches_and_crops_that_do_not_match(patch_size, crop_size, monkeypatch, tmp_path):
    architecture = Architecture(64, 2 * patch_size, 4, 64, patch_size, 64, 2)
    preset = Preset(architecture, crop_size, channels=32, decoder_width=32)
    monkeypatch.setitem(PRESETS, "odd", preset)
    model = build_model("odd", NAMES)
    with torch.no_grad():
        pyramid = model.encoder.backbone(images(1, crop_size, crop_size))[0]
    grid = crop_size // patch_size
    assert [x.shape[-1] for x in pyramid] == [4 * grid, 2 * grid, grid, grid // 2]
    history = train_steps(model)
    assert sum(history[-1].values()) < sum(history[0].values())
    check_round_trip(model, tmp_path / "model.pt", size=(107, 75))


def test_a_resnet_of_another_width_trains(monkeypatch, tmp_path):
    architecture = Architecture(80, 96, (2, 1, 1, 1), 20, 0, 64, 2)  # as RN50x4: 80 = 64 * 1.25 wide
    monkeypatch.setitem(PRESETS, "wide", Preset(architecture, 64, channels=32, decoder_width=32))
    model = build_model("wide", NAMES)
    train_steps(model)
    check_round_trip(model, tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------------ UperNet


def test_upernet_shapes_at_odd_sizes():
    head = UperNetHead([8, 12, 16, 20], 5, channels=16).eval()
    shapes = ((8, 19, 27), (12, 10, 14), (16, 5, 7), (20, 3, 4))
    pyramid = [torch.randn(1, *shape) for shape in shapes]
    assert head(pyramid).shape == (1, 5, 19, 27)


def test_upernet_is_mmsegmentations():
    shapes = {key: tuple(value.shape) for key, value in UperNetHead([96, 192, 384, 768], 150).state_dict().items()}
    assert shapes["psp_modules.3.1.conv.weight"] == (512, 768, 1, 1)
    assert shapes["bottleneck.conv.weight"] == (512, 768 + 4 * 512, 3, 3)
    assert shapes["lateral_convs.2.conv.weight"] == (512, 384, 1, 1) and "lateral_convs.3.conv.weight" not in shapes
    assert shapes["fpn_convs.2.conv.weight"] == (512, 512, 3, 3) and "fpn_convs.3.conv.weight" not in shapes
    assert shapes["fpn_bottleneck.conv.weight"] == (512, 4 * 512, 3, 3)
    assert shapes["conv_seg.weight"] == (150, 512, 1, 1)
    pools = [block[0].output_size for block in UperNetHead([8, 8, 8, 8], 2, 8).psp_modules]
    assert pools == [1, 2, 3, 6]


def test_upernet_step_by_step():
    torch.manual_seed(0)
    head = UperNetHead([4, 5, 6, 7], 2, channels=8).eval()
    x1, x2, x3, x4 = (torch.randn(1, 4 + i, 12 >> i, 16 >> i) for i in range(4))

    def up(x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

    with torch.no_grad():
        pooled = [up(head.psp_modules[i][1](F.adaptive_avg_pool2d(x4, s)), x4) for i, s in enumerate((1, 2, 3, 6))]
        p4 = head.bottleneck(torch.cat([x4, *pooled], 1))
        p3 = head.lateral_convs[2](x3) + up(p4, x3)
        p2 = head.lateral_convs[1](x2) + up(p3, x2)
        p1 = head.lateral_convs[0](x1) + up(p2, x1)
        fused = [head.fpn_convs[0](p1), up(head.fpn_convs[1](p2), x1), up(head.fpn_convs[2](p3), x1), up(p4, x1)]
        expected = head.conv_seg(head.fpn_bottleneck(torch.cat(fused, 1)))
        assert torch.allclose(head([x1, x2, x3, x4]), expected, atol=1e-6)


def test_upernet_sees_the_whole_image_at_every_pixel():
    torch.manual_seed(0)
    head = UperNetHead([8, 8, 8, 8], 2, channels=8).eval()
    pyramid = [torch.randn(1, 8, 64 // s, 64 // s, requires_grad=True) for s in (1, 2, 4, 8)]
    head(pyramid)[0, 0, 0, 0].backward()
    assert (pyramid[3].grad.abs().sum(1) > 0).all()  # by pooling
    assert pyramid[0].grad[..., 8:].abs().max() == 0  # by three 3 x 3 convolutions at most
    assert all(x.grad.abs().max() > 0 for x in pyramid)


# ------------------------------------------------------------------------------------------------ any backbone


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramids_at_odd_sizes(name):
    backbone = build_backbone(name, embed_dim=32, input_resolution=64).eval()
    with torch.no_grad():
        pyramid, z_bar, z = backbone(images(1, 75, 97))
    sizes = [(19, 25), (10, 13), (5, 7), (3, 4)]
    assert [tuple(x.shape[1:]) for x in pyramid] == [(c, *s) for c, s in zip(backbone.channels, sizes, strict=True)]
    assert z_bar.shape == (1, 32) and z.shape == (1, 32, 3, 4)


def test_resnet_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    backbone = build_backbone("resnet18", str(tmp_path / "resnet18.pth")).eval()
    with torch.no_grad():
        pyramid, z_bar, z = backbone(images())
        logits = net.fc(pyramid[-1].mean(dim=(2, 3)))
        rgb = images() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        # A network of torchvision expects ImageNet's mean and std.
        normalised = torchvision.transforms.functional.normalize(rgb, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert torch.allclose(logits, net(normalised), atol=1e-4)
    assert z_bar is None and z is None  # embed_dim 0: no way to language


def test_swin_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.swin_t(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "swin_t.pth")
    backbone = build_backbone("swin_t", str(tmp_path / "swin_t.pth")).eval()
    with torch.no_grad():
        pyramid = backbone(images(1))[0]
        x = ImageNetNormalize()(images(1))
        for i, norm in enumerate(backbone.module.norms):
            x = net.features[2 * i : 2 * i + 2](x)
            assert torch.allclose(pyramid[i], norm(x).permute(0, 3, 1, 2), atol=1e-5)


def test_attention_pool_is_on_the_last_map():
    backbone = WithAttentionPool(nn.Identity(), [4, 4, 4, 128], embed_dim=16, input_resolution=64)
    maps = [torch.randn(2, c, 4, 6, requires_grad=True) for c in (4, 4, 4, 128)]
    pyramid, z_bar, z = backbone(maps)
    z.sum().backward()
    assert maps[3].grad.abs().max() > 0  # what language has to say reaches the network below
    expected = backbone.attnpool(maps[3])
    assert torch.equal(z_bar, expected[0]) and torch.equal(z, expected[1]) and pyramid[3] is maps[3]
    assert backbone.attnpool.heads == 2 and len(backbone.attnpool.positional_embedding) == 1 + 2 * 2
    with pytest.raises(ValueError, match=r"expected feature maps of \[4, 4, 4, 128\] channels, got \[4, 4, 128\]"):
        backbone(maps[1:])


def test_only_the_text_encoder_comes_from_clip(tmp_path):
    a = PRESETS["tiny"].architecture
    torch.manual_seed(5)
    clip = {key.removeprefix("text."): value for key, value in CLIP(a).state_dict().items()}
    torch.save(clip, tmp_path / "clip.pt")
    model = build(backbone="resnet18", clip=str(tmp_path / "clip.pt"))
    assert torch.equal(model.encoder.text_encoder.text_projection, clip["text_projection"])
    assert not any("visual" in key for key in model.state_dict())
    assert "backbone_weights" not in model.settings and model.settings["backbone"] == "resnet18"


def test_errors_about_weights(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file; .* resnet18 .*IMAGENET1K_V1"):
        load_torchvision("resnet18", "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth: not a state dict"):
        load_torchvision("resnet18", str(tmp_path / "text.pth"))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: the weights do not fit the model: features"):
        SwinPyramid("swin_t", str(tmp_path / "other.pth"))

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(backbones.torchvision.models, "get_model", offline)
    with pytest.raises(ValueError, match="https://download.pytorch.org/models/resnet18.*no route.*give its path"):
        load_torchvision("resnet18", "IMAGENET1K_V1")


def test_readme_example_of_an_own_module(monkeypatch, tmp_path):
    """The README's lines as they stand, only that what they would download is random."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = next(block for block in blocks if "WithAttentionPool" in block)
    with torch.device("meta"):  # its image encoder is not asked for
        weights = {key: value for key, value in CLIP(ARCHITECTURES["RN50"]).state_dict().items() if "visual" in key}
    weights |= TextEncoder(embed_dim=1024, width=512).state_dict()
    convnext = torchvision.models.convnext_tiny
    monkeypatch.setattr(torchvision.models, "convnext_tiny", lambda weights: convnext(weights=None))
    monkeypatch.setattr(denseclip, "read_weights", lambda name: {"RN50": weights}[name])
    scope = {}
    exec(lines, scope)
    model = scope["model"]
    assert torch.equal(model.encoder.text_encoder.text_projection, weights["text_projection"])

    losses = model.train()(images(), torch.zeros(2, 64, 64, dtype=torch.long))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_checkpoint(tmp_path / "own.pt", model)
    with pytest.raises(ValueError, match="your own module"):  # only the reader's code can build it again
        load_checkpoint(tmp_path / "own.pt")
    with torch.no_grad():
        expected = model.eval()(images(1, 75, 53))
    exec(lines, scope)
    again = scope["model"].eval()
    again.load_state_dict(denseclip.read_checkpoint(tmp_path / "own.pt")["model"])
    with torch.no_grad():
        assert torch.equal(again(images(1, 75, 53)), expected)


def test_score_maps_of_a_foreign_backbone_are_cosines():
    model = build(backbone="resnet18")
    with torch.no_grad():
        pyramid, score_map, texts = model.encoder(images())
        z = model.encoder.backbone(images())[2]
    expected = F.cosine_similarity(z[:, None], texts[..., None, None], dim=2)
    assert torch.allclose(score_map, expected, atol=1e-5) and pyramid[3].shape[1] == 512 + 3
