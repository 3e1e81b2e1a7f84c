"""nn.LSTM, nn.GRU and nn.RNN after pruning: layers and directions of different sizes.

torch's own classes have one hidden_size for all layers and directions. A module whose layers or
directions have kept different numbers of hidden units becomes the class of the same name in this
file. It has the same parameters under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence


class States(tuple[Tensor, ...]):
    """The last states of all layers and directions, which are of different sizes.

    They are in torch's order and are indexed as torch's tensor is: `h_n[-1]`, `h_n[-1, :, 2:]`. A
    tensor of all is impossible, so anything else that a tensor has raises a RuntimeError.
    """

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, tuple) and place and isinstance(place[0], int):
            return super().__getitem__(place[0])[place[1:]]
        return super().__getitem__(place)

    def select(self, dim: int, index: int) -> Any:
        """As torch's: one layer's state, for dimension 0."""
        if dim != 0:
            raise RuntimeError(f"dim: found {dim}, but the states are of different sizes")
        return self[index]

    def unbind(self, dim: int = 0) -> States:
        """As torch's: the states of all layers and directions, for dimension 0."""
        if dim != 0:
            raise RuntimeError(f"dim: found {dim}, but the states are of different sizes")
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise RuntimeError(
            f"{name!r}: the states of these layers and directions are of different sizes, "
            f"{[state.shape[-1] for state in self]}, so they are no tensor; expected one of them, "
            "such as h_n[-1]"
        )


class _Layers(nn.RNNBase):
    """A recurrent module that runs its layers and directions one after the other."""

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002  # as torch names it
        hx: Any = None,
    ) -> tuple[Any, Any]:
        """What torch's forward gives: the outputs, and the last states.

        The last states are a `States` where their sizes differ. `hx` may be one, too.
        """
        packed = input if isinstance(input, PackedSequence) else None
        values: Tensor = input if packed is None else packed.data  # type: ignore[assignment]
        batch_dim = 0 if self.batch_first else 1
        is_single = packed is None and values.dim() == 2
        if is_single:
            values = values.unsqueeze(batch_dim)
        samples = values.shape[batch_dim] if packed is None else int(packed.batch_sizes[0])
        order = None if packed is None else packed.sorted_indices
        given = self._given(hx, is_single, order)
        states: list[list[Tensor]] = [[] for _ in given]
        for layer in range(self.num_layers):
            if layer:
                values = functional.dropout(values, self.dropout, self.training)
            outputs = list[Tensor]()
            for backward in (False, True)[: 1 + self.bidirectional]:
                initial = self._initial(len(states[0]), given, samples, values)
                output, *last = self._run(len(states[0]), values, initial, packed, backward)
                outputs.append(output)
                for own, state in zip(states, last, strict=True):
                    own.append(state[0])
            values = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        results = [self._results(own, is_single, packed) for own in states]
        hidden = tuple(results) if self.mode == "LSTM" else results[0]
        if packed is not None:
            _, batch_sizes, sorted_indices, unsorted_indices = packed
            return PackedSequence(values, batch_sizes, sorted_indices, unsorted_indices), hidden
        return values.squeeze(batch_dim) if is_single else values, hidden

    def _weights(self, place: int) -> list[Tensor]:
        """The weights and biases of one layer and direction."""
        return [getattr(self, name) for name in self._all_weights[place]]

    def _sizes(self) -> list[int]:
        """The hidden sizes of all layers and directions."""
        return [self._weights(i)[1].shape[1] for i in range(len(self._all_weights))]

    def _given(self, hx: Any, is_single: bool, order: Tensor | None) -> list[list[Tensor] | None]:
        """The states to start from, h and for an LSTM c: (B, H) of each layer and direction."""
        if hx is None:
            return [None] * (2 if self.mode == "LSTM" else 1)
        given = list[list[Tensor] | None]()
        for states in hx if self.mode == "LSTM" else [hx]:
            own = [state.unsqueeze(0) if is_single else state for state in states]
            given.append(own if order is None else [state.index_select(0, order) for state in own])
        return given

    def _initial(
        self, place: int, given: Sequence[list[Tensor] | None], samples: int, values: Tensor
    ) -> list[Tensor]:
        """The states of one layer and direction to start from: (1, B, H)."""
        sizes, initial = self._sizes(), list[Tensor]()
        for states in given:
            if states is None:
                size = 1, samples, sizes[place]
                initial.append(torch.zeros(size, dtype=values.dtype, device=values.device))
                continue
            if [state.shape for state in states] != [(samples, size) for size in sizes]:
                raise RuntimeError(
                    f"Expected hidden sizes {sizes} of {samples} samples, got "
                    f"{[tuple(state.shape) for state in states]}"
                )
            initial.append(states[place].unsqueeze(0))
        return initial

    def _run(
        self, place: int, values: Tensor, initial: list[Tensor], packed: PackedSequence | None,
        backward: bool,
    ) -> list[Tensor]:  # fmt: skip
        """One layer in one direction: its outputs and last states."""
        function: Any = getattr(torch._VF, self.mode.lower())
        hx = initial if self.mode == "LSTM" else initial[0]
        options = self._weights(place), self.bias, 1, 0.0, self.training, False
        if packed is None:
            time = int(self.batch_first)
            inputs = values.flip(time) if backward else values
            output, *last = function(inputs, hx, *options, self.batch_first)
            return [output.flip(time) if backward else output, *last]
        turned = _turned(packed.batch_sizes).to(values.device) if backward else None
        inputs = values if turned is None else values[turned]
        output, *last = function(inputs, packed.batch_sizes, hx, *options)
        return [output if turned is None else output[turned], *last]

    def _results(self, states: list[Tensor], is_single: bool, packed: PackedSequence | None) -> Any:
        """The last states as torch gives them, or `States`."""
        if is_single:
            states = [state[0] for state in states]
        if packed is not None and packed.unsorted_indices is not None:
            states = [state.index_select(0, packed.unsorted_indices) for state in states]
        alike = len(set(self._sizes())) == 1
        return torch.stack(states) if alike else States(states)

    def flatten_parameters(self) -> None:
        """As torch's, for each layer and direction by itself."""
        weights = self._flat_weights
        usable = [isinstance(w, Tensor) and w.is_cuda for w in weights]
        if not all(usable) or len({w.data_ptr() for w in weights}) < len(weights):  # type: ignore[union-attr]
            return
        dtypes = {w.dtype for w in weights}  # type: ignore[union-attr]
        if len(dtypes) > 1 or not torch.backends.cudnn.is_acceptable(weights[0]):
            return
        from torch.backends.cudnn import rnn

        with torch.cuda.device_of(weights[0]), torch.no_grad():
            for place, size in enumerate(self._sizes()):
                own = self._weights(place)
                torch._cudnn_rnn_flatten_weight(
                    own, len(own), own[0].shape[1], rnn.get_cudnn_mode(self.mode), size, 0, 1,
                    self.batch_first, False,
                )  # fmt: skip

    def reset_parameters(self) -> None:
        """As torch's, for each layer and direction with its own size."""
        for place, size in enumerate(self._sizes()):
            for weight in self._weights(place):
                nn.init.uniform_(weight, -1 / math.sqrt(size), 1 / math.sqrt(size))


class LSTM(_Layers, nn.LSTM):
    """torch.nn.LSTM whose layers and directions have hidden sizes of their own.

    Made by `greedyprune.prune`, not by hand. `hidden_size` has the sizes, in the order of torch's
    `h_n`.
    """


class GRU(_Layers, nn.GRU):
    """torch.nn.GRU whose layers and directions have hidden sizes of their own, as `LSTM`."""


class RNN(_Layers, nn.RNN):
    """torch.nn.RNN whose layers and directions have hidden sizes of their own, as `LSTM`."""


_OWN: dict[type[nn.RNNBase], type[_Layers]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
_TORCHS = {own: kind for kind, own in _OWN.items()}


def fit_recurrent(model: nn.Module) -> None:
    """Gives every recurrent module of a copied or cut model its sizes and the forward they need.

    On a GPU, its weights are then in one piece of memory again, as cuDNN wants them.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNCellBase):
            module.hidden_size = module.weight_hh.shape[1]
            module.input_size = module.weight_ih.shape[1]
        if not isinstance(module, nn.RNNBase) or module.proj_size:
            continue
        weights = [[getattr(module, name) for name in names[:2]] for names in module._all_weights]
        sizes: Any = tuple(weight_hh.shape[1] for _, weight_hh in weights)
        input_size = weights[0][0].shape[1]
        if len(set(sizes)) == 1:
            sizes = sizes[0]
            module.__class__ = _TORCHS.get(type(module), type(module))  # type: ignore[arg-type]
        else:
            module.__class__ = _OWN.get(type(module), type(module))
        module.hidden_size, module.input_size = sizes, input_size
        module.flatten_parameters()


def _turned(batch_sizes: Tensor) -> Tensor:
    """Where each value of a packed sequence is after each of its sequences is turned around."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    steps = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)
    samples = torch.arange(len(steps)) - starts[steps]
    lengths = (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)
    return starts[lengths[samples] - 1 - steps] + samples
