"""Modules that did not run, and may take units that are to be removed: another task's head.

The graph of one batch does not show what such a module would take. Its sizes are all that is known.
Many models have modules that never run and do no harm: a pooler, a copy for momentum, auxiliary
heads. So a module is told of only if its inputs or outputs have the size of units that are removed,
and either nothing else that ran has this size, or it stands beside a module that takes or gives
these units, as one head beside another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..runtime.progress import warn
from .groups import Group

SHOWN = 3  # names in a warning
IN_SIZES = ("in_features", "in_channels", "num_features", "num_channels", "input_size", "nx")
OUT_SIZES = ("out_features", "out_channels", "num_features", "num_channels", "hidden_size", "nf")
Sizes = tuple[frozenset[int], frozenset[int]]  # of a module's inputs and outputs


class UsedTensors(TorchFunctionMode):
    """Inside, notes which tensors torch's functions are called with.

    Modules' hooks would miss weights that another module uses, as nn.MultiheadAttention does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.used.update(id(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        return func(*args, **(kwargs or {}))


def warn_of_unrun(
    model: nn.Module, used: UsedTensors, groups: Iterable[Group], argument: str
) -> None:
    """A warning that names the modules that may need the groups' units, though they did not run.

    argument: what the model ran on: "data" or "example"
    """
    ties = dict(unrun_ties(model, used, list(groups)))
    if not ties:
        return
    names, producers = _listed(ties), _listed(dict.fromkeys(ties.values()))
    inputs = "the first batch" if argument == "data" else "it"
    warn(
        f"{argument}: {inputs} does not run {names}, which may need the units of {producers}. What "
        "does not run keeps its size, and fails in the pruned model if it needs them; expected "
        f"inputs that run it, or `layers` without {producers}"
    )


def _listed(names: Iterable[str]) -> str:
    texts = [repr(name) for name in names]
    more = [f"{len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return " and ".join([", ".join(texts[:SHOWN]), *more])


def unrun_ties(
    model: nn.Module, used: UsedTensors, groups: list[Group]
) -> Iterator[tuple[str, str]]:
    """The modules that may need a group's units: each with the group's first producer."""
    modules = dict(model.named_modules())
    unrun = list(_unrun(model, used))
    free_in, free_out = _sizes_of_whole(model, used, groups)
    for name in unrun:
        ins, outs = _sizes(modules[name])
        for group in groups:
            taken = {at.width * group.units for _, at in group.places}
            beside = any(_beside(modules, name, consumer, 0) for consumer in group.consumers)
            needed = ins if beside else ins - free_in
            beside = any(_beside(modules, name, producer, -1) for producer in group.producers)
            given = outs if beside else outs - free_out
            if taken & (needed | given):
                yield name, group.producer
                break


def _unrun(model: nn.Module, used: UsedTensors) -> Iterator[str]:
    """The largest modules of which no parameter was used: a head, but not each of its layers."""
    found = set[str]()
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in found):
            continue
        parameters = list(module.parameters())
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if parameters and not is_list and not any(id(p) in used.used for p in parameters):
            found.add(name)
            yield name


def _sizes(module: nn.Module) -> Sizes:
    """The sizes of a module's inputs and outputs: those of its first and its last layer."""
    layers = _layers(module)
    return _layer_sizes(layers[0], IN_SIZES), _layer_sizes(layers[-1], OUT_SIZES)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own, in order."""
    return [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]


def _layer_sizes(layer: nn.Module, names: tuple[str, ...]) -> frozenset[int]:
    """Its sizes with these names; all dimensions of its parameters where it has none of them."""
    known = {getattr(layer, name, None) for name in names}
    sizes = frozenset(size for size in known if isinstance(size, int))
    if sizes or isinstance(layer, nn.Embedding):
        return sizes
    return frozenset(size for p in layer.parameters(recurse=False) for size in p.shape)


def _sizes_of_whole(model: nn.Module, used: UsedTensors, groups: list[Group]) -> Sizes:
    """The sizes of inputs and outputs, of layers that ran, whose channels are not removed."""
    cut = {(name, at.dim) for group in groups for name, at in group.places}
    ins, outs = set[int](), set[int]()
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() < 2 or id(weight) not in used.used:
            continue
        is_transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        for sizes, names, dim in ((ins, IN_SIZES, 1), (outs, OUT_SIZES, 0)):
            dim = 1 - dim if is_transposed else dim
            if (f"{name}.weight", dim) not in cut:
                sizes |= _layer_sizes(layer, names)
    return frozenset(ins), frozenset(outs)


def _beside(modules: Mapping[str, nn.Module], name: str, layer: str, end: int) -> bool:
    """Is a layer the first (end 0) or the last (-1) of another module of the same parent?"""
    parent = name.rpartition(".")[0]
    if parent and not layer.startswith(f"{parent}."):
        return False
    inside = layer.removeprefix(f"{parent}.").partition(".")[0]
    sibling = modules.get(f"{parent}.{inside}" if parent else inside)
    if sibling is None:  # the layer is the parent's own parameter
        return False
    owner = layer if layer in modules else layer.rpartition(".")[0]  # of a layer's weight
    return _layers(sibling)[end] is modules[owner]
