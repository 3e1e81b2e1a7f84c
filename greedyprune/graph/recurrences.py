"""Recurrences: what a recurrent layer computes once its input is projected to its gates.

nn.LSTM, nn.GRU and nn.RNN multiply the inputs of all steps by `weight_ih`, which is an ordinary
linear map. What is left is the recurrence: in every step, the state is multiplied by `weight_hh`
and changes by the gates. The functions here compute it from the projected inputs. They give what
torch's modules give, up to rounding, and follow the formulas of their documentation.

Of a function's arguments, `gates` are the projected inputs, (T, B, G * H) for G gates and H hidden
units; (B, T, G * H) where batch_first. `weight` (G * H, H) and `bias` are `weight_hh` and
`bias_hh`. The states `h` and `c` are (B, H); None is zero. The results are the outputs of all steps
and the last states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

States = tuple[Tensor, ...]
WEIGHT = 1  # the place of `weight` among the functions' arguments


def lstm_cell(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None = None,
    c: Tensor | None = None,
) -> States:  # fmt: skip
    """One step of an LSTM: the new h and c."""
    h, c = _state(gates, weight, h), _state(gates, weight, c)
    first, forget, new, last = (gates + functional.linear(h, weight, bias)).chunk(4, -1)
    c = forget.sigmoid() * c + first.sigmoid() * new.tanh()
    return last.sigmoid() * c.tanh(), c


def gru_cell(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None = None
) -> States:  # fmt: skip
    """One step of a GRU: the new h."""
    h = _state(gates, weight, h)
    hidden, size = functional.linear(h, weight, bias), weight.shape[1]
    both = (gates[..., : 2 * size] + hidden[..., : 2 * size]).sigmoid()
    reset, update = both.chunk(2, -1)
    new = (gates[..., 2 * size :] + reset * hidden[..., 2 * size :]).tanh()
    return (new + update * (h - new),)


def rnn_tanh_cell(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None = None
) -> States:  # fmt: skip
    """One step of an RNN: the new h."""
    return ((gates + functional.linear(_state(gates, weight, h), weight, bias)).tanh(),)


def rnn_relu_cell(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None = None
) -> States:  # fmt: skip
    """One step of an RNN with ReLU: the new h."""
    return ((gates + functional.linear(_state(gates, weight, h), weight, bias)).relu(),)


def lstm(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None,
    batch_first: bool, reverse: bool,
) -> States:  # fmt: skip
    """One layer and direction of an LSTM: its outputs, h and c."""
    return _all_steps(lstm_cell, gates, weight, bias, (h, c), batch_first, reverse)


def gru(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, batch_first: bool,
    reverse: bool,
) -> States:  # fmt: skip
    """One layer and direction of a GRU: its outputs and h."""
    return _all_steps(gru_cell, gates, weight, bias, (h,), batch_first, reverse)


def rnn_tanh(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, batch_first: bool,
    reverse: bool,
) -> States:  # fmt: skip
    """One layer and direction of an RNN: its outputs and h."""
    return _all_steps(rnn_tanh_cell, gates, weight, bias, (h,), batch_first, reverse)


def rnn_relu(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, batch_first: bool,
    reverse: bool,
) -> States:  # fmt: skip
    """One layer and direction of an RNN with ReLU: its outputs and h."""
    return _all_steps(rnn_relu_cell, gates, weight, bias, (h,), batch_first, reverse)


def stacked(*states: Tensor) -> Tensor:
    """The states of all layers and directions as one tensor, which needs them in one size."""
    return torch.stack(states)


# The functions by the names of torch's operations, and how many gates each has.
FUNCTIONS: dict[str, Callable[..., States]] = {
    function.__name__: function
    for function in (
        lstm, gru, rnn_tanh, rnn_relu, lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell,
    )
}  # fmt: skip
GATES = {name: {"lstm": 4, "gru": 3}.get(name.removesuffix("_cell"), 1) for name in FUNCTIONS}


def is_recurrence(node: fx.Node) -> bool:
    """Does a node run one of the functions above?"""
    return FUNCTIONS.get(getattr(node.target, "__name__", "")) is node.target


def with_columns(args: tuple[Any, ...], left: Tensor) -> tuple[Any, ...]:
    """A recurrence's arguments where `weight` keeps these columns, (K,) int64, and 0 elsewhere."""
    weight: Tensor = args[WEIGHT]
    left = left.to(weight.device)
    kept = torch.zeros_like(weight).index_copy(1, left, weight.index_select(1, left))
    return (*args[:WEIGHT], kept, *args[WEIGHT + 1 :])


def _state(gates: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    return gates.new_zeros(*gates.shape[:-1], weight.shape[1]) if state is None else state


def _all_steps(
    cell: Callable[..., States], gates: Tensor, weight: Tensor, bias: Tensor | None,
    initial: tuple[Tensor | None, ...], batch_first: bool, reverse: bool,
) -> States:  # fmt: skip
    time, outputs, states = int(batch_first), list[Tensor](), States()
    steps = gates.unbind(time)
    for step in reversed(steps) if reverse else steps:
        states = cell(step, weight, bias, *(states or initial))
        outputs.append(states[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, time), *states
