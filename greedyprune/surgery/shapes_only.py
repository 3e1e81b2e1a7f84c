"""Runs a model on shapes alone: a first answer to whether it runs at all, without its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..data.batches import Batch


def fails_on_shapes(
    model: nn.Module, build: Callable[[dict[int, Any]], nn.Module], batch: Batch,
    is_about_shapes: Callable[[Exception], bool],
) -> bool:  # fmt: skip
    """Does a changed copy of a model raise an error about shapes? False: numbers may tell.

    torch's fake tensors have shapes and no numbers, so that copies and operations take no time.

    build: makes the copy, with a memo for copy.deepcopy that has fake parameters and buffers
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(buffer): mode.from_tensor(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.data), requires_grad=False)
    args, kwargs = tree_map_only(Tensor, mode.from_tensor, (batch.args, dict(batch.kwargs)))
    try:
        changed = build(memo)
    except Exception:  # of any kind: some models can't be changed without numbers
        return False
    with mode:
        try:
            changed(*args, **kwargs)
        except Exception as error:  # of any kind: some code needs numbers
            own = isinstance(error, AssertionError) or "_subclasses" in type(error).__module__
            return not own and is_about_shapes(error)
    return False
