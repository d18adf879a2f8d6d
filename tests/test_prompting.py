"""Every system of the paper's Table 2 is a switch: each prompting variant differs from the default where it should and
nowhere else. With every image encoder it trains by command-line options, evaluates at an odd size, saves and reloads.
Settings that would have no effect are refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import NAMES, images, make_folders, run, train_steps

import train
from backbones import UperNetHead
from denseclip import PRESETS, PROMPTING, build_encoder, build_model, load_checkpoint
from tokenizer import tokenize


def build(name="tiny", class_names=NAMES, **settings):
    torch.manual_seed(0)
    return build_model(name, class_names, crop_size=64, **settings).eval()


# ------------------------------------------------------------------------------------------------ by options

IMAGE_ENCODERS = {
    "rn": ["--model", "tiny"],
    "vit": ["--model", "tiny_vit"],
    "resnet18": ["--model", "tiny", "--backbone", "resnet18"],
    "swin_t": ["--model", "tiny_vit", "--backbone", "swin_t", "--set", "head=upernet"],
}
QUICK = {("rn", prompting) for prompting in ("post", "pre", "template", "none")} | {("vit", "post")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options that name three images of an odd size, their masks and classes."""
    root = tmp_path_factory.mktemp("data")
    folders = make_folders(root / "set", 3, height=75, width=53)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return ["--train", *folders, "--val", *folders, "--classes", root / "classes.txt"]


def run_train(monkeypatch, data, out, *options):
    """Run train.py for three iterations, and check that best.pt gives the trained model's logits at an odd size.

    return: the initial weights, the trained model, the logged losses
    """
    loop, runs = train.train, []

    def keep(model, *args, **kwargs):
        runs.append(({name: value.clone() for name, value in model.state_dict().items()}, model))
        return loop(model, *args, **kwargs)

    monkeypatch.setattr(train, "train", keep)
    fixed = [
        "--clip",
        "none",
        "--backbone-weights",
        "none",
        "--set",
        "crop_size=64",
        "--iterations",
        3,
        "--batch-size",
        2,
    ]
    fixed += ["--lr", 3e-4, "--warmup", 1, "--log-every", 3, "--workers", 0, "--device", "cpu", "--out", out]
    run(train, monkeypatch, *data, *fixed, *options)
    ((before, model),) = runs
    model.eval().requires_grad_(False)
    loaded, logits = load_checkpoint(out / "best.pt").requires_grad_(False), model(images(1, 75, 53))
    assert logits.shape == (1, 4, 75, 53) and logits.isfinite().all()
    assert torch.equal(loaded(images(1, 75, 53)), logits) and loaded.settings == model.settings
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return before, model, next(record for record in log if "loss" in record)


@pytest.mark.parametrize(
    "image_encoder, prompting",
    [pytest.param(e, p, marks=() if (e, p) in QUICK else pytest.mark.slow) for e in IMAGE_ENCODERS for p in PROMPTING],
)
def test_every_system_trains_evaluates_and_reloads(image_encoder, prompting, monkeypatch, data, tmp_path):
    options = ["--prompting", prompting, *IMAGE_ENCODERS[image_encoder]]
    _, model, losses = run_train(monkeypatch, data, tmp_path, *options)
    assert ("aux_loss" in losses) == (prompting != "none")
    assert model.settings.prompting == prompting
    assert model.settings.backbone == (None if image_encoder in ("rn", "vit") else image_encoder)
    assert isinstance(model.decode_head, UperNetHead) == ("head=upernet" in options)


def test_every_setting_trains_and_reloads(monkeypatch, data, tmp_path):
    options = ["num_contexts=4", "decoder_layers=1", "gamma=0.5", "learn_gamma=false", "join_score_map=false"]
    options += ["aux_weight=1", "tau=0.1", "drop_path=0.2", "double_class_embedding=false", "quick_gelu=false"]
    options = ["--model", "tiny_vit", "--set", "context_length=20", *options]
    _, model, losses = run_train(monkeypatch, data, tmp_path, *options)
    encoder, s = model.encoder, model.settings
    assert encoder.contexts.shape == (1, 4, 64) and len(encoder.context_decoder.decoder) == 1
    assert (encoder.gamma == 0.5).all() and not encoder.join_score_map
    assert "aux_loss" in losses and (model.aux_weight, model.tau) == (1, 0.1)
    assert (s.drop_path, s.double_class_embedding, s.quick_gelu, s.context_length) == (0.2, False, False, 20)


def test_text_encoder_learns_at_its_own_rate(monkeypatch, data, tmp_path):
    before, model, _ = run_train(monkeypatch, data, tmp_path, "--model", "tiny", "--text-lr-multiplier", 0.1)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed > {name for name, _ in model.named_parameters() if ".text_encoder." not in name}
    groups = train.parameter_groups(model, train.Recipe(text_lr_multiplier=0.1))
    assert {group["name"]: group["base_lr"] for group in groups}["text_encoder"] == pytest.approx(1e-5)


# ------------------------------------------------------------------------------------------------ settings


NO_OPTIONS = ("init", "clip", "backbone_weights", "resume", *train.OWN)


def test_options_of_another_type_are_refused():
    wrong = {"learn_gamma=0": "learn_gamma is 0, expected bool", "gamma=large": "gamma is 'large', expected float"}
    wrong |= {"gamma=true": "gamma is True, expected float", "num_contexts=2.5": "num_contexts is 2.5, expected int"}
    for option, message in (wrong | {"contexts=4": "--set contexts: expected NAME=VALUE, with a name of"}).items():
        with pytest.raises(ValueError, match=message):
            train.choose_model(train.PRESETS, {**dict.fromkeys(NO_OPTIONS), "model": "tiny", "set": [option]})


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"prompting": "both"}, "choose one of post, pre, learned"),
        ({"head": "fcn"}, "choose one of fpn, upernet"),
        ({"backbone": "resnet7"}, "choose one of resnet18, resnet50"),
        ({"prompting": "pre", "gamma": 1.0}, "it needs post-model prompting (prompting=pre)"),
        ({"prompting": "learned", "gamma": 1.0}, "it needs post-model prompting (prompting=learned)"),
        ({"prompting": "learned", "decoder_layers": 3}, "it needs a context decoder"),
        ({"prompting": "template", "num_contexts": 8}, "it needs learned contexts"),
        ({"prompting": "none", "tau": 0.07}, "it needs an auxiliary loss"),
        ({"prompting": "none", "aux_weight": 0.4}, "it needs a score map"),
        ({"prompting": "none", "join_score_map": True}, "it needs a score map"),
        ({"prompting": "none", "context_length": 77}, "it needs a text encoder"),
        ({"prompting": "none", "quick_gelu": True}, "it needs a transformer of CLIP's"),
        ({"backbone": "resnet18", "drop_path": 0.1}, "it needs CLIP's ViT or Swin (prompting=post, backbone=resnet18)"),
        ({"double_class_embedding": True}, "it needs CLIP's ViT"),
        ({"aux_weight": 0.0, "tau": 0.07}, "it needs an auxiliary loss"),
        ({"prompting": "template+post", "num_contexts": 8}, "it needs learned contexts"),
        ({"prompting": "learned", "templates": ["a {}"]}, "it needs a template"),
        ({"prompting": "template", "templates": ["a photo"]}, "expected texts with one {} each"),
        ({"prompting": "template", "templates": []}, "expected texts with one {} each"),
        ({"fcn_weight": 0.4}, "it needs UperNet"),
        ({"tau": 0.0}, "tau is 0.0, it must be from"),
        ({"gamma": float("nan")}, "gamma is nan, it must be from"),
        ({"aux_weight": 0.0, "join_score_map": False}, "language has no effect"),
    ],
)
def test_wrong_or_useless_settings_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        build(**settings)


def test_auxiliary_loss_is_a_weight():
    half, full, none = (train_steps(build(aux_weight=weight), steps=1)[0] for weight in (0.5, 1.0, 0.0))
    assert half["aux_loss"] * 2 == pytest.approx(full["aux_loss"]) and "aux_loss" not in none
    assert half["loss"] == pytest.approx(full["loss"]) and half["loss"] == pytest.approx(none["loss"])


# ------------------------------------------------------------------------------------------------ text


@torch.no_grad()
def texts_of(model, x):
    return model.encoder(x)[2]


def test_template_is_plain_clip():
    model = build(prompting="template")
    assert model.encoder.contexts is None and model.encoder.context_decoder is None and model.encoder.gamma is None
    expected = model.encoder.text_encoder(tokenize([f"a photo of a {name}." for name in NAMES]))
    assert torch.allclose(texts_of(model, images()), expected.expand(2, -1, -1), atol=1e-6)


def test_learned_text_depends_on_the_contexts_but_not_on_the_image():
    model = build(prompting="learned")
    a, b = texts_of(model, images(1, seed=1)), texts_of(model, images(1, seed=2))
    assert torch.equal(a, b)
    model.encoder.contexts.data += 1
    assert not torch.allclose(texts_of(model.eval(), images(1, seed=1)), a)  # eval() drops the cached text


def test_post_depends_on_the_image_after_the_text_encoder():
    model, calls = build(prompting="post", gamma=1.0), []
    model.encoder.text_encoder.transformer.register_forward_hook(lambda *_: calls.append(1))
    a, b = texts_of(model, images(1, seed=1)), texts_of(model, images(1, seed=2))
    assert not torch.allclose(a, b) and len(calls) == 1
    assert len(model.encoder.context_decoder.decoder) == 3


def test_pre_depends_on_the_image_before_the_text_encoder():
    model, contexts = build(prompting="pre", num_contexts=5), []
    model.encoder.prompt_decoder.register_forward_hook(lambda module, inputs, output: contexts.append(output))
    both, second = texts_of(model, images(seed=1)), texts_of(model, images(seed=1)[1:])
    assert [c.shape for c in contexts] == [(2, 5, 64), (1, 5, 64)]  # the text encoder runs for every batch
    for values in (contexts[0], both):
        assert not torch.allclose(values[0], values[1], rtol=1e-5)
    assert torch.allclose(second[0], both[1], atol=1e-5)  # the rest of the batch makes no difference
    assert model.encoder.contexts is None and model.encoder.context_decoder is None and model.encoder.gamma is None
    assert model.encoder.queries.shape == (1, 5, 128) and len(model.encoder.prompt_decoder.decoder) == 6


@torch.no_grad()
def test_gamma_zero_makes_post_equal_learned():
    post, learned = build(prompting="post", gamma=0.0), build(prompting="learned")
    keys = learned.load_state_dict(post.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith(("encoder.context_decoder.", "encoder.gamma")) for key in keys.unexpected_keys)
    assert torch.equal(post(images()), learned(images()))
    post.encoder.gamma.fill_(1.0)
    assert not torch.allclose(post(images()), learned(images()))


def test_gamma_starts_at_its_value_and_learns_unless_fixed():
    default, fixed = build(), build(gamma=1, learn_gamma=False)
    assert default.encoder.gamma.unique().item() == pytest.approx(1e-4) and default.encoder.gamma.requires_grad
    train_steps(fixed, steps=2)
    assert fixed.encoder.gamma.unique().item() == 1


@pytest.mark.parametrize("prompting", ["template", "learned", "post", "pre"])
@torch.no_grad()
def test_permuted_class_names_permute_the_logits(prompting):
    """Given that the head's weights for the scores and for the classes are permuted, too."""
    order, model = [2, 0, 3, 1], build(prompting=prompting)
    other, weights = build(prompting=prompting, class_names=[NAMES[i] for i in order]), model.state_dict()
    lateral = weights["neck.lateral_convs.3.conv.weight"]
    weights["neck.lateral_convs.3.conv.weight"] = torch.cat([lateral[:, :-4], lateral[:, -4:][:, order]], dim=1)
    for key in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
        weights[key] = weights[key][order]
    other.load_state_dict(weights)
    assert torch.allclose(other.encoder(images())[1], model.encoder(images())[1][:, order], atol=1e-5)
    assert torch.allclose(other(images()), model(images())[:, order], atol=1e-4)


# ------------------------------------------------------------------------------------------------ score map


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
@pytest.mark.parametrize("detection, join, temperature", [(False, True, 1.0), (True, True, 0.5), (False, False, None)])
@torch.no_grad()
def test_score_map_joins_one_level_or_none(name, detection, join, temperature):
    """Released code: s joins in segmentation, s / tau in detection."""
    encoder, _ = build_encoder(replace(PRESETS[name], detection=detection), NAMES, tau=0.5, join_score_map=join)
    pyramid, score_map, _ = encoder.eval()(images())
    expected, level = encoder.backbone(images())[0], encoder.backbone.score_level
    if join:
        expected[level] = torch.cat([expected[level], score_map / temperature], dim=1)
    assert all(torch.equal(a, b) for a, b in zip(pyramid, expected, strict=True))
    assert encoder.channels == [x.shape[1] for x in pyramid]


def test_detectors_crop_positions_for_images_smaller_than_the_grid():
    """Released code: a detector's small image gets the grid's corner; elsewhere the grid is resized."""
    positions = {}
    for detection in (True, False):
        encoder, _ = build_encoder(replace(PRESETS["tiny"], detection=detection), NAMES, crop_size=128)
        pool = encoder.backbone.attnpool
        pool.positional_embedding.data[1:] = torch.arange(16.0)[:, None]  # (4 * 4, D), row by row
        positions[detection] = pool.positions(2, 2)[1:, 0].tolist()
    assert positions[True] == [0, 1, 4, 5] != positions[False]


@torch.no_grad()
def test_several_templates_are_averaged_as_in_clips_zero_shot():
    templates = ["a photo of a {}.", "a drawing of a {}.", "{}"]
    model = build(prompting="template", templates=templates)
    text = model.encoder(images())[2][0]  # (K, C)
    for k, class_name in enumerate(NAMES):
        each = model.encoder.text_encoder(tokenize([template.format(class_name) for template in templates]))
        expected = torch.nn.functional.normalize(each, dim=1).mean(0)
        assert torch.allclose(text[k], expected, atol=1e-6)
    one = build(prompting="template", templates=["a photo of a {}."])
    assert torch.equal(one(images()), build(prompting="template")(images()))


def test_template_with_post_model_prompting():
    """Table 7: a fixed template, refined by the image."""
    model = build(prompting="template+post")
    assert model.encoder.contexts is None and model.encoder.gamma.requires_grad
    losses = train_steps(model, 2)
    assert {"loss", "aux_loss"} == losses[0].keys()
