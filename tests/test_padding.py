"""Hidden positions count nowhere: padded and unpadded data select the same units.

Over 400 lines, since all kinds of models and ways to select share these sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from padded import CLASSES, WIDTH, hidden_batch, padded, sequences, tagger, together
from processes import Team, group_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Fisher, Imitation, Loss, Selection
from greedyprune.surgery.cut import masked

WAYS: dict[str, dict[str, Any]] = {
    "imitation": {"objective": "imitation"},
    "from one pass": {"objective": Imitation(sequential=False)},
    "counts": {"objective": "imitation", "weights": "counts"},
    "metric": {"objective": Imitation(metric="fisher")},
    "fisher": {"objective": "fisher"},
    "defaults": {},
    "loss": {"objective": "loss", "weights": "counts"},
    "loss, refit": {"objective": "loss", "weights": "refit"},
    "mini-batches of all": {"objective": Loss(candidates=4, draw="gradient")},
    "steps": {"objective": "loss", "steps": 12, "layers": "hidden"},
    "columns": {
        "objective": Imitation(sequential=False), "weights": "counts", "layers": "up", "size": 2,
        "memory_limit": 1000,  # less than the Gram matrix takes
    },
}  # fmt: skip


def selected(data: object, pooled: bool = False, **options: Any) -> Selection:
    options = {"size": 0.5} | options
    if "steps" in options:
        del options["size"]
    return greedyprune.select(tagger(pooled=pooled), data, progress=False, **options)


def same(one: Selection, other: Selection, rtol: float = 1e-4) -> None:
    for name, layer in one.layers.items():
        assert layer.order.tolist() == other.layers[name].order.tolist(), name
        torch.testing.assert_close(other.layers[name].losses, layer.losses, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(
            other.layers[name].dense_loss, layer.dense_loss, rtol=rtol, atol=1e-6
        )
        for consumer in layer.outputs:
            weights = [s.layers[name].new_weights(consumer) for s in (one, other)]
            if weights[0] is not None:
                torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_padding_changes_no_selection(way: str, left: bool) -> None:
    alone = sequences()
    expected = selected(alone, **WAYS[way])
    for fill in ("zeros", "noise"):
        same(expected, selected(padded(alone, fill, left=left), **WAYS[way]))


@pytest.mark.parametrize("way", ["imitation", "counts", "fisher", "defaults", "loss"])
def test_batches_of_several_sequences(way: str) -> None:
    """One of them has no token at all; it counts nowhere."""
    alone = sequences()
    expected = selected(alone, **WAYS[way])
    batches = together(padded(alone, "noise"), 4)
    same(expected, selected(batches, **WAYS[way]))
    hidden = {name: value[:1].clone() for name, value in batches[0].items()}
    hidden["attention_mask"].zero_()
    same(expected, selected([*batches, hidden], **WAYS[way]))
    first = {name: torch.cat([batches[0][name], hidden[name]]) for name in hidden}
    same(expected, selected([first, *batches[1:]], **WAYS[way]))


def test_the_noise_would_matter() -> None:
    """Without the mask the same data select other units: the tests above can fail."""
    alone = sequences()
    expected, other = selected(alone), selected(padded(alone, "noise"), mask=None)
    picks = [[layer.order.tolist() for layer in s.layers.values()] for s in (expected, other)]
    assert picks[0] != picks[1]


@pytest.mark.parametrize("form", [torch.bool, torch.float32, torch.int32])
def test_types_of_a_mask(form: torch.dtype) -> None:
    batches = together(padded(sequences(), "noise"), 4)
    expected = selected(batches)
    others = [batch | {"attention_mask": batch["attention_mask"].to(form)} for batch in batches]
    same(expected, selected(others), rtol=1e-9)


def test_a_mask_that_only_names_positions() -> None:
    """It is not given to a model that does not take it, and hides rows of a model without masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, shown = torch.randn(6, 5, WIDTH), torch.rand(6, 5) > 0.4
    data = [{"input": inputs, "shown": shown}]
    expected = greedyprune.select(model, inputs[shown], size=7)
    same(expected, greedyprune.select(model, data, size=7, mask="shown"), rtol=1e-9)
    other = greedyprune.select(
        model, [{"input": inputs, "hidden_key_padding_mask": ~shown}], size=7,
        mask="hidden_key_padding_mask",
    )  # fmt: skip
    same(expected, other, rtol=1e-9)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [("mse", torch.randn(6, 5, 4)), ("bce_with_logits", torch.rand(6, 5, 4))],
    ids=["mse", "bce"],
)
def test_losses_of_each_output(loss: str, targets: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, shown = torch.randn(6, 5, WIDTH), torch.rand(6, 5) > 0.4
    data = [{"input": inputs, "shown": shown, "labels": targets}]
    for options in ({}, {"objective": Loss(candidates=3, draw="gradient")}):
        expected = greedyprune.select(model, (inputs[shown], targets[shown]), loss=loss, **options)
        found = greedyprune.select(model, data, loss=loss, mask="shown", **options)
        same(expected, found, rtol=1e-6)


def test_mini_batches_of_a_network() -> None:
    """Targets of hidden positions are numbers, which no label -100 marks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh())
    inputs, targets = torch.randn(12, 5, WIDTH), torch.randn(12, 5, 4)
    shown = torch.rand(12, 5) > 0.4
    found = []
    for fill in (0.0, 7.0):
        data = [
            {
                "input": x.masked_fill(~s, fill),
                "labels": y.masked_fill(~s, fill),
                "shown": s[..., 0],
            }
            for x, y, s in zip(
                inputs.split(4), targets.split(4), shown[..., None].split(4), strict=True
            )
        ]
        objective = Loss(batch_size=3, candidates=6)
        found.append(greedyprune.select(model, data, objective=objective, mask="shown", size=7))
    same(*found, rtol=1e-9)


def test_convolutions_over_positions() -> None:
    """Their positions are those of the sequence; a window reaches into what is hidden."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()).sin()

    model, inputs, shown = Net(), torch.randn(6, 3, 5), torch.rand(6, 5) > 0.4
    rows = inputs.transpose(1, 2)[shown]  # (positions, 3)
    for options in ({}, {"weights": "counts"}, {"objective": Imitation(metric="fisher")}):
        expected = greedyprune.select(model, [rows[:, :, None]], size=5, **options)
        found = greedyprune.select(
            model, [{"x": inputs, "shown": shown}], size=5, mask="shown", **options
        )
        if options.get("weights") == "counts":
            same(expected, found, rtol=1e-6)
        torch.testing.assert_close(
            found.layers["a"].dense_loss, expected.layers["a"].dense_loss, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("masc", "mask: found 'masc', which no entry of a batch has"),
        ("labels", "mask: found 'labels', which no entry"),
        ("additive", "mask: found 'additive' of shape"),
    ],
)
def test_wrong_masks(mask: str, message: str) -> None:
    batch = together(padded(sequences(), "zeros"), 12)[0]
    batch["additive"] = torch.zeros(12, 1, 10, 10)
    with pytest.raises(ValueError, match=message):
        selected([batch], mask=mask)


def test_masks_that_hide_nothing() -> None:
    """An additive mask of attention's form, and a ViT's bool_masked_pos."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

        def forward(
            self, x: Tensor, attention_mask: Tensor | None = None,
            bool_masked_pos: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            return self.b(self.a(x).relu())

    model, inputs = Net(), torch.randn(6, 5, WIDTH)
    expected = greedyprune.select(model, [{"x": inputs}], size=4)
    hidden = torch.rand(6, 5) > 0.5
    for more in (
        {"attention_mask": torch.where(hidden, 0.0, -1e9)[:, None, None]},
        {"attention_mask": torch.where(hidden, 0.0, -1e9)},
        {"attention_mask": torch.zeros(6, 5)},  # of the same form, without padding
        {"bool_masked_pos": hidden},
    ):
        same(expected, greedyprune.select(model, [{"x": inputs, **more}], size=4), rtol=1e-12)
    found = greedyprune.select(model, [{"x": inputs, "attention_mask": hidden}], size=4)
    assert found.layers["a"].losses[0] != expected.layers["a"].losses[0]


def test_hidden_positions_may_be_nan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, shown = torch.randn(6, 5, WIDTH), torch.rand(6, 5) > 0.4
    labels = torch.randint(4, (6, 5))
    data = [{"input": inputs.masked_fill(~shown[..., None], torch.nan), "shown": shown}]
    data[0]["labels"] = labels
    options: list[dict[str, Any]] = [
        {"objective": "imitation"}, {"objective": Fisher()}, {"objective": "loss"}
    ]  # fmt: skip
    for option in options:
        zeros = [data[0] | {"input": inputs.masked_fill(~shown[..., None], 0.0)}]
        expected = greedyprune.select(model, zeros, size=7, mask="shown", **option)
        same(expected, greedyprune.select(model, data, size=7, mask="shown", **option), rtol=1e-9)
    found = greedyprune.select(model, data, size=7, mask="shown")
    assert greedyprune.prune(model, found)[0].out_features == 7


def test_the_monitor_measures_what_is_shown() -> None:
    alone = sequences()
    monitors = [
        greedyprune.PretrainingMonitor(tagger(), data, size=0.5, progress=False)
        for data in (alone, padded(alone, "noise"), together(padded(alone, "zeros"), 4))
    ]
    first, *others = [monitor.check() for monitor in monitors]
    assert first.dense_metric is not None
    for check in others:
        assert check.dense_loss == pytest.approx(first.dense_loss, rel=1e-5)
        assert check.loss == pytest.approx(first.loss, rel=1e-4)
        assert check.dense_metric == first.dense_metric
    with torch.no_grad():
        logits = torch.cat([tagger()(b["input_ids"], b["attention_mask"])[0] for b in alone])
    labels = torch.cat([b["labels"][0] for b in alone])
    assert first.dense_loss == pytest.approx(
        float(functional.cross_entropy(logits, labels)), rel=1e-5
    )
    assert first.dense_metric == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """It skips hidden positions, whose labels are -100."""
    return functional.cross_entropy(outputs.reshape(-1, CLASSES).float(), targets.flatten().long())


def test_least_squares_for_a_loss_of_ones_own() -> None:
    """The loss is called with all positions; least squares leaves out the hidden ones."""
    options = {"objective": "loss", "weights": "refit", "layers": "hidden", "loss": own_loss}
    found = [
        selected(together(padded(sequences(), fill), 4), **options) for fill in ("zeros", "noise")
    ]
    same(*found)
    same(selected(sequences(), **options | {"loss": "cross_entropy"}), found[0])


@pytest.mark.parametrize("loss", ["cross_entropy", own_loss], ids=["named", "own"])
def test_a_batch_that_counts_nowhere(loss: Any) -> None:
    """In which all positions are hidden or, for a named loss, all labels are ignored."""
    batches = together(padded(sequences(), "noise"), 4)
    ignored = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
    for objective in ("loss", "fisher"):
        expected = selected(batches, objective=objective, loss=loss, layers="hidden")
        others = [hidden_batch()] if callable(loss) else [hidden_batch(), ignored]
        for other in others:
            for data in ([other, *batches], [*batches, other]):
                same(expected, selected(data, objective=objective, loss=loss, layers="hidden"))


def test_nothing_counts() -> None:
    data, loss = [hidden_batch()], "data: every label is ignored or hidden by the mask"
    for way, message in (
        ("imitation", "data: every position is hidden"), ("counts", "data: every position is"),
        ("from one pass", "data: every position is"), ("loss", loss), ("fisher", loss),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            selected(data, **WAYS[way])
    with pytest.raises(ValueError, match="data: every position is hidden by the mask"):
        selected(data, **WAYS["counts"], layers="up", backend="reference")
    selection = selected(sequences())
    with pytest.raises(ValueError, match="data: every position is hidden by the mask"):
        greedyprune.refit(tagger(), selection, data, progress=False)


def test_one_label_of_a_wider_tensor() -> None:
    """A view of one number, whose stride is not 1, among the targets of a batch."""
    alone = [batch | {"labels": batch["labels"][:, 0]} for batch in sequences()]
    assert alone[0]["labels"].stride() != (1,)
    cloned = [batch | {"labels": batch["labels"].clone()} for batch in alone]
    for way in ("metric", "fisher", "defaults"):
        same(selected(cloned, pooled=True, **WAYS[way]), selected(alone, pooled=True, **WAYS[way]))


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(2)
    yield team
    team.close()


def _on_rank(rank: int, way: str) -> Selection:
    torch.manual_seed(0)
    batches = padded(sequences(), "noise")
    own = batches[:3] if rank == 0 else batches[3:]
    return selected(own, process_group=group_of(2), **WAYS[way])


@pytest.mark.parametrize("way", ["imitation", "counts", "fisher", "defaults", "loss"])
def test_several_processes(team: Team, way: str) -> None:
    """Each has its own number of shown positions; what sums are divided by is that of all."""
    expected = selected(sequences(), **WAYS[way])
    for selection in team.results(2, _on_rank, way):
        same(expected, selection)


class Encoder(nn.Module):
    """torch's own encoder, which has a fast path for padded sequences, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True)
        self.embed, self.encoder = nn.Embedding(50, WIDTH), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x = self.encoder(self.embed(tokens), src_key_padding_mask=src_key_padding_mask)
        shown = ~src_key_padding_mask[..., None]
        return self.head((x * shown).sum(1) / shown.sum(1))


def encoder_data(fill: str | None) -> list[dict[str, Tensor]]:
    """Sequences for `Encoder`: padded to one length, or alone where `fill` is None."""
    batches = sequences() if fill is None else padded(sequences(), fill)
    return [
        {
            "tokens": batch["input_ids"],
            "src_key_padding_mask": batch["attention_mask"] == 0,
            "labels": batch["labels"][:, 0] % 3,
        }
        for batch in batches
    ]


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:data. these layers keep")
@pytest.mark.parametrize(
    ("way", "enabled"),
    [("defaults", True), ("defaults", False), ("from one pass", True), ("loss", True)],
)
def test_torch_s_encoder_with_a_padding_mask(
    way: str, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", enabled)
    torch.manual_seed(3)
    model = Encoder().eval()
    options: dict[str, Any] = WAYS[way] | {"mask": "src_key_padding_mask", "size": 0.5}
    expected = greedyprune.select(model, encoder_data(None), **options)
    for fill in ("zeros", "noise"):
        selection = greedyprune.select(model, encoder_data(fill), **options)
        same(expected, selection)
    assert list(selection.layers) == [
        f"encoder.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.in_proj_weight", "linear1")
    ]
    data = encoder_data("noise")
    inputs = data[0]["tokens"], data[0]["src_key_padding_mask"]
    with torch.no_grad():  # torch's fast path, in both
        small = greedyprune.prune(model, selection)(*inputs)
        torch.testing.assert_close(small, masked(model, selection)(*inputs))
        refitted = greedyprune.refit(model, selection, data, mask=options["mask"])(*inputs)
        errors = [(outputs - model(*inputs)).square().sum() for outputs in (refitted, small)]
        assert errors[0] < errors[1]
    assert torch.backends.mha.get_fastpath_enabled() is enabled


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:data. these layers keep")
@pytest.mark.parametrize("together", [4, 10])  # as many samples as positions
def test_torch_s_encoder_on_batches_of_padded_samples(together: int) -> None:
    """Its attention has the positions first and then the samples."""
    torch.manual_seed(3)
    model, parts = Encoder().eval(), encoder_data("noise")
    batches = [
        {name: torch.cat([part[name] for part in parts[i : i + together]]) for name in parts[0]}
        for i in range(0, len(parts), together)
    ]
    options: dict[str, Any] = {"mask": "src_key_padding_mask", "size": 0.5, "weights": "none"}
    expected, selection = (
        greedyprune.select(model, data, objective="imitation", progress=False, **options)
        for data in (encoder_data(None), batches)
    )
    same(expected, selection)
    hidden = greedyprune.select(
        model, batches, objective="imitation", progress=False, **options | {"mask": None}
    )
    layer = "encoder.layers.0.self_attn.in_proj_weight"
    assert abs(hidden.layers[layer].losses[0] / expected.layers[layer].losses[0] - 1) > 1e-2
