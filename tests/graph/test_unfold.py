"""Layers as matrix products: inputs, outputs and weights brought to one form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from greedyprune.graph import unfold
from greedyprune.graph.slices import Slice
from greedyprune.graph.windows import Window, window_of

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=1), (5, 6, 11)),
    "conv1d, one sample": (lambda: nn.Conv1d(6, 4, 3), (6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), (1, 2), (2, 1), (2, 1)), (5, 6, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(6, 4, (3, 4), padding="same"), (5, 6, 9, 8)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="reflect"), (5, 6, 9, 8)
    ),
    "transposed, 1d": (lambda: nn.ConvTranspose1d(6, 4, 3, 2, 1, output_padding=1), (5, 6, 7)),
    "transposed, 2d": (
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), (1, 3), (2, 0), (0, 2), dilation=(2, 1)),
        (5, 6, 5, 4),
    ),
    "transposed, more padding": (lambda: nn.ConvTranspose2d(6, 4, 2, 2, 3), (5, 6, 7, 6)),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(6, 4, 2, 2), (5, 6, 3, 2, 3)),
    "conv3d": (lambda: nn.Conv3d(6, 4, (2, 1, 3), padding=(0, 1, 2)), (5, 6, 3, 4, 5)),
}  # fmt: skip


def all_columns(window: Window | None, inputs: Tensor) -> Tensor:
    """A layer's inputs at all positions: (channels, taps, positions)."""
    places = torch.arange(math.prod(unfold.positions_shape(window, inputs)))
    [(columns, _)] = unfold.columns_at(window, inputs, places)
    return columns


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_a_layer_is_a_product(
    make: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight times its unfolded inputs, plus the bias, is its output; in parts, too."""
    torch.manual_seed(0)
    module, inputs = make().double(), torch.randn(shape, dtype=torch.float64)
    outputs, window = module(inputs), window_of(module)

    def check() -> int:
        positions = math.prod(unfold.positions_shape(window, inputs))
        parts = list(unfold.columns_at(window, inputs, torch.arange(positions), [outputs]))
        columns = torch.cat([part for part, _ in parts], 2).flatten(0, 1)
        expected = torch.cat([target for _, [target] in parts], 1)
        transposed = type(module).__name__.startswith("ConvTranspose")
        weight = unfold.outputs_first(module.weight, 0 if transposed else 1)
        product = weight.flatten(1) @ columns + module.bias[:, None]
        torch.testing.assert_close(product, expected)
        return len(parts)

    assert check() == 1
    monkeypatch.setattr(unfold, "PART", 1)  # one sample is copied at a time
    assert check() == 1
    monkeypatch.setattr(unfold, "PRODUCT", 1)  # one position in each part
    assert check() == math.prod(unfold.positions_shape(window, inputs))


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_columns_at_some_positions(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """They are those of all positions at these places; a position may be there twice."""
    torch.manual_seed(0)
    module, inputs = make(), torch.randn(shape)
    outputs, window = module(inputs), window_of(module)
    assert (
        unfold.output_shape(
            window, inputs, outputs.numel() // math.prod(unfold.positions_shape(window, inputs))
        )
        == outputs.shape
    )
    positions = math.prod(unfold.positions_shape(window, inputs))
    [(columns, [target])] = unfold.columns_at(window, inputs, torch.arange(positions), [outputs])
    places = torch.randint(positions, (max(1, positions // 3),)).sort().values
    [(some, [of_some, again])] = unfold.columns_at(window, inputs, places, [outputs, 2 * outputs])
    assert some.equal(columns[..., places])
    assert of_some.equal(target[:, places]) and again.equal(2 * of_some)
    assert list(unfold.columns_at(window, inputs, places[:0], [outputs])) == []


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_inputs_by_position(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """A layer with kernel size 1 and stride 1 has the same positions in both forms."""
    module, inputs = make(), torch.randn(shape)
    if not isinstance(module, nn.Linear):
        module = type(module)(6, 4, 1)
    expected = all_columns(window_of(module), inputs).flatten(0, 1).T
    assert unfold.by_position(window_of(module), inputs).equal(expected)


@pytest.mark.parametrize("outer", [1, 2])
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "ConvTranspose2d"])
def test_weights_by_unit_and_back(kind: str, outer: int, inner: int) -> None:
    """`unit_major` puts each unit's features together, and `module_weight` puts them back."""
    units, features = 5, 5 * outer * inner
    kernel = (2, 3) if "2d" in kind else ()
    weight = torch.randn(4, features, *kernel)
    at = Slice.regular(1, units, outer, inner)
    if kind in ("Conv1D", "ConvTranspose2d"):
        weight = unfold.outputs_first(weight, 0).contiguous()
        at = Slice.regular(0, units, outer, inner)
    by_unit = unfold.unit_major(weight, at)
    for unit in range(units):
        entries = at.entries(torch.tensor([unit]))
        expected = weight.index_select(at.dim, entries)
        expected = unfold.outputs_first(expected, at.dim).flatten(1)
        assert by_unit.view(4, units, -1)[:, unit].equal(expected)
    back = unfold.module_weight(by_unit.view(4, units, -1), at.dim, weight)
    assert back.equal(weight.index_select(at.dim, at.places.flatten()))


def test_half_precision_is_unfolded_as_float32() -> None:
    inputs = torch.randn(5, 6).bfloat16()
    assert all_columns(None, inputs).dtype == torch.float32
