"""Networks with attention of many kinds, small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class TalkingHeads(nn.Module):
    """Linears between heads (CaiT), before and after the softmax, and frozen batch norms."""

    class Frozen(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "mean", "variance"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            buffers = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
            weight, bias, mean, variance = buffers
            scale = weight * (variance + 1e-5).rsqrt()
            return x * scale + (bias - mean * scale)

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.frozen, self.num_heads = nn.Conv2d(3, 16, 2, 2), self.Frozen(16), 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 5)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.frozen(self.patches(x))).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class ChannelAttention(nn.Module):
    """XCiT: attention between the channels of a head, of vectors that are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.num_heads = nn.Conv2d(3, 16, 2, 2), 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 5)
        self.temperature = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        scores = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((scores @ v).permute(0, 3, 1, 2).reshape(b, n, -1))


class OneShare(nn.Module):
    """A vision transformer as it is mostly written: `B, N, C = x.shape`, `reshape(B, N, C)`.

    So the heads and the stream have to keep one share of their units.
    """

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.num_heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

        def attention(self, x: Tensor) -> Tensor:
            B, N, C = x.shape
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1)) * 0.5
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(self.Block(16, 4), self.Block(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Backbone(nn.Module):
    """A vision transformer without a head (EVA, DINO): its stream is the output, and stays.

    Rotary embeddings turn neighbouring entries, which are stacked and reshaped again. So do tokens
    stay, whose positions have an embedding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.num_heads = nn.Conv2d(3, 16, 2, 2), 4
        self.positions = nn.Parameter(torch.randn(1, 16, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        angles = torch.rand(16, 4)
        self.register_buffer("sin", angles.sin())
        self.register_buffer("cos", angles.cos())

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.cos + pairs * self.sin

    def attention(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class TorchEncoder(nn.Module):
    """torch's own encoder layers, with padding; the norms come first in one of them."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, "dim_feedforward": 20, "dropout": 0.0}
        self.patches = nn.Conv2d(3, 12, 2, 2)
        self.first = nn.TransformerEncoderLayer(12, 4, **options)
        self.second = nn.TransformerEncoderLayer(12, 2, norm_first=True, **options)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        padding = x.new_zeros(len(x), 16, dtype=torch.bool)
        padding[:, 12:] = True
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.first(x, src_key_padding_mask=padding)
        return self.head(self.second(x)[:, :12].mean(1))


class Translator(nn.Module):
    """torch's nn.Transformer: attention from one sequence to another, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 12), nn.Embedding(30, 12)
        self.body = nn.Transformer(12, 4, 1, 1, 20, 0.0, batch_first=True)
        self.head = nn.Linear(12, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3)
        mask = mask.to(self.head.weight)
        target = self.target(tokens[:, 4:])
        return self.head(self.body(self.source(tokens[:, :4]), target, tgt_mask=mask))
