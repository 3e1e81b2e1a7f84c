"""Public architectures with random weights and small inputs, for coverage.py.

A model's name is "library/name". Of torchvision and timm, the smallest model of each family is
chosen; a family is the library's module together with the first word of the model's name. Where
that has over 80 million parameters, timm makes it of four blocks if it can. Models of transformers
are of two small layers where their configs allow it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import greedyprune

Inputs = Tensor | dict[str, Any]

SAMPLES = 8
FEW_BLOCKS = 4  # of models of timm whose smallest size has more parameters than this:
LARGE = 80e6
IMAGE_SIZES = (64, 128, None)  # None: the size that the model is made for
VIDEO_SIZES = ((8, 64), (16, 112), (16, 224))  # frames, height and width

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
STACKS = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
}  # fmt: skip
SMALL = TOKENS | BLOCKS | STACKS | {"num_key_value_heads": 2, "head_dim": 16}
PATCHES = BLOCKS | {"image_size": 32, "patch_size": 8}
FEW_EXPERTS = {
    "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip

# transformers' models, by the class that makes them: model types and the config that they take.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MaskedLM": (
        "bert roberta distilbert albert electra deberta deberta-v2 mpnet camembert ernie rembert "
        "modernbert nystromformer convbert layoutlm big_bird fnet roformer", SMALL,
    ),
    "CausalLM": (
        "gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen2_moe qwen3 gemma "
        "gemma2 phi phi3 falcon stablelm olmo starcoder2 mamba codegen cohere biogpt xglm mpt",
        SMALL,
    ),
    "Seq2SeqLM": ("t5 mt5 bart mbart pegasus marian m2m_100 blenderbot", SMALL),
    "ImageClassification": (
        "vit beit dinov2 vit_msn swin convnext resnet segformer mobilevit poolformer pvt regnet "
        "levit", {},
    ),
    "CTC": ("wav2vec2 hubert wavlm sew unispeech", SMALL),
    "AudioClassification": ("audio-spectrogram-transformer", PATCHES),
    "SpeechSeq2Seq": ("whisper", SMALL),
}  # fmt: skip
OWN_CONFIG: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "pvt": {"image_size": 64},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "qwen2_moe": FEW_EXPERTS,
    "deberta": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
    "t5": {"d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "whisper": {"max_source_positions": 32, "decoder_start_token_id": 1},
    **dict.fromkeys(("vit", "beit", "dinov2", "vit_msn"), PATCHES),
}

# Small models of all kinds, about three minutes in all.
DOZEN = (
    "torchvision/squeezenet1_1", "torchvision/mobilenet_v3_small", "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5", "timm/test_resnet", "timm/test_vit", "timm/test_convnext",
    "timm/starnet_s050", "transformers/bert", "transformers/gpt2", "transformers/llama",
    "transformers/vit",
)  # fmt: skip


def import_torchvision() -> Any:
    """torchvision; also one built for another torch, whose compiled operators do not load."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        detections = "Tensor dets, Tensor scores, float iou_threshold"
        library.define(f"nms({detections}) -> Tensor")
        register = torch.library.register_fake

        def register_others(op: Any, *args: Any, **kwargs: Any) -> Any:
            is_missing = isinstance(op, str) and op.startswith("torchvision::")
            return (lambda fake: fake) if is_missing else register(op, *args, **kwargs)

        torch.library.register_fake = register_others
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]  # what the failed import left
        import torchvision

        torchvision._greedyprune_library = library  # its definitions live as long as it does
    return torchvision


def names(every: bool, cache: Path) -> list[str]:
    """All models' names; every: all sizes of a family, not only the smallest.

    cache: a file that holds the smallest sizes, which take two minutes to find
    """
    families = _families()
    texts = [f"transformers/{kind}" for kinds, _ in TRANSFORMERS.values() for kind in kinds.split()]
    if every:
        return [name for members in families.values() for name in members] + texts
    known = json.loads(cache.read_text()) if cache.exists() else {}
    for family, members in families.items():
        if family not in known:
            known[family] = min(members, key=_size)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(known, indent=0))
    return [known[family] for family in families] + texts


def _families() -> dict[str, list[str]]:
    """The models of torchvision and timm, by family."""
    torchvision = import_torchvision()
    import timm
    from timm.models._registry import _model_to_module

    models, families = torchvision.models, dict[str, list[str]]()
    for name in models.list_models():
        if not name.startswith("quantized_"):
            module = models.get_model_builder(name).__module__
            families.setdefault(f"{module} {_word(name)}", []).append(f"torchvision/{name}")
    for name in timm.list_models():
        family = f"timm.{_model_to_module[name]} {_word(name)}"
        families.setdefault(family, []).append(f"timm/{name}")
    return families


def _word(name: str) -> str:
    return re.findall(r"[a-z]+", name)[0]


def _size(name: str) -> float:
    """A model's number of parameters; infinite where it can't be made without memory."""
    try:
        with torch.device("meta"):
            model = _make(name, None)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:
        return float("inf")


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model in eval mode, and the smallest inputs on which it runs.

    Constants such as a layer scale of 1e-6 get random values, and batch normalisations the
    statistics of the inputs. Without these whole blocks would not change the output.
    """
    library, _, kind = name.partition("/")
    torch.manual_seed(0)
    if library == "transformers":
        model, inputs = _transformer(kind)
    else:
        model, inputs = _first_that_runs(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            is_constant = bool((parameter == parameter.flatten()[:1]).all())
            if parameter.is_floating_point() and is_constant:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with contextlib.suppress(ValueError):  # some models do not run in training mode
        greedyprune.recalibrate(model, [inputs] if isinstance(inputs, dict) else inputs)
    return model.eval(), inputs


class Logits(nn.Module):
    """A model of transformers without the encoder's output, whose width could not change."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits


def _first_that_runs(name: str) -> tuple[nn.Module, Inputs]:
    error: Exception | None = None
    torchvision = import_torchvision()
    videos = torchvision.models.list_models(module=torchvision.models.video)
    sizes: tuple[Any, ...] = VIDEO_SIZES if name.split("/")[1] in videos else IMAGE_SIZES
    for size in sizes:
        try:
            torch.manual_seed(0)
            side = size if isinstance(size, int) else None
            try:
                model = _make(
                    name, side, few_blocks=name.startswith("timm/") and _size(name) > LARGE
                )
            except TypeError:  # it has no such option
                model = _make(name, side)
            model = model.eval()
            inputs = _images(name, model, size)
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(inputs[:2])
            return model, inputs
        except Exception as failure:
            error = failure
    raise RuntimeError(f"runs on no input that was tried: {error}") from error


def _make(name: str, size: int | None, few_blocks: bool = False) -> nn.Module:
    library, _, kind = name.partition("/")
    make: Callable[..., nn.Module]
    options: dict[str, Any] = {}
    if library == "timm":
        import timm

        make, sized = timm.create_model, {"img_size": size}
        if few_blocks:
            options["depth"] = FEW_BLOCKS
    else:
        models = import_torchvision().models
        make, sized = models.get_model, {"image_size": size}
        options["weights"] = None
        module = models.get_model_builder(kind).__module__
        if "detection" in module or "segmentation" in module:
            options["weights_backbone"] = None
        if kind in ("googlenet", "inception_v3"):
            options |= {"init_weights": False, "aux_logits": False}
    if size is not None:
        try:
            return make(kind, **options, **sized)
        except TypeError:
            pass  # it takes images of any size
    return make(kind, **options)


def _images(name: str, model: nn.Module, size: Any) -> Inputs:
    torch.manual_seed(2)
    if isinstance(size, tuple):
        frames, size = size
        return torch.randn(SAMPLES, 3, frames, size, size)
    channels, side = 3, size or 224
    if name.startswith("timm/"):
        config: Any = model.default_cfg
        channels, *sides = config["input_size"]
        side = size or sides[-1]
    images = torch.randn(SAMPLES, channels, side, side)
    kind = name.partition("/")[2]
    if kind.startswith("raft"):
        return {"image1": images[:2], "image2": images[2:4]}
    module = type(model).__module__
    return {"images": list(images[:2])} if "torchvision.models.detection" in module else images


def _transformer(kind: str) -> tuple[nn.Module, Inputs]:
    with contextlib.suppress(ModuleNotFoundError):  # a torchvision that can't load would stop it
        import_torchvision()
    import transformers

    head, (_, entries) = next(
        (head, row) for head, row in TRANSFORMERS.items() if kind in row[0].split()
    )
    entries = entries | OWN_CONFIG.get(kind, {})
    if kind == "falcon":
        entries = {key: value for key, value in entries.items() if key != "head_dim"}
    # A cache of keys and values among the outputs has the sizes of the heads.
    config = transformers.AutoConfig.for_model(kind, **entries, use_cache=False)
    config.architectures = config.architectures or []  # LeViT's classes are looked up in it
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    torch.manual_seed(2)
    ids = torch.randint(3, 99, (SAMPLES, 16))
    if head in ("MaskedLM", "CausalLM"):
        return model, {"input_ids": ids}
    if head == "Seq2SeqLM":
        return Logits(model), {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    if head == "ImageClassification":
        side = entries.get("image_size") or (224 if kind in ("levit", "swin") else 64)
        return model, {"pixel_values": torch.randn(SAMPLES, 3, side, side)}
    if head == "CTC":
        return model, {"input_values": torch.randn(SAMPLES, 2000)}
    if head == "AudioClassification":
        return model, {"input_values": torch.randn(SAMPLES, 64, 32)}
    features = torch.randn(SAMPLES, config.num_mel_bins, 64)
    return model, {"input_features": features, "decoder_input_ids": ids[:, :8]}
