"""Pruned models work with torch.export, torch.compile and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hugging_face import family
from networks import Inputs, network, outputs_of
from torch import Tensor, nn
from torch.export import Dim

import greedyprune
from greedyprune import Imitation

each_network = pytest.mark.parametrize("name", ["resnet", "mobilenet", "attention", "gpt2"])
pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    """A model as a function from one tensor to one tensor, without a cache of keys and values."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.key = model, next(iter(inputs)) if isinstance(inputs, dict) else None
        self.options = {"use_cache": False} if self.key else {}

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None:
            return self.model(x)
        return self.model(**{self.key: x}, **self.options).logits


def pruned(name: str) -> tuple[nn.Module, Tensor]:
    """All layers of a network cut to half, and inputs for it."""
    model, inputs = network(name)
    data = inputs if isinstance(inputs, dict) else [inputs]
    selection = greedyprune.select(model, data, objective=Imitation(sequential=False))
    x = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    return Plain(greedyprune.prune(model, selection), inputs).eval(), x


@torch.no_grad()
def assert_close(outputs: Tensor, expected: Tensor) -> None:
    assert outputs.shape == expected.shape
    assert float((outputs - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@each_network
def test_torch_export(name: str, tmp_path: Path) -> None:
    """The exported program runs on batches of other lengths, after it was saved and loaded."""
    model, inputs = pruned(name)
    program = torch.export.export(model, (inputs[:3],), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    assert_close(loaded(inputs), outputs_of(model, inputs))


@each_network
def test_torch_compile(name: str) -> None:
    """A compiler traces the pruned model as one graph, in which no dense size is left."""
    model, inputs = pruned(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(outputs_of(compiled, inputs), outputs_of(model, inputs))


@each_network
def test_onnx(name: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, inputs = pruned(name)
    program = torch.onnx.export(model, (inputs,), dynamo=True, verbose=False)
    assert_close(program(inputs)[0], outputs_of(model, inputs))


@pytest.mark.parametrize(
    ("name", "onnx"), [("bert", True), ("llama", True), ("t5", False), ("vit", True)]
)
def test_hugging_face_models_of_varied_sizes(name: str, onnx: bool) -> None:
    """Heads and feed-forward blocks differ from layer to layer. T5's masks stop ONNX's exporter."""
    model, inputs = family(name)
    size = {
        layer: max(1, group.units * (1 + i % 4 // 2) // 3)
        for i, (layer, group) in enumerate(greedyprune.layers(model, dict(inputs)).items())
    }
    selection = greedyprune.select(
        model, [inputs], size=size, objective=Imitation(sequential=False), progress=False
    )
    small = Named(greedyprune.prune(model, selection), list(inputs)).eval()
    tensors = tuple(inputs.values())
    with torch.no_grad():
        expected = small(*tensors)
    assert_close(torch.export.export(small, tensors).module()(*tensors), expected)
    if onnx:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        program = torch.onnx.export(small, tensors, dynamo=True, verbose=False)
        assert_close(program(*tensors)[0], expected)


class Named(nn.Module):
    """A model as a function of its keyword arguments, in order, without a cache."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        generates = getattr(model, "can_generate", bool)()
        self.options = {"use_cache": False} if generates else {}

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.options).logits
