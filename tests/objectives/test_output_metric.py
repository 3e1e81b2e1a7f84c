"""`Imitation(metric="fisher")`: output errors count by their effect on the predictions."""

from __future__ import annotations

import pytest
import torch
from jobs import job_of
from networks import NETWORKS, data_of, network, outputs_of, streams_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation
from greedyprune.data.batches import Batch
from greedyprune.data.forward import evaluating
from greedyprune.data.losses import Criterion
from greedyprune.graph.unfold import as_columns
from greedyprune.graph.windows import window_of
from greedyprune.objectives import output_metric
from greedyprune.surgery.cut import masked


def roots_of(model: nn.Module, names: list[str], data: object, kind: str) -> dict[str, Tensor]:
    with evaluating(model):
        modules = {name: model.get_submodule(name) for name in names}
        outputs = {  # GPT-2's Conv1D says nf
            name: int(getattr(module, "nf", len(module.get_parameter("weight"))))
            for name, module in modules.items()
        }
        windows = {name: window_of(module) for name, module in modules.items()}
        return output_metric.roots(job_of(model, data, loss=kind), outputs, windows)


def test_the_metric_is_that_of_the_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of g g^T by torch's own derivatives, of frozen weights, too."""
    model, inputs = network("resnet")
    assert isinstance(inputs, Tensor)
    model.requires_grad_(False)
    monkeypatch.setattr(output_metric, "_slope", lambda outputs, kind, targets: outputs)
    roots = roots_of(model, ["3.conv2", "4.conv2"], [inputs[:2], inputs[2:]], "mse")
    for name, root in roots.items():
        block = model.get_submodule(name.split(".")[0])
        hidden = model[: int(name[0])](inputs)
        out = block.conv2(block.bn1(block.conv1(hidden)).relu()).requires_grad_()
        after = block.total(block.bn2(out) + block.shortcut(hidden)).relu()
        [slope] = torch.autograd.grad(model[int(name[0]) + 1 :](after).square().sum() / 2, out)
        columns = slope.double().transpose(0, 1).flatten(1)
        expected = columns @ columns.T
        expected = expected / expected.diagonal().mean() / 2 + torch.eye(len(expected)) / 2
        torch.testing.assert_close(root @ root, expected, rtol=1e-4, atol=1e-5)


def test_hidden_positions_are_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hidden has derivatives, too, where a later window reaches it."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = Net(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 5, 1), nn.Conv1d(5, 4, 3))
    inputs, shown = torch.randn(6, 3, 7), torch.rand(6, 7) > 0.4
    monkeypatch.setattr(output_metric, "_slope", lambda outputs, kind, targets: outputs)
    data = [{"x": inputs, "attention_mask": shown}]
    [root] = roots_of(model, ["2"], data, "mse").values()
    out = model[2](model[1](model[0](inputs))).detach().requires_grad_()
    [slope] = torch.autograd.grad(model[3](out).square().sum() / 2, out)
    columns = slope.double().transpose(1, 2)[shown].T
    expected = columns @ columns.T
    expected = expected / expected.diagonal().mean() / 2 + torch.eye(5) / 2
    torch.testing.assert_close(root @ root, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (5, 3)])
def test_slopes_are_drawn_from_the_predictions(shape: tuple[int, ...]) -> None:
    """Of mean 0, and with the Fisher information of their distribution as covariance."""
    torch.manual_seed(0)
    logits, many = torch.randn(shape), 40_000
    outputs = logits.expand(many, *shape)
    p = logits.softmax(-1).double()
    expected = {
        "mse": torch.eye(3).double().expand(*shape, 3),
        "bce_with_logits": torch.diag_embed(logits.sigmoid() * (1 - logits.sigmoid())).double(),
        "cross_entropy": torch.diag_embed(p) - p[..., :, None] * p[..., None, :],
    }
    for kind, covariance in expected.items():
        slopes = output_metric._slope(outputs, Criterion(kind), Batch((), {}, None)).double()
        assert float(slopes.mean(0).abs().max()) < 5 / many**0.5
        products = (slopes[..., :, None] * slopes[..., None, :]).mean(0)
        torch.testing.assert_close(products, covariance, rtol=0, atol=8 / many**0.5)
    moved = outputs.movedim(-1, 1) if len(shape) > 1 else outputs
    targets = torch.zeros(many, *shape[:-1], dtype=torch.int64)
    torch.manual_seed(1)
    slopes = output_metric._slope(moved, Criterion("cross_entropy"), Batch((), {}, targets))
    assert float(slopes.sum(1).abs().max()) < 1e-5  # over the classes


def test_outputs_that_nothing_depends_on_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.fill_(3.0)
        model[2].weight.copy_(torch.diag(torch.tensor([1.3, 1.0])))  # unit 0 gives more
        model[2].bias.fill_(9.0)
        model[4].weight[:, 0] = 0  # but nobody takes it
    torch.manual_seed(0)
    data = torch.randn(200, 2), torch.randint(3, (200,))
    for metric, unit in (("none", 0), ("fisher", 1)):
        objective = Imitation(metric=metric)
        selection = greedyprune.select(model, data, layers="0", size=1, objective=objective)
        assert selection.kept.tolist() == [unit]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weights", ["counts", "refit"])
def test_losses_are_in_the_metric(name: str, weights: str) -> None:
    model, inputs = network(name)
    objective = Imitation(metric="fisher", sequential=False)
    selection = greedyprune.select(model, data_of(inputs), objective=objective, weights=weights)
    consumers = [each for layer in selection.layers.values() for each in layer.outputs]
    roots = roots_of(model, consumers, data_of(inputs), "mse")
    streams = streams_of(model, inputs)
    for producer, layer in selection.layers.items():
        other = masked(model, greedyprune.Selection({producer: layer}))
        total, count, shares = 0.0, 0, []
        for consumer in layer.outputs:
            found: list[Tensor] = []
            empty: list[Tensor] = []

            def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                pruned = other.get_submodule(consumer)  # noqa: B023
                nothing = map(torch.zeros_like, args)
                for errors, given in ((found, args), (empty, nothing)):  # noqa: B023
                    errors.append(as_columns(window_of(module), (pruned(*given) - out).double()))

            handle = model.get_submodule(consumer).register_forward_hook(record)
            outputs_of(model, inputs)
            handle.remove()
            squares, without = (  # the errors of each use
                sum(float((roots[consumer] @ error).square().sum()) for error in errors)
                for errors in (found, empty)
            )
            total, count = total + squares, count + sum(error.numel() for error in found)
            shares.append(squares / without)
        expected = sum(shares) / len(shares) if producer in streams else total / count
        assert float(layer.losses[-1]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_best_weights_are_the_same_in_any_metric() -> None:
    model, inputs = network("vgg")
    plain, other = (
        greedyprune.select(
            model, [inputs], size=1.0, objective=Imitation(metric=metric, sequential=False)
        )
        for metric in ("none", "fisher")
    )
    for producer, layer in plain.layers.items():
        again = other.layers[producer].weights
        torch.testing.assert_close(layer.weights, again, rtol=1e-7, atol=1e-9)


def test_seeds_may_be_larger_than_torch_takes() -> None:
    model, inputs = network("vgg")
    objective = Imitation(metric="fisher")
    one, other = (
        greedyprune.select(model, [inputs], size=1, objective=objective, seed=seed)
        for seed in (5, 2**64 + 5)
    )
    for name, layer in one.layers.items():
        assert layer.losses.equal(other.layers[name].losses)


def test_what_a_metric_refuses() -> None:
    model, inputs = network("vgg")
    with pytest.raises(ValueError, match="metric: found 'other', expected one of 'none', 'fish"):
        Imitation(metric="other")
    with pytest.raises(ValueError, match="metric: found 'fisher' with a loss of your own"):
        greedyprune.select(
            model, [(inputs, torch.zeros(30))], objective=Imitation(metric="fisher"),
            loss=lambda outputs, targets: outputs.sum(),
        )  # fmt: skip
