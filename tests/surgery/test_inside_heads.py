"""The dimensions inside attention's heads: which there are, and models that lose some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from head_kinds import HEADS, KINDS, WIDTH, of_kind
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget, Selection

FEW: dict[str, Any] = {"objective": greedyprune.Imitation(swaps=0)}
BOTH = ["blocks.0.qkv[query-key]", "blocks.0.qkv[value]"]
TIED = {"norms", "norms, scale of its own", "rotary", "biased"}  # heads keep the same dimensions


def inside(model: nn.Module, inputs: Tensor) -> dict[str, greedyprune.Prunable]:
    return dict(greedyprune.layers(model, inputs).inside_heads)


def score_units(name: str) -> bool:
    return name.endswith("[query-key]")


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_has_both_parts(kind: str) -> None:
    model, inputs = of_kind(kind)
    layers = inside(model, inputs)
    assert len(layers) == 4
    for name, layer in layers.items():
        assert layer.kind.startswith("inside heads")
        assert layer.units == (4 if score_units(name) and kind == "rotary" else 8)
        assert bool(layer.consumers) != score_units(name)
        assert layer.parameters > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [(), ("first",)])
def test_pruned_models_equal_masked_ones(kind: str, beside: tuple[str, ...]) -> None:
    model, inputs = of_kind(kind)
    names = [*inside(model, inputs), *beside]
    selection = greedyprune.select(model, inputs, layers=names, **FEW)
    small = greedyprune.prune(model, selection)  # which compares them
    refitted = greedyprune.refit(model, selection, inputs)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for pruned in (small, refitted):
        for name in selection.layers:
            assert len(selection.layers[name].kept) == selection.layers[name].counts.numel() // 2
        assert pruned(inputs).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_dimensions_are_the_dense_model(kind: str) -> None:
    model, inputs = of_kind(kind)
    names = [*inside(model, inputs)]
    selection = greedyprune.select(model, inputs, layers=names, size=1.0, weights="none", **FEW)
    for name, layer in selection.layers.items():
        assert layer.losses[-1] <= 1e-9 * layer.losses[0], name
    torch.testing.assert_close(greedyprune.prune(model, selection)(inputs), model(inputs))


@torch.no_grad()
def test_the_picks_are_better_than_random_ones() -> None:
    """The error of the model's outputs, weights as they are, as a geometric mean over kinds."""
    ratios = []
    for kind in KINDS:
        model, inputs = of_kind(kind)
        names = [*inside(model, inputs)]
        selection = greedyprune.select(model, inputs, layers=names, weights="none", **FEW)

        def error(selection: Selection, model: nn.Module = model, inputs: Tensor = inputs) -> float:
            small = greedyprune.prune(model, selection)
            return float((small(inputs) - model(inputs)).square().mean())

        errors = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            layers = {}
            for name, layer in selection.layers.items():
                order = torch.randperm(len(layer.counts), generator=generator)[: len(layer.order)]
                counts = torch.zeros_like(layer.counts).index_fill(0, order, 1)
                layers[name] = type(layer)(**{
                    **vars(layer), "order": order, "counts": counts, "kept": order.sort().values
                })  # fmt: skip
            errors.append(error(Selection(layers)))
        ratios.append(error(selection) / (sum(errors) / len(errors)))
    assert torch.tensor(ratios).log().mean().exp() < 0.75


def test_one_size_of_heads_for_queries_keys_and_values() -> None:
    model, inputs = of_kind("torch's scale")
    assert inside(model, inputs)[BOTH[0]].share == tuple(BOTH)
    with pytest.raises(ValueError, match=r"without 'blocks.0.qkv\[value\]'"):
        greedyprune.select(model, inputs, layers=BOTH[0])
    selection = greedyprune.select(model, inputs, layers=BOTH, size=0.375, **FEW)
    small = greedyprune.prune(model, selection)
    assert small.blocks[0].head_dim == 3
    assert small.blocks[0].qkv.weight.shape == (3 * HEADS * 3, WIDTH)
    assert small.blocks[1].head_dim == 8


def test_separate_sizes_where_the_code_allows_them() -> None:
    model, inputs = of_kind("grouped")
    sizes = {"blocks.0.q[query-key]": 3, "blocks.0.v[value]": 5}
    selection = greedyprune.select(model, inputs, layers=list(sizes), size=sizes, **FEW)
    block = greedyprune.prune(model, selection).blocks[0]
    assert [len(layer.weight) for layer in (block.q, block.k, block.v)] == [12, 6, 10]


def test_heads_keep_dimensions_of_their_own() -> None:
    for kind in KINDS:
        if kind in ("rotary", "grouped") or "module" in kind:
            continue
        model, inputs = of_kind(kind)
        selection = greedyprune.select(model, inputs, layers=BOTH, size=0.25, **FEW)
        layer = selection.layers[BOTH[0]]
        kept = layer.slices["blocks.0.qkv.weight"].entries(layer.kept).view(2, HEADS, -1) % 8
        queries, keys = kept
        assert torch.equal(queries, keys)  # each dimension of a query meets that of the key
        same = all(torch.equal(queries[0], head) for head in queries[1:])
        assert same == (kind in TIED), kind


def test_they_are_off_by_default() -> None:
    model, inputs = of_kind("torch's scale")
    for layers in (None, "all"):
        selection = greedyprune.select(model, inputs, layers=layers, **FEW)
        assert not any(name.endswith("]") for name in selection.layers)
        assert not any(name.endswith("]") for name in selection.refused)


def test_not_together_with_heads() -> None:
    model, inputs = of_kind("torch's scale")
    with pytest.raises(ValueError, match=r"found 'blocks.0.qkv' and .* dimensions inside its unit"):
        greedyprune.select(model, inputs, layers=[*BOTH, "blocks.0.qkv"], **FEW)
    heads = greedyprune.select(model, inputs, layers="blocks.0.qkv", size=2, **FEW)
    small = greedyprune.prune(model, heads)
    selection = greedyprune.select(small, inputs, layers=BOTH, **FEW)
    assert greedyprune.prune(small, selection).blocks[0].qkv.weight.shape == (3 * 2 * 4, WIDTH)


@pytest.mark.parametrize("objective", ["loss", "fisher"])
def test_no_loss_judges_them(objective: str) -> None:
    model, inputs = of_kind("torch's scale")
    data = inputs, torch.randint(4, (len(inputs),))
    for names in (BOTH, ["blocks.0.v[value]"]):
        if len(names) == 1:
            model, inputs = of_kind("grouped")
        with pytest.raises(ValueError, match=rf"objective: found '{objective}' for 'blocks.0."):
            greedyprune.select(model, data, layers=names, objective=objective)


def test_an_unknown_part() -> None:
    model, inputs = of_kind("torch's scale")
    for name in ("blocks.0.proj[value]", "blocks.0.qkv[keys]"):
        reason = "no such dimensions" if name.endswith("[value]") else "no such module"
        with pytest.raises(ValueError, match=reason):
            greedyprune.select(model, inputs, layers=name)


def test_a_budget() -> None:
    model, inputs = of_kind("torch's scale")
    names = [*inside(model, inputs)]
    for uniform in (False, True):
        budget = Budget(params=0.8, uniform=uniform)
        selection = greedyprune.select(model, inputs, layers=names, size=budget, **FEW)
        dense, pruned = selection.change("params") or (0, 0)
        assert 0.6 * dense < pruned <= 0.8 * dense
        small = greedyprune.prune(model, selection)
        assert sum(p.numel() for p in small.parameters()) == pruned


def test_files_and_checkpoints(tmp_path: Path) -> None:
    model, inputs = of_kind("norms")
    names = [*inside(model, inputs)]
    selection = greedyprune.select(model, inputs, layers=names, checkpoint=tmp_path / "c", **FEW)
    again = greedyprune.select(model, inputs, layers=names, checkpoint=tmp_path / "c", **FEW)
    selection.save(tmp_path / "selection")
    for other in (again, Selection.load(tmp_path / "selection")):
        small = greedyprune.prune(model, other, inputs)
        torch.testing.assert_close(
            small(inputs), greedyprune.prune(model, selection)(inputs), rtol=0, atol=0
        )


def test_a_path_serves_smaller_sizes() -> None:
    model, inputs = of_kind("scale of its own")
    selection = greedyprune.select(model, inputs, layers=BOTH, size=6, **FEW)
    small = greedyprune.prune(model, selection.at(2))
    assert small.blocks[0].head_dim == 2


class Before(nn.Module):
    """A layer whose units are gone from memory once the attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 30), nn.Linear(30, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = KINDS["grouped"][0]()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.attention(self.b(self.a(x).relu())).mean(1))
        return output


def test_a_layer_before_the_attention_in_sequence() -> None:
    torch.manual_seed(0)
    model, inputs = Before().eval(), torch.randn(64, 7, 6)
    names = ["a", "attention.q[query-key]", "attention.v[value]"]
    selection = greedyprune.select(model, inputs, layers=names, **FEW)
    assert greedyprune.prune(model, selection)(inputs).isfinite().all()


@torch.no_grad()
def test_values_are_selected_after_queries_and_keys() -> None:
    """The loss is the error of the projection in the pruned network, also of a single layer."""
    model, inputs = of_kind("grouped")
    names = ["blocks.0.q[query-key]", "blocks.0.v[value]"]
    selection = greedyprune.select(model, inputs, layers=names, **FEW)
    outputs = list[Tensor]()
    for network in (model, greedyprune.prune(model, selection)):
        handle = network.blocks[0].proj.register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        network(inputs)
        handle.remove()
    error = float((outputs[0] - outputs[1]).square().mean())
    assert float(selection.layers[names[1]].losses[-1]) == pytest.approx(error, rel=1e-4)


def test_no_epochs() -> None:
    model, inputs = of_kind("grouped")
    selection = greedyprune.select(model, inputs, layers="blocks.0.v[value]", **FEW)
    with pytest.raises(ValueError, match=r"epochs: found 1 for 'blocks.0.v\[value\]'"):
        greedyprune.refit(model, selection, inputs, epochs=1)


def test_a_projection_is_no_attention() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 3)
            self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.last((self.first(x) @ (self.a @ self.b)).relu())
            return output

    assert not inside(Computed(), torch.randn(8, 5, 6))


def test_embeddings_that_are_queries_and_keys() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.e = (nn.Embedding(50, WIDTH) for _ in range(3))
            self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            given = self.q(x), self.k(x), self.v(self.e(x))
            q, k, v = (each.unflatten(-1, (3, -1)).transpose(1, 2) for each in given)
            output: Tensor = self.o(((q @ k.mT * 0.4).softmax(-1) @ v).transpose(1, 2).flatten(2))
            return output

    torch.manual_seed(0)
    model, tokens = Looked().eval(), torch.randint(50, (16, 7))
    for names in (["q[query-key]"], ["q[query-key]", "v[value]"]):
        selection = greedyprune.select(model, tokens, layers=names, **FEW)
        for small in (
            greedyprune.prune(model, selection), greedyprune.refit(model, selection, tokens),
        ):  # fmt: skip
            assert small.q.weight.shape == (50, WIDTH // 2)


def test_attention_that_hardly_depends_on_its_scores() -> None:
    """With another number of heads the code runs, too, and gives nearly the same."""

    class Inferred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim, self.scale = 6, 0.4
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.proj = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], -1, self.head_dim)
            given = (layer(x).view(shape) for layer in (self.q, self.k, self.v))
            q, k, v = (each.transpose(1, 2) for each in given)
            scores = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
            output: Tensor = self.proj((scores @ v).transpose(1, 2).flatten(2))
            return output

    torch.manual_seed(0)
    model, inputs = Inferred().eval(), torch.randn(32, 7, WIDTH)
    for layer in (model.q, model.k):
        layer.weight.data *= 0.01
        layer.bias.data *= 0.01
    selection = greedyprune.select(model, inputs, layers=[*inside(model, inputs)], **FEW)
    assert greedyprune.prune(model, selection).head_dim == 3
