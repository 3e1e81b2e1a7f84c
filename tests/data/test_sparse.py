"""Sparse tensors among a model's inputs and buffers: the numbers that dense ones give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation, Loss
from greedyprune.data.batch import Batch
from greedyprune.data.halves import in_second_half
from greedyprune.runtime.sparse import bytes_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant)"),
]
NODES = 150
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}
each_layout = pytest.mark.parametrize("layout", ["coo", "csr"])


def dense(tensor: Tensor) -> Tensor:
    return tensor


class Graphs(nn.Module):
    """A graph network: each layer's outputs are summed over the neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        hidden = self.b(torch.relu(self.a(neighbours @ x)))
        return neighbours @ self.c(torch.relu(neighbours @ torch.relu(hidden)))


class NeighboursFirst(Graphs):
    def forward(self, neighbours: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, neighbours)


class Held(Graphs):
    """The neighbours are a buffer."""

    def __init__(self, neighbours: Tensor) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.neighbours)


def problem(kind: str, form: Callable[[Tensor], Tensor]) -> tuple[nn.Module, list]:
    """A model, and two graphs as its data."""
    torch.manual_seed(1)
    graphs = [nn.functional.dropout(torch.rand(NODES, NODES), 0.98) / 10 for _ in range(2)]
    inputs = [torch.randn(NODES, 6) for _ in graphs]
    targets = [torch.randint(3, (NODES,)) for _ in graphs]
    if kind == "held":
        return Held(form(graphs[0])).eval(), list(zip(inputs, targets, strict=True))
    pairs = [(x, form(graph)) for x, graph in zip(inputs, graphs, strict=True)]
    if kind == "first":
        pairs = [(graph, x) for x, graph in pairs]
    model = NeighboursFirst() if kind == "first" else Graphs()
    return model.eval(), list(zip(pairs, targets, strict=True))


def numbers(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@each_layout
@pytest.mark.parametrize("kind", ["second", "first", "held"])
@pytest.mark.parametrize(
    "objective", [
        "imitation", "loss", "fisher", Imitation(sequential=False),
        Loss(draw="gradient", candidates=4),
    ],
    ids=["imitation", "loss", "fisher", "not sequential", "gradient"],
)  # fmt: skip
def test_select_gives_what_dense_inputs_give(kind: str, layout: str, objective: object) -> None:
    model, data = problem(kind, dense)
    expected = greedyprune.select(model, data, objective=objective)
    model, data = problem(kind, LAYOUTS[layout])
    selection = greedyprune.select(model, data, objective=objective)
    assert list(selection.layers) == ["a", "b"]
    for name, layer in selection.layers.items():
        assert layer.order.equal(expected.layers[name].order)
        assert torch.allclose(layer.losses, expected.layers[name].losses, rtol=1e-5)
    greedyprune.prune(model, selection)


@each_layout
@pytest.mark.parametrize("kind", ["second", "first", "held"])
@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"epochs": 3}])
def test_refit_gives_what_dense_inputs_give(kind: str, layout: str, options: dict) -> None:
    model, data = problem(kind, dense)
    selection = greedyprune.select(model, data, size=8)
    expected = greedyprune.refit(model, selection, data, **options)
    unchanged = greedyprune.prune(model, selection)
    model, data = problem(kind, LAYOUTS[layout])
    small = greedyprune.refit(model, selection, data, **options)
    for one, other in zip(numbers(small), numbers(expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    assert not numbers(small)[-2].equal(numbers(unchanged)[-2])


def error(small: nn.Module, model: nn.Module, data: list) -> float:
    with torch.no_grad():
        return sum(float((small(*x) - model(*x)).square().sum()) for x, _ in data)


@pytest.mark.parametrize("kind", ["second", "first"])
def test_epochs_keep_graphs_whole(kind: str) -> None:
    """Nodes can't run without their neighbours; training in parts of a graph fits nothing."""
    model, data = problem(kind, dense)
    selection = greedyprune.select(model, data, size=6)
    refitted = greedyprune.refit(model, selection, data)
    trained = greedyprune.refit(model, selection, data, epochs=60)
    assert error(trained, model, data) < 0.95 * error(refitted, model, data)


@each_layout
@pytest.mark.parametrize("kind", ["second", "held"])
def test_a_checkpoint_knows_the_data_and_the_model(kind: str, layout: str, tmp_path: Path) -> None:
    model, data = problem(kind, LAYOUTS[layout])
    first = greedyprune.select(model, data, checkpoint=tmp_path)
    again = greedyprune.select(model, data, checkpoint=tmp_path)
    for name, layer in first.layers.items():
        assert again.layers[name].order.equal(layer.order)
    torch.manual_seed(5)
    other = LAYOUTS[layout]((torch.rand(NODES, NODES) < 0.03).float())
    if kind == "held":
        model.neighbours = other
    else:
        data = [((data[0][0][0], other), data[0][1]), data[1]]
    with pytest.raises(ValueError, match="checkpoint"):
        greedyprune.select(model, data, checkpoint=tmp_path)


@each_layout
@pytest.mark.parametrize("kind", ["second", "held"])
def test_the_monitor_measures_what_it_does_on_dense_inputs(kind: str, layout: str) -> None:
    losses = []
    for form in (dense, LAYOUTS[layout]):
        model, data = problem(kind, form)
        monitor = greedyprune.PretrainingMonitor(model, data, every=1, size=8)
        monitor.step()
        losses.append(monitor.history[-1].loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@each_layout
def test_buffers_that_a_forward_changes_are_restored(layout: str) -> None:
    model, data = problem("held", LAYOUTS[layout])
    before = model.neighbours.to_dense()

    class Doubles(Held):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            self.neighbours = self.neighbours * 2
            return result

    model.__class__ = Doubles
    greedyprune.layers(model, data[0][0])
    assert model.neighbours.to_dense().equal(before)


def test_sparse_buffers_are_not_saved(tmp_path: Path) -> None:
    model, data = problem("held", Tensor.to_sparse)
    small = greedyprune.prune(model, greedyprune.select(model, data))
    with pytest.raises(TypeError, match=r"'neighbours' is sparse .*expected dense tensors"):
        greedyprune.save_pruned(small, tmp_path / "small.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_a_batch(layout: str) -> None:
    """Samples, halves and marks; COO tensors also uncoalesced and with dense dimensions."""
    torch.manual_seed(0)
    numbers = torch.where(torch.rand(9, 4) < 0.5, torch.randn(9, 4), 0.0)
    sparse = LAYOUTS[layout](numbers)
    whole, batch = Batch((numbers,), {}, None), Batch((sparse,), {}, sparse)
    rows = torch.tensor([5, 0, 7])
    part = batch.take(rows)
    assert part.args[0].to_dense().equal(numbers[rows])
    assert part.targets.to_dense().equal(numbers[rows])
    assert part.args[0].layout is sparse.layout
    assert in_second_half(batch).equal(in_second_half(whole))
    assert (
        batch.mark
        == Batch((copy.deepcopy(numbers).to_sparse(layout=sparse.layout),), {}, sparse).mark
    )
    changed = numbers.clone()
    changed[changed != 0] *= 2
    assert batch.mark != Batch((LAYOUTS[layout](changed),), {}, sparse).mark
    assert bytes_of(sparse) < bytes_of(torch.zeros(9, 400))


@pytest.mark.parametrize("form", ["uncoalesced", "hybrid"])
def test_other_forms_of_coo(form: str) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(9, 4)
    sparse = numbers.to_sparse(1)
    if form == "uncoalesced":
        at = torch.tensor([[0, 3, 3], [1, 2, 2]])
        sparse = torch.sparse_coo_tensor(at, torch.tensor([1.0, 2.0, 3.0]), (9, 4))
        numbers = sparse.to_dense()
    batch, rows = Batch((sparse,), {}, None), torch.tensor([3, 0, 7])
    assert batch.take(rows).args[0].to_dense().equal(numbers[rows])
    assert in_second_half(batch).equal(in_second_half(Batch((numbers,), {}, None)))
    assert batch.mark
