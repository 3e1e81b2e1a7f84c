"""`save_pretrained` of pruned Hugging Face models: it loads again, or says what to do."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import BLOCKS, TOKENS, family, floats, tokens
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation
from greedyprune.surgery.cut import masked

pytestmark = pytest.mark.usefixtures("one_thread")
REFUSED = "^save_pretrained: .* can't describe the sizes of .* save it with greedyprune.save_pruned"

# The names of the feed-forward blocks' first layers, of the attention's, and of those that no
# config describes. Heads are left out where their size follows from the hidden size.
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "bart": ((".fc1",), (), ("attn.q_proj",)),
    "bert": (("intermediate.dense",), (), ("self.query", "pooler.dense")),
    "clip": ((".fc1",), (), ()),
    "distilbert": (("ffn.lin1",), (), ("q_lin", "pre_classifier")),
    "gpt2": (("mlp.c_fc",), (), ("attn.c_attn",)),
    "llama": (("gate_proj",), ("q_proj",), ()),
    "llama, tied": (("gate_proj",), ("q_proj",), ()),
    "masked": (("intermediate.dense",), (), ("self.query",)),
    "mistral": (("gate_proj",), ("q_proj",), ()),
    "qwen2": (("gate_proj",), ("q_proj",), ()),
    "t5": (("DenseReluDense.wi",), (), ()),
    "t5, gated": (("DenseReluDense.wi_0",), (), ()),
    "vit": (("mlp.fc1",), ("q_proj",), ()),
    "whisper": ((".fc1",), (), ("attn.q_proj", "conv1")),
}
SLOW = ("bart", "clip", "t5, gated", "whisper")  # some seconds each
each_family = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYERS],
)


def ending(names: object, ends: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.endswith(ends)]  # type: ignore[attr-defined]


def pruned(
    model: nn.Module, inputs: Mapping[str, Tensor], layers: list[str], size: Any = 0.5
) -> tuple[nn.Module, greedyprune.Selection]:
    selection = greedyprune.select(
        model, [dict(inputs)], layers=layers, size=size, weights="none",
        objective=Imitation(sequential=False), progress=False,
    )  # fmt: skip
    return greedyprune.prune(model, selection), selection


def varied(table: greedyprune.surgery.layers.Layers, layers: list[str]) -> dict[str, int]:
    """Sizes that differ between the layers of a kind."""
    return {name: table[name].units // 2 + i % 2 for i, name in enumerate(layers)}


@each_family
def test_one_size_for_all_blocks_loads_again(name: str, tmp_path: Path) -> None:
    model, inputs = family(name)
    table = greedyprune.layers(model, dict(inputs))
    widths, heads, _ = (ending(table, ends) for ends in LAYERS[name])
    before = copy.deepcopy(model.config.to_dict())
    for layers in filter(None, (widths, heads, widths + heads if heads else [])):
        small, selection = pruned(model, inputs, layers)
        assert selection.saving == "save_pretrained: from_pretrained will load the pruned model"
        small.save_pretrained(tmp_path)
        loaded, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        for out, expected in zip(floats(loaded, inputs), floats(small, inputs), strict=True):
            assert out.equal(expected)
    assert model.config.to_dict() == before


@each_family
def test_what_no_config_describes_is_refused_before_a_file_is_written(
    name: str, tmp_path: Path
) -> None:
    model, inputs = family(name)
    table = greedyprune.layers(model, dict(inputs))
    widths, heads, others = (ending(table, ends) for ends in LAYERS[name])
    selections: list[tuple[list[str], Any]] = [(widths, varied(table, widths))]
    selections += [(layers, 0.5) for layers in [others, widths + others] if others]
    selections += [(heads, varied(table, heads))] if heads else []
    for layers, size in selections:
        small, selection = pruned(model, inputs, layers, size)
        with pytest.raises(ValueError, match=REFUSED) as raised:
            small.save_pretrained(tmp_path / "new")
        assert selection.saving == str(raised.value)
        assert not (tmp_path / "new").exists()
        assert small.config.to_dict() == model.config.to_dict()


def test_a_config_with_a_hidden_size_for_each_stage(tmp_path: Path) -> None:
    """MobileViT's config has `hidden_sizes`: it can't say how many heads stay."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], image_size=64
    )
    torch.manual_seed(0)
    model = transformers.MobileViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 64, 64)
    table = greedyprune.layers(model, images)
    heads = [name for name in table if name.endswith("attention.query")]
    assert heads
    assert "attention.query" in str(table.saving).partition("is refused once")[2]
    small, selection = pruned(model, {"pixel_values": images}, heads, 0.5)
    full = masked(model, selection)
    torch.testing.assert_close(small(images).logits, full(images).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=REFUSED):
        small.save_pretrained(tmp_path / "new")


@each_family
def test_the_table_of_layers_says_so_before_a_selection(name: str) -> None:
    model, inputs = family(name)
    table = greedyprune.layers(model, dict(inputs))
    widths, heads, others = LAYERS[name]
    parts = str(table.saving).removeprefix("save_pretrained ").split("; ")
    one_size = next(part for part in parts if part.startswith("needs one size for all of"))
    assert all(f"{end}," in one_size or f"{end} " in one_size for end in widths + heads)
    assert "Budget(..., uniform=True)" in one_size
    if others:
        [refused] = [part for part in parts if part.startswith("is refused once")]
        assert all(f"{end}," in refused or f"{end} " in refused for end in others)
    assert table.summary().caption == table.saving


def test_layers_that_no_config_describes(tmp_path: Path) -> None:
    """ALBERT's pooler: there is nothing to advise but save_pruned."""
    model, inputs = family("albert")
    small, selection = pruned(model, inputs, ["albert.pooler"])
    assert str(selection.saving).endswith("save it with greedyprune.save_pruned")
    with pytest.raises(ValueError, match=REFUSED):
        small.save_pretrained(tmp_path / "new")


def test_a_uniform_budget_gives_sizes_that_load_again(tmp_path: Path) -> None:
    for name in ("llama", "t5"):
        model, inputs = family(name)
        budget = greedyprune.Budget(params=0.9, uniform=True)
        selection = greedyprune.select(model, [inputs], size=budget, progress=False)
        small = greedyprune.prune(model, selection)
        small.save_pretrained(tmp_path)
        loaded = type(small).from_pretrained(tmp_path)
        assert floats(loaded, inputs)[0].equal(floats(small, inputs)[0])


def test_copies_of_a_configs_get_the_entries() -> None:
    """T5's encoder and decoder keep copies of the model's config, CLIP's share parts of it."""
    model, inputs = family("t5")
    small, _ = pruned(model, inputs, ending(greedyprune.layers(model, inputs), ("wi",)))
    assert [part.config.d_ff for part in (small, small.encoder, small.decoder)] == [10, 10, 10]
    model, inputs = family("clip")
    small, _ = pruned(model, inputs, ending(greedyprune.layers(model, inputs), (".fc1",)))
    config = small.config
    assert (config.text_config.intermediate_size, config.vision_config.intermediate_size) == (
        10,
        14,
    )
    assert small.text_model.config is config.text_config
    assert model.config.text_config.intermediate_size == 20


def test_one_stack_of_two_is_described_by_itself(tmp_path: Path) -> None:
    """Both stacks have one width here, but only the encoder's is cut."""
    transformers = pytest.importorskip("transformers")
    from hugging_face import STACKS

    config = transformers.BartConfig(**TOKENS | STACKS | {"decoder_ffn_dim": 20})
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(6)}
    layers = [f"model.encoder.layers.{i}.fc1" for i in (0, 1)]
    small, _ = pruned(model, inputs, layers)
    assert (small.config.encoder_ffn_dim, small.config.decoder_ffn_dim) == (10, 20)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert floats(loaded, inputs)[0].equal(floats(small, inputs)[0])


@pytest.fixture
def refused() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A Llama, the Llama with two widths, and inputs."""
    model, inputs = family("llama")
    table = greedyprune.layers(model, inputs)
    layers = ending(table, ("gate_proj",))
    return model, pruned(model, inputs, layers, varied(table, layers))[0], inputs


Models = tuple[nn.Module, nn.Module, dict[str, Tensor]]


def test_copies_of_a_refused_model_are_refused(refused: Models, tmp_path: Path) -> None:
    model, small, inputs = refused
    torch.save(small, buffer := io.BytesIO())
    buffer.seek(0)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: copy.deepcopy(model))
    for copied in (
        small, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded,
        torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert type(copied) is type(model)
        assert floats(copied, inputs)[0].equal(floats(small, inputs)[0])
        for part in (copied, copied.model):
            with pytest.raises(ValueError, match=REFUSED):
                part.save_pretrained(tmp_path / "new")
        assert copied.save_pretrained._model() is copied
    assert not (tmp_path / "new").exists()
    again, selection = pruned(small, inputs, ["model.layers.0.self_attn.q_proj"])
    assert selection.saving == small.save_pretrained.sentence
    assert str(greedyprune.layers(small, inputs).saving) == small.save_pretrained.sentence
    with pytest.raises(ValueError, match=REFUSED):
        again.save_pretrained(tmp_path / "new")


def test_a_refused_model_is_freed_at_once(refused: Models) -> None:
    copied = copy.deepcopy(refused[1])
    gc.disable()
    try:
        reference = weakref.ref(copied)
        del copied
        assert reference() is None
    finally:
        gc.enable()


def test_a_selection_keeps_what_it_says_of_saving(tmp_path: Path) -> None:
    model, inputs = family("llama")
    _, selection = pruned(model, inputs, ["model.layers.0.mlp.gate_proj"])
    assert selection.saving is not None
    assert str(selection.summary().caption).endswith(selection.saving)
    selection.save(tmp_path / "selection.safetensors")
    loaded = greedyprune.Selection.load(tmp_path / "selection.safetensors")
    assert loaded.saving == pickle.loads(pickle.dumps(selection)).saving == selection.saving
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = torch.randn(16, 4), torch.randn(16, 2)
    assert greedyprune.select(plain, data).saving is None
    assert greedyprune.layers(plain, data[0]).saving is None


def test_a_model_inside_another_module(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net, self.head = model, nn.Linear(50, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.net(input_ids=input_ids).logits)

    model, inputs = family("llama")
    whole = Wrapped(model).eval()
    layers = [f"net.model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
    small, selection = pruned(whole, inputs, layers)
    small.net.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert floats(loaded, inputs)[0].equal(floats(small.net, inputs)[0])
    assert "from_pretrained will load" in str(selection.saving)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    again = greedyprune.load_pruned(
        tmp_path / "small.safetensors", lambda: Wrapped(copy.deepcopy(model))
    )
    assert again.net.config.intermediate_size == 10
    small, _ = pruned(whole, inputs, layers, dict(zip(layers, (8, 9), strict=True)))
    with pytest.raises(ValueError, match=REFUSED):
        small.net.save_pretrained(tmp_path / "new")


def test_a_replaced_head_does_not_count(tmp_path: Path) -> None:
    """The config says two labels, but the classifier gives three: from_pretrained says so."""
    model, inputs = family("bert")
    model.classifier = nn.Linear(24, 3)
    layers = ending(greedyprune.layers(model, inputs), ("intermediate.dense",))
    small, _ = pruned(model, inputs, layers)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path, num_labels=3)
    assert floats(loaded, inputs)[0].equal(floats(small, inputs)[0])


def per_layer_model() -> nn.Module:
    """A model of a class that reads the width of each block from config.per_layer_config."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.PreTrainedConfig, "per_layer_config"):
        pytest.skip("this version of transformers has no per_layer_config")

    class Config(transformers.PreTrainedConfig):
        model_type = "per_layer"

        def __init__(self, **entries: Any) -> None:
            super().__init__(**BLOCKS | entries)

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList([
                nn.Sequential(
                    nn.Linear(config.hidden_size, block.intermediate_size), nn.ReLU(),
                    nn.Linear(block.intermediate_size, config.hidden_size),
                ) for block in config.per_layer_config
            ])  # fmt: skip
            self.post_init()

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = x + layer(x)
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)

    torch.manual_seed(0)
    return Model(Config()).eval()


def test_sizes_of_single_layers(tmp_path: Path) -> None:
    model, inputs = per_layer_model(), {"x": torch.randn(16, 24)}
    table = greedyprune.layers(model, inputs)
    assert str(table.saving) == "save_pretrained takes any sizes of layers.*.*"
    small, selection = pruned(model, inputs, list(table), dict(zip(table, (8, 9), strict=True)))
    assert "from_pretrained will load" in str(selection.saving)
    assert [part.intermediate_size for part in small.config.per_layer_config] == [8, 9]
    assert not model.config.is_heterogeneous
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    again = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: copy.deepcopy(model))
    smaller, _ = pruned(loaded, inputs, list(table), 4)
    smaller.save_pretrained(tmp_path)
    for model_, expected in (
        (loaded, small), (again, small), (type(small).from_pretrained(tmp_path), smaller),
    ):  # fmt: skip
        assert floats(model_, inputs)[0].equal(floats(expected, inputs)[0])
    assert [part.intermediate_size for part in again.config.per_layer_config] == [8, 9]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "llama, tied", "masked", "vit"])
def test_half_of_everything_loads_again(name: str, tmp_path: Path) -> None:
    """Half of the stream, of the heads and of the widths is half of each entry of the config."""
    model, inputs = family(name)
    selection = greedyprune.select(
        model, [inputs], size=0.5, layers="all", objective="imitation", progress=False
    )
    assert selection.saving == "save_pretrained: from_pretrained will load the pruned model"
    small = greedyprune.prune(model, selection)
    small.save_pretrained(tmp_path)
    loaded, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    for out, expected in zip(floats(loaded, inputs), floats(small, inputs), strict=True):
        assert out.equal(expected)


@pytest.mark.parametrize("name", ["gpt2", "llama, tied", "masked"])
def test_a_tied_table_is_cut_once_and_stays_tied(name: str, tmp_path: Path) -> None:
    model, inputs = family(name)
    table = model.get_input_embeddings().weight.detach().clone()
    selection = greedyprune.select(
        model, [inputs], size=0.5, layers="all", objective="imitation", progress=False
    )
    [stream] = [layer for layer in selection.layers.values() if layer.tied]
    for small in (
        greedyprune.prune(model, selection), greedyprune.refit(model, selection, [inputs])
    ):  # fmt: skip
        first, last = small.get_input_embeddings(), small.get_output_embeddings()
        assert first.weight is last.weight
        assert first.weight.equal(table[:, stream.kept])
        assert first.embedding_dim == last.in_features == len(stream.kept)
        greedyprune.save_pruned(small, tmp_path / "small.safetensors")
        again = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: family(name)[0])
        for out, expected in zip(floats(again, inputs), floats(small, inputs), strict=True):
            assert out.equal(expected)
