"""The groups of networks with convolutions and attention, and the table of them."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from networks import NETWORKS, Groups, Inputs, network
from rich.console import Console
from torch import Tensor, nn

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.groups import Group
from greedyprune.graph.slices import NotPrunableError
from greedyprune.graph.structure import analyse, find_groups
from greedyprune.graph.tracing import LAYER_TYPES

ATTENTION = "bert.encoder.layer.0.attention"
_BERT_STREAM: Groups = {
    "bert.embeddings.word_embeddings": (
        24,
        (
            "bert.embeddings.token_type_embeddings", "bert.embeddings.position_embeddings",
            f"{ATTENTION}.output.dense", "bert.encoder.layer.0.output.dense",
        ),
        (
            f"{ATTENTION}.self.query", f"{ATTENTION}.self.key", f"{ATTENTION}.self.value",
            "bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense",
        ),
    ),
}  # fmt: skip
# The residual streams of these networks.
STREAMS: dict[str, Groups] = {
    "resnet": {
        "0": (8, ("3.conv2",), ("3.conv1", "4.conv1", "4.shortcut")),
        "4.conv2": (16, ("4.shortcut",), ("7",)),
    },
    "shared": {"first": (8, ("narrow",), ("wide", "last"))},
    "bert": _BERT_STREAM,
    "bert, eager": _BERT_STREAM,
    "llama": {
        "model.embed_tokens": (
            24,
            ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"),
            (
                *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
                "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head",
            ),
        ),
    },
    "gpt2": {
        "transformer.wte": (
            24,
            ("transformer.wpe", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"),
            ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"),
        ),
    },
    "vit": {
        "vit.embeddings.patch_embeddings.projection": (
            24,
            ("vit.layers.0.attention.o_proj", "vit.layers.0.mlp.fc2"),
            (
                *(f"vit.layers.0.attention.{name}_proj" for name in "qkv"),
                "vit.layers.0.mlp.fc1", "classifier",
            ),
        ),
    },
}  # fmt: skip

each_network = pytest.mark.parametrize("name", NETWORKS)


def groups_of(model: nn.Module, inputs: Inputs) -> list[Group]:
    batch = Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)
    return find_groups(model, analyse(model, batch), None)


@each_network
def test_groups(name: str) -> None:
    groups = {
        group.producer: (group.units, group.producers[1:], group.consumers)
        for group in groups_of(*network(name))
    }
    assert groups == NETWORKS[name][1]


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg", "mobilenet", "excited"])
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    """The same layers are cut together as in another library's dependency graph."""
    tp = pytest.importorskip("torch_pruning")
    model, inputs = network(name)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    names = {module: name for name, module in model.named_modules()}
    for group in groups_of(model, inputs):
        root = model.get_submodule(group.producer)
        prune = tp.prune_conv_out_channels
        if isinstance(root, nn.Linear):
            prune = tp.prune_linear_out_channels
        theirs = {names[dep.target.module] for dep, _ in graph.get_pruning_group(root, prune, [0])
                  if dep.target.module in names}  # fmt: skip
        ours = {tensor.rpartition(".")[0] for tensor in group.slices}
        assert ours == theirs


@each_network
def test_the_table_of_layers(name: str) -> None:
    model, inputs = network(name)
    table = greedyprune.layers(model, inputs)
    rows, streams = (
        {
            key: (row.units, row.producers[1:], row.consumers)
            for key, row in table.items() if row.stream == is_stream
        }
        for is_stream in (False, True)
    )  # fmt: skip
    assert rows == NETWORKS[name][1]
    assert streams == STREAMS.get(name, {})
    layers = {key for key, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    producers = {producer for row in table.values() for producer in row.producers}
    assert layers <= producers | set(table.refused)
    assert all(row.flops > 0 for row in table.values())
    console = Console(width=400, file=StringIO())
    console.print(table.summary())
    assert all(text in console.file.getvalue() for text in [*table, *table.refused.values()])


def test_the_columns_of_the_table() -> None:
    """Reasons have a column of their own; columns without an entry are left out."""
    table = greedyprune.layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    columns = {str(column.header): [*column.cells] for column in table.summary().columns}
    assert columns["layer"] == ["0", "1"]
    assert columns["taken by"] == ["1", ""]
    assert columns["why not"] == ["", "its units are the model's output"]
    assert "with" not in columns


def test_the_numbers_in_the_table_of_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    table = greedyprune.layers(model, torch.randn(2, 3, 4, 4))
    assert model.training
    assert table["0"].features == 4
    assert table["0"].parameters == 8 * 27 + 8 + 8 + 8 + 32 * 5
    assert table["0"].flops == 2 * (2 * 4 * 8 * 27 + 2 * 32 * 5)
    assert table.refused == {"3": "its units are the model's output"}
    with pytest.raises(TypeError, match="example: found int"):
        greedyprune.layers(model, 3)
    with pytest.raises(ValueError, match=r"example: the model can't run on it"):
        greedyprune.layers(model, torch.randn(2, 4, 4, 4))


def test_a_large_model_without_weights() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        ids = torch.zeros(1, 16, dtype=torch.int64)
    table = greedyprune.layers(model, {"input_ids": ids})
    assert len(table) == 2 * 22 + 1
    assert table["model.embed_tokens"].stream
    assert table["model.embed_tokens"].units == 2048
    assert sum(layer.parameters for layer in table.values()) > 9e8
    assert table["model.layers.7.self_attn.q_proj"].units == 4
    assert table["model.layers.7.mlp.gate_proj"].units == 5632


def refused(model: nn.Module, inputs: Tensor, layer: str) -> str:
    """The message that refuses a layer."""
    with pytest.raises(NotPrunableError) as error:
        find_groups(model, analyse(model.eval(), Batch((inputs,), {}, None)), [layer])
    return str(error.value)


def test_refusals_name_the_operation() -> None:
    model, inputs = network("resnet")
    assert "its units are the model's output" in refused(model, inputs, "7")
    model, inputs = network("resnext")
    assert "a grouped convolution" in refused(model, inputs, "2")

    mixed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1), nn.Conv2d(4, 2, 1))
    assert "aten.softmax" in refused(mixed, torch.randn(2, 3, 4, 4), "0")


def test_a_model_whose_code_holds_its_sizes_is_refused() -> None:
    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x).relu().view(-1, 96))

    with pytest.raises(
        ValueError, match=r"'conv': .* aten.view.default \(test_groups.py line \d+\) may"
    ):
        greedyprune.select(LeNet(), [torch.randn(4, 1, 6, 6)])


def test_a_group_is_found_by_any_of_its_producers() -> None:
    model, inputs = network("excited")
    by_gate = greedyprune.select(model, [inputs], layers=["excite"], size=3)
    assert list(by_gate.layers) == ["conv"]
