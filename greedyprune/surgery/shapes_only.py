"""Runs a model on shapes alone: a first answer to whether it runs at all, without its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ..data.batches import Batch
from ..graph.executor import tensors_of


def fails_on_shapes(
    model: nn.Module, batch: Batch, is_shape_error: Callable[[Exception], bool]
) -> bool:
    """Does a model raise an error about its shapes? False where its numbers would be needed.

    torch's fake tensors have shapes and no numbers, so that operations take no time.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return tree_map_only(Tensor, mode.from_tensor, value)

    tensors = {name: fake(tensor) for name, tensor in tensors_of(model).items()}
    try:
        with mode:
            functional_call(model, tensors, fake(batch.args), fake(dict(batch.kwargs)))
    except Exception as error:  # of any kind: some code can't run on such tensors
        own = isinstance(error, AssertionError) or "_subclasses" in type(error).__module__
        return not own and is_shape_error(error)
    return False
