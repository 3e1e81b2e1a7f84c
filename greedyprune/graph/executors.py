"""A model's executors: one trace for batches of all sizes where the model allows it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..data.batches import Batch
from ..data.forward import run_model, same_outputs, traceable
from .executor import GraphExecutor
from .export import without_cache
from .networks import tensors_of

MOST_SHAPES = 16  # of batches that take a trace of their own


class GraphExecutors:
    """A model's executors, made when first needed.

    A second shape of batches gets a trace whose sizes are open, if the model allows it. Other
    shapes take a trace each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._by_shapes: dict[object, GraphExecutor] = {}
        self._open: dict[object, GraphExecutor | None] = {}  # by what is not a size

    def of(self, batch: Batch) -> GraphExecutor:
        """The executor for a batch; ValueError for more than MOST_SHAPES traces."""
        executor = self.find(batch)
        if executor is None:
            raise ValueError(
                f"data: found batches of more than {MOST_SHAPES} shapes, each of which takes a "
                "trace of this model; expected batches of one size, or sequential=False in the "
                "objective of `select`"
            )
        return executor

    def find(self, batch: Batch) -> GraphExecutor | None:
        """The executor for a batch; None for more than MOST_SHAPES traces."""
        leaves, structure = tree_flatten((batch.args, batch.kwargs))
        shapes = tuple((v.shape, v.dtype, v.layout) if isinstance(v, Tensor) else v for v in leaves)
        known = self._by_shapes.get(shapes)
        if known is not None:
            return known
        ranks = tuple((v.dim(), v.dtype, v.layout) if isinstance(v, Tensor) else v for v in leaves)
        if self._by_shapes:
            executor = self._with_open_sizes((ranks, str(structure)), batch)
            if executor is not None and executor.accepts(batch):
                return executor
        if len(self._by_shapes) < MOST_SHAPES:
            with traceable(self._model, batch):
                self._by_shapes[shapes] = GraphExecutor(self._model, batch)
        return self._by_shapes.get(shapes)

    def _with_open_sizes(self, form: object, batch: Batch) -> GraphExecutor | None:
        """The executor for all sizes; None where the trace fails or is not the model's."""
        if form not in self._open:
            self._open[form] = None
            try:
                executor = GraphExecutor(self._model, batch, dynamic=True)
                with torch.no_grad():
                    outputs = executor.outputs(executor.inputs(batch), tensors_of(self._model), 0)
            except Exception:  # torch.export raises errors of many types; a graph may need a size
                return None
            traced = replace(batch, kwargs=without_cache(self._model, batch.kwargs))
            if same_outputs(run_model(self._model, traced), outputs, batch.padding):
                self._open[form] = executor
        return self._open[form]
