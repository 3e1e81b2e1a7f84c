"""Torch-Pruning's pruners with greedy forward selection as their importance criterion."""

from __future__ import annotations

import doctest
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from networks import network, outputs_of, streams_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation

tp = pytest.importorskip("torch_pruning")
from greedyprune.integrations import torch_pruning  # noqa: E402
from greedyprune.integrations.torch_pruning import GreedyImportance  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch_pruning"),
]


def graph_of(model: nn.Module, inputs: object) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, example_inputs=inputs)


def group_of(graph: tp.DependencyGraph, layer: nn.Module) -> tp.dependency.Group:
    pruner = graph.get_pruner_of_module(layer)
    channels = list(range(pruner.get_out_channels(layer)))
    return graph.get_pruning_group(layer, pruner.prune_out_channels, channels)


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg", "mobilenet", "excited"])
def test_the_pruner_keeps_the_units_that_select_keeps(name: str) -> None:
    """In the layers that select can prune; the two pruned networks compute the same.

    But for streams: select takes the mean of their readers' errors as shares, the pruner the sum.
    """
    model, inputs = network(name)
    selection = greedyprune.select(
        model, [inputs], objective=Imitation(sequential=False), weights="none"
    )
    streams = streams_of(model, inputs)
    selection = greedyprune.Selection(
        {name: layer for name, layer in selection.layers.items() if name not in streams}
    )
    expected = outputs_of(greedyprune.prune(model, selection), inputs)
    pruned = {
        tensor.removesuffix(".weight") for layer in selection.layers.values()
        for tensor in layer.slices if tensor.removesuffix(".weight") not in layer.outputs
    }  # fmt: skip
    others = [module for name, module in model.named_modules() if name not in pruned
              and isinstance(module, (nn.Conv2d, nn.Linear))]  # fmt: skip
    tp.pruner.MetaPruner(
        model, inputs, GreedyImportance(model, inputs), pruning_ratio=0.5, ignored_layers=others
    ).step()
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-5, atol=1e-6)


def test_hidden_positions_do_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    inputs, shown = torch.randn(8, 5, 6), torch.rand(8, 5) > 0.4
    noisy = inputs.masked_fill(~shown[..., None], 1e3)
    scores = [
        importance(group_of(graph_of(model, inputs[0]), model[0]))
        for importance in (
            GreedyImportance(model, inputs[shown]),
            GreedyImportance(model, [{"input": noisy, "shown": shown}], mask="shown"),
        )
    ]
    torch.testing.assert_close(scores[1], scores[0])


@torch.no_grad()
def squared_error(layers: list[nn.Module], inputs: list[Tensor], kept: list[int]) -> float:
    """Of the layers' outputs, when their inputs have only the channels `kept`."""
    mask = torch.zeros(inputs[0].shape[1], 1, 1)
    mask[kept] = 1
    errors = [layer(x * mask) - layer(x) for layer, x in zip(layers, inputs, strict=True)]
    return sum(float(error.double().square().sum()) for error in errors)


def test_channels_of_a_residual_stream() -> None:
    """Picks and errors are those of a plain loop over all layers that read the stream."""
    model, images = network("resnet")
    readers = [model[3].conv1, model[4].shortcut, model[4].conv1]
    inputs: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
               for layer in readers]  # fmt: skip
    outputs_of(model, images)
    for handle in handles:
        handle.remove()
    inputs = [inputs[0], inputs[2], inputs[1]]  # conv1 runs first
    kept: list[int] = []
    path = [squared_error(readers, inputs, kept)]  # the error before each pick
    while len(kept) < 8:
        candidates = [j for j in range(8) if j not in kept]
        errors = [squared_error(readers, inputs, [*kept, j]) for j in candidates]
        kept.append(candidates[errors.index(min(errors))])
        path.append(min(errors))
    graph = graph_of(model, images)
    scores = GreedyImportance(model, images)(group_of(graph, model[0]))
    assert scores.argsort(descending=True).tolist() == kept
    expected = torch.tensor([max(path[k:-1]) / path[0] for k in range(8)], dtype=torch.float64)
    torch.testing.assert_close(scores[kept], expected, rtol=1e-4, atol=1e-9)
    part = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [6, 2])
    assert GreedyImportance(model, images)(part).equal(scores[[6, 2]])


def test_whole_networks_are_pruned() -> None:
    """The residual stream included: in one step, in two, and with one threshold for all layers."""
    for options in ({}, {"iterative_steps": 2}, {"global_pruning": True}):
        model, images = network("resnet")
        importance = GreedyImportance(model, [images[:3], images[3:]])
        pruner = tp.pruner.BasePruner(
            model, images, importance, pruning_ratio=0.5, ignored_layers=[model[7]], **options
        )
        for _ in range(options.get("iterative_steps", 1)):
            pruner.step()
        assert outputs_of(model, images).shape == (6, 10)
        widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        if "global_pruning" in options:
            assert sum(widths) == pytest.approx(72 / 2, abs=4)  # about half of all channels
            assert widths != [4, 4, 4, 8, 8, 8]
        else:
            assert widths == [4, 4, 4, 8, 8, 8]


def test_scores_follow_the_weights() -> None:
    model, images = network("vgg")
    importance, group = GreedyImportance(model, images), group_of(graph_of(model, images), model[4])
    before = importance(group)
    best = int(before.argmax())
    assert importance(group).equal(before)
    with torch.no_grad():
        model[8].weight[:, 4 * best : 4 * best + 4] = 0
    assert importance(group)[best] < 1e-9 < before[best]


def test_attention_heads() -> None:
    """Their pruners score attention by the group of the layer after it; the scores are the same."""
    model, inputs = network("vit")
    graph = graph_of(model, inputs)
    layer = model.vit.layers[0].attention
    scores = GreedyImportance(model, inputs)(group_of(graph, layer.v_proj))
    pruner_group = graph.get_pruning_group(
        layer.o_proj, tp.prune_linear_in_channels, list(range(24))
    )
    importance = GreedyImportance(model, inputs)
    assert importance(pruner_group).equal(scores)
    projections = [layer.q_proj, layer.k_proj, layer.v_proj]
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))
              and m not in projections]  # fmt: skip
    pruner = tp.pruner.BasePruner(
        model, inputs, importance, pruning_ratio=0.5, head_pruning_ratio=0.5, prune_num_heads=True,
        prune_head_dims=False, ignored_layers=others, num_heads=dict.fromkeys(projections, 4),
    )  # fmt: skip
    dense, heads = layer.o_proj.weight.clone(), scores.view(4, 6).mean(1).topk(2).indices
    pruner.step()
    expected = dense.view(24, 4, 6)[:, heads.sort().values].reshape(24, 12)
    assert layer.o_proj.weight.equal(expected)


class Concatenation(nn.Module):
    """Two layers' channels side by side in the inputs of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def test_bad_input() -> None:
    model, images = network("resnext")
    importance, graph = GreedyImportance(model, images), graph_of(model, images)
    with pytest.raises(ValueError, match=r"'4', but no layer takes them; .* put '4' into ignored_"):
        importance(group_of(graph, model[4]))
    with pytest.raises(ValueError, match=r"'0', but not all inputs of '2' are theirs; exp"):
        importance(group_of(graph, model[0]))
    joined, x = Concatenation().eval(), torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match=r"'a', but not all inputs of 'c' are theirs; exp"):
        GreedyImportance(joined, x)(group_of(graph_of(joined, x), joined.a))
    fused = nn.ModuleDict({"qkv": nn.Linear(4, 6), "proj": nn.Linear(2, 4)})
    fused.forward = lambda x: fused.proj(fused.qkv(x).chunk(3, -1)[0])
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"'qkv', but not all inputs of 'proj' are theirs"):
        GreedyImportance(fused, x)(group_of(graph_of(fused, x), fused.qkv))
    with pytest.raises(TypeError, match="model: found int, expected"):
        GreedyImportance(3, images)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data: found int, expected"):
        GreedyImportance(model, 3)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf in its activations"):
        GreedyImportance(model, images)(group_of(graph, model[2]))


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning.pruner.importance", None)
    with pytest.raises(ImportError, match=r"needs Torch-Pruning; .*pip install '\.\[torch-"):
        importlib.reload(torch_pruning)


def test_docstring_example() -> None:
    failed, tried = doctest.testmod(torch_pruning, extraglobs={"nn": nn, "torch": torch})
    assert tried > 4
    assert not failed


@pytest.mark.data
def test_on_a_trained_network_it_is_ahead_of_magnitude() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from cifar import accuracy, kept, read_cifar

    folder = Path(os.environ.get("GREEDYPRUNE_DATA", ""))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip("no cifar-10-batches-py in $GREEDYPRUNE_DATA")
    train, test = read_cifar(folder, "train"), read_cifar(folder, "test")
    accuracies = []
    for greedy in (True, False):
        model = kept()
        importance = tp.importance.MagnitudeImportance()
        if greedy:
            importance = GreedyImportance(model, train[0][:256])
        tp.pruner.BasePruner(
            model, train[0][:1], importance, pruning_ratio=0.25, ignored_layers=[model[-1]]
        ).step()
        accuracies.append(accuracy(model, (test[0][:1000], test[1][:1000])))
    assert accuracies[0] > accuracies[1] + 0.05
