"""CLIP is CLIP: the encoders equal open_clip's, and every kind of weights file loads or the error says why not."""

import hashlib
import http.server
import threading

import open_clip
import pytest
import torch
from torch import nn

import clip_model
from clip_model import ARCHITECTURES, CLIP, Architecture, download, load_clip, read_architecture, resize_positions
from tokenizer import tokenize

RESNET = Architecture(64, 64, (1, 2, 1, 1), 16, 0, 64, text_layers=2)
VIT = Architecture(32, 48, 3, 128, 16, 64, text_layers=2)


def open_clip_twin(a, quick_gelu=True):
    """open_clip's model of an architecture, with its own random weights."""
    torch.manual_seed(0)
    vision = {"image_size": a.input_resolution, "layers": a.layers, "width": a.width}
    vision |= {"patch_size": a.patch_size} if a.patch_size else {}
    text = {"width": a.text_width, "layers": a.text_layers, "heads": a.text_width // 64}
    model = open_clip.CLIP(a.embed_dim, vision, text, quick_gelu=quick_gelu).eval()
    for name, parameter in model.named_parameters():  # zeros could hide mistakes
        if parameter.ndim == 1 and "bn" in name or "bias" in name:
            nn.init.normal_(parameter, 0.5 if "weight" in name else 0.0, 0.2)
    return model


@pytest.mark.parametrize(
    "architecture, quick_gelu", [(RESNET, True), (VIT, True), (VIT, False)], ids=["resnet", "vit", "vit-gelu"]
)
@torch.no_grad()
def test_encoders_equal_open_clip(architecture, quick_gelu, tmp_path):
    theirs = open_clip_twin(architecture, quick_gelu)
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    ours = load_clip(str(tmp_path / "open_clip.pt"), quick_gelu=quick_gelu)
    assert ours.architecture == architecture
    images = torch.randn(2, 3, architecture.input_resolution, architecture.input_resolution)
    tokens = tokenize(["a photo of a cat", "a diagram", "naïve café"])
    assert (ours.encode_image(images) - theirs.encode_image(images)).abs().max() < 1e-5
    assert (ours.encode_text(tokens) - theirs.encode_text(tokens)).abs().max() < 1e-5
    _, text, scale = theirs(images, tokens)
    expected = scale * theirs.encode_image(images, normalize=True) @ text.T
    assert torch.allclose(ours(images, tokens), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name, theirs", [("RN50", "RN50-quickgelu"), ("ViT-B/16", "ViT-B-16-quickgelu")])
@torch.no_grad()
def test_full_size_encoders_equal_open_clip(name, theirs, tmp_path):
    theirs = open_clip.create_model(theirs).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "clip.pt")
    ours = load_clip(str(tmp_path / "clip.pt"))
    assert ours.architecture == ARCHITECTURES[name]
    images, tokens = torch.randn(2, 3, 224, 224), tokenize(["a photo of a cat", "a photo of two dogs"])
    assert (ours.encode_image(images) - theirs.encode_image(images)).abs().max() < 1e-5
    assert (ours.encode_text(tokens) - theirs.encode_text(tokens)).abs().max() < 1e-5


class Archive(nn.Module):
    """A TorchScript archive with the names and buffers of OpenAI's."""

    def __init__(self, weights):
        super().__init__()
        for name, value in {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(49408), **weights}.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, value)

    def forward(self):
        return self.vocab_size


def weights_of(model):
    return {key.removeprefix("text."): value for key, value in model.state_dict().items()}


def test_torchscript_archive_of_half_precision_loads(tmp_path):
    model = CLIP(RESNET)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in weights_of(model).items()}
    torch.jit.script(Archive(halves)).save(str(tmp_path / "RN.pt"))
    loaded = load_clip(str(tmp_path / "RN.pt"))
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.half().float() if value.is_floating_point() else expected), name
    assert loaded.architecture == RESNET


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_from_weights(name):
    with torch.device("meta"):
        weights = weights_of(CLIP(ARCHITECTURES[name]))
    assert read_architecture(weights) == ARCHITECTURES[name]


def test_resized_positions():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = torch.cat([torch.tensor([[7.0, 7.0]]), torch.stack([rows, columns], -1).view(16, 2)])
    assert torch.equal(resize_positions(positions, (4, 4)), positions)
    resized = resize_positions(positions, (8, 6))
    assert torch.equal(resized[0], positions[0])
    grid = resized[1:].view(8, 6, 2)
    assert torch.allclose(grid[:, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert (grid[:, :, 1].diff(dim=1) > 0).all() and torch.allclose(grid[:, :, 1], grid[:1, :, 1].expand(8, 6))


def test_encoders_at_other_sizes():
    for architecture, size in [(RESNET, (3, 5)), (VIT, (6, 10))]:
        images = torch.randn(1, 3, 3 * 32, 5 * 32)
        pyramid, global_embedding, visual_embeddings = CLIP(architecture).visual(images)
        assert global_embedding.shape == (1, architecture.embed_dim)
        assert visual_embeddings.shape == (1, architecture.embed_dim, *size)
        assert len(pyramid) == 4


def test_contexts_follow_the_start_token():
    encoder = CLIP(VIT).text.eval()
    tokens = tokenize(["cat", "fire hydrant"], 8)
    start, end = tokens[:, :1], tokens[:, 1:]
    inserted = torch.tensor([[320, 1125, 539]])  # "a photo of"
    contexts = encoder.token_embedding(inserted)  # (1, 3, width)
    words = torch.cat([start, inserted.expand(2, -1), end], dim=1)
    assert torch.allclose(encoder.forward_shared(tokens, contexts)[0], encoder(words), atol=1e-6)
    both = encoder.forward_shared(tokens, torch.cat([contexts, contexts * 2]))
    assert torch.allclose(both[0], encoder(words), atol=1e-6)
    with pytest.raises(ValueError, match="78 tokens.* 77 positions"):
        encoder.forward_shared(tokenize("cat", 77), contexts[:, :1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("ln_final.bias"), "text.ln_final.bias is missing"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "text.extra.weight is not part of the model"),
        (lambda w: w.update({"visual.bn1.bias": torch.zeros(3)}), r"visual.bn1.bias is \(3,\), expected \(8,\)"),
        (lambda w: w.pop("visual.layer1.0.conv1.weight"), "not CLIP's weights"),
        (lambda w: w.update({"epoch": 3}), "expected a state dict"),
    ],
)
def test_wrong_weights(change, message, tmp_path):
    weights = weights_of(CLIP(RESNET))
    change(weights)
    torch.save(weights, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_clip(str(tmp_path / "wrong.pt"))
    assert "wrong.pt" in str(error.value) and "\n" not in str(error.value)


def test_truncated_and_missing_files(tmp_path):
    torch.save(weights_of(CLIP(RESNET)), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="half.pt: not a file of torch.save, or cut short or damaged") as error:
        load_clip(str(tmp_path / "half.pt"))
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="RN51: no such file; .* RN50, "):
        load_clip("RN51")


@pytest.fixture
def server(tmp_path):
    """A local web server for tmp_path/site that supports Range; yields its URL and the list of requested ranges."""
    requested = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = (tmp_path / "site" / self.path.lstrip("/")).read_bytes()
            requested.append(self.headers.get("Range"))
            start = int((requested[-1] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(416 if start >= len(data) else 206 if start else 200)
            self.send_header("Content-Length", str(len(data[start:])))
            self.end_headers()
            self.wfile.write(data[start:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", requested
        httpd.shutdown()


def test_named_weights_are_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    url, requested = server
    model = CLIP(RESNET)
    torch.save(weights_of(model), tmp_path / "made.pt")
    data = (tmp_path / "made.pt").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    folder = tmp_path / "site" / sha256
    folder.mkdir(parents=True)
    (folder / "RN50.pt").write_bytes(data)
    monkeypatch.setattr(clip_model, "SERVER", url)
    monkeypatch.setitem(clip_model.FILES, "RN50", f"{sha256}/RN50.pt")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "RN50.pt.part").write_bytes(data[:1000])  # an interrupted transfer resumes
    loaded = load_clip("RN50", cache=str(cache))
    assert torch.equal(loaded.visual.conv1.weight, model.visual.conv1.weight)
    assert [path.name for path in cache.iterdir()] == ["RN50.pt"] and requested == ["bytes=1000-"]
    load_clip("RN50", cache=str(cache))
    assert len(requested) == 1

    (cache / "RN50.pt").unlink()
    (folder / "RN50.pt").write_bytes(data[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256 .* expected"):
        load_clip("RN50", cache=str(cache))
    assert not list(cache.iterdir())


def test_processes_that_want_one_file_download_it_once(server, tmp_path):
    url, requested = server
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "big").write_bytes(data := bytes(3_000_000))
    arguments = (f"{url}/big", tmp_path / "cache" / "big", hashlib.sha256(data).hexdigest())
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=download, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and requested == [None]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["big"]
