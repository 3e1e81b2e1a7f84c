"""Networks of many kinds, small: what carries units in the public architectures after them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_kinds import (
    Backbone,
    ChannelAttention,
    OneShare,
    TalkingHeads,
    TorchEncoder,
    Translator,
)
from recurrent_kinds import Reader, Recurrent, StateSpace, Tagger
from torch import Tensor, nn
from torch.nn import functional


class Encoder(nn.Module):
    """A vision transformer as timm writes it: fused qkv, `unbind`, sizes in attributes."""

    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.num_heads, self.head_dim, self.attn_dim = heads, dim // heads, dim
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            x = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
            return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attn = Encoder.Attention(dim, heads)
            self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
            self.scale = nn.Parameter(torch.rand(dim) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x)) * self.scale
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 16)) for n in (1, 5))
        self.blocks = nn.Sequential(Encoder.Block(16, 4), Encoder.Block(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windows(nn.Module):
    """Swin: attention in windows that roll, with a table of biases for each head, and merging."""

    class Block(nn.Module):
        def __init__(self, dim: int, shift: int) -> None:
            super().__init__()
            self.shift, self.heads = shift, 2
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.table = nn.Parameter(torch.randn(9, 2))
            ys, xs = (i.flatten() for i in torch.meshgrid(*[torch.arange(2)] * 2, indexing="ij"))
            index = (ys[:, None] - ys + 1) * 3 + xs[:, None] - xs + 1
            self.register_buffer("index", index)
            self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            b, h, w, c = x.shape
            rolled = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
            windows = rolled.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
            windows = windows.reshape(-1, 4, c)
            qkv = self.qkv(windows).reshape(len(windows), 4, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
            out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            out = self.proj(out).view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
            x = x + torch.roll(out.reshape(b, h, w, -1), (self.shift, self.shift), (1, 2))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.first = nn.Sequential(Windows.Block(8, 0), Windows.Block(8, 1))
        self.merged, self.reduction = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.last, self.norm, self.head = Windows.Block(16, 0), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.patches(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.last(self.reduction(self.merged(torch.cat(corners, -1))))
        return self.head(self.norm(x).mean((1, 2)))


class UNet(nn.Module):
    """Skips by `cat`, interpolation, GroupNorm and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.same, self.norm = nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.up, self.last = nn.Conv2d(20, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = functional.silu(self.down(x))
        low = functional.silu(self.deep(high))
        low = low + self.same(functional.silu(self.norm(low)))
        low = functional.interpolate(low, scale_factor=2.0, mode="bilinear")
        return self.last(functional.silu(self.up(torch.cat([low, high], 1))))


class Dense(nn.Module):
    """DenseNet: every layer takes the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(4))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.head = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(functional.relu(norm(x)))], 1)
        return self.head(functional.relu(self.norms[3](x)).mean((2, 3)))


class Detector(nn.Module):
    """YOLO: C2f blocks (chunk, a list, cat), pyramid pooling, heads at two scales."""

    class C2f(nn.Module):
        def __init__(self, ins: int, outs: int) -> None:
            super().__init__()
            self.cv1, self.cv2 = nn.Conv2d(ins, outs, 1), nn.Conv2d(2 * outs, outs, 1)
            half = outs // 2
            self.a = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(2))
            self.b = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).chunk(2, 1))
            y.extend(y[-1] + b(functional.silu(a(y[-1]))) for a, b in zip(
                self.a, self.b, strict=True
            ))  # fmt: skip
            return functional.silu(self.cv2(torch.cat(y, 1)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.first, self.second = Detector.C2f(8, 8), Detector.C2f(8, 12)
        self.squeeze, self.spread = nn.Conv2d(12, 6, 1), nn.Conv2d(18, 12, 1)
        self.neck = Detector.C2f(20, 8)
        self.heads = nn.ModuleList([nn.Conv2d(8, 7, 1), nn.Conv2d(12, 7, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.first(self.stem(x))
        coarse = self.squeeze(self.second(self.down(fine)))
        pooled = functional.max_pool2d(coarse, 3, 1, 1)
        coarse = self.spread(torch.cat([coarse, pooled, functional.max_pool2d(pooled, 3, 1, 1)], 1))
        fine = self.neck(torch.cat([functional.interpolate(coarse, scale_factor=2.0), fine], 1))
        return self.heads[0](fine), self.heads[1](coarse)


class Res2Net(nn.Module):
    """Channels in parts of a width that an attribute holds; each part is added to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.first, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.parts = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.last, self.head = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.norm(self.first(x)).relu(), self.width, 1)
        one = self.parts[0](parts[0])
        other = self.parts[1](one + parts[1])
        return self.head(self.last(torch.cat([one, other, parts[2]], 1)).relu())


class ConvNeXt(nn.Module):
    """Depthwise convolution, channels last, layer scale, a global response norm (V2)."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.deep, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)
            self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
            self.gamma, self.beta = (nn.Parameter(torch.rand(2 * dim)) for _ in range(2))
            self.scale = nn.Parameter(torch.rand(dim) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.gelu(self.fc1(self.norm(self.deep(x).permute(0, 2, 3, 1))))
            size = y.norm(p=2, dim=(1, 2), keepdim=True)
            size = size / (size.mean(-1, keepdim=True) + 1e-6)
            y = y + torch.addcmul(self.beta, self.gamma, y * size)
            return x + (self.fc2(y) * self.scale).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 12, 2, 2), nn.Sequential(*map(self.Block, [12, 12]))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class RepVGG(nn.Module):
    """Branches with and without a convolution, added up; all layers read and write one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.large = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(2))
        self.small = nn.ModuleList(nn.Conv2d(10, 10, 1) for _ in range(2))
        self.norms, self.head = (
            nn.ModuleList(nn.BatchNorm2d(10) for _ in range(2)),
            nn.Linear(10, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for large, small, norm in zip(self.large, self.small, self.norms, strict=True):
            x = (large(x) + small(x) + norm(x)).relu()
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """A gated linear unit, a pixel shuffle, an instance norm, and a flip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 16, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.last, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pixel_shuffle(self.wide(functional.glu(self.first(x), 1)), 2)
        return self.head(self.last(self.norm(x)).flip(1).tanh())


class Upsampling(nn.Module):
    """An autoencoder with transposed convolutions, of several strides and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 10, 3, 2, 1), nn.Conv2d(10, 12, 3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 10, 3, 2, 1, output_padding=1)
        self.norm, self.last = nn.BatchNorm2d(10), nn.ConvTranspose2d(10, 8, 2, 2)
        self.same = nn.ConvTranspose2d(8, 3, 3, 1, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        high = functional.gelu(self.down(x))
        low = self.norm(self.up(functional.gelu(self.deep(high)))) + high
        return self.same(functional.gelu(self.last(low)))


class Selective(nn.Module):
    """Selective kernels: a softmax over branches weighs their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 8, k, padding=k // 2) for k in (1, 3))
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 16)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([branch(x).relu() for branch in self.branches], 1)
        weight = self.excite(functional.gelu(self.squeeze(x.sum(1).mean((2, 3)))))
        weight = weight.view(len(x), 2, -1, 1, 1).softmax(1)
        return self.last((x * weight).sum(1))


class Gates(nn.Module):
    """A gate of each channel from the means of its neighbours (efficient channel attention)."""

    class Block(nn.Module):
        def __init__(self, channels: int, bias: bool) -> None:
            super().__init__()
            self.conv1, self.bn = nn.Conv2d(8, channels, 3), nn.BatchNorm2d(channels)
            self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=bias)
            self.conv2 = nn.Conv2d(channels, 8, 3, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv1(x)).relu()
            gate = self.gate(y.mean((2, 3)).unsqueeze(1)).sigmoid()
            return self.conv2(y * gate.transpose(1, 2).unsqueeze(-1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(self.Block(12, False), self.Block(16, True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    """T5 and Llama: an embedding, RMS norms written out, biases of heads from a table, gates."""

    class Norm(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(dim) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = Decoder.Norm(dim), Decoder.Norm(dim)
            self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
            self.o, self.head_dim = nn.Linear(dim, dim, bias=False), dim // 4
            self.gate, self.up = nn.Linear(dim, 20, bias=False), nn.Linear(dim, 20, bias=False)
            self.down = nn.Linear(20, dim, bias=False)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            shape = (*x.shape[:2], -1, self.head_dim)
            y = self.norm1(x)
            q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
            scores = ((q @ k.transpose(2, 3)) + bias).softmax(-1)
            x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
            y = self.norm2(x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.biases = nn.Embedding(30, 16), nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(Decoder.Block(16) for _ in range(2))
        self.norm, self.head = Decoder.Norm(16), nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        near = (places[:, None] - places).abs().clamp(max=5)
        bias, x = self.biases(near).permute(2, 0, 1).unsqueeze(0), self.embed(tokens)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))


IMAGES = 3, 8, 8
# Each with the shape of one of its inputs, and how many groups it has; streams among them.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "encoder": (Encoder, IMAGES, 5, 1),
    "windows": (Windows, IMAGES, 8, 2),
    "u-net": (UNet, IMAGES, 3, 1),
    "dense": (Dense, IMAGES, 4, 0),
    "detector": (Detector, IMAGES, 16, 3),
    "res2net": (Res2Net, IMAGES, 3, 1),
    "convnext": (ConvNeXt, IMAGES, 3, 1),
    "repvgg": (RepVGG, IMAGES, 1, 1),
    "gated": (Gated, IMAGES, 3, 0),
    "talking heads": (TalkingHeads, IMAGES, 3, 0),
    "channel attention": (ChannelAttention, IMAGES, 2, 0),
    "upsampling": (Upsampling, IMAGES, 3, 1),
    "selective": (Selective, IMAGES, 2, 0),
    "gates": (Gates, IMAGES, 3, 1),
    "decoder": (Decoder, (7,), 4, 1),
    "backbone": (Backbone, IMAGES, 2, 0),
    "one share": (OneShare, IMAGES, 5, 1),
    "torch encoder": (TorchEncoder, IMAGES, 5, 1),
    "translator": (Translator, (7,), 6, 1),
    "tagger": (Tagger, (7,), 5, 0),
    "reader": (Reader, (7,), 4, 0),
    "recurrent": (Recurrent, (7,), 5, 0),
    "state space": (StateSpace, (7,), 2, 0),
}


def of_kind(name: str, samples: int = 24) -> tuple[nn.Module, Tensor]:
    """A network with random weights and statistics, in eval mode, and its inputs."""
    torch.manual_seed(0)
    kind, shape, _, _ = KINDS[name]
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
    if shape == (7,):
        return model, torch.randint(30, (samples, *shape))
    return model, torch.randn(samples, *shape)
