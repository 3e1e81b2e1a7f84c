"""What can be selected, read off torch.export's graph.

From each producer (a Linear) forward through operations that keep the units' dimension, until every
path ends in a consumer (a Linear) that contracts it. Such a group is closed: removing a unit means
slicing the tensors that were met on the way. An operation that no table below names refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from .data import Batch

# What the operations do to the last dimension, by name (in-place forms count as the plain ones).
# What leaves every number as it is:
IDENTITY = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
# Elementwise operations are those that torch tags `pointwise`, and these:
ELEMENTWISE = IDENTITY | {"hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like"}
# Reshaping: keeps the units where the last dimension is unchanged.
RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"}
# Normalisation of each unit by itself: these arguments have one entry a unit.
PER_UNIT_ARGUMENTS = {"batch_norm": (1, 2, 3, 4), "prelu": (1,)}


@dataclass(frozen=True)
class Group:
    """Units that are removed together.

    slices: the names of the parameters and buffers with one entry a unit, and in which dimension
    output: the consumer's output is the model's output
    """

    producer: str
    consumer: str
    units: int
    slices: Mapping[str, int]
    output: bool
    not_output: str = ""  # what stands between the consumer and the model's output


class NotPrunableError(ValueError):
    """No unit of the layer can be removed; the message says which operation is in the way."""


@dataclass
class _Walk:
    """One producer's walk: the nodes that carry its units, what it met."""

    units: int
    carrying: set[fx.Node] = field(default_factory=set)
    slices: dict[str, int] = field(default_factory=dict)
    consumers: list[fx.Node] = field(default_factory=list)


class Graph:
    """The exported graph of a model on one batch of example inputs."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # it prints whole graphs where it fails
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        finally:
            logging.disable(before)
        signature = program.graph_signature
        self._model = model
        self._nodes = list(program.graph.nodes)
        self._tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def producers(self) -> Iterator[tuple[str, fx.Node]]:
        """The Linears whose weights are a module's own, in the order in which they run."""
        for node in self._nodes:
            name = self._linear(node)
            if name is not None:
                yield name, node

    def group(self, name: str, node: fx.Node) -> Group:
        """The group that `node`'s units belong to; NotPrunableError where they can't be removed."""
        units = int(_shape(node)[-1])
        walk = _Walk(units, {node})
        self._slice_linear(walk, node, dim=0)
        uses = [n for n in self._nodes if self._linear(n) == name]
        if len(uses) > 1:
            raise NotPrunableError(f"layer {name!r}: its weights are used {len(uses)} times")
        for user in self._nodes[self._nodes.index(node) + 1 :]:
            if any(source in walk.carrying for source in user.all_input_nodes):
                self._step(name, walk, user)
        if not walk.consumers:
            raise NotPrunableError(f"layer {name!r}: nothing uses its units")
        consumers = {str(self._linear(consumer)) for consumer in walk.consumers}
        if len(walk.consumers) > 1:
            raise NotPrunableError(
                f"layer {name!r}: its units feed {len(walk.consumers)} Linears "
                f"({', '.join(sorted(consumers))}), expected one"
            )
        self._check_untied(name, walk)
        between = self._between_and_output(walk.consumers[0])
        return Group(name, consumers.pop(), units, walk.slices, between == "", between)

    def _check_untied(self, name: str, walk: _Walk) -> None:
        """What is sliced must not be used elsewhere."""
        inside = walk.carrying | set(walk.consumers)
        owners: dict[int, list[str]] = {}
        for tensor, value in self._model.state_dict(keep_vars=True).items():
            owners.setdefault(id(value), []).append(tensor)
        shared = {tensor for names in owners.values() if len(names) > 1 for tensor in names}
        for node in self._nodes:
            tensor = self._tensors.get(node.name, "")
            if tensor in walk.slices and (tensor in shared or not inside.issuperset(node.users)):
                raise NotPrunableError(f"layer {name!r}: {tensor!r} is shared with another layer")

    def _step(self, name: str, walk: _Walk, node: fx.Node) -> None:
        """Takes the units through one operation, or says why not."""

        def refuse(why: str) -> NotPrunableError:
            return NotPrunableError(f"layer {name!r}: {why}")

        if node.op == "output":
            raise refuse("its units are the model's output")
        op = _name(node)
        if op == "linear":
            consumer = self._linear(node)
            if node.args[0] not in walk.carrying or consumer is None:
                raise refuse(
                    "its units meet a linear operation that is no module's own (aten.linear)"
                )
            if any(arg in walk.carrying for arg in node.args[1:]):
                raise refuse("its units are used as weights (aten.linear)")
            walk.slices[f"{consumer}.weight"] = 1
            walk.consumers.append(node)
            return
        if not node.users:
            return
        shape = _shape(node)
        if op in PER_UNIT_ARGUMENTS:
            if len(shape) != 2 and not (
                op == "prelu" and _shape(cast(fx.Node, node.args[1])) == (1,)
            ):
                raise refuse(f"{node.target} does not act along the units' dimension")
            for i in PER_UNIT_ARGUMENTS[op]:
                self._slice_operand(walk, node.args[i], refuse, str(node.target))
        elif op in RESHAPING:
            if not shape or shape[-1] != walk.units:
                raise refuse(f"{node.target} mixes its units' dimension with others")
        elif op in ELEMENTWISE or _is_pointwise(node):
            for source in node.all_input_nodes:
                if source not in walk.carrying:
                    self._slice_operand(walk, source, refuse, str(node.target))
            if shape[-1] != walk.units:
                raise refuse(f"{node.target} changes its units' dimension")
        else:
            raise refuse(f"{node.target} stands between its units and a Linear")
        walk.carrying.add(node)

    def _slice_operand(self, walk: _Walk, operand: object, refuse: Any, op: str) -> None:
        """An operand beside the units: the same for all of them, or with one entry a unit."""
        if not isinstance(operand, fx.Node):
            return
        shape = _shape(operand)
        if not shape or shape[-1] == 1:
            return
        tensor = self._tensors.get(operand.name)
        if tensor is None or shape[-1] != walk.units:
            raise refuse(f"{op} combines its units with another tensor of shape {tuple(shape)}")
        walk.slices[tensor] = len(shape) - 1

    def _slice_linear(self, walk: _Walk, node: fx.Node, dim: int) -> None:
        for arg in node.args[1:]:
            if isinstance(arg, fx.Node):
                walk.slices[self._tensors[arg.name]] = dim

    def _linear(self, node: fx.Node) -> str | None:
        """The nn.Linear whose weights a node uses."""
        if node.op != "call_function" or _name(node) != "linear":
            return None
        weight = node.args[1]
        tensor = self._tensors.get(weight.name) if isinstance(weight, fx.Node) else None
        if tensor is None or not tensor.endswith("weight"):
            return None
        name = tensor.rpartition(".")[0]
        return name if type(self._model.get_submodule(name)) is nn.Linear else None

    def _between_and_output(self, consumer: fx.Node) -> str:
        """The first operation between the consumer and the model's output; "" if there is none."""
        reached = {consumer}
        for node in self._nodes[self._nodes.index(consumer) + 1 :]:
            if not any(source in reached for source in node.all_input_nodes):
                continue
            if node.op == "output":
                return ""
            if _name(node) in (IDENTITY | RESHAPING):
                reached.add(node)
            elif node.users:
                return str(node.target)
        return "nothing that reaches the output"


# What each model's structure allows, from the last call; kept with the model, weakly.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, dict[str, Group | NotPrunableError]]]
_KNOWN = WeakKeyDictionary()


def analyse(model: nn.Module, batch: Batch) -> dict[str, Group | NotPrunableError]:
    """Every producer's group, or why it has none, in the order in which they run.

    Raises whatever torch.export raises for a model that it can't trace. A second call on an
    unchanged model finds the answer kept.
    """
    signature = _signature(model, batch)
    known = _KNOWN.get(model)
    if known is not None and known[0] == signature:
        return known[1]
    graph = Graph(model, batch.args, batch.kwargs)
    found: dict[str, Group | NotPrunableError] = {}
    for name, node in graph.producers():
        try:
            found[name] = graph.group(name, node)
        except NotPrunableError as error:
            found[name] = error.with_traceback(None)
    _KNOWN[model] = signature, found
    return found


def _signature(model: nn.Module, batch: Batch) -> object:
    """What a trace depends on: modules, their plain attributes, shapes of tensors and inputs."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((str(key), plain(each)) for key, each in value.items())
        return id(value)

    modules = [
        (name, type(module), plain({k: v for k, v in vars(module).items() if k != "_modules"}))
        for name, module in model.named_modules()
    ]
    return modules, plain(batch.args), plain(batch.kwargs)


def find_groups(
    model: nn.Module, found: Mapping[str, Group | NotPrunableError], wanted: Sequence[str] | None
) -> list[Group]:
    """Of what `analyse` found, the groups of the wanted producers, or of all that have one.

    Raises NotPrunableError for a wanted layer that can't be pruned, or where no layer can.
    """
    if wanted is None:
        groups = [group for group in found.values() if isinstance(group, Group)]
        if not groups:
            reasons = [str(reason) for reason in found.values()]
            reasons += [
                f"layer {name!r}: {_not_found(module)}"
                for name, module in model.named_modules()
                if name not in found and isinstance(module, (nn.Linear, *CONVOLUTIONS))
            ]
            why = "; ".join(reasons) or "it has no Linear"
            raise NotPrunableError(f"model: no layer can be pruned: {why}")
        return groups
    groups = []
    known = ", ".join(repr(n) for n, group in found.items() if isinstance(group, Group)) or "none"
    for name in wanted:
        group = found.get(name)
        if isinstance(group, Group):
            groups.append(group)
        elif group is not None:
            raise NotPrunableError(
                f"layers: found {name!r}, which can't be pruned ({group}), expected any of: {known}"
            )
        else:
            module = dict(model.named_modules()).get(name)
            why = "no such module" if module is None else _not_found(module)
            raise ValueError(f"layers: found {name!r} ({why}), expected any of: {known}")
    return groups


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _not_found(module: nn.Module) -> str:
    """Why a module is no producer."""
    kind = type(module).__name__
    if isinstance(module, CONVOLUTIONS):
        return f"{kind}: convolutions can't be pruned yet"
    if not isinstance(module, nn.Linear):
        return f"{kind}: no Linear"
    if "weight" not in module._parameters:
        return f"{kind}: its weight is computed, by a parametrization or torch.nn.utils.prune"
    return (
        f"{kind}: it does not run, or shares its weight"
        if type(module) is nn.Linear
        else f"{kind}: no plain Linear"
    )


def named_group(model: nn.Module, producer: str, consumer: str, batch: Batch) -> Group:
    """The group of a producer and a consumer named by hand, for models that can't be traced.

    One forward pass tells which modules run between the two and whether the consumer's output is
    the model's.
    """
    modules = dict(model.named_modules())
    for name in (producer, consumer):
        if type(modules.get(name)) is not nn.Linear:
            raise ValueError(
                f"layers: found {name!r} ({module_kind(model, name)}), "
                "expected the name of an nn.Linear"
            )
    first, last = modules[producer], modules[consumer]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    units = first.out_features
    if units != last.in_features:
        raise ValueError(
            f"layers: {producer!r} has {units} output units, but {consumer!r} takes "
            f"{last.in_features} inputs"
        )
    ran: list[tuple[str, object]] = []
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: ran.append((name, out)))
        for name, module in modules.items()
    ]
    try:
        outputs = model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ran]
    if names.count(producer) != 1 or names.count(consumer) != 1:
        raise ValueError(
            f"layers: {producer!r} ran {names.count(producer)} and {consumer!r} "
            f"{names.count(consumer)} times in one forward pass, expected once each"
        )
    slices = {f"{consumer}.weight": 1}
    for name in [producer, *names[names.index(producer) + 1 : names.index(consumer)]]:
        module = modules[name]
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        sized = {key: t for key, t in own if t.dim() and len(t) == units}
        if name != producer and sized and not isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
            raise NotPrunableError(
                f"layer {producer!r}: {name!r} ({type(module).__name__}) stands between its units "
                f"and {consumer!r}"
            )
        slices |= {f"{name}.{key}": 0 for key in sized}
    last_out = ran[names.index(consumer)][1]
    output = (
        isinstance(outputs, Tensor)
        and isinstance(last_out, Tensor)
        and torch.equal(outputs.flatten(), last_out.flatten())
    )
    between = "" if output else "something that was not traced"
    return Group(producer, consumer, units, slices, output, between)


def module_kind(model: nn.Module, name: str) -> str:
    module = dict(model.named_modules()).get(name)
    return "no such module" if module is None else type(module).__name__


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
