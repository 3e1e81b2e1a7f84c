"""`prune_optimizer`: an optimizer of a model goes on with the pruned one, with its state."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..runtime.modules import module_of
from .cut import check_made_for, in_format_of
from .remaining import entries_left
from .selection import Selection

T = TypeVar("T", bound=Optimizer)


def prune_optimizer(optimizer: T, model: nn.Module, small: nn.Module, selection: Selection) -> T:
    """A new optimizer of the pruned model's parameters, which goes on where `optimizer` is.

    It has the class of `optimizer`, its groups of parameters and their options. Of state tensors
    that have the shape of their parameter, such as `momentum_buffer`, `exp_avg` and `exp_avg_sq`,
    the entries of the kept units stay. All other state, such as `step`, is copied.

    `prune` multiplies the outgoing weights of the kept units by the selection's weights, or
    replaces them. Their state is not scaled with them: each entry of momentum stays as it was. So
    training the pruned model is the same as training the dense model with the units masked.

    A scheduler belongs to its optimizer: make a new one, with `last_epoch` of the old one.

    Args:
        optimizer: an optimizer of parameters of `model`; it is not changed
        model: the dense model that the selection was made for
        small: what `prune` or `refit` made of it with this selection
        selection: from `select`

    Returns:
        the new optimizer

    Raises:
        TypeError: `optimizer` is not a torch.optim.Optimizer, or `model`, `small` or `selection`
            has another type
        ValueError: the optimizer has parameters that are not the model's, a state tensor that does
            not have the shape of its parameter (as LBFGS has), or a constructor with arguments that
            are no options of its groups; or the selection was made for another model, or `small`
            with another selection

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> data = torch.randn(32, 4), torch.randn(32, 1)
        >>> selection = greedyprune.select(model, data, size=3)
        >>> small = greedyprune.prune(model, selection)
        >>> optimizer = greedyprune.prune_optimizer(optimizer, model, small, selection)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: found {type(optimizer).__name__}, expected a torch.optim one")
    model, small = module_of(model), module_of(small, "small: found")
    check_made_for(model, selection)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    cuts: dict[str, list[_Cut]] = {}
    for (tensor, dim), entries in entries_left(selection.layers.values()).items():
        cuts.setdefault(tensor, []).append(_Cut(dim, entries))
    groups, state = [], dict[Tensor, dict[str, Any]]()
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            if (name := names.get(id(parameter))) is None:
                raise ValueError(
                    f"optimizer: found a parameter of shape {tuple(parameter.shape)} that is not "
                    "the model's, expected an optimizer of `model`"
                )
            new = _counterpart(small, name, parameter, cuts.get(name, []))
            parameters.append(new)
            if parameter in optimizer.state:
                state[new] = {
                    key: _cut_value(value, key, parameter, cuts.get(name, []))
                    for key, value in optimizer.state[parameter].items()
                }
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({"params": parameters, **options})
    pruned = _like(optimizer, groups)
    pruned.state.update(state)
    return pruned


class _Cut(NamedTuple):
    """The entries (K,) int64 that stay of a tensor's dimension."""

    dim: int
    entries: Tensor

    def of(self, tensor: Tensor, size: int) -> Tensor:
        """The entries that stay; all of a dimension of 1, as Adafactor's state has."""
        if tensor.shape[self.dim] == 1 != size:
            return tensor
        return tensor.index_select(self.dim, self.entries.to(tensor.device))


def _counterpart(small: nn.Module, name: str, parameter: Tensor, cuts: list[_Cut]) -> nn.Parameter:
    """The pruned model's parameter of this name; ValueError if it has another shape."""
    new = dict(small.named_parameters(remove_duplicate=False)).get(name)
    expected = tuple(_cut_tensor(parameter.detach(), parameter.shape, cuts).shape)
    if new is None or tuple(new.shape) != expected:
        found = "none" if new is None else f"shape {tuple(new.shape)}"
        raise ValueError(
            f"small: found {found} for {name!r}, expected shape {expected}, which `prune` gives it "
            "for this selection"
        )
    return new


def _cut_tensor(tensor: Tensor, shape: torch.Size, cuts: list[_Cut]) -> Tensor:
    """The entries of kept units, of a tensor with the sizes of its parameter's shape or 1."""
    small = tensor
    for cut in cuts:
        small = cut.of(small, shape[cut.dim])
    return small


def _cut_value(value: Any, key: str, parameter: Tensor, cuts: list[_Cut]) -> Any:
    """A parameter's state for the pruned parameter."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if all(tensor.numel() <= 1 for tensor in tensors) and (
        not isinstance(value, Tensor) or value.shape != parameter.shape
    ):
        return copy.deepcopy(value)
    fits = (
        isinstance(value, Tensor)
        and value.dim() == parameter.dim()
        and all(size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True))
    )
    if not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"optimizer: its state {key!r} has shape {shapes}, expected {tuple(parameter.shape)} "
            "as the parameter has, since only such entries belong to units"
        )
    return in_format_of(value, _cut_tensor(value.detach(), parameter.shape, cuts)).clone(
        memory_format=torch.preserve_format
    )


def _like(optimizer: T, groups: list[dict[str, Any]]) -> T:
    """An optimizer of the same class and defaults, without state."""
    defaults = copy.deepcopy(optimizer.defaults)
    known = inspect.signature(type(optimizer)).parameters
    try:
        new = type(optimizer)(groups, **{k: v for k, v in defaults.items() if k in known})
    except TypeError as error:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} can't be made from its groups and defaults "
            f"({error}), expected a constructor that takes these"
        ) from error
    new.defaults = defaults
    return new
