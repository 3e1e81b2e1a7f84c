"""The attributes in which modules hold the sizes of their tensors, and how pruning changes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..graph.slices import Entries

Size = int | tuple[int, ...] | list[int]

# The names of attributes that hold the size of one dimension of the weight, with this dimension.
# (nx and nf are those of GPT-2's Conv1D, whose weight is transposed.)
_DIMENSIONS = {
    "out_features": 0, "out_channels": 0, "out_dim": 0, "output_dim": 0, "nf": 1,
    "in_features": 1, "in_channels": 1, "in_dim": 1, "input_dim": 1, "nx": 0, "embedding_dim": 1,
}  # fmt: skip
# The names of other attributes that hold a size: of every dimension that has it.
_NAMES = {
    "num_features", "num_channels", "num_parameters", "features", "channels", "width",
    "hidden_features", "hidden_channels", "hidden_dim", "hidden_size", "normalized_shape",
}  # fmt: skip

# The attributes of attention modules that are in proportion to their number of heads.
HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "all_head_size")

_NOTED = "_greedyprune_sizes"  # the attribute with a module's other sizes

# Of torch's own modules those with tensors that pruning can cut, along their first two dimensions.
_CUT_TYPES = (
    nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU, nn.Embedding,
    nn.ParameterList, nn.ParameterDict,
    nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip


def sizes_of(module: nn.Module) -> dict[str, Size]:
    """The attributes of a module that hold sizes which pruning can change, with their values."""
    noted = vars(module).get(_NOTED, set())
    names = set(HEADS) | noted
    if _tensors_of(module):
        names |= _NAMES | _DIMENSIONS.keys() | {"groups", "num_groups"}
    sizes = {name: vars(module)[name] for name in sorted(names & vars(module).keys())}
    return {
        name: size for name, size in sizes.items()
        if _is_size(size) or (name in noted and type(size) is list and _is_size(tuple(size)))
    }  # fmt: skip


def note_size(module: nn.Module, attribute: str) -> None:
    """Counts an attribute of this module among its sizes, whatever its name is."""
    if attribute not in sizes_of(module):
        vars(module)[_NOTED] = vars(module).get(_NOTED, set()) | {attribute}


def sizes_after(module: nn.Module, cuts: Mapping[tuple[str, int], int]) -> dict[str, Size]:
    """The attributes that change when tensors of the module are cut, with their new values.

    An attribute changes if it has a known name and equals the size of a dimension that is cut. If a
    dimension that is not cut has the same size, only the names of `_DIMENSIONS` tell which one is
    meant.

    cuts: new sizes of dimensions of the module's own tensors, by tensor and dimension; not yet cut
    """
    tensors, sizes, changed = _tensors_of(module), sizes_of(module), dict[str, Size]()
    for (tensor, dim), new in cuts.items():
        size = tensors[tensor].shape[dim]
        others = {
            (name, other_dim) for name, other in tensors.items()
            for other_dim, other_size in enumerate(other.shape) if other_size == size
            if cuts.get((name, other_dim)) != new
        }  # fmt: skip
        for name, value in sizes.items():
            named = _DIMENSIONS.get(name)
            if named is not None and getattr(module, "transposed", False):  # ConvTranspose's weight
                named = 1 - named
            is_meant = not others or (tensor == "weight" and named == dim)
            if name in HEADS or name in ("groups", "num_groups") or not is_meant:
                continue
            if value == size:
                changed[name] = new
            elif isinstance(value, tuple) and value == tuple(tensors[tensor].shape):
                changed[name] = (*value[:dim], new, *value[dim + 1 :])
        if tensor == "weight" and isinstance(groups := sizes.get("groups"), int) and groups > 1:
            changed["groups"] = groups * new // size  # each group has its own units
            if isinstance(channels := sizes.get("in_channels"), int):
                changed["in_channels"] = channels * new // size
        if tensor == "weight" and isinstance(groups := sizes.get("num_groups"), int) and groups > 1:
            changed["num_groups"] = groups * new // size
    return changed


def holders_of(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that have each parameter, by the parameter's identity."""
    holders = defaultdict[int, list[nn.Module]](list)
    for module in model.modules():
        for parameter in {id(p) for p in module._parameters.values() if p is not None}:
            holders[parameter].append(module)
    return holders


def tied_sizes(
    holders: Mapping[int, Sequence[nn.Module]], owner: nn.Module, cuts: Entries
) -> list[tuple[nn.Module, dict[str, Size]]]:
    """The attributes that change in other modules that have the owner's tensors.

    holders: from `holders_of`
    """
    found = []
    held_by = (
        module for tensor, _ in cuts for module in holders.get(id(getattr(owner, tensor)), ())
    )  # fmt: skip
    for module in dict.fromkeys(held_by):
        held = {
            (name, dim): len(left) for (tensor, dim), left in cuts.items()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter is getattr(owner, tensor)
        }  # fmt: skip
        if held and module is not owner:
            found.append((module, sizes_after(module, held)))
    return found


def can_be_cut(module: nn.Module, dim: int) -> bool:
    """Can pruning cut this dimension of a module's own tensors?

    Of torch's modules it cuts only some, and not along a convolution's kernel. Any other module may
    have a dimension for the units.
    """
    if type(module).__module__.startswith("torch."):
        is_attention = isinstance(module, nn.MultiheadAttention)
        return is_attention or (isinstance(module, _CUT_TYPES) and dim < 2)
    return True


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    tensors = (module._parameters | module._buffers).items()
    return {name: tensor for name, tensor in tensors if tensor is not None}


def _is_size(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(size, int) and not isinstance(size, bool) for size in values)
