"""Hugging Face's sequence models: shifted labels, padding, the decoder's inputs and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Imitation, Selection
from greedyprune.data.batches import Batches

transformers = pytest.importorskip("transformers")


def started(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
    return model.eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return started(transformers.LlamaForCausalLM(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return started(transformers.T5ForConditionalGeneration(config))


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=20,
        decoder_ffn_dim=20, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return started(transformers.BartForConditionalGeneration(config))


def same(one: Selection, other: Selection, rtol: float = 1e-3) -> None:
    for name, layer in one.layers.items():
        assert layer.order.tolist() == other.layers[name].order.tolist(), name
        torch.testing.assert_close(other.layers[name].losses, layer.losses, rtol=rtol, atol=1e-6)


def test_labels_are_shifted_as_the_model_shifts_them() -> None:
    model, ids = llama(), torch.randint(1, 40, (6, 9))
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    options: dict[str, Any] = {"layers": "model.layers.0.mlp.gate_proj", "size": 6}
    batch = {"input_ids": ids, "labels": labels}
    selection = greedyprune.select(model, [batch], objective="loss", **options)
    with torch.no_grad():
        dense, pruned = (m(**batch).loss for m in (model, greedyprune.prune(model, selection)))
    assert float(selection.dense_loss) == pytest.approx(float(dense), rel=1e-5)
    assert float(selection.losses[-1]) == pytest.approx(float(pruned), rel=1e-4)
    unshifted = functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    assert float(unshifted) != pytest.approx(float(dense), rel=0.01)
    monitor = greedyprune.PretrainingMonitor(model, [batch], progress=False, **options)
    check = monitor.check()
    assert check.dense_loss == pytest.approx(float(dense), rel=1e-5)
    shown = labels[:, 1:] != -100
    right = (model(ids).logits[:, :-1].argmax(-1) == labels[:, 1:])[shown]
    assert check.dense_metric == pytest.approx(float(right.double().mean()))


def test_the_first_batch_may_ignore_all_labels() -> None:
    model, ids = llama(), torch.randint(1, 40, (6, 9))
    batches = [{"input_ids": ids, "labels": labels} for labels in (torch.full_like(ids, -100), ids)]
    options: dict[str, Any] = {"layers": "model.layers.0.mlp.gate_proj", "size": 6}
    selection = greedyprune.select(model, batches, objective="loss", **options)
    dense = model(**batches[1]).loss
    assert float(selection.dense_loss) == pytest.approx(float(dense), rel=1e-5)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("objective", ["imitation", "loss", "fisher"])
def test_padded_language_models(objective: str, left: bool) -> None:
    """Labels of hidden positions are ids, not -100; a hidden position predicts no first token."""
    torch.manual_seed(1)
    alone = [torch.randint(1, 40, (1, n)) for n in (4, 9, 6, 7, 5, 8)]
    ids, mask = torch.randint(1, 40, (6, 9)), torch.zeros(6, 9, dtype=torch.int64)
    for i, part in enumerate(alone):
        at = slice(9 - part.shape[1], 9) if left else slice(0, part.shape[1])
        ids[i, at], mask[i, at] = part[0], 1
    whole = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    single = [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in alone
    ]  # fmt: skip
    options: dict[str, Any] = {"objective": objective, "size": 0.5, "progress": False}
    options["layers"] = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    expected = greedyprune.select(llama(), single, **options)
    same(expected, greedyprune.select(llama(), [whole], **options))


class OwnLoss(nn.Module):
    """A language model with a loss that is no cross-entropy of its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.b(self.a(self.embed(ids)).relu())
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = 3 + functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return found


def test_a_model_with_another_loss() -> None:
    torch.manual_seed(0)
    model, ids = OwnLoss(), torch.randint(9, (8, 5))
    batch = {"ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"loss: the model's own loss .* expected loss=a function"):
        greedyprune.select(model, [batch], objective="loss")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 3 + functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    with pytest.warns(UserWarning, match="function of your own"):
        selection = greedyprune.select(model, [batch], layers="a", objective="loss", loss=loss)
    assert float(selection.dense_loss) == pytest.approx(float(model(**batch)["loss"]), rel=1e-5)
    greedyprune.select(model, [batch], objective="imitation")  # it needs no loss


@pytest.mark.parametrize("kind", [t5, bart])
@pytest.mark.parametrize("objective", ["imitation", "loss"])
def test_a_trainers_batch_for_an_encoder_decoder(kind: Any, objective: str) -> None:
    model, ids = kind(), torch.randint(2, 40, (6, 9))
    labels = torch.randint(2, 40, (6, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    start = model.prepare_decoder_input_ids_from_labels(labels)
    table = greedyprune.layers(model, batch | {"labels": labels})
    names = [name for name in table if "wi" in name or "fc1" in name]
    options: dict[str, Any] = {"objective": objective, "size": 6, "layers": names[-1]}
    expected = greedyprune.select(model, [batch | {"decoder_input_ids": start}], **options)
    found = greedyprune.select(model, [batch], **options)
    same(expected, found, rtol=1e-9)
    if objective == "loss":
        dense = model(**batch).loss
        assert float(found.dense_loss) == pytest.approx(float(dense), rel=1e-5)
    small = greedyprune.refit(model, found, [batch], progress=False)
    assert small(**batch).logits.shape == (6, 5, 40)


@pytest.mark.parametrize("lengths", [(9, 5), (7, 7)], ids=["unlike", "alike"])
@pytest.mark.parametrize("marked", ["labels", "mask"])
@pytest.mark.parametrize("way", ["imitation", "metric", "loss", "fisher"])
def test_each_side_has_its_own_padding(lengths: tuple[int, int], marked: str, way: str) -> None:
    """Also where both sides have as many positions."""
    torch.manual_seed(1)
    model = t5()
    sizes = [(4, 3), (9, 5), (6, 4), (7, 2), (5, 5), (8, 3)]
    sizes = [(min(a, lengths[0]), min(b, lengths[1])) for a, b in sizes]
    single, whole = [], []
    for a, b in sizes:
        ids, labels = torch.randint(2, 40, (1, a)), torch.randint(2, 40, (1, b))
        single.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        row = {
            "input_ids": functional.pad(ids, (0, lengths[0] - a), value=11),
            "attention_mask": functional.pad(torch.ones_like(ids), (0, lengths[0] - a)),
            "labels": functional.pad(labels, (0, lengths[1] - b), value=-100),
        }
        if marked == "mask":  # the decoder's inputs and mask are in the batch
            start = model.prepare_decoder_input_ids_from_labels(labels)
            row["decoder_input_ids"] = functional.pad(start, (0, lengths[1] - b), value=12)
            shown = functional.pad(torch.ones_like(labels), (0, lengths[1] - b))
            row["decoder_attention_mask"] = shown
            row["labels"] = functional.pad(labels, (0, lengths[1] - b), value=13)
        whole.append(row)
    names = [
        f"{side}.block.0.layer.{n}.DenseReluDense.wi"
        for side, n in (("encoder", 1), ("decoder", 2))
    ]
    options: dict[str, Any] = {"objective": way, "size": 0.5, "layers": names, "progress": False}
    if way == "metric":
        options["objective"] = Imitation(metric="fisher")
    expected = greedyprune.select(model, single, **options)
    same(expected, greedyprune.select(model, whole, **options))
    together = [{name: torch.cat([row[name] for row in whole]) for name in whole[0]}]
    if way != "metric":  # it draws labels batch by batch
        same(expected, greedyprune.select(model, together, **options))


def test_keys_and_values_of_cross_attention_are_the_encoders() -> None:
    model, ids = t5(), torch.randint(2, 40, (3, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, 40, (3, 6))}
    layers = Batches([batch], model).first().padding.decoder_layers
    assert layers is not None
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert {f"{cross}.q", "decoder.block.0.layer.0.SelfAttention.k", "lm_head"} <= layers
    encoder = {f"{cross}.k", f"{cross}.v", "encoder.block.0.layer.0.SelfAttention.q"}
    assert not layers & encoder


def test_token_classification() -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=16, num_labels=5,
    )  # fmt: skip
    model = started(transformers.BertForTokenClassification(config))
    ids, labels = torch.randint(1, 40, (8, 10)), torch.randint(5, (8, 10))
    mask = (torch.arange(10) < torch.tensor([3, 10, 5, 7, 4, 6, 8, 9])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    ignored = batch | {"labels": labels.masked_fill(mask == 0, -100)}
    options: dict[str, Any] = {"layers": "bert.encoder.layer.0.intermediate.dense", "size": 7}
    for objective in ("loss", "fisher"):
        expected = greedyprune.select(model, [ignored], objective=objective, **options)
        found = greedyprune.select(
            model, [batch | {"labels": labels}], objective=objective, **options
        )
        same(expected, found, rtol=1e-9)
        if objective == "loss":
            dense = model(**ignored).loss
            assert float(found.dense_loss) == pytest.approx(float(dense), rel=1e-5)
