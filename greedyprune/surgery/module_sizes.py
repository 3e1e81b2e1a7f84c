"""The attributes in which modules hold their sizes, and the dimensions that pruning can cut."""

from __future__ import annotations

from torch import nn

# The attribute with the size of a tensor's dimension. The module's other tensors are sized alike.
SIZES: dict[tuple[type[nn.Module], str, int], str] = {
    (nn.Linear, "weight", 0): "out_features",
    (nn.Linear, "weight", 1): "in_features",
    (nn.BatchNorm1d, "weight", 0): "num_features",
    (nn.BatchNorm1d, "running_mean", 0): "num_features",
    (nn.PReLU, "weight", 0): "num_parameters",
}
for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    SIZES |= {(_conv, "weight", 0): "out_channels", (_conv, "weight", 1): "in_channels"}
for _norm in (nn.BatchNorm2d, nn.BatchNorm3d):
    SIZES |= {(_norm, name, 0): "num_features" for name in ("weight", "running_mean")}
# The same for both dimensions of the weight of GPT-2's Conv1D, a Linear with its weight transposed.
CONV1D = ("nx", "nf")

# The attributes of attention modules that are in proportion to their number of heads.
HEADS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "all_head_size")


def size_name_of(module: nn.Module, tensor: str, dim: int) -> str | None:
    """The attribute with the size of a tensor's dimension; None: the module has none."""
    names = (SIZES.get((kind, tensor, dim)) for kind in type(module).__mro__)
    name = next((name for name in names if name is not None), None)
    return name if name is not None and hasattr(module, name) else None


def sizes_of(module: nn.Module) -> dict[str, int]:
    """The attributes of a module that hold sizes which pruning can change, with their values."""
    names = {size for (kind, _, _), size in SIZES.items() if isinstance(module, kind)} | set(HEADS)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        names.add("groups")
    elif type(module).__name__ == "Conv1D":
        names |= set(CONV1D)
    sizes = {name: getattr(module, name, None) for name in sorted(names)}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def can_be_cut(module: nn.Module, dim: int) -> bool:
    """Can pruning cut this dimension of a module's own tensors?

    Of torch's modules it cuts only those in SIZES, and not along a convolution's kernel. Any other
    module may have a dimension for the units.
    """
    if any(isinstance(module, kind) for kind, _, _ in SIZES):
        return dim < 2
    return not type(module).__module__.startswith("torch.")
