"""Attention whose table of biases holds its shape in a tuple."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Biased(nn.Module):
    """Attention in windows, by timm: the table of biases has its shape, with the heads, in a tuple.

    The module of the table does not run: another one reads its table.
    """

    class Table(nn.Module):
        def __init__(self, area: int, heads: int, kind: type) -> None:
            super().__init__()
            self.area, self.shape = area, kind((area, area, heads))
            self.table = nn.Parameter(torch.randn(2 * area - 1, heads))
            places = torch.arange(area)
            self.register_buffer("index", places[:, None] - places + area - 1)

        def bias(self) -> Tensor:
            return self.table[self.index.flatten()].view(*self.shape).permute(2, 0, 1)

    def __init__(self, area: int, heads: int, kind: type) -> None:
        super().__init__()
        self.num_heads, self.bias = heads, self.Table(area, heads, kind)
        self.qkv, self.proj = nn.Linear(5, 3 * heads * 2), nn.Linear(heads * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        residual, qkv = x, self.qkv(x).view(*x.shape[:2], 3, self.num_heads, 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.bias())
        return residual + self.proj(x.transpose(1, 2).flatten(2))
