"""Pruned models in files: `save_pruned` and `load_pruned`, and Hugging Face's own format."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, network, outputs_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation

each_network = pytest.mark.parametrize("name", NETWORKS)
pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(model: nn.Module, inputs: object, **options: object) -> nn.Module:
    data = inputs if isinstance(inputs, dict) else [inputs]
    selection = greedyprune.select(
        model, data, **{"objective": Imitation(sequential=False), "weights": "none"} | options
    )
    return greedyprune.prune(model, selection)


def untied(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those that are tied under one of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@each_network
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_pruned_model_survives_its_file(name: str, device: str, tmp_path: Path) -> None:
    model, inputs = network(name)
    small = pruned(model, inputs)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")

    def dense() -> nn.Module:
        with torch.device(device):
            return NETWORKS[name][0]()[0]

    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", dense).eval()
    assert outputs_of(loaded, inputs).equal(outputs_of(small, inputs))
    assert str(loaded) == str(small)  # which shows the modules' widths
    assert untied(loaded).keys() == untied(small).keys()  # the same tensors are tied
    for key, tensor in untied(small).items():
        read = untied(loaded)[key]
        assert read.equal(tensor)
        assert (read.dtype, read.device) == (tensor.dtype, tensor.device)
        assert read.requires_grad == tensor.requires_grad
    assert loaded.state_dict().keys() == small.state_dict().keys()


@each_network
def test_attributes_hold_the_sizes_of_the_tensors(name: str) -> None:
    model, inputs = network(name)
    small, compared = pruned(model, inputs), 0
    for key, module in small.named_modules():
        tensor = getattr(module, "weight", getattr(module, "running_mean", None))
        if tensor is None or isinstance(module, (nn.Embedding, nn.LayerNorm)):
            continue
        compared += not torch.equal(tensor, model.get_parameter(f"{key}.weight"))
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tensor.shape
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            channels = module.out_channels, module.in_channels // module.groups
            assert channels == tensor.shape[:2]
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert (module.num_features,) == tensor.shape == module.running_mean.shape
        elif type(module).__name__ == "Conv1D":
            assert (module.nx, module.nf) == tensor.shape
    assert compared >= 2  # a producer and a consumer were cut


@each_network
def test_a_loaded_model_is_trained_and_pruned_again(name: str, tmp_path: Path) -> None:
    model, inputs = network(name)
    greedyprune.save_pruned(pruned(model, inputs, size=0.7), tmp_path / "small.safetensors")
    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: network(name)[0])
    before = {key: tensor.clone() for key, tensor in loaded.named_parameters()}
    loaded.train()
    returned = loaded(**inputs) if isinstance(inputs, dict) else loaded(inputs)
    outputs = returned if isinstance(returned, Tensor) else returned.logits
    outputs.square().mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    moved = {key for key, tensor in loaded.named_parameters() if not tensor.equal(before[key])}
    layers = greedyprune.layers(loaded.eval(), inputs)
    assert {
        f"{consumer}.weight" for layer in layers.values() for consumer in layer.consumers
    } <= moved
    smaller = pruned(loaded, inputs)
    greedyprune.save_pruned(smaller, tmp_path / "smaller.safetensors")
    for factory in (lambda: network(name)[0], lambda: copy.deepcopy(loaded)):
        again = greedyprune.load_pruned(tmp_path / "smaller.safetensors", factory).eval()
        assert outputs_of(again, inputs).equal(outputs_of(smaller, inputs))


def test_types_modes_and_views(tmp_path: Path) -> None:
    """Half precision, frozen layers, buffers outside the state dict, views of one another."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
            self.register_buffer("table", torch.arange(12).view(3, 4).T, persistent=False)
            self.register_buffer("flat", self.table.T.view(-1))
            self.register_buffer("row", self.flat[:3])
            self.a.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) * self.row[1]

    torch.manual_seed(0)
    model, inputs = Odd().bfloat16(), torch.randn(20, 6, dtype=torch.bfloat16)
    small = pruned(model, inputs)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", Odd)
    assert loaded(inputs).equal(small(inputs))
    assert loaded.a.weight.dtype == torch.bfloat16
    assert loaded.table.equal(model.table)
    assert loaded.training
    assert not loaded.a.weight.requires_grad
    assert loaded.b.weight.requires_grad
    assert loaded.state_dict().keys() == small.state_dict().keys()


def test_the_file_is_a_plain_state_dict(tmp_path: Path) -> None:
    model, inputs = network("gpt2")
    small = pruned(model, inputs)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        names, header = set(file.keys()), file.metadata()
    assert names == {key for key, _ in small.named_parameters()}
    assert json.loads(header["tied"]) == {"lm_head.weight": "transformer.wte.weight"}
    sizes = json.loads(header["sizes"])
    assert sizes["transformer.h.0.mlp.c_proj"] == {"nf": 24, "nx": 10}
    assert sizes["transformer.h.0.attn"] == {"num_heads": 2, "split_size": 12}


def test_files_that_hold_no_pruned_model(tmp_path: Path) -> None:
    model, inputs = network("vgg")
    path = tmp_path / "small.safetensors"
    with pytest.raises(FileNotFoundError, match="path: no file at"):
        greedyprune.load_pruned(path, lambda: model)
    greedyprune.save_pruned(pruned(model, inputs), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"path: .* is not a safetensors file"):
        greedyprune.load_pruned(path, lambda: model)
    path.write_text("once upon a time")
    with pytest.raises(ValueError, match=r"path: .* is not a safetensors file"):
        greedyprune.load_pruned(path, lambda: model)
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"path: .* holds no pruned model of this format"):
        greedyprune.load_pruned(path, lambda: model)
    for broken in ({}, {"sizes": "{", "tied": "{}"}, {"sizes": "{}", "tied": '{"0.weight": "x"}'}):
        header = {"format": "greedyprune-pruned-2", "config": "{}"} | broken
        save_file(model.state_dict(), path, header)
        with pytest.raises(ValueError, match=r"path: the header of .* is damaged"):
            greedyprune.load_pruned(path, lambda: model)


def test_factories_of_other_models(tmp_path: Path) -> None:
    def dense(*, classes: int = 4, kernel: int = 3, width: int = 8, **more: bool) -> nn.Sequential:
        middle = nn.Conv2d(width, 6, kernel, **more)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), middle, nn.ReLU(),
            nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, classes),
        )  # fmt: skip

    model, path = dense(), tmp_path / "small.safetensors"
    small = pruned(model, torch.randn(8, 3, 5, 5))
    assert small[0].out_channels == 4
    greedyprune.save_pruned(small, path)
    for other, message in (
        (lambda: dense(width=3), r"found '0.weight' of shape \(3, 3, 3, 3\), expected .* \(4, 3,"),
        (lambda: dense(kernel=5), r"found '3.weight' of shape \(6, 8, 5, 5\), expected"),
        (lambda: dense(bias=False), "its model lacks '3.bias', which the file has"),
        (lambda: nn.Sequential(*dense(), nn.PReLU()), "its model has '8.weight', which the file"),
        (lambda: dense(classes=3), r"found '7.weight' of shape \(3, 6\), expected"),
    ):
        with pytest.raises(ValueError, match=f"^model_factory: {message}"):
            greedyprune.load_pruned(path, other)
    other = dense()
    other[0] = nn.ConvTranspose2d(8, 3, 3)
    other[0].bias = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match=r"found ConvTranspose2d at '0' .*expected a module with"):
        greedyprune.load_pruned(path, lambda: other)
    wide = dense()
    wide[6] = nn.LayerNorm(2)
    with pytest.raises(ValueError, match=r"found '6.weight' of shape \(2,\), expected"):
        greedyprune.load_pruned(path, lambda: wide)
    with pytest.raises(TypeError, match="model_factory: found Sequential, expected a function"):
        greedyprune.load_pruned(path, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model_factory: it returned int"):
        greedyprune.load_pruned(path, lambda: 3)  # type: ignore[arg-type,return-value]


def test_models_that_can_t_be_saved(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    path = tmp_path / "small.safetensors"
    with pytest.raises(TypeError, match="model: found int, expected"):
        greedyprune.save_pruned(3, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: found '_extra_state' in its state"):
        greedyprune.save_pruned(Counting(2, 2), path)
    with pytest.raises(TypeError, match="model: 'weight' is on the meta device"):
        greedyprune.save_pruned(nn.Linear(2, 2, device="meta"), path)
    assert not path.exists()


def hugging_face(name: str, **config: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two layers of each kind, in eval mode; the head width of the Llama is not the default."""
    transformers = pytest.importorskip("transformers")
    kind = {
        "Bert": "BertForSequenceClassification", "GPT2": "GPT2LMHeadModel",
        "Llama": "LlamaForCausalLM", "ViT": "ViTForImageClassification",
    }[name]  # fmt: skip
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    if name in ("Bert", "Llama", "GPT2"):
        common |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    if name == "ViT":
        common |= {"image_size": 8, "patch_size": 4}
    if name != "GPT2":
        common["intermediate_size"] = 20
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**common, **config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if name == "ViT":
        return model.eval(), {"pixel_values": torch.randn(6, 3, 8, 8)}
    return model.eval(), {"input_ids": torch.randint(50, (6, 12))}


FEED_FORWARD = {
    "Bert": "bert.encoder.layer.{}.intermediate.dense", "GPT2": "transformer.h.{}.mlp.c_fc",
    "Llama": "model.layers.{}.mlp.gate_proj", "ViT": "vit.layers.{}.mlp.fc1",
}  # fmt: skip
HEADS = {"Llama": "model.layers.{}.self_attn.q_proj", "ViT": "vit.layers.{}.attention.q_proj"}


def described(
    name: str, layers: list[str], path: Path, size: object = 0.5, **config: object
) -> dict[str, object]:
    """Prunes two of each of these layers; returns the entries of the config that changed.

    Checks that the model's class builds the pruned model from this config, and that both forms of
    file bring the model and its config back.
    """
    model, inputs = hugging_face(name, **config)
    before = copy.deepcopy(model.config.to_dict())
    small = pruned(model, inputs, layers=[layer.format(i) for layer in layers for i in (0, 1)],
                   size=size)  # fmt: skip
    assert model.config.to_dict() == before
    after = small.config.to_dict()
    changed = {key: value for key, value in after.items() if value != before.get(key)}
    shapes = {key: tensor.shape for key, tensor in small.state_dict().items()}
    built = type(small)(small.config)
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == shapes
    small.save_pretrained(path)
    from_hugging_face = type(small).from_pretrained(path)
    assert outputs_of(from_hugging_face, inputs).equal(outputs_of(small, inputs))
    greedyprune.save_pruned(small, path / "small.safetensors")
    dense = copy.deepcopy(model.config)
    loaded = greedyprune.load_pruned(path / "small.safetensors", lambda: type(model)(dense)).eval()
    assert dense.to_dict() == model.config.to_dict()
    assert outputs_of(loaded, inputs).equal(outputs_of(small, inputs))
    assert all(getattr(m, "config", loaded.config) is loaded.config for m in loaded.modules())
    for read in (from_hugging_face, loaded):
        assert {key: getattr(read.config, key) for key in changed} == changed
    return changed


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_configs_say_the_width_of_feed_forward_blocks(name: str, tmp_path: Path) -> None:
    changed = described(name, [FEED_FORWARD[name]], tmp_path)
    assert changed == ({"n_inner": 48} if name == "GPT2" else {"intermediate_size": 10})


@pytest.mark.parametrize("name", HEADS)
def test_configs_say_the_number_of_heads(name: str, tmp_path: Path) -> None:
    options = {"num_key_value_heads": 3} if name == "Llama" else {}
    changed = described(name, [FEED_FORWARD[name], HEADS[name]], tmp_path, size=0.7, **options)
    expected = {"intermediate_size": 14, "num_attention_heads": 4}
    expected |= {"num_key_value_heads": 2} if name == "Llama" else {"head_dim": 4}
    assert changed == expected


def test_configs_that_can_t_describe_the_pruned_model_stay(tmp_path: Path) -> None:
    for name, size in (
        ("Bert", 0.5),  # heads follow from the hidden size, and the pooler is pruned, too
        ("GPT2", 0.5),
        ("Llama", {FEED_FORWARD["Llama"].format(0): 8, FEED_FORWARD["Llama"].format(1): 9}),
    ):
        model, inputs = hugging_face(name)
        small = pruned(model, inputs, size=size, layers=list(size) if name == "Llama" else None)
        assert small.config.to_dict() == model.config.to_dict()
        greedyprune.save_pruned(small, tmp_path / "small.safetensors")
        loaded = greedyprune.load_pruned(
            tmp_path / "small.safetensors", lambda model=model: type(model)(model.config)
        )
        assert outputs_of(loaded.eval(), inputs).equal(outputs_of(small, inputs))


class Positions(nn.Module):
    """A table that a forward makes, and that grows with the longest input."""

    def __init__(self, persistent: bool, made: bool) -> None:
        super().__init__()
        self.persistent, self.fc1, self.fc2 = persistent, nn.Linear(6, 16), nn.Linear(16, 3)
        if made:
            self.make(2)

    def make(self, length: int) -> None:
        table = torch.arange(float(length))[:, None].expand(length, 6).sin().clone()
        self.register_buffer("table", table, persistent=self.persistent)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table") or len(self.table) < x.shape[1]:
            self.make(x.shape[1])
        return self.fc2(self.fc1(x + self.table[: x.shape[1]]).relu())


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_buffers_that_a_forward_makes(persistent: bool, made: bool, tmp_path: Path) -> None:
    model, inputs = Positions(persistent, made), torch.randn(8, 5, 6)
    small = pruned(model, inputs)
    assert hasattr(small, "table") == made  # as in the model, since select restores it
    expected = small(inputs)
    greedyprune.save_pruned(small, tmp_path / "small")
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = Positions(persistent, made)
        loaded = greedyprune.load_pruned(tmp_path / "small", lambda fresh=fresh: fresh)
        assert loaded.table.shape == (5, 6)
        assert loaded.state_dict().keys() == small.state_dict().keys()
        assert loaded(inputs).equal(expected)


def test_functions_of_the_factory_s_tensors(tmp_path: Path) -> None:
    """A forward that holds a weight computes with the loaded one."""

    def dense() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(torch.float64)
        weight, last = model[2].weight, model[2]
        last.forward = lambda x: x @ weight.T + last.bias
        return model

    model, inputs = dense(), torch.randn(8, 6).double()
    plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    plain.load_state_dict(model.state_dict())
    selection = greedyprune.select(plain, (inputs, torch.zeros(8, 3).double()), size=4)
    small = greedyprune.prune(model, selection)
    torch.testing.assert_close(small(inputs), greedyprune.prune(plain, selection)(inputs))
    greedyprune.save_pruned(small, tmp_path / "small")
    loaded = greedyprune.load_pruned(tmp_path / "small", dense)
    assert loaded(inputs).equal(small(inputs))


def test_the_memory_format_is_the_factory_s(tmp_path: Path) -> None:
    model, inputs = network("vgg")
    model = model.to(memory_format=torch.channels_last)
    small = pruned(model, inputs)
    greedyprune.save_pruned(torch.compile(small, backend="eager"), tmp_path / "small")
    last = {"memory_format": torch.channels_last}
    loaded = greedyprune.load_pruned(tmp_path / "small", lambda: network("vgg")[0].to(**last))
    for model in (small, loaded):
        assert model[4].weight.is_contiguous(**last)
        assert not model[4].weight.is_contiguous()
    torch.testing.assert_close(loaded.eval()(inputs), small(inputs))


def test_synchronised_statistics_are_read_into_a_model_on_one_device(tmp_path: Path) -> None:
    model, inputs = network("vgg")
    small = pruned(nn.SyncBatchNorm.convert_sync_batchnorm(model), inputs)
    greedyprune.save_pruned(small, tmp_path / "small")
    loaded = greedyprune.load_pruned(tmp_path / "small", lambda: network("vgg")[0]).eval()
    assert loaded(inputs).equal(small(inputs))
