"""Which positions of padded sequences count: those that a batch's mask does not hide.

A *position* is one token of one sample. A mask has a number for each position of the inputs. Values
inside the model may have other shapes; `counted` finds a mask's entries for their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AUTO = "auto"
MASK = "attention_mask"
DECODER_MASK = "decoder_attention_mask"
NO_LABEL = "data: every label is ignored or hidden by the mask, expected at least one that counts"
NO_POSITION = "data: every position is hidden by the mask, expected at least one that counts"
INVERTED = "key_padding_mask"  # torch's masks with this name are True where a position is hidden


@dataclass(frozen=True)
class Padding:
    """Which positions of a batch count.

    mask:           (m, T) bool; None: all positions count
    decoder_mask:   (m, T') bool, of the decoder's positions
    decoder_layers: the names of the layers that run on the decoder's positions; None: the model has
        no decoder
    time_first: the names of layers whose rows have the positions first and then the samples
    """

    mask: Tensor | None
    decoder_mask: Tensor | None = None
    decoder_layers: frozenset[str] | None = None
    time_first: frozenset[str] = frozenset()

    def map(self, function: Callable[[Any], Any]) -> Padding:
        """The padding with function(mask) in the place of both masks."""
        return replace(self, mask=function(self.mask), decoder_mask=function(self.decoder_mask))

    def of(self, layer: str) -> Tensor | None:
        """The mask of the positions that a layer runs on, in its rows' order; None: all count."""
        is_decoders = self.decoder_layers is not None and layer in self.decoder_layers
        mask = self.decoder_mask if is_decoders else self.mask
        return mask.T if mask is not None and layer in self.time_first else mask

    @property
    def hides(self) -> bool:
        """Is any position hidden?"""
        masks = (self.mask, self.decoder_mask)
        return any(mask is not None and not bool(mask.all()) for mask in masks)

    @property
    def outputs(self) -> Tensor | None:
        """The mask of the model's outputs; None: all count."""
        return self.mask if self.decoder_layers is None else self.decoder_mask


NO_PADDING = Padding(None)


def counted(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Which rows of a tensor count: bool of the given shape; None: all of them.

    Args:
        mask: (m, T) bool, of the positions that count; None: all count
        shape: the tensor's dimensions without that of its features: (m, T), (m, T, ...), (T, m) or
            (m * T,), one row for each position; or (m, ...), for other rows of each sample, which
            count if any position of the sample does. Other shapes mean other rows: all count.
            Where m = T, the samples come first
    """
    if mask is None or not shape or bool(mask.all()):
        return None
    samples, length = mask.shape
    shape = tuple(shape)
    if shape[:2] == (samples, length):
        rows = mask
    elif shape[:2] == (length, samples):
        rows = mask.T
    elif shape == (samples * length,):
        rows = mask.flatten()
    elif shape[0] == samples:
        rows = mask.any(1)
    else:
        return None
    return rows.reshape(*rows.shape, *[1] * (len(shape) - rows.dim())).expand(shape)


def padding_of(
    entries: Mapping[str, Any], name: str | None, samples: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of a batch, of its inputs and of its decoder's inputs; None: all positions count.

    entries: the batch's entries by name
    name:    of the entry that is the mask; "auto": "attention_mask", if there is one; None: no mask
    samples: m

    ValueError for a mask that is named but missing, or is not (m, T) of 0 and 1. With "auto", other
    forms of a mask, such as those that are added to attention's products, hide nothing. A mask of
    0.0 only is one of these, of a batch without padding.
    """
    if name is None:
        return None, None
    decoder = _mask(entries.get(DECODER_MASK), samples)
    if name == AUTO:
        value = entries.get(MASK)
        is_zero = isinstance(value, Tensor) and value.is_floating_point() and not value.any()
        return None if is_zero else _mask(value, samples), decoder
    if name not in entries:
        known = f"one of {sorted(entries)}" if entries else "batches that are dicts with it"
        raise ValueError(f"mask: found {name!r}, which no entry of a batch has, expected {known}")
    mask = _mask(entries[name], samples)
    if mask is None:
        value = entries[name]
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"mask: found {name!r} of {what}, expected one number for each position, (samples, "
            "positions), 1 where it counts and 0 where it is padding"
        )
    return (~mask if name.endswith(INVERTED) else mask), decoder


def _mask(value: object, samples: int | None) -> Tensor | None:
    """A mask as (m, T) bool; None for something that is no such mask."""
    if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != samples:
        return None
    if value.dtype == torch.bool:
        return value
    if value.is_complex() or (value.numel() and not bool((value >= 0).all())):
        return None
    return value != 0


def visible(targets: Tensor, mask: Tensor | None, ignored: int) -> Tensor:
    """Labels (m, T) with `ignored` in the positions that the mask hides; other targets as they are.

    ignored: torch's `ignore_index`
    """
    is_labels = not targets.is_floating_point() and targets.dtype != torch.bool
    if mask is None or targets.shape != mask.shape or not is_labels:
        return targets
    return targets.long().masked_fill(~mask, ignored)
