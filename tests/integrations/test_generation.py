"""Pruned language models generate what they generate without a cache; pipelines take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import VOCABULARY, family, tokens
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
GENERATORS = ["bart", "gpt2", "llama", "mistral", "qwen2", "t5", "whisper"]
SLOW = ("bart", "whisper")
each_generator = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in GENERATORS]
)


def pruned(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Every layer cut, to sizes that differ from layer to layer; its inputs but the decoder's."""
    model, inputs = family(name)
    table = greedyprune.layers(model, dict(inputs))
    size = {
        layer: max(1, group.units * (1 + i % 4 // 2) // 3)
        for i, (layer, group) in enumerate(table.items())
    }
    selection = greedyprune.select(
        model, [inputs], size=size, objective=Imitation(sequential=False), progress=False
    )
    small = greedyprune.prune(model, selection)
    assert len({len(layer.kept) for layer in selection.layers.values()}) > 1
    return small.eval(), {key: x for key, x in inputs.items() if key != "decoder_input_ids"}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(
        **inputs, **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    )


@each_generator
def test_every_cache_and_beams(name: str) -> None:
    """Logits are compared, too: a random model may give one token whatever the cache holds."""
    model, inputs = pruned(name)
    caches = ["dynamic", "static"]
    if torch.cuda.is_available():  # these move the cache between the GPU and the host
        model, inputs = model.cuda(), {key: x.cuda() for key, x in inputs.items()}
        caches += ["offloaded", "offloaded_static"]
    details = {"output_logits": True, "return_dict_in_generate": True}
    expected: Any = generated(model, inputs, use_cache=False, **details)
    for cache in caches:
        cached: Any = generated(model, inputs, cache_implementation=cache, **details)
        assert cached.sequences.equal(expected.sequences), cache
        for step, exact in zip(cached.logits, expected.logits, strict=True):
            assert torch.allclose(step, exact, atol=1e-4 * float(exact.abs().max())), cache
    beams = [generated(model, inputs, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert beams[0].equal(beams[1])


def test_a_quantised_cache() -> None:
    pytest.importorskip("optimum.quanto")
    model, inputs = pruned("llama")
    cached = generated(model, inputs, cache_implementation="quantized")
    assert cached.shape == generated(model, inputs, use_cache=False).shape


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2"])
def test_left_padding_changes_nothing(name: str) -> None:
    model, _ = pruned(name)
    short, long = tokens(6, samples=1), tokens(9, samples=1)
    batch = torch.cat([nn.functional.pad(short, (3, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = generated(model, {"input_ids": batch, "attention_mask": mask})
    for row, alone in zip(together, (short, long), strict=True):
        inputs = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
        assert row[9:].equal(generated(model, inputs)[0, alone.shape[1] :])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """One token for each of the words "w2" to "w49", and the special ones."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(2, VOCABULARY - 1)}
    special = {"[PAD]": 0, "[EOS]": 1, "[MASK]": VOCABULARY - 1}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | special, "w2"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]"
    )


def test_a_pipeline_for_text(tokenizer: Any) -> None:
    model, _ = pruned("llama")
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipeline("w5 w7 w9", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    inputs = dict(tokenizer("w5 w7 w9", return_tensors="pt", return_token_type_ids=False))
    expected = generated(model, inputs, max_new_tokens=4, min_new_tokens=0)[0]
    new = expected[inputs["input_ids"].shape[1] :]
    assert text == "w5 w7 w9" + tokenizer.decode(new, skip_special_tokens=True)


def test_a_pipeline_for_masked_words(tokenizer: Any) -> None:
    model, _ = pruned("masked")
    pipeline = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    best = pipeline("w5 [MASK] w9", top_k=1)[0]
    inputs = tokenizer("w5 [MASK] w9", return_tensors="pt")
    with torch.no_grad():
        chances = model(**inputs).logits[0, 1].softmax(0)
    assert best["token"] == int(chances.argmax())
    assert best["score"] == pytest.approx(float(chances.max()), rel=1e-5)


def test_a_pipeline_for_images() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8), (200, 30, 90))
    model, _ = pruned("vit")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
    best = pipeline(image)[0]
    with torch.no_grad():
        chances = model(**processor(image, return_tensors="pt")).logits[0].softmax(0)
    assert best["score"] == pytest.approx(float(chances.max()), rel=1e-5)
    assert best["label"] == model.config.id2label[int(chances.argmax())]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = tokens(samples=8)[row]
        return {"input_ids": ids, "labels": ids}


def test_a_trainer_saves_checkpoints_and_resumes(tmp_path: Path) -> None:
    """Its checkpoints are for this model in memory; `save_pretrained` by hand stays refused."""
    pytest.importorskip("accelerate")
    model, _ = pruned("llama")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    with pytest.warns(UserWarning, match="checkpoints are written, and resume the training"):
        trainer.train()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="checkpoints are written, and resume the training"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, trained[name], atol=1e-6), name
    with pytest.raises(ValueError, match=r"^save_pretrained: "):
        model.save_pretrained(tmp_path / "new")
    with pytest.raises(RuntimeError, match="mismatch"):  # and no one gets a wrong model of them
        type(model).from_pretrained(tmp_path / "checkpoint-4")


def test_lora_is_merged_before_pruning_and_added_after_it(tmp_path: Path) -> None:
    """The flow that the documentation shows."""
    peft = pytest.importorskip("peft")
    model, inputs = family("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, lora).merge_and_unload()
    selection = greedyprune.select(merged, [inputs], size=0.5, progress=False)
    small = greedyprune.prune(merged, selection)
    small.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(small, lora)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    base = type(small).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted.eval()(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
        assert torch.allclose(loaded.merge_and_unload()(**inputs).logits, expected, atol=1e-4)
