"""What is written for speed or memory computes what the plain code beside it does, and the benchmark compares the same
computation: text that shares its contexts, the loss image by image, attention in bf16, recomputed blocks.

Bounds: the largest absolute or relative difference allowed, in float32 unless the test says otherwise.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import clip_model
from clip_model import Architecture, TextEncoder
from denseclip import build_model, keep_memory, load_checkpoint, pixel_cross_entropy, save_checkpoint
from eval import predict_labels
from experiments import benchmark
from heads import resize
from tokenizer import tokenize
from train import recompute_blocks

NAMES = ["sky", "road", "traffic light", "swimming pool"]


@pytest.mark.parametrize("num_images, num_texts, length", [(1, 1, 7), (1, 21, 7), (1, 22, 7), (3, 70, 8), (2, 5, 70)])
def test_texts_that_share_their_contexts_are_the_same_texts(num_images, num_texts, length):
    torch.manual_seed(0)
    encoder = TextEncoder(Architecture(32, 0, 1, 1, 0, 64, 3)).requires_grad_(False)
    names = [f"{name} {i}" if i > 3 else name for i, name in zip(range(num_texts), NAMES * num_texts, strict=False)]
    tokens, contexts = tokenize(names, length), torch.randn(num_images, 4, 64)
    results = []
    for forward in (benchmark.released_texts, TextEncoder.forward_shared):
        contexts = contexts.clone().requires_grad_()
        texts = forward(encoder, tokens, contexts)
        (gradient,) = torch.autograd.grad(texts.square().sum(), contexts)
        results.append((texts, gradient / gradient.abs().max()))
    assert results[0][0].shape == (num_images, num_texts, 32)
    for plain, shared in zip(*results, strict=True):
        assert (plain - shared).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size, label_size", [((16, 16), (64, 64)), ((5, 7), (66, 50)), ((9, 9), (9, 9))])
def test_loss_image_by_image_is_the_loss_of_the_batch(size, label_size, layout):
    logits = 5 * torch.randn(3, 6, *size).to(memory_format=layout)
    labels = torch.randint(6, (3, *label_size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    up_sampled = resize(plain, label_size)
    expected = F.cross_entropy(up_sampled, labels, ignore_index=255, reduction="sum") / labels.numel()
    with torch.inference_mode():
        assert pixel_cross_entropy(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    loss = pixel_cross_entropy(ours, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * expected).backward()
    (3 * loss).backward()
    assert (ours.grad - plain.grad).abs().max() < 2e-6 * plain.grad.abs().max()


def test_a_text_beyond_the_positions_is_refused():
    encoder = TextEncoder(Architecture(32, 0, 1, 1, 0, 64, 1, context_length=10))
    with pytest.raises(ValueError, match="text of 11 tokens, but the text encoder has 10 positions"):
        encoder.forward_shared(tokenize(NAMES, 7), torch.randn(1, 4, 64))


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(IndexError, match="out of bounds"):
        pixel_cross_entropy(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 3))


def test_attention_in_bf16_is_attention():
    """Within bf16's rounding of fp32's: 3 significant digits of values of about 1."""
    q, k, v = torch.randn(3, 2, 37, 128)
    exact = clip_model.attention(q, k, v, heads=2)
    rounded = clip_model.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), heads=2)
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 0.02


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
def test_recomputed_blocks_change_no_number(name):
    torch.manual_seed(0)
    plain = build_model(name, NAMES, **({"drop_path": 0.3} if name == "tiny_vit" else {})).train()
    other = copy.deepcopy(plain)
    recompute_blocks(other)
    images, labels, saved = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64)), []
    for model in (plain, other):
        for _ in range(2):
            torch.manual_seed(1)  # of dropout
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
            ):
                loss = sum(model(images, labels).values())
            loss.backward()
        saved.append(sum(kept))
    assert saved[1] < 0.8 * saved[0]  # it does save memory
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), other.buffers(), strict=True))


def test_recomputing_is_refused_where_it_has_no_effect():
    with pytest.raises(ValueError, match="--recompute would have no effect"):
        recompute_blocks(build_model("tiny", NAMES, backbone="resnet18"))


@torch.no_grad()
def test_models_are_channels_last_and_memory_is_kept_without_a_trace(tmp_path):
    save_checkpoint(tmp_path / "model.pt", build_model("tiny", NAMES))
    model = load_checkpoint(tmp_path / "model.pt")
    assert model.decode_head.conv_seg.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(torch.randn(1, 3, 64, 64)).is_contiguous(memory_format=torch.channels_last)
    before = model(torch.ones(1, 3, 64, 64))
    keep_memory()
    assert torch.equal(model(torch.ones(1, 3, 64, 64)), before)


# ------------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
def test_both_sides_of_the_benchmark_compute_the_same(name):
    torch.manual_seed(0)
    model, images, labels = build_model(name, NAMES), torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
            module.p = 0
        if hasattr(module, "drop_path"):
            module.drop_path = 0
    logits, losses = model.eval()(images), copy.deepcopy(model).train()(images, labels)
    with benchmark.as_released():
        assert torch.allclose(model(images), logits, atol=1e-4)
        released = copy.deepcopy(model).train()(images, labels)
        assert {k: v.item() for k, v in released.items()} == pytest.approx(
            {k: v.item() for k, v in losses.items()}, 1e-5
        )
        labels = benchmark.released_labels(model, images[0], (50, 90), 96, multi_scale=True)
    ours = predict_labels(model, images[0], (50, 90), short_side=96, multi_scale=True)
    assert (labels == ours).float().mean() > 0.999


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZES", {"tiny": 64})
    monkeypatch.setattr(benchmark.Benchmark, "measure_peaks", lambda *_: (1e12, 1e12))
    monkeypatch.setattr("sys.argv", ["benchmark", "inference", "--runs", "1", "--threads", "1"])
    benchmark.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "x 64 x 64" in line]
    assert [row[1] for row in rows] == ["fp32", "bf16"] and all(row[4].endswith("x") for row in rows)
