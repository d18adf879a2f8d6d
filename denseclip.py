"""DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting (Rao et al., CVPR 2022, arXiv 2112.01518).

Read from `LanguageGuidedEncoder.forward` (the method, Figure 3) to `DenseCLIP.forward` (segmentation).
This file needs clip_model.py and tokenizer.py, and backbones.py for image encoders other than CLIP's.

    paper      here                  shape
    ---------  --------------------  -------------------------------------------------------------------------
    x1 .. x4   pyramid               four maps, (B, C_i, H_i, W_i)
    z_bar      global_embedding      (B, C)            CLIP's embedding of the image
    z          visual_embeddings     (B, C, H4, W4)    the language-compatible feature map
    [z_bar, z] memory                (B, 1 + H4 W4, C) what the context decoder looks at
    p          contexts              (1, N, D)         learned, in the place of "a photo of a"; D: text width
    q          queries               (1, N, C)         learned, what pre-model prompting makes contexts from
    e_k        tokens                (K, L)            the class names' tokens
    t          text_embeddings       (B, K, C)
    gamma      gamma                 (C,)              how much of the context decoder's answer is added to t
    s          score_map             (B, K, H4, W4)    cosine of every pixel with every class name
    tau        tau                   0.07
    y          labels                (B, H, W)         in [0, K), or 255: ignored

For a ResNet H4 = H / 32; for a ViT it is H / patch size, and x3 is the map that has this size.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_model import (
    ARCHITECTURES,
    Architecture,
    ResNet,
    TextEncoder,
    VisionTransformer,
    load_weights,
    read_architecture,
    read_weights,
    resize_positions,
)
from tokenizer import encode, tokenize

IGNORE_INDEX = 255


# ------------------------------------------------------------------------------------------------ the method


class LanguageGuidedEncoder(nn.Module):
    """Image in, pyramid with score map out: everything of DenseCLIP but the task's own head.

    backbone:        images -> (pyramid, global_embedding, visual_embeddings), with the attributes `channels` (of the
                     pyramid's maps) and `score_level` (the index of the map that has visual_embeddings' size)
    text_encoder:    CLIP's, frozen; gradients flow through it to the contexts
    num_contexts:    N learned context vectors in front of each class name, Eq. (3); 0: `template` alone
    context_decoder: for post-model prompting, Eqs. (5) and (6); None: the text does not depend on the image
    gamma:           its start; learned, unless learn_gamma is False
    score_map:       False leaves the pyramid as the backbone gave it
    score_temperature: divides the score map where it joins the pyramid (released code: tau in detection)
    """

    def __init__(
        self,
        backbone: nn.Module,
        text_encoder: TextEncoder,
        class_names: list[str],
        context_decoder: nn.Module | None = None,
        num_contexts: int = 8,
        gamma: float = 1e-4,
        learn_gamma: bool = True,
        score_map: bool = True,
        score_temperature: float = 1.0,
        template: str = "{}",
    ):
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder.requires_grad_(False)
        self.context_decoder = context_decoder
        self.num_contexts, self.template = num_contexts, template
        self.join_score_map, self.score_temperature = score_map, score_temperature
        self.contexts = self.gamma = None
        if num_contexts:
            self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, text_encoder.width)))
        if context_decoder is not None:
            self.gamma = nn.Parameter(torch.full((text_encoder.embed_dim,), float(gamma)), requires_grad=learn_gamma)
        self.set_class_names(class_names)
        self.channels = list(backbone.channels)  # of the pyramid that forward returns
        if score_map:
            self.channels[backbone.score_level] += len(class_names)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """images: (B, 3, H, W) RGB, normalised with CLIP's mean and std.

        return: the pyramid, x1 .. x4 with the score map joined to one of them; the score map (B, K, H4, W4);
            the text embeddings (B, K, C)
        """
        # Eq. (1): [z_bar, z] = MHSA([x4_bar, x4]), CLIP's attention pool kept at every position
        pyramid, global_embedding, visual_embeddings = self.backbone(images)
        memory = torch.cat([global_embedding[:, None], visual_embeddings.flatten(2).transpose(1, 2)], dim=1)

        # Eq. (3): t = TextEncoder([p, e_k])
        text_embeddings = self.embed_class_names(memory)  # (B, K, C)

        # Eq. (5): v = TransDecoder(t, [z_bar, z]);  Eq. (6): t <- t + gamma v
        if self.context_decoder is not None:
            text_embeddings = text_embeddings + self.gamma * self.context_decoder(text_embeddings, memory)

        # Eq. (2): s = z_hat t_hat^T, then x4' = [x4, s]
        score_map = pixel_text_scores(visual_embeddings, text_embeddings)  # (B, K, H4, W4)
        if self.join_score_map:
            level = self.backbone.score_level
            pyramid[level] = torch.cat([pyramid[level], score_map / self.score_temperature], dim=1)
        return pyramid, score_map, text_embeddings

    def embed_class_names(self, memory: Tensor) -> Tensor:
        """Text embeddings of the class names before they have seen the image, (B, K, C). Eq. (3).

        They are the same for all images: in evaluation they are computed once, and are constants to autograd.
        """
        if self.training:
            return self._encode_text().expand(len(memory), -1, -1)
        return self._cached_text().expand(len(memory), -1, -1)

    def _encode_text(self) -> Tensor:
        contexts = () if self.contexts is None else (self.contexts,)
        return self.text_encoder(self.tokens, *contexts).view(1, len(self.tokens), -1)

    @torch.compiler.disable  # reads version counters
    def _cached_text(self) -> Tensor:
        # An in-place change of a tensor raises its version, and a move to another device or type gives it new memory.
        # Fused optimisers and `p.data` change values without a version: hence train() below, and the contexts, which
        # alone are usually trained, are compared by value.
        tensors = [self.tokens, *self.text_encoder.parameters()]
        state = [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
        fresh = self._text_cache is not None and self._text_cache[0] == state
        if fresh and self.contexts is not None:
            kept = self._text_cache[1]
            fresh = kept.device == self.contexts.device and torch.equal(kept, self.contexts)
        if not fresh:
            # In full precision and as a plain tensor, whatever mode the first caller was in.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.tokens.device.type, enabled=False):
                kept = None if self.contexts is None else self.contexts.detach().clone()
                self._text_cache = (state, kept, self._encode_text())
        return self._text_cache[2]

    def train(self, mode: bool = True) -> "LanguageGuidedEncoder":
        self._text_cache = None
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):  # .to(), .cuda(), .half(): memory may be used again at the same address
        self._text_cache = None
        return super()._apply(fn, *args, **kwargs)

    def set_class_names(self, class_names: list[str]) -> None:
        """Guide by these names from now on, for instance others than in training (there must be as many for a head)."""
        check_class_names(class_names)
        texts = [self.template.format(name) for name in class_names]
        # Released code: 5 tokens, and a name of more than 3 was an error. Here they are as many as the longest needs.
        length = max(5, 2 + max(len(encode(text)) for text in texts))
        room = self.text_encoder.context_length - self.num_contexts
        if length > room:
            longest = max(texts, key=lambda text: len(encode(text)))
            raise ValueError(f"class name {longest!r} has {length} tokens, but the text encoder has room for {room}")
        device = self.text_encoder.token_embedding.weight.device
        self.register_buffer("tokens", tokenize(texts, length).to(device), persistent=False)  # (K, L)
        self.class_names = list(class_names)
        self._text_cache = None


class PreModelEncoder(LanguageGuidedEncoder):
    """Pre-model prompting: the image makes the contexts, so the text encoder runs for every image.

    prompt_decoder: a ContextDecoder, (queries, memory) -> (B, N, text width)
    """

    def __init__(
        self,
        backbone: nn.Module,
        text_encoder: TextEncoder,
        class_names: list[str],
        prompt_decoder: nn.Module,
        num_contexts: int = 8,
        score_map: bool = True,
        score_temperature: float = 1.0,
    ):
        common = {"num_contexts": num_contexts, "score_map": score_map, "score_temperature": score_temperature}
        super().__init__(backbone, text_encoder, class_names, **common)
        self.contexts = None
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_contexts, text_encoder.embed_dim)))
        self.prompt_decoder = prompt_decoder

    def embed_class_names(self, memory: Tensor) -> Tensor:
        # Eq. (4): v = TransDecoder(q, [z_bar, z]), and v takes the place of p in Eq. (3)
        contexts = self.prompt_decoder(self.queries.expand(len(memory), -1, -1), memory)  # (B, N, D)
        return self.text_encoder(self.tokens, contexts)


class PlainEncoder(nn.Module):
    """The baselines without language: the backbone's pyramid as it is."""

    def __init__(self, backbone: nn.Module, class_names: list[str]):
        super().__init__()
        self.backbone, self.class_names = backbone, list(class_names)
        self.channels = list(backbone.channels)

    def forward(self, images: Tensor) -> tuple[list[Tensor], None, None]:
        return self.backbone(images)[0], None, None


class DenseCLIP(nn.Module):
    """Semantic segmentation: language-guided encoder, FPN, Semantic FPN head (or no neck, and UperNet).

    images, normalised (B, 3, H, W), without labels -> logits (B, K, H, W)
    with labels (B, H, W) -> {"loss", "aux_loss"}, scalars whose sum is to be minimised
    """

    def __init__(
        self, encoder: nn.Module, neck: nn.Module, decode_head: nn.Module, aux_weight: float = 0.4, tau: float = 0.07
    ):
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.decode_head = decode_head
        self.aux_weight, self.tau = aux_weight, tau

    @property
    def class_names(self) -> list[str]:
        return self.encoder.class_names

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        pyramid, score_map, _ = self.encoder(images)  # Eqs. (1) to (6)
        logits = self.decode_head(self.neck(pyramid))  # (B, K, H / 4, W / 4)
        if labels is None:
            return resize(logits, images.shape[-2:])

        losses = {"loss": pixel_cross_entropy(logits, labels)}
        if score_map is not None and self.aux_weight:
            # Eq. (7): CE(softmax(s / tau), y). Released code: weighted by 0.4
            losses["aux_loss"] = self.aux_weight * pixel_cross_entropy(score_map / self.tau, labels)
        return losses


def pixel_text_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Cosine similarity of every pixel with every class name, Eq. (2).

    visual: (B, C, H, W)  language-compatible feature map z
    text:   (B, K, C)     text embeddings t
    return: (B, K, H, W)  in [-1, 1]; divide by tau before a loss
    """
    return torch.einsum("bchw,bkc->bkhw", F.normalize(visual, dim=1), F.normalize(text, dim=2))


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the labels' size.

    logits: (B, K, h, w), any size; labels: (B, H, W)
    Released code: the mean is over all pixels, the ignored ones counted as 0.
    """
    logits = resize(logits.float(), labels.shape[-2:])
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / labels.numel()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, C, h, w) to (B, C, H, W)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------ context decoder


class Attention(nn.Module):
    """Multi-head attention of the context decoder: no bias but the output's."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """queries: (B, K, width); memory: (B, N, width); return: (B, K, width)."""
        q, k, v = self.q_proj(queries), self.k_proj(memory), self.v_proj(memory)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, K, width / heads)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


class DecoderLayer(nn.Module):
    """Pre-norm: self-attention among the queries, cross-attention to the image, MLP."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        expand, contract = nn.Linear(width, width * 4), nn.Linear(width * 4, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), nn.Dropout(dropout), contract, nn.Dropout(dropout))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class ContextDecoder(nn.Module):
    """TransDecoder of Eqs. (4) and (5): what the image has to say to every class name, or to every query.

    embed_dim: C of text and memory; out_dim: of the answer, C if None
    Released code: 3 layers, where the paper's text says 6.
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int | None = None,
        width: int = 256,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim or embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """text: (B, K, C); memory: (B, 1 + HW, C); return: v (B, K, out_dim)."""
        memory, x = self.memory_proj(memory), self.text_proj(text)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out_proj(x)


# ------------------------------------------------------------------------------------------------ pyramid and head


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    """A convolution, or [convolution, batch norm, ReLU], initialised as in the released code."""
    padding = kernel_size // 2
    layers = {"conv": nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not norm)}
    nn.init.kaiming_normal_(layers["conv"].weight, mode="fan_out", nonlinearity="relu")
    if norm:
        layers.update(bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU())
    else:
        nn.init.zeros_(layers["conv"].bias)
    return nn.Sequential(OrderedDict(layers))


class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017): lateral 1x1, top-down sums by nearest up-sampling, 3x3 on each level."""

    def __init__(self, in_channels: list[int], channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in in_channels)

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """[(B, C_i, H_i, W_i)], fine to coarse -> [(B, channels, H_i, W_i)]."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, pyramid, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])
        return [output(x) for output, x in zip(self.fpn_convs, laterals, strict=True)]


class SemanticFPNHead(nn.Module):
    """Semantic FPN (Kirillov et al., 2019): every level brought to the finest one's size, summed, classified.

    Level i, of twice the stride of level i - 1, has max(1, i) blocks, each but level 0's followed by x2 up-sampling.
    """

    def __init__(self, num_classes: int, channels: int = 256, levels: int = 4, dropout: float = 0.1):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level in range(levels):
            blocks = []
            for _ in range(max(1, level)):
                blocks.append(conv(channels, channels, 3, norm=True))
                if level > 0:
                    blocks.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*blocks))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """[(B, channels, H_i, W_i)] -> logits (B, K, H_0, W_0)."""
        finest, *coarser = (head(level) for head, level in zip(self.scale_heads, pyramid, strict=True))
        x = sum((resize(x, finest.shape[-2:]) for x in coarser), start=finest)
        return self.conv_seg(self.dropout(x))


class UperNetHead(nn.Module):
    """UperNet (Xiao et al., 2018), as mmsegmentation builds it: pyramid pooling on the coarsest map, top-down sums,
    all levels brought to the finest one's size and fused by one convolution. It is neck and head in one.

    Not here: the auxiliary FCN head on the third map that mmsegmentation trains beside it with weight 0.4.
    Training needs two images a batch or more: batch norm sees one pixel an image behind the coarsest pooling.
    """

    def __init__(self, in_channels: list[int], num_classes: int, channels: int = 512, dropout: float = 0.1):
        super().__init__()
        *finer, coarsest = in_channels
        bins = (1, 2, 3, 6)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(coarsest, channels, 1, norm=True)) for size in bins
        )
        self.bottleneck = conv(coarsest + len(bins) * channels, channels, 3, norm=True)
        self.lateral_convs = nn.ModuleList(conv(c, channels, 1, norm=True) for c in finer)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3, norm=True) for _ in finer)
        self.fpn_bottleneck = conv(len(in_channels) * channels, channels, 3, norm=True)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """[(B, C_i, H_i, W_i)], fine to coarse -> logits (B, K, H_0, W_0)."""
        *finer, coarsest = pyramid
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.psp_modules]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        outputs = [output(x) for output, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        x = torch.cat([resize(x, outputs[0].shape[-2:]) for x in outputs], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(x)))


class PyramidViT(VisionTransformer):
    """CLIP's ViT with its four maps brought to strides P/4, P/2, P and 2P, P the patch size."""

    def __init__(self, **settings):
        super().__init__(**settings)
        width = self.channels[0]
        self.fpn1 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.GroupNorm(1, width), nn.ConvTranspose2d(width, width, 2, stride=2))
        self.fpn3 = nn.GroupNorm(1, width)
        self.fpn4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        pyramid, global_embedding, visual_embeddings = super().forward(images)
        scales = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [scale(x) for scale, x in zip(scales, pyramid, strict=True)], global_embedding, visual_embeddings


# ------------------------------------------------------------------------------------------------ factories


@dataclass(frozen=True)
class Preset:
    """A named model: which CLIP, and the sizes that belong to it."""

    architecture: Architecture
    crop_size: int  # pixels; training crop, window of evaluation, and what the positional grid is set up for
    drop_path: float = 0.0
    channels: int = 256  # of FPN and head
    decoder_width: int = 256  # of the context decoder


PRESETS = {
    "rn50": Preset(ARCHITECTURES["RN50"], 512),
    "rn101": Preset(ARCHITECTURES["RN101"], 512),
    "rn50x4": Preset(ARCHITECTURES["RN50x4"], 512),
    "rn50x16": Preset(ARCHITECTURES["RN50x16"], 512),
    "rn50x64": Preset(ARCHITECTURES["RN50x64"], 512),
    "vitb32": Preset(ARCHITECTURES["ViT-B/32"], 640, drop_path=0.1),
    "vitb16": Preset(ARCHITECTURES["ViT-B/16"], 640, drop_path=0.1),
    "vitl14": Preset(ARCHITECTURES["ViT-L/14"], 644, drop_path=0.1),  # 46 patches a side
    "vitl14_336": Preset(ARCHITECTURES["ViT-L/14@336px"], 644, drop_path=0.1),
    # for a CPU, from random weights
    "tiny": Preset(Architecture(128, 128, (1, 1, 1, 1), 32, 0, 64, 2), 128, channels=64, decoder_width=64),
    "tiny_vit": Preset(Architecture(128, 128, 4, 128, 16, 64, 2), 128, channels=64, decoder_width=64),
}
PROMPTING = ("post", "pre", "learned", "template", "none")
HEADS = ("fpn", "upernet")


def build_model(
    name: str,
    class_names: list[str],
    clip: str | None = None,
    *,
    head: str = "fpn",
    aux_weight: float = 0.4,
    tau: float = 0.07,
    **encoder_settings,
) -> DenseCLIP:
    """A segmentation model.

    name: one of PRESETS; clip: weights by name or path (see `clip_model.load_clip`), None for random ones
    head: "fpn": Semantic FPN, or "upernet"
    aux_weight, tau: of the auxiliary loss, Eq. (7); encoder_settings: see `build_encoder`
    """
    if head not in HEADS:
        raise ValueError(f"no head named {head!r}: choose one of {', '.join(HEADS)}")
    encoder = build_encoder(name, class_names, clip, **encoder_settings)
    if isinstance(encoder, LanguageGuidedEncoder) and not (aux_weight or encoder.join_score_map):
        raise ValueError('with neither score map nor auxiliary loss language has no effect: that is prompting="none"')
    channels = PRESETS[name].channels
    if head == "fpn":
        neck, decode_head = FPN(encoder.channels, channels), SemanticFPNHead(len(class_names), channels)
    else:
        neck, decode_head = nn.Identity(), UperNetHead(encoder.channels, len(class_names), 2 * channels)
    model = DenseCLIP(encoder, neck, decode_head, aux_weight, tau)
    model.name = name
    model.settings = {"head": head, "aux_weight": aux_weight, "tau": tau, **encoder.settings}
    model.crop_size = encoder.settings["crop_size"]
    return model


def build_encoder(
    name: str,
    class_names: list[str],
    clip: str | None = None,
    *,
    backbone: str | nn.Module | None = None,
    backbone_weights: str | None = None,
    prompting: str = "post",
    num_contexts: int = 8,
    decoder_layers: int | None = None,
    gamma: float = 1e-4,
    learn_gamma: bool = True,
    score_map: bool = True,
    score_temperature: float = 1.0,
    crop_size: int | None = None,
    drop_path: float | None = None,
    context_length: int = 77,
    quick_gelu: bool = True,
    double_class_embedding: bool = True,
    crop_positions: bool = False,
) -> LanguageGuidedEncoder | PlainEncoder:
    """The language-guided encoder without a head, for any dense task.

    backbone:        None: CLIP's image encoder; else `name` says the text encoder alone, and this the image encoder:
                     one of backbones.PYRAMIDS, or a module such as backbones.WithAttentionPool makes
    backbone_weights: of a backbone by name: torchvision's name for them or a path; None: random
    prompting:       "post", the paper's choice: the image refines the text, Eqs. (5) and (6); "pre": the image makes
                     the contexts, Eq. (4); "learned": contexts alone, Eq. (3); "template": "a photo of a {}.";
                     "none": no language, the baseline
    decoder_layers:  None: 3, or 6 for "pre"
    gamma:           its start; learned, unless learn_gamma is False
    score_map:       joined to the pyramid, divided by score_temperature
    crop_size:       pixels a side, for which the positional grid is set up; None: the preset's; drop_path likewise
    context_length:  positions of the text encoder
    quick_gelu:      False for weights trained with GELU (open_clip's)
    double_class_embedding: the released code adds the ViT's class embedding to its token a second time
    crop_positions:  take the corner of the positional grid instead of resizing it (detection)
    """
    if name not in PRESETS:
        raise ValueError(f"no model named {name!r}: choose one of {', '.join(PRESETS)}")
    if prompting not in PROMPTING:
        raise ValueError(f"no prompting named {prompting!r}: choose one of {', '.join(PROMPTING)}")
    check_class_names(class_names)
    preset = PRESETS[name]
    a = preset.architecture
    crop_size = preset.crop_size if crop_size is None else crop_size
    drop_path = preset.drop_path if drop_path is None else drop_path
    decoder_layers = (6 if prompting == "pre" else 3) if decoder_layers is None else decoder_layers
    for what, value, least in (("crop_size", crop_size, 32), ("decoder_layers", decoder_layers, 1),
                               ("num_contexts", num_contexts, 1)):
        if value < least:
            raise ValueError(f"{what} is {value}, it has to be at least {least}")
    settings = {
        "backbone": type(backbone).__name__ if isinstance(backbone, nn.Module) else backbone,
        "prompting": prompting, "num_contexts": num_contexts, "decoder_layers": decoder_layers, "gamma": gamma,
        "learn_gamma": learn_gamma, "score_map": score_map, "score_temperature": score_temperature,
        "crop_size": crop_size, "drop_path": drop_path, "context_length": context_length, "quick_gelu": quick_gelu,
        "double_class_embedding": double_class_embedding, "crop_positions": crop_positions,
    }

    embed_dim = 0 if prompting == "none" else a.embed_dim
    if isinstance(backbone, nn.Module):
        image_encoder = backbone  # such a model is rebuilt by the code that made the module
    elif backbone is not None:
        from backbones import build_backbone

        image_encoder = build_backbone(backbone, backbone_weights, embed_dim, crop_size)
    elif a.patch_size:
        image_encoder = PyramidViT(
            layers=a.layers,
            width=a.width,
            patch_size=a.patch_size,
            embed_dim=embed_dim,
            input_resolution=crop_size,
            quick_gelu=quick_gelu,
            drop_path=drop_path,
            double_class_embedding=double_class_embedding,
        )
    else:
        image_encoder = ResNet(a.layers, a.width, embed_dim, crop_size, crop_positions)

    if prompting == "none":
        encoder = PlainEncoder(image_encoder, class_names)
    else:
        text = TextEncoder(a.embed_dim, a.text_width, a.text_layers, context_length, a.vocab_size, quick_gelu)
        sizes = {"width": preset.decoder_width, "layers": decoder_layers}
        parts = {"backbone": image_encoder, "text_encoder": text, "class_names": class_names}
        join = {"score_map": score_map, "score_temperature": score_temperature}
        if prompting == "pre":
            prompt_decoder = ContextDecoder(a.embed_dim, a.text_width, **sizes)
            encoder = PreModelEncoder(**parts, prompt_decoder=prompt_decoder, num_contexts=num_contexts, **join)
        else:
            encoder = LanguageGuidedEncoder(
                **parts,
                context_decoder=ContextDecoder(a.embed_dim, **sizes) if prompting == "post" else None,
                num_contexts=0 if prompting == "template" else num_contexts,
                gamma=gamma,
                learn_gamma=learn_gamma,
                template="a photo of a {}." if prompting == "template" else "{}",
                **join,
            )
    if clip is not None:
        load_clip_weights(encoder, read_weights(clip), a, clip)
    encoder.settings = settings
    return encoder


def check_class_names(class_names: list[str]) -> None:
    """A ValueError unless class_names is a list of different, non-empty names."""
    if isinstance(class_names, str) or not class_names or not all(class_names):
        raise ValueError(f"expected a list of class names, none of them empty, got {class_names!r}")
    doubled = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if doubled:
        raise ValueError(f"class names must differ, but {', '.join(map(repr, doubled))} came more than once")


def load_clip_weights(encoder: nn.Module, weights: dict[str, Tensor], expected: Architecture, source: str) -> None:
    """Put CLIP's weights into an encoder's backbone, positional embeddings resized to its grid, and text encoder.

    A backbone that is not CLIP's stays as it is.
    """
    found = read_architecture(weights, source)
    for field in ("layers", "width", "patch_size", "embed_dim", "text_width", "text_layers"):
        if getattr(found, field) != getattr(expected, field):
            raise ValueError(
                f"{source}: weights of another architecture: {field} is {getattr(found, field)}, "
                f"the model expects {getattr(expected, field)}"
            )
    if isinstance(encoder.backbone, (ResNet, VisionTransformer)):
        load_visual_weights(encoder, weights, source)
    if not isinstance(encoder, PlainEncoder):
        text = {key: value for key, value in weights.items() if not key.startswith("visual.") and key != "logit_scale"}
        load_weights(encoder.text_encoder, text, source)


def load_visual_weights(encoder: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put CLIP's weights into an encoder's backbone, which is CLIP's."""
    own = encoder.backbone.state_dict()
    visual = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    for key in ("positional_embedding", "attnpool.positional_embedding"):
        if key in visual and key in own:
            grid = round((len(own[key]) - 1) ** 0.5)
            visual[key] = resize_positions(visual[key], (grid, grid))
    if isinstance(encoder, PlainEncoder):  # it has no way into the space of the text
        visual = {key: value for key, value in visual.items() if not key.startswith(("attnpool.", "ln_post.", "proj"))}
    new = {key: value for key, value in own.items() if key.startswith("fpn")}  # PyramidViT's, not in CLIP
    load_weights(encoder.backbone, {**new, **visual}, source)


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: str | Path, model: nn.Module, **extra) -> None:
    """Write tensors and built-ins alone: name, settings, class names and weights of the model, and `extra`.

    The file appears under its name when it is complete: a crash leaves the one before it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    checkpoint = {"name": model.name, "settings": model.settings, "class_names": model.class_names}
    with open(part, "wb") as file:
        torch.save({**checkpoint, "model": model.state_dict(), **extra}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_checkpoint(path: str | Path, unsafe: bool = False) -> dict:
    """The dictionary in a checkpoint file, ours or the released code's, on the CPU.

    unsafe: also unpickle arbitrary objects, which can run code; the released files' "meta" may hold such.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path) and Path(path).read_bytes()[:1] != b"\x80":  # neither of torch.save's formats
            raise ValueError(f"{path}: not a checkpoint, or cut short") from None
        raise ValueError(
            f"{path}: holds more than tensors and built-ins. If you trust where it comes from, "
            "load_checkpoint(path, unsafe=True), or eval.py --unsafe, reads it, running whatever code it holds"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint, perhaps cut short: copy it again ({reason})") from None
    ours = {"name", "settings", "class_names", "model"}
    if not isinstance(checkpoint, dict) or not (ours <= checkpoint.keys() or "state_dict" in checkpoint):
        raise ValueError(f"{path}: expected a checkpoint of train.py or of the released code, with weights in it")
    return checkpoint


def load_checkpoint(path: str | Path, class_names: list[str] | None = None, unsafe: bool = False) -> DenseCLIP:
    """The model in a file of train.py or of the authors' release, in evaluation mode on the CPU.

    class_names: for released files that do not hold them; unsafe: see `read_checkpoint`
    """
    return restore_model(read_checkpoint(path, unsafe), path, class_names)


def restore_model(checkpoint: dict, path: str | Path, class_names: list[str] | None = None) -> DenseCLIP:
    """The model in what `read_checkpoint` read from path."""
    if "settings" in checkpoint:
        name, weights, settings = checkpoint["name"], checkpoint["model"], checkpoint["settings"]
        class_names = checkpoint["class_names"]
        if name not in PRESETS:
            raise ValueError(f"{path}: {name!r} is no segmentation model; detection.load_checkpoint reads detectors")
    else:
        name, weights, settings = from_released(checkpoint["state_dict"], path)
        class_names = released_class_names(checkpoint, len(weights["decode_head.conv_seg.weight"]), path, class_names)
    try:
        model = build_model(name, class_names, **settings)
    except TypeError as error:
        raise ValueError(f"{path}: a setting that this version does not know, is it newer? ({error})") from None
    load_weights(model, weights, str(path))
    return model.eval()


def from_released(state_dict: dict[str, Tensor], path: str | Path) -> tuple[str, dict[str, Tensor], dict]:
    """The released code's segmentation weights under our names; return: preset, weights, settings of `build_model`."""
    if "decode_head.conv_seg.weight" not in state_dict:
        raise ValueError(f"{path}: not a segmentation model of the released code: no decode_head.conv_seg.weight in it")
    ours = ("neck.", "decode_head.")
    weights = {key if key.startswith(ours) else f"encoder.{key}": value for key, value in state_dict.items()}
    name, settings = read_released_encoder(state_dict, path)
    return name, weights, settings


def read_released_encoder(state_dict: dict[str, Tensor], path: str | Path) -> tuple[str, dict]:
    """Preset and settings of `build_encoder` that the released code's weights belong to, for any task."""
    as_clip = {}
    for key, value in state_dict.items():
        if key.startswith(("backbone.", "text_encoder.")):
            as_clip[key.replace("backbone.", "visual.", 1).removeprefix("text_encoder.")] = value
    found = read_architecture(as_clip, str(path))
    names = {(p.architecture.layers, p.architecture.width, p.architecture.patch_size): n for n, p in PRESETS.items()}
    name = names.get((found.layers, found.width, found.patch_size))
    if name is None:
        raise ValueError(f"{path}: no model here has its backbone ({found}): choose from {', '.join(PRESETS)}")
    settings = {"prompting": "post" if found.text_width else "none", "context_length": found.context_length or 77}
    if found.input_resolution:  # baselines have no positional grid
        settings["crop_size"] = found.input_resolution
    return name, settings


def released_class_names(checkpoint: dict, expected: int, path: str | Path, given: list[str] | None) -> list[str]:
    """The names that a released checkpoint holds, unless others are given; they must be as many as the model's."""
    class_names = given or list((checkpoint.get("meta") or {}).get("CLASSES") or [])
    if len(class_names) != expected:
        raise ValueError(f"{path}: a model of {expected} classes, but {len(class_names)} names; give class_names")
    return class_names
