"""Networks with attention of many kinds, whose heads can lose dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Packed projections and one size of heads, as in timm.

    scale: None: torch's own, which divides by the root of the size
    norm:  of the queries and of the keys of each head
    """

    def __init__(self, scale: float | None = None, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH // HEADS, WIDTH
        self.scale = scale
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.scale is None:
            x = functional.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Rotary(nn.Module):
    """Rotary embeddings, and two heads of queries for each of keys and values, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.proj = nn.Linear(32, WIDTH)
        self.register_buffer("frequencies", 0.5 ** torch.arange(4.0))

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1]).float()[:, None] @ self.frequencies[None]
        angles = torch.cat((angles, angles), -1)
        q, k = self.rotated(q, angles), self.rotated(k, angles)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        scores = (q @ k.transpose(-2, -1) * 0.4).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """torch's attention of several heads of queries for each of keys, and separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.proj = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, -1).transpose(1, 2)
        k, v = (layer(x).view(b, n, 2, -1).transpose(1, 2) for layer in (self.k, self.v))
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(x.transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """A bias of queries for each head and dimension (Transformer-XL), and factors of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, WIDTH // HEADS))
        self.factors = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part.view(b, n, HEADS, -1) for part in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("bihd,bjhd->bhij", q + self.bias, k) * self.factors
        return self.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(b, n, -1))


class LinearAttention(nn.Module):
    """Keys and values are multiplied first; no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = q.relu(), k.relu()
        values = k.transpose(-2, -1) @ v
        weights = q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1
        return self.proj((q @ values / weights).transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x.flip(1), x, need_weights=False)[0]
        return output


class Network(nn.Module):
    """Two blocks of attention and feed-forward units along a residual stream."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(kind(**options) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return self.last(x.mean(1))


KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "torch's scale": (Attention, {}),
    "scale of its own": (Attention, {"scale": 0.4}),
    "norms": (Attention, {"norm": nn.LayerNorm}),
    "norms, scale of its own": (Attention, {"norm": nn.RMSNorm, "scale": 0.4}),
    "rotary": (Rotary, {}),
    "grouped": (Grouped, {}),
    "biased": (Biased, {}),
    "linear attention": (LinearAttention, {}),
    "torch's module": (Torchs, {}),
    "torch's module, more keys": (Torchs, {"bias": False, "add_bias_kv": True}),
}


def of_kind(kind: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights in eval mode, and 32 samples of 7 tokens."""
    torch.manual_seed(0)
    attention, options = KINDS[kind]
    model = Network(attention, **options).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    return model, torch.randn(32, 7, 6)
