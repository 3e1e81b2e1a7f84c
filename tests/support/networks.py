"""Small networks of every kind that can be pruned, and the groups of units that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from greedyprune.data.batches import Batch
from greedyprune.graph.structure import analyse, find_groups

Inputs = Tensor | dict[str, Tensor]
Groups = dict[
    str, tuple[int, tuple[str, ...], tuple[str, ...]]
]  # units, other producers, consumers


class Block(nn.Module):
    """A residual block: conv1's units can be removed, conv2's are added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.total = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.total(self.bn2(self.conv2(hidden)) + self.shortcut(x)))


class Bottleneck(nn.Module):
    """The residual block of a ResNet-50: convolutions 1x1, 3x3, 1x1, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, width, 1), nn.BatchNorm2d(width)
        self.total = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.total(self.bn3(self.conv3(hidden)) + x))


class Excited(nn.Module):
    """Squeeze and excitation: each unit is multiplied by a gate that other layers compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.conv(x))
        gate = functional.relu(self.squeeze(hidden.mean((2, 3), keepdim=True)))
        return self.last(hidden * torch.sigmoid(self.excite(gate)))


class Shuffled(nn.Module):
    """Channels change places (ShuffleNet): pairs of them are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        b, c, h, w = hidden.shape
        return self.last(hidden.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w))


class Attention(nn.Module):
    """Self-attention from one fused projection, in the form of vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head_dim = nn.Linear(12, 3 * 20), nn.Linear(20, 12), 5

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).chunk(3)
        scores = (q[0] @ k[0].transpose(-2, -1) / self.head_dim**0.5).softmax(-1)
        return self.proj((scores @ v[0]).transpose(1, 2).reshape(b, s, -1))


class SameConv2d(nn.Conv2d):
    """TensorFlow's padding, which depends on the input's size, before a convolution without any."""

    def forward(self, x: Tensor) -> Tensor:
        ends: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            ends = [total // 2, total - total // 2, *ends]
        return functional.conv2d(functional.pad(x, ends), self.weight, self.bias, self.stride)


class ProductLinear(nn.Linear):
    """A Linear whose forward is written as a product and a sum, as in Falcon."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class OwnLinear(nn.Module):
    """A module that is no nn.Linear, and computes what one does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Shared(nn.Module):
    """A residual block that runs three times, with the same weights (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.wide, self.narrow = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for _ in range(3):
            hidden = hidden + self.narrow(functional.relu(self.wide(hidden.tanh())))
        return self.last(hidden)


def _subclasses() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        SameConv2d(3, 8, 3, 2), nn.ReLU(), SameConv2d(8, 6, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), ProductLinear(6, 12), nn.ReLU(), OwnLinear(12, 9),
        nn.Tanh(), ProductLinear(9, 4),
    )  # fmt: skip
    return model, torch.randn(6, 3, 12, 11)


def _resnet() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8), Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return model, torch.randn(6, 3, 12, 12)


def _bottleneck() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(8)), torch.randn(6, 3, 9, 9)


def _vgg() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10),
    )  # fmt: skip
    return model, torch.randn(30, 3, 12, 12)


def _mobilenet() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    return model, torch.randn(6, 3, 8, 8)


def _resnext() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1, groups=4), nn.ReLU(),
        nn.Conv2d(16, 4, 3, 2, 1, padding_mode="reflect"),
    )  # fmt: skip
    return model, torch.randn(6, 3, 8, 8)


def _conv1d() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(nn.Conv1d(3, 8, 5, dilation=2), nn.GELU(), nn.Conv1d(8, 4, 3, stride=2))
    return model, torch.randn(6, 3, 30)


def _conv3d() -> tuple[nn.Module, Inputs]:
    model = nn.Sequential(
        nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU(),
        nn.Conv3d(6, 4, (3, 1, 2), padding=(1, 0, 1)),
    )  # fmt: skip
    return model, torch.randn(5, 3, 6, 6, 6)


def _hugging_face(name: str, **config: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        kind = {
            "Bert": transformers.BertForSequenceClassification,
            "GPT2": transformers.GPT2LMHeadModel,
            "Llama": transformers.LlamaForCausalLM,
            "ViT": transformers.ViTForImageClassification,
        }[name]
        model = kind(getattr(transformers, f"{name}Config")(**config))
        if name == "ViT":
            return model, {"pixel_values": torch.randn(6, 3, 8, 8)}
        return model, {"input_ids": torch.randint(50, (6, 12))}

    return make


_BERT = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 20,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 50, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_inner": 20, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 3, "intermediate_size": 20, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_VIT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_ATTENTION = "bert.encoder.layer.0.attention"
_BERT_GROUPS: Groups = {
    f"{_ATTENTION}.self.query": (
        4, (f"{_ATTENTION}.self.key", f"{_ATTENTION}.self.value"), (f"{_ATTENTION}.output.dense",)
    ),
    "bert.encoder.layer.0.intermediate.dense": (20, (), ("bert.encoder.layer.0.output.dense",)),
    "bert.pooler.dense": (24, (), ("classifier",)),
}  # fmt: skip
_LAYER = "model.layers.0"

NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], Groups]] = {
    "resnet": (_resnet, {
        "3.conv1": (8, (), ("3.conv2",)), "4.conv1": (16, (), ("4.conv2",)),
    }),
    "bottleneck": (_bottleneck, {
        "1.conv1": (6, (), ("1.conv2",)), "1.conv2": (6, (), ("1.conv3",)),
    }),
    "vgg": (_vgg, {"0": (8, (), ("4",)), "4": (6, (), ("8",)), "8": (12, (), ("11",))}),
    "mobilenet": (_mobilenet, {"0": (8, (), ("6",))}),
    "resnext": (_resnext, {"0": (4, (), ("4",))}),
    "excited": (lambda: (Excited(), torch.randn(6, 3, 8, 8)), {
        "conv": (8, ("excite",), ("squeeze", "last")), "squeeze": (4, (), ("excite",)),
    }),
    "shuffled": (lambda: (Shuffled(), torch.randn(6, 3, 5, 5)), {"first": (4, (), ("last",))}),
    "attention": (lambda: (Attention(), torch.randn(6, 7, 12)), {"qkv": (4, (), ("proj",))}),
    "subclasses": (_subclasses, {
        "0": (8, (), ("2",)), "2": (6, (), ("6",)), "6": (12, (), ("8",)), "8": (9, (), ("10",)),
    }),
    "shared": (lambda: (Shared(), torch.randn(6, 6)), {"wide": (10, (), ("narrow",))}),
    "conv1d": (_conv1d, {"0": (8, (), ("2",))}),
    "conv3d": (_conv3d, {"0": (6, (), ("3",))}),
    "bert": (_hugging_face("Bert", **_BERT), _BERT_GROUPS),
    "bert, eager": (
        _hugging_face("Bert", **_BERT, attn_implementation="eager"), _BERT_GROUPS
    ),
    "gpt2": (_hugging_face("GPT2", **_GPT2), {
        "transformer.h.0.attn.c_attn": (4, (), ("transformer.h.0.attn.c_proj",)),
        "transformer.h.0.mlp.c_fc": (20, (), ("transformer.h.0.mlp.c_proj",)),
    }),
    "llama": (_hugging_face("Llama", **_LLAMA), {
        f"{_LAYER}.self_attn.q_proj": (
            3, (f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.v_proj"),
            (f"{_LAYER}.self_attn.o_proj",),
        ),
        f"{_LAYER}.mlp.gate_proj": (
            20, (f"{_LAYER}.mlp.up_proj",), (f"{_LAYER}.mlp.down_proj",)
        ),
    }),
    "vit": (_hugging_face("ViT", **_VIT), {
        "vit.layers.0.attention.q_proj": (
            4, ("vit.layers.0.attention.k_proj", "vit.layers.0.attention.v_proj"),
            ("vit.layers.0.attention.o_proj",),
        ),
        "vit.layers.0.mlp.fc1": (20, (), ("vit.layers.0.mlp.fc2",)),
    }),
}  # fmt: skip


# For each consumer whose output is added to a shortcut: the module that takes the sum, and the
# normalisation between the consumer and the sum.
_BERT_TOTALS = {
    f"{_ATTENTION}.output.dense": (f"{_ATTENTION}.output.LayerNorm", None),
    "bert.encoder.layer.0.output.dense": ("bert.encoder.layer.0.output.LayerNorm", None),
}
TOTALS: dict[str, dict[str, tuple[str, str | None]]] = {
    "resnet": {"3.conv2": ("3.total", "3.bn2"), "4.conv2": ("4.total", "4.bn2")},
    "bottleneck": {"1.conv3": ("1.total", "1.bn3")},
    "bert": _BERT_TOTALS,
    "bert, eager": _BERT_TOTALS,
    "gpt2": {
        "transformer.h.0.attn.c_proj": ("transformer.h.0.ln_2", None),
        "transformer.h.0.mlp.c_proj": ("transformer.ln_f", None),
    },
    "llama": {
        f"{_LAYER}.self_attn.o_proj": (f"{_LAYER}.post_attention_layernorm", None),
        f"{_LAYER}.mlp.down_proj": ("model.norm", None),
    },
    "vit": {
        "vit.layers.0.attention.o_proj": ("vit.layers.0.layernorm_after", None),
        "vit.layers.0.mlp.fc2": ("vit.layernorm", None),
    },
}


def network(name: str) -> tuple[nn.Module, Inputs]:
    """The network in eval mode, with statistics as if it were trained, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name][0]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            nn.init.normal_(module.weight, std=0.3)  # transformers start with much smaller ones
    return model.eval(), inputs


def data_of(inputs: Inputs) -> object:
    """Inputs as data without targets, in one batch."""
    return inputs if isinstance(inputs, dict) else [inputs]


def batches_of(inputs: Inputs) -> object:
    """The same in batches of four samples."""
    if isinstance(inputs, dict):
        return [{name: part} for name, value in inputs.items() for part in value.split(4)]
    return list(inputs.split(4))


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's output tensor; a language model's logits."""
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def loss_of(model: nn.Module, pair: tuple[Inputs, Tensor]) -> float:
    """The squared error of the model's outputs, with inputs and targets of a pair."""
    with torch.no_grad():
        return float(
            functional.mse_loss(
                outputs_of(model, pair[0]), pair[1].to(next(model.parameters()).dtype)
            )
        )


def streams_of(model: nn.Module, inputs: Inputs) -> set[str]:
    """The layers that residual streams are known by."""
    batch = Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)
    groups = find_groups(model, analyse(model, batch), None)
    return {group.producer for group in groups if group.stream}
