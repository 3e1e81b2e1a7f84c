"""Two Linears with any operation between or behind them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Between = Callable[["Net", Tensor, Tensor], Tensor]  # of the hidden units and the inputs

After = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two Linears, with `between` applied to the hidden units and `after` to the output."""

    def __init__(self, between: Between | None = None, after: After | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.norm = nn.BatchNorm1d(8)
        self.plain_norm = nn.BatchNorm1d(8, affine=False)
        self.prelu, self.prelu8 = nn.PReLU(), nn.PReLU(8)
        self.side = nn.Linear(5, 8)
        self.between, self.after = between or (lambda s, h, x: h), after or (lambda s, y: y)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.last(self.between(self, self.first(x), x)))
