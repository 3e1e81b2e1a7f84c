"""What is passed as `model`: wrapped and other modules, and things that are none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

import greedyprune

pytestmark = pytest.mark.usefixtures("one_thread")
FUTURE = "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning", "ignore:.*:UserWarning"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
DATA = INPUTS, torch.arange(64) % 3


class Scripted(nn.Module):
    """A Python module with a TorchScript module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = torch.jit.script(nn.Sequential(nn.Linear(6, 6))), network()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's wrapper, which needs a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(network(), (INPUTS,))


OF_SCRIPT = r"a TorchScript module \({}\), expected the nn.Module that it was made from"
OF_EXPORT = r"expected the nn.Module that was exported: prune that"
NONE = {
    "script": (lambda: torch.jit.script(network()), OF_SCRIPT.format("RecursiveScriptModule")),
    "trace": (lambda: torch.jit.trace(network(), INPUTS), OF_SCRIPT.format("TopLevelTracedModule")),
    "script inside": (Scripted, "'first', " + OF_SCRIPT.format("RecursiveScriptModule")),
    "program": (exported, f"an ExportedProgram, {OF_EXPORT}"),
    "its module": (lambda: exported().module(), rf".* program \(GraphModule\), {OF_EXPORT}"),
    "unflattened": (
        lambda: torch.export.unflatten(exported()),
        rf".* program \(UnflattenedModule\), {OF_EXPORT}",
    ),
    "class": (lambda: Scripted, r"the class Scripted, expected an nn.Module: Scripted\(...\)"),
    "path": (lambda: "model.pt", "str, expected an nn.Module: load the file first"),
    "state": (lambda: network().state_dict(), "OrderedDict, .*: build the model and load the st"),
    "method": (lambda: network().forward, "a method of Sequential, expected an nn.Module"),
    "pipeline": (lambda: SimpleNamespace(model=network()), "Simple.*, such as its attribute 'mod"),
    "none": (lambda: None, "NoneType, expected an nn.Module$"),
}
CALLS: dict[str, Callable[[object, greedyprune.Selection, Path], object]] = {
    "layers": lambda model, _, __: greedyprune.layers(model, INPUTS),
    "select": lambda model, _, __: greedyprune.select(model, DATA),
    "prune": lambda model, selection, _: greedyprune.prune(model, selection),
    "refit": lambda model, selection, _: greedyprune.refit(model, selection, DATA),
    "recalibrate": lambda model, _, __: greedyprune.recalibrate(model, INPUTS),
    "save_pruned": lambda model, _, path: greedyprune.save_pruned(model, path),
    "monitor": lambda model, _, __: greedyprune.PretrainingMonitor(model, DATA),
}


@pytest.mark.filterwarnings(*FUTURE)
@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_model_is_told_with_what_to_pass(kind: str, tmp_path: Path) -> None:
    make, sentence = NONE[kind]
    model, path = make(), tmp_path / "small.safetensors"
    selection = greedyprune.select(network(), DATA)
    for call in CALLS.values():
        with pytest.raises(TypeError, match=f"^model: found {sentence}"):
            call(model, selection, path)
    greedyprune.save_pruned(greedyprune.prune(network(), selection), path)
    with pytest.raises(TypeError, match=f"^model_factory: it returned {sentence}"):
        greedyprune.load_pruned(path, lambda: model)


def test_a_sharded_model_whose_parameters_look_whole_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model: 'FullyShardedDataParallel' is sharded over"):
        greedyprune.select(FullyShardedDataParallel(), DATA)


@pytest.mark.filterwarnings(*FUTURE)
def test_a_quantised_layer_is_the_reason() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, torch.qint8)
    sentence = r"^model: torch.export can't trace it \('0' is quantised, .*: prune first, then"
    with pytest.raises(ValueError, match=sentence):
        greedyprune.layers(quantised, INPUTS)
    with pytest.raises(ValueError, match=sentence):
        greedyprune.select(quantised, DATA)


@pytest.mark.filterwarnings(*FUTURE)
@pytest.mark.parametrize("wrap", [fx.symbolic_trace, nn.DataParallel, torch.compile])
def test_modules_that_hold_python_modules_are_pruned(wrap: Callable) -> None:
    selection = greedyprune.select(network(), DATA, size=6)
    expected = greedyprune.refit(network(), selection, DATA)
    model = wrap(copy.deepcopy(network()))
    assert greedyprune.select(model, DATA, size=6).order.equal(selection.order)
    small = greedyprune.refit(model, selection, DATA)
    assert small.get_submodule("0").weight.shape == (6, 6)
    assert torch.allclose(small(INPUTS), expected(INPUTS), atol=1e-5)


# ---------------------------------------------------------------- example


WRONG_EXAMPLES: dict[str, object] = {
    "width": INPUTS[:, :5],
    "dtype": INPUTS.long(),
    "too many": (INPUTS, INPUTS),
    "none": (),
    "name": {"pixels": INPUTS},
}


@pytest.mark.parametrize("wrong", WRONG_EXAMPLES)
def test_layers_blames_the_example(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^example: the model can't run on it \("):
        greedyprune.layers(network(), WRONG_EXAMPLES[wrong])


def test_layers_takes_an_example_of_another_float_type() -> None:
    assert list(greedyprune.layers(network(), INPUTS.double())) == ["0"]
