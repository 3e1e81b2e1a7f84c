"""What sequence models do with labels, and which of their layers belong to a decoder.

A Trainer's batch for an encoder-decoder has labels, of which the model makes the decoder's inputs.
Causal language models shift labels by one position against the outputs before they compute a loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batch import Batch
from .forward import evaluating, hooked, main_output, run_model

LABELS = "labels"
DECODER = "decoder_"  # how names of a decoder's inputs begin
IGNORED = -100  # torch's label of positions that have none
CLOSE = 1e-3  # relative: two losses of the same labels, in the model's dtype


def accepts(model: nn.Module, name: str, *, required: bool = False) -> bool:
    """Does the model's forward take this keyword argument; required: and not run without it?"""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    parameter = parameters.get(name)
    if parameter is None:
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        return takes_any and not required
    return not required or parameter.default is parameter.empty


def is_encoder_decoder(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return decodes or any(name.startswith(DECODER) for name in inputs)


def inputs_of_labels(
    model: nn.Module, inputs: Mapping[str, Any], key: str, labels: Any
) -> dict[str, Any]:
    """The model's inputs that have to be made of the labels; none where it runs without them.

    They are the labels themselves where the model's forward requires them, and the decoder's inputs
    where an encoder-decoder got none.

    inputs: the batch's other entries
    key:    the name of the entry that has the labels
    """
    if accepts(model, key, required=True):
        return {key: labels}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    has_inputs = any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    is_labels = key == LABELS and isinstance(labels, Tensor) and not labels.is_floating_point()
    if not decodes or has_inputs or not is_labels:
        return {}
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return {"decoder_input_ids": prepare(labels)}
    return {key: labels} if accepts(model, key) else {}


def decoder_layers(model: nn.Module, batch: Batch) -> frozenset[str]:
    """The layers whose inputs depend on the decoder's inputs; other layers run on the encoder's.

    The model runs twice, with other tokens for the decoder the second time. So the layers of a
    decoder that take the encoder's outputs, as cross-attention's keys do, are the encoder's.
    """
    changed = {
        name: _other(value)
        for name, value in batch.kwargs.items()
        if (name.startswith(DECODER) and "mask" not in name) or name == LABELS
    }
    leaves = [
        name for name, module in model.named_modules()
        if not list(module.children()) and list(module.parameters(recurse=False))
    ]  # fmt: skip

    def sums_of(batch: Batch) -> dict[str, list[Tensor]]:
        sums: dict[str, list[Tensor]] = {}

        def add(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                wide = value.detach().double().nan_to_num()
                sums.setdefault(name, []).append(torch.stack([wide.sum(), wide.square().sum()]))

        with evaluating(model), hooked(model, leaves, before=add):
            run_model(model, batch)
        return sums

    first, second = sums_of(batch), sums_of(replace(batch, kwargs=batch.kwargs | changed))
    return frozenset(
        name
        for name, sums in first.items()
        if any(not torch.equal(a, b) for a, b in zip(sums, second.get(name, sums), strict=False))
    )


def _other(value: Any) -> Any:
    """Other tokens, all of them valid, or other embeddings; labels that are ignored stay."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return -1 - value
    return torch.where(value < 0, value, (value == 0).to(value.dtype))


def shifts_labels(model: nn.Module, batch: Batch) -> bool:
    """Does the model's own loss compare each position's outputs with the next position's label?

    The model's own loss on the batch is compared with cross-entropy, with and without a shift. No
    shift where the model computes no loss, or none from a label for each position.

    batch: its targets are not shifted

    ValueError where the model's own loss is neither.
    """
    labels = batch.targets
    if not isinstance(labels, Tensor) or labels.dim() != 2 or not accepts(model, LABELS):
        return False
    if bool((labels == IGNORED).all()):  # any other labels tell the same
        labels = torch.zeros_like(labels)
    try:
        with evaluating(model):
            outputs = run_model(model, replace(batch, kwargs=batch.kwargs | {LABELS: labels}))
        logits = main_output(outputs)
    except ValueError:
        return False
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1 or logits.shape[:-1] != labels.shape:
        return False
    losses = [
        float(functional.cross_entropy(part.flatten(0, 1).double(), goal.flatten().long()))
        for part, goal in ((logits, labels), (logits[:, :-1], labels[:, 1:]))
    ]
    matches = [abs(float(own) - loss) <= CLOSE * max(1.0, abs(loss)) for loss in losses]
    if not any(matches) and labels.shape[1] > 1:
        raise ValueError(
            f"loss: the model's own loss on the first batch is {float(own):.6g}, but "
            f"cross-entropy with its labels is {losses[0]:.6g}, or {losses[1]:.6g} with labels "
            "shifted by one position; expected loss=a function of (outputs, targets) that computes "
            "the model's own"
        )
    return matches[1] and not matches[0]


def shifted(labels: Tensor, ignored: int) -> Tensor:
    """Each position's next label (m, T); `ignored` for the last position, which has none."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), ignored)], 1)


def time_first_layers(model: nn.Module) -> frozenset[str]:
    """The names of the layers of nn.MultiheadAttention, which puts the samples second."""
    inside = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
    return frozenset(
        f"{name}.{layer}" if name else layer
        for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
        if type(module).forward is nn.MultiheadAttention.forward
        for layer in inside
    )  # fmt: skip
