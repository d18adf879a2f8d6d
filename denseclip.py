"""DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting (Rao et al., CVPR 2022, arXiv 2112.01518).

Start at `LanguageGuidedEncoder.forward` (the method, Figure 3), then read `DenseCLIP.forward` (segmentation).
To copy this file, also take clip_model.py, tokenizer.py with its vocabulary file, and heads.py; UperNet and all image
encoders but CLIP's ResNets need backbones.py, too.

    paper      here                  shape
    ---------  --------------------  -----------------------------------------------------------------------------
    x1 .. x4   pyramid               four maps (B, C_i, H_i, W_i)
    z_bar      global_embedding      (B, C)             CLIP's image embedding
    z          visual_embeddings     (B, C, H4, W4)     the language-compatible feature map
    [z_bar, z] memory                (B, 1 + H4 W4, C)  image tokens that the context decoder attends to
    p          contexts              (1, N, D)          learned, replaces "a photo of a"; D: text width
    q          queries               (1, N, C)          learned; pre-model prompting turns them into contexts
    e_k        tokens                (K, L)             token indices of the class names
    t          text_embeddings       (B, K, C)
    v          context_decoder(...)  (B, K, C)          cross-attention from class names to image tokens
    gamma      gamma                 (C,)               weight of v
    s          score_map             (B, K, H4, W4)     cosine similarity of every pixel and every class name
    tau        tau                   0.07
    y          labels                (B, H, W)          in [0, K), or 255: ignored

For a ResNet H4 = H / 32. For a ViT H4 = H / patch size, and x3 has this size, so the score map joins x3."""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import clip_model
from clip_model import ARCHITECTURES, IGNORE_INDEX, Architecture, ResNet, TextEncoder, VisionTransformer
from heads import FPN, SemanticFPNHead, resize


class LanguageGuidedEncoder(nn.Module):
    """Image to feature pyramid with score map: all of DenseCLIP except the task's own neck and head.
    backbone.channels: of the pyramid's maps; backbone.score_level: index of the map with visual_embeddings' size."""

    def __init__(
        self,
        backbone: nn.Module,  # images -> (pyramid, global_embedding, visual_embeddings)
        text_encoder: "TextEncoder | StoredText",  # CLIP's, frozen: gradients flow through it to the contexts
        class_names: list[str],
        prompt_decoder: nn.Module | None = None,  # pre-model prompting, Eq. (4): (queries, memory) -> (B, N, D)
        context_decoder: nn.Module | None = None,  # post-model, Eq. (5): (text_embeddings, memory) -> (B, K, C)
        num_contexts: int = 8,  # N learned context vectors before each class name, Eq. (3); 0: `templates` alone
        gamma: float = 1e-4,  # initial value, Eq. (6)
        learn_gamma: bool = True,
        join_score_map: bool = True,  # False leaves the pyramid as the backbone returned it
        score_temperature: float = 1.0,  # divides the score map that joins. Released code: 1, in detection tau
        templates: tuple[str, ...] = ("{}",),
    ):
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder.requires_grad_(False)
        self.prompt_decoder, self.context_decoder = prompt_decoder, context_decoder
        self.num_contexts, self.templates = num_contexts, tuple(templates)
        self.join_score_map, self.score_temperature = join_score_map, score_temperature
        self.contexts = self.queries = self.gamma = None
        if prompt_decoder is not None:
            self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, text_encoder.embed_dim)))
        elif num_contexts:
            self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, text_encoder.width)))
        if context_decoder is not None:
            self.gamma = nn.Parameter(torch.full((text_encoder.embed_dim,), float(gamma)), requires_grad=learn_gamma)
        self.class_names = []
        self.set_class_names(class_names)
        self.channels = list(backbone.channels)  # of the pyramid that forward returns
        if join_score_map:
            self.channels[backbone.score_level] += len(class_names)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """images: (B, 3, H, W) RGB, normalized with CLIP's mean and std.
        return: the pyramid x1 .. x4, one of them joined by the score map; score map (B, K, H4, W4); text (B, K, C)"""
        # Eq. (1): [z_bar, z] = MHSA([x4_bar, x4]), CLIP's attention pool applied to every position
        pyramid, global_embedding, visual_embeddings = self.backbone(images)  # x1 .. x4, (B, C), (B, C, H4, W4)
        image_tokens = visual_embeddings.flatten(2).transpose(1, 2)  # (B, H4 W4, C)
        memory = torch.cat([global_embedding[:, None], image_tokens], dim=1)  # (B, 1 + H4 W4, C)

        # Eq. (3), with contexts from Eq. (4) in pre-model prompting: t = TextEncoder([p, e_k])
        text_embeddings = self.embed_class_names(memory)  # (B, K, C)

        # Eq. (5): v = TransDecoder(t, [z_bar, z]);  Eq. (6): t <- t + gamma v
        if self.context_decoder is not None:
            text_embeddings = text_embeddings + self.gamma * self.context_decoder(text_embeddings, memory)  # (B, K, C)

        # Eq. (2), with the refined text: s = z_hat t_hat^T, then x4' = [x4, s]
        score_map = pixel_text_scores(visual_embeddings, text_embeddings)  # (B, K, H4, W4)
        if self.join_score_map:
            level = self.backbone.score_level
            pyramid[level] = torch.cat([pyramid[level], score_map / self.score_temperature], dim=1)  # (B, C_i + K, ...)
        return pyramid, score_map, text_embeddings

    def embed_class_names(self, memory: Tensor) -> Tensor:
        """Text embeddings of the class names before the image refines them, (B, K, C). Eqs. (3) and (4). In eval mode,
        those that do not depend on the image are computed once: after changing weights in place, call eval() again."""
        if self.prompt_decoder is not None:
            # Eq. (4): v = TransDecoder(q, [z_bar, z]), and v replaces p in Eq. (3)
            contexts = self.prompt_decoder(self.queries.expand(memory.shape[0], -1, -1), memory)  # (B, N, D)
            return self.text_encoder.forward_shared(self.tokens, contexts)  # (B, K, C)
        if self.training or isinstance(self.text_encoder, StoredText):
            return self.encode_text().expand(memory.shape[0], -1, -1)
        if self.cached_text is None:  # in full precision and usable by autograd, whatever mode the first caller was in
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.tokens.device.type, enabled=False):
                self.cached_text = self.encode_text()
        return self.cached_text.expand(memory.shape[0], -1, -1)

    def encode_text(self) -> Tensor:
        """t = TextEncoder([p, e_k]), Eq. (3), (1, K, C). Several templates are averaged as in CLIP's zero-shot."""
        if isinstance(self.text_encoder, StoredText):
            return self.text_encoder.embeddings
        encoder, contexts = self.text_encoder, self.contexts
        text = encoder(self.tokens) if contexts is None else encoder.forward_shared(self.tokens, contexts)
        text = text.view(len(self.templates), -1, encoder.embed_dim)  # (templates, K, C)
        return text if len(text) == 1 else F.normalize(text, dim=2).mean(0, keepdim=True)

    @torch.no_grad()
    def freeze_text(self) -> None:
        """Store the class names' embeddings and drop the text encoder. Outputs in evaluation mode stay the same."""
        if self.prompt_decoder is not None:
            raise ValueError("pre-model prompting needs the text encoder: its contexts come from each image, Eq. (4)")
        if not isinstance(self.text_encoder, StoredText):
            self.text_encoder, self.contexts, self.num_contexts = StoredText(self.encode_text()), None, 0

    def set_class_names(self, class_names: list[str], any_number: bool = False) -> None:
        """Use these names from now on; any_number: for score maps alone, which then no longer join the pyramid."""
        check_class_names(class_names, 0 if any_number else len(self.class_names))
        if any_number:
            self.join_score_map, self.channels = False, list(self.backbone.channels)
        if not isinstance(self.text_encoder, StoredText):
            self.register_buffer("tokens", self.tokenize(class_names), persistent=False)  # (templates * K, L)
        elif self.class_names not in ([], list(class_names)):
            raise ValueError("this model's text encoder was dropped by freeze_text; use the model it was made from")
        self.class_names, self.cached_text = list(class_names), None

    def tokenize(self, class_names: list[str]) -> Tensor:
        """(templates * K, L). Released code: L is 5, longer names are an error. Here the longest name decides."""
        from tokenizer import SOT, encode, tokenize  # here, so that a model with stored text needs no vocabulary

        texts = [template.format(name) for template in self.templates for name in class_names]
        tokens, room = [encode(text) for text in texts], self.text_encoder.context_length - self.num_contexts
        for i, text in enumerate(texts):
            if not tokens[i] or max(tokens[i]) >= SOT or tokens[i] in tokens[:i]:
                raise ValueError(f"{text!r} is empty, a special token or the same as another name to CLIP's tokenizer")
            if (length := 2 + len(tokens[i])) > room:
                raise ValueError(f"class name {text!r} has {length} tokens, but the text encoder has room for {room}")
        tokens = tokenize(texts, length=max(5, 2 + max(map(len, tokens))))
        return tokens.to(self.text_encoder.token_embedding.weight.device)

    # Whatever else may change the text drops the cached one: training, moving or casting, loading weights.
    def train(self, mode: bool = True) -> "LanguageGuidedEncoder":
        self.cached_text = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.cached_text = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        self.cached_text = None
        super()._load_from_state_dict(*args)


class StoredText(nn.Module):
    """Text embeddings (1, K, C) of fixed class names instead of the text encoder."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embed_dim = embeddings.shape[2]
        self.register_buffer("embeddings", embeddings)


class PlainEncoder(nn.Module):
    """The baselines without language: the backbone's pyramid, unchanged."""

    def __init__(self, backbone: nn.Module, class_names: list[str]):
        super().__init__()
        check_class_names(class_names)
        self.backbone, self.class_names, self.channels = backbone, list(class_names), list(backbone.channels)

    def forward(self, images: Tensor) -> tuple[list[Tensor], None, None]:
        return self.backbone(images)[0], None, None


class DenseCLIP(nn.Module):
    """Semantic segmentation: language-guided encoder, FPN, Semantic FPN head (or UperNet, without a neck).
    forward(images (B, 3, H, W)) -> logits (B, K, H, W)
    forward(images, labels (B, H, W)) -> {"loss", "aux_loss"}, scalars; minimize their sum"""

    def __init__(self, encoder: nn.Module, neck, decode_head, fcn_head, name: str, settings: "Settings"):
        super().__init__()
        self.encoder, self.neck, self.decode_head, self.fcn_head = encoder, neck, decode_head, fcn_head
        self.name, self.settings = name, settings  # what a checkpoint needs to build the model again
        self.crop_size, self.short_side = settings.crop_size, settings.short_side  # pixels
        self.aux_weight, self.tau = settings.aux_weight, settings.tau

    @property
    def class_names(self) -> list[str]:
        return self.encoder.class_names

    def freeze_text(self) -> "DenseCLIP":
        """Drop the text encoder, see `LanguageGuidedEncoder.freeze_text`; return the model."""
        if self.settings.prompting != "none":
            self.encoder.freeze_text()
            self.settings = replace(self.settings, stored_text=True)
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        pyramid, score_map, _ = self.encoder(images)  # Eqs. (1) to (6): (B, C_i, H_i, W_i), (B, K, H4, W4)
        logits = self.decode_head(self.neck(pyramid))  # (B, K, H / 4, W / 4)
        if labels is None:
            return resize(logits, images.shape[-2:])  # (B, K, H, W)

        losses = {"loss": pixel_cross_entropy(logits, labels)}
        if self.fcn_head is not None:
            losses["fcn_loss"] = self.settings.fcn_weight * pixel_cross_entropy(self.fcn_head(pyramid[2]), labels)
        if score_map is not None and self.aux_weight:
            # Eq. (7): CE(softmax(s / tau), y). Released code: weighted by 0.4
            losses["aux_loss"] = self.aux_weight * pixel_cross_entropy(score_map / self.tau, labels)
        return losses


def pixel_text_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Cosine similarity of every pixel and every class name, Eq. (2).
    visual: (B, C, H, W)  language-compatible feature map z
    text:   (B, K, C)     text embeddings t
    return: (B, K, H, W)  in [-1, 1]; divide by tau before a loss"""
    return torch.einsum("bchw,bkc->bkhw", F.normalize(visual, dim=1), F.normalize(text, dim=2))


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the labels' size, a scalar. logits: (B, K, h, w), any size; labels: (B, H, W).
    Released code: the mean is over all pixels; ignored ones count as 0."""

    def image_loss(x: Tensor, y: Tensor) -> Tensor:  # (1, K, h, w), (1, H, W) -> sum over pixels
        x = resize(x.contiguous(memory_format=torch.channels_last), y.shape[1:])  # (1, K, H, W)
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # (HW, K), classes side by side in memory
        return F.cross_entropy(pixels, y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    # One image at a time, and again for the gradient: the logits at full size (157 MB per image with 150 classes and
    # 512 x 512 pixels) never exist for the whole batch.
    per_image = zip(logits.float().split(1), labels.split(1), strict=True)
    losses = [checkpoint(image_loss, *each, use_reentrant=False, preserve_rng_state=False) for each in per_image]
    return sum(losses) / labels.numel()


class Attention(nn.Module):
    """Multi-head attention without biases, except the output's."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """queries: (B, K, width); memory: (B, M, width); return: (B, K, width)."""
        q, k, v = self.q_proj(queries), self.k_proj(memory), self.v_proj(memory)  # (B, K or M, width)
        return self.dropout(self.proj(clip_model.attention(q, k, v, self.heads)))  # (B, K, width)


class DecoderLayer(nn.Module):
    """Pre-norm: self-attention among the queries, cross-attention to the image tokens, MLP."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn, self.cross_attn = (Attention(width, heads, dropout) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        expand, contract = nn.Linear(width, width * 4), nn.Linear(width * 4, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), nn.Dropout(dropout), contract, nn.Dropout(dropout))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, K, width); memory: (B, M, width); return: (B, K, width)."""
        y = self.norm1(x)  # (B, K, width)
        x = x + self.self_attn(y, y)  # (B, K, width)
        x = x + self.cross_attn(self.norm2(x), memory)  # (B, K, width)
        return x + self.mlp(self.norm3(x))  # (B, K, width)


class ContextDecoder(nn.Module):
    """TransDecoder of Eqs. (4) and (5): cross-attention from class names (or queries) to image tokens.
    embed_dim: C of text and memory; out_dim: of the output, C if None. Released code: 3 layers, the paper says 6."""

    def __init__(self, embed_dim: int, out_dim: int | None = None, width: int = 256, layers: int = 3):
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads=4, dropout=0.1) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim or embed_dim))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """text: (B, K, C); memory: (B, 1 + HW, C); return: v (B, K, out_dim)."""
        memory = self.memory_proj(memory)  # (B, 1 + HW, width)
        x = self.text_proj(text)  # (B, K, width)
        for layer in self.decoder:
            x = layer(x, memory)  # (B, K, width)
        return self.out_proj(x)  # (B, K, out_dim)


# ---------------------------------------------------------------------------------------------- settings, factories
@dataclass(frozen=True)
class Preset:
    """A named model: which CLIP, and the sizes and released choices that belong to it."""

    architecture: Architecture
    crop_size: int  # pixels per side
    drop_path: float = 0.0
    channels: int = 256  # of FPN and head
    decoder_width: int = 256  # of the context decoder
    aux_weight: float = 0.4
    detection: bool = False  # released detectors: s / tau joins the pyramid; positions are cropped from a large grid


PRESETS = {
    "rn50": Preset(ARCHITECTURES["RN50"], 512),
    "rn101": Preset(ARCHITECTURES["RN101"], 512),
    "vitb16": Preset(ARCHITECTURES["ViT-B/16"], 640, drop_path=0.1),
    "tiny": Preset(Architecture(128, 128, (1, 1, 1, 1), 32, 0, 64, 2), 128, channels=64, decoder_width=64),  # for a CPU
    "tiny_vit": Preset(Architecture(128, 128, 4, 128, 16, 64, 2), 128, channels=64, decoder_width=64),
}
PROMPTING = {  # the paper's systems: where the contexts of the text come from, and whether the image refines the text
    "post": ("learned", True),  # Eqs. (3), (5) and (6): the final model
    "pre": ("image", False),  # Eq. (4)
    "learned": ("learned", False),  # Eq. (3)
    "template": ("template", False),  # "a photo of a {}."
    "template+post": ("template", True),  # Table 7: post-model prompting without learned contexts
    "none": (None, False),  # no language: the baselines
}


@dataclass(frozen=True)
class Settings:
    """What the paper's ablations vary. None means the default after the semicolon; `resolve` fills it in."""

    prompting: str = "post"  # a key of PROMPTING (Table 2)
    num_contexts: int | None = None  # N of Eqs. (3) and (4); 8
    templates: list | None = None  # texts with {} for the class name, averaged if several; ["a photo of a {}."]
    decoder_layers: int | None = None  # of TransDecoder; 3, for pre-model prompting 6
    gamma: float | None = None  # initial value, Eq. (6); 1e-4 (Table 8)
    learn_gamma: bool | None = None  # False keeps the initial value; True (Table 8)
    join_score_map: bool | None = None  # x4' = [x4, s], Eq. (2); True
    aux_weight: float | None = None  # of the auxiliary loss, Eqs. (7) and (8); 0.4, for detectors 1
    tau: float | None = None  # temperature in Eqs. (7) and (8); 0.07
    head: str | None = None  # "fpn" (FPN and Semantic FPN) or "upernet", segmentation only; "fpn", on Swin "upernet"
    fcn_weight: float | None = None  # of UperNet's auxiliary FCN head in training; 0.4
    backbone: str | None = None  # image encoder, one of backbones.PYRAMIDS or package.module:function; CLIP's own
    imagenet_normalize: bool | None = None  # the backbone expects ImageNet's mean and std, not CLIP's; True
    crop_size: int | None = None  # pixels per side of training crop, test window and positional grid; the preset's
    short_side: int | None = None  # pixels; images are resized to fit (2048, this); crop_size, for detectors 800
    drop_path: float | None = None  # of CLIP's ViT, the preset's; of Swin, 0.3
    double_class_embedding: bool | None = None  # Released code: CLIP's ViT adds its class embedding twice; True
    quick_gelu: bool | None = None  # False for weights trained with GELU, such as most of open_clip's; True
    context_length: int | None = None  # positions of the text encoder; 77
    stored_text: bool | None = None  # set by freeze_text: text embeddings instead of the text encoder; False


# Every number that a user may set, in Settings or as an option of a script.
RANGES = {"gamma": (-1e3, 1e3), "tau": (1e-4, 1e3), "drop_path": (0, 0.99), "threshold": (0, 1), "workers": (0, 256)}
RANGES |= {"num_contexts decoder_layers": (1, 64), "context_length": (5, 1024), "crop_size short_side": (32, 8192)}
RANGES |= {"lr weight_decay backbone_lr_multiplier text_lr_multiplier power min_lr clip_grad warmup": (0, 1e6)}
RANGES |= {"iterations eval_every save_every log_every": (1, 10**9), "batch_size accumulate": (1, 65536)}
RANGES |= {"aux_weight fcn_weight": (0, 1e6), "seed": (0, 2**32 - 1), "ignore_index": (-1, 65535)}  # of 16-bit masks
RANGES = {name: limits for names, limits in RANGES.items() for name in names.split()}


def check_ranges(values: dict) -> None:
    """A ValueError for the first number that is outside its range in RANGES, or nan; None and other names are fine."""
    for name, (low, high) in RANGES.items():
        if (value := values.get(name)) is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, it must be from {low} to {high}")


def resolve(s: Settings, preset: Preset) -> Settings:
    """The settings with defaults filled in. What would have no effect stays None, and is a ValueError if given."""
    for name, kind in Settings.__annotations__.items():
        value = getattr(s, name)
        number = type(value) is int and isinstance(0.0, kind)  # a whole number where fractions are possible
        if not number and (not isinstance(value, kind) or isinstance(value, bool) and kind != bool | None):
            raise ValueError(f"{name} is {value!r}, expected {kind}")
    check_ranges(asdict(s))
    for name, value, choices in (("prompting", s.prompting, PROMPTING), ("head", s.head or "fpn", ("fpn", "upernet"))):
        if value not in choices:
            raise ValueError(f"no {name} named {value!r}: choose one of {', '.join(choices)}")
    source, refined = PROMPTING[s.prompting]
    language, decoder = source is not None, refined or source == "image"
    vit, swin = s.backbone is None and preset.architecture.patch_size > 0, s.backbone in ("swin_t", "swin_s")
    tau = language and (s.aux_weight != 0 or preset.detection and s.join_score_map is not False)
    rules = {  # name: (default, whether it has an effect, what it needs)
        "num_contexts": (8, source in ("learned", "image"), "learned contexts"),
        "templates": (["a photo of a {}."], source == "template", "a template"),
        "decoder_layers": (6 if source == "image" else 3, decoder, "a context decoder"),
        "gamma": (1e-4, refined, "post-model prompting"),
        "learn_gamma": (True, refined, "post-model prompting"),
        "join_score_map": (True, language, "a score map"),
        "aux_weight": (preset.aux_weight, language, "a score map"),
        "tau": (0.07, tau, "an auxiliary loss"),
        "head": ("upernet" if swin else "fpn", not preset.detection, "a segmentation model"),
        "fcn_weight": (0.4, not preset.detection and (s.head or swin and "upernet") == "upernet", "UperNet"),
        "crop_size": (min(preset.crop_size, 512) if s.backbone else preset.crop_size, True, ""),
        # Released code: no drop path in CLIP's ViT without language
        "drop_path": (0.3 if swin else preset.drop_path * language, vit or swin, "CLIP's ViT or Swin"),
        "double_class_embedding": (True, vit, "CLIP's ViT"),
        "quick_gelu": (True, language or vit, "a transformer of CLIP's"),
        "imagenet_normalize": (True, s.backbone is not None, "a backbone that is not CLIP's"),
        "context_length": (77, language, "a text encoder"),
        "stored_text": (False, language and source != "image", "text that does not depend on the image"),
    }
    rules["short_side"] = (800 if preset.detection else s.crop_size or rules["crop_size"][0], True, "")
    for name, (default, has_effect, needs) in rules.items():
        value = getattr(s, name)
        if value is None and has_effect:
            s = replace(s, **{name: default})
        elif value is not None and not has_effect:
            what = f"prompting={s.prompting}" + (f", backbone={s.backbone}" if s.backbone else "")
            raise ValueError(f"{name}={value} would have no effect: it needs {needs} ({what}); leave it out")
    if s.templates == [] or not all(type(t) is str and re.fullmatch(r"[^{}]*\{\}[^{}]*", t) for t in s.templates or ()):
        raise ValueError(f"templates={s.templates}: expected texts with one {{}} each, for the class name")
    if language and not (s.aux_weight or s.join_score_map):
        raise ValueError("with neither score map nor auxiliary loss, language has no effect: use prompting=none")
    return s


def build_model(name: str, class_names: list[str], clip: str | None = None, **settings) -> DenseCLIP:
    """A segmentation model: preset `name`, CLIP's weights `clip`, and `settings` as `build_encoder` takes them."""
    if name not in PRESETS:
        names = ", ".join(PRESETS)
        raise ValueError(f"no segmentation model named {name!r} (detectors: detect.py): choose one of {names}")
    preset = PRESETS[name]
    encoder, resolved = build_encoder(preset, class_names, clip, **settings)
    fcn_head = None
    if resolved.head == "fpn":
        neck, decode_head = FPN(encoder.channels, preset.channels), SemanticFPNHead(len(class_names), preset.channels)
    else:
        from backbones import FCNHead, UperNetHead

        neck, decode_head = nn.Identity(), UperNetHead(encoder.channels, len(class_names), 2 * preset.channels)
        fcn_head = FCNHead(encoder.channels[2], len(class_names)) if resolved.fcn_weight else None
    return DenseCLIP(encoder, neck, decode_head, fcn_head, name, resolved).to(memory_format=torch.channels_last)


def build_encoder(
    preset: Preset,
    class_names: list[str],
    clip: str | None = None,  # CLIP's weights by name or path, see `clip_model.load_clip`; None: random
    backbone: str | nn.Module | None = None,
    backbone_weights: str | None = None,  # of a backbone by name: torchvision's name for them, a path; None: random
    **settings,  # fields of `Settings`
) -> tuple[LanguageGuidedEncoder | PlainEncoder, Settings]:
    """The encoder of any dense task, without a head, and its settings with defaults filled in.
    backbone: image encoder instead of CLIP's: a name in backbones.PYRAMIDS; "package.module:function", which returns a
    module; or a module of your own, images (B, 3, H, W) -> four maps (B, C_i, H_i, W_i)."""
    name = type(backbone).__name__ if isinstance(backbone, nn.Module) else backbone
    if backbone_weights is not None and (name is not backbone or backbone is None or ":" in backbone):
        raise ValueError(f"backbone_weights={backbone_weights} would have no effect: they belong to a backbone by name")
    s = resolve(Settings(backbone=name, **settings), preset)
    a, (source, refined) = preset.architecture, PROMPTING[s.prompting]
    embed_dim = a.embed_dim if source else 0  # 0: no projection to the text's space
    visual = replace(a, embed_dim=embed_dim, input_resolution=s.crop_size)  # CLIP's image encoder
    if backbone is not None:  # imports are here, so that for ResNets a copy of this file works without backbones.py
        from backbones import AttentionPoolBackbone, build_backbone

        module = build_backbone(name, backbone_weights, s.drop_path) if backbone is name else backbone
        image_encoder = AttentionPoolBackbone(module, embed_dim, s.crop_size, s.imagenet_normalize)
    elif a.patch_size:
        from backbones import PyramidViT

        image_encoder = PyramidViT(visual, s.quick_gelu, s.drop_path, s.double_class_embedding)
    else:
        image_encoder = ResNet(visual, crop_positions=preset.detection)
    if source is None:
        encoder = PlainEncoder(image_encoder, class_names)
    else:
        sizes = {"width": preset.decoder_width, "layers": s.decoder_layers}
        stored = StoredText(torch.zeros(1, len(class_names), a.embed_dim)) if s.stored_text else None
        text = stored or TextEncoder(replace(a, context_length=s.context_length), s.quick_gelu)
        prompt_decoder = ContextDecoder(a.embed_dim, a.text_width, **sizes) if source == "image" else None
        context_decoder = ContextDecoder(a.embed_dim, **sizes) if refined else None
        options = {"gamma": s.gamma, "learn_gamma": s.learn_gamma, "join_score_map": s.join_score_map}
        options |= {"num_contexts": 0 if stored else s.num_contexts or 0, "templates": s.templates or ("{}",)}
        options["score_temperature"] = s.tau if preset.detection else 1.0
        encoder = LanguageGuidedEncoder(image_encoder, text, class_names, prompt_decoder, context_decoder, **options)
    if clip is not None:
        load_clip_weights(encoder, a, clip)
    return encoder, s


def check_class_names(class_names: list[str], number: int = 0) -> None:
    """A ValueError unless class_names is a list of distinct, non-empty names, as many as `number` if that is not 0."""
    line = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"  # neither control characters nor lone surrogates
    if isinstance(class_names, str) or not class_names or not all(re.fullmatch(line, name) for name in class_names):
        raise ValueError(f"expected a list of class names, each a single, non-empty line, got {class_names!r:.300}")
    if repeated := sorted({name for name in class_names if list(class_names).count(name) > 1}):
        raise ValueError(f"class names must differ, but {', '.join(map(repr, repeated))} occurs more than once")
    if number and len(class_names) != number:
        how = f"whose head needs {number}; predict.py --classes draws score maps of any names"
        raise ValueError(f"{len(class_names)} class names for a model trained with {number}, {how}")


def load_clip_weights(encoder: nn.Module, expected: Architecture, clip: str) -> None:
    """Load CLIP's text encoder, and its image encoder with positional embeddings resized, unless it was replaced."""
    weights = clip_model.read_weights(clip)
    found, ours = asdict(clip_model.read_architecture(weights, clip)), asdict(expected)
    if differ := [key for key in found if found[key] != ours[key] and key != "input_resolution"]:
        what = ", ".join(f"{key} is {found[key]}, the model expects {ours[key]}" for key in differ)
        raise ValueError(f"{clip}: weights of another architecture: {what}")
    if isinstance(encoder, LanguageGuidedEncoder):
        text = {key: value for key, value in weights.items() if not key.startswith(("visual.", "logit_scale"))}
        clip_model.load_weights(encoder.text_encoder, text, clip)
    if isinstance(encoder.backbone, (ResNet, VisionTransformer)):
        state = encoder.backbone.state_dict()
        visual = {key: value for key, value in state.items() if key.startswith("fpn")}  # PyramidViT's, not in CLIP
        visual |= {key: weights[f"visual.{key}"] for key in state if f"visual.{key}" in weights}
        for key in visual:  # the positional embeddings of a ViT, or of attnpool, which the baselines do not have
            if key.endswith("positional_embedding"):
                grid = round((len(state[key]) - 1) ** 0.5)
                visual[key] = clip_model.resize_positions(visual[key], (grid, grid))
        clip_model.load_weights(encoder.backbone, visual, clip)


def save_checkpoint(path: str | Path, model: nn.Module, **extra) -> None:
    """Write the model's name, settings, class names and weights, and `extra`: only tensors and built-in types.
    The file is renamed once it is complete: after a crash, or if a weight is not finite, the previous one is kept."""
    if wrong := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise ValueError(f"{path} was left as it was: {wrong[0]} is not finite; a lower --lr or --clip-grad may help")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {"name": model.name, "settings": asdict(model.settings), "class_names": model.class_names}
    with clip_model.replacing(path) as part, open(part, "wb") as file:
        torch.save({**checkpoint, "model": model.state_dict(), **extra}, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary that `save_checkpoint` wrote, on the CPU; a ValueError for any other file."""
    checkpoint = clip_model.read_tensors(path)
    if not isinstance(checkpoint, dict) or not {"name", "settings", "class_names", "model"} <= checkpoint.keys():
        how = f"if it is of the authors' release, convert it: python convert.py {path} OURS.pt"
        raise ValueError(f"{path}: expected a checkpoint that train.py or detect.py wrote; {how}")
    kinds = {"name": str, "settings": dict, "class_names": list, "model": dict, "run": dict, "data": dict}
    kinds |= {"iteration": int, "best": float, "optimizer": dict, "random_states": list, "run.iterations": int}
    kinds |= {"data.colors": list, "data.val": list, "run.reduce_zero_label": bool, "run.ignore_index": int}
    parts = {k: v for k, v in checkpoint.items() if k in ("data", "run") and isinstance(v, dict)}
    found = checkpoint | {f"{k}.{name}": value for k, part in parts.items() for name, value in part.items()}
    types = {name: isinstance(found[name], kind) for name, kind in kinds.items() if name in found}
    types["class_names"] = types["class_names"] and all(isinstance(name, str) for name in found["class_names"])
    types["model"] = types["model"] and all(map(clip_model.is_plain, found["model"].values()))
    if wrong := [name for name, right in types.items() if not right]:
        raise ValueError(f"{path}: a damaged checkpoint, its {' and '.join(wrong)} cannot be read")
    return checkpoint


def load_checkpoint(path: str | Path, backbone: str | nn.Module | None = None) -> DenseCLIP:
    """The segmentation model saved by train.py, in evaluation mode on the CPU. Options: see `restore_model`."""
    return restore_model(read_checkpoint(path), path, build_model, backbone)


def restore_model(checkpoint: dict, path: str | Path, build: Callable, backbone=None) -> nn.Module:
    """The model in what `read_checkpoint` read from path; build: `build_model` of either task. Calls `keep_memory`.
    backbone: module or string of your own, as it was given for training; a checkpoint alone never imports code."""
    saved = checkpoint["settings"].get("backbone")
    if backbone is None and ":" in str(saved):
        raise ValueError(f"{path}: its backbone is code that is not in the file; --backbone {saved} imports it")
    settings = checkpoint["settings"] | {"backbone": saved if backbone is None else backbone}
    try:
        Settings(**settings)  # no other names, such as "clip"
        model = build(checkpoint["name"], checkpoint["class_names"], **settings)
        clip_model.load_weights(model, checkpoint["model"], "weights")
    except Exception as error:  # whatever a file may hold
        reason = (str(error) or repr(error)).partition("\n")[0]
        raise ValueError(f"{path}: its model cannot be built: {reason:.500}") from error
    keep_memory()
    return model.eval()


def keep_memory() -> None:
    """This process now keeps the memory that it frees, for its next tensors, as PyTorch does on GPUs. On Linux with
    glibc, mapping it anew takes up to a quarter of the time of inference on CPUs. Training would need more memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which ends with it
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: memory at the end of the heap is never given back
