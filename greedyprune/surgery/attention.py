"""nn.MultiheadAttention after pruning: heads and model dimension no longer fit together.

torch's own forward needs num_heads * head_dim to be the size of the query's last dimension. So a
module that has lost heads, or channels of the residual stream, but not as many of both, becomes a
`MultiheadAttention` of this file. It has the same parameters under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with any number of heads for any size of its input.

    Made by `greedyprune.prune`, not by hand. The forward takes and gives what torch's does (Vaswani
    et al. 2017, arXiv:1706.03762, section 3.2.2).
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The attention's output, and the weights of the heads or their mean.

        query: (N, L, E) with batch_first=True, else (L, N, E); or (L, E) for one sample. key and
            value: the same with S for L

        Raises RuntimeError where torch's forward does: for is_causal=True without an `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        inputs = [query, key, value]
        if not is_batched:
            inputs = [tensor.unsqueeze(0) for tensor in inputs]
        elif not self.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        queries, keys, values = self._projected(*inputs)
        mask = self._mask(key_padding_mask, attn_mask, queries, is_batched)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout)
            heads = weights @ values
        else:
            heads = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values of each head: (N, heads, L or S, head_dim)."""
        weights: list[Tensor] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if self._parameters["in_proj_weight"] is not None:
            weights = [*self.in_proj_weight.chunk(3)]
        biases = [None] * 3 if self.in_proj_bias is None else [*self.in_proj_bias.chunk(3)]
        results: list[Tensor] = []
        for tensor, weight, bias, added in zip(
            inputs, weights, biases, (None, self.bias_k, self.bias_v), strict=True
        ):
            projected = functional.linear(tensor, weight, bias)
            if added is not None:
                projected = torch.cat([projected, added.expand(len(projected), -1, -1)], 1)
            if self.add_zero_attn and results:
                projected = functional.pad(projected, (0, 0, 0, 1))
            results.append(projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        return results

    def _mask(
        self, padding: Tensor | None, mask: Tensor | None, queries: Tensor, is_batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores, for the keys that are added, too."""

        def added(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(queries.dtype)
            return torch.zeros_like(mask, dtype=queries.dtype).masked_fill_(mask, -math.inf)

        masks = []
        if padding is not None:  # (N, S)
            padding = added(padding if is_batched else padding.unsqueeze(0))
            masks.append(padding[:, None, None])
        if mask is not None:  # (L, S), or (N * heads, L, S)
            mask = added(mask)
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (len(queries), -1)))
        if not masks:
            return None
        more = (self.bias_k is not None) + self.add_zero_attn
        return functional.pad(sum(masks[1:], masks[0]), (0, int(more)))


def fit_attention(model: nn.Module) -> None:
    """Gives every nn.MultiheadAttention of a cut model the forward that its sizes need."""
    for module in model.modules():
        if isinstance(module, nn.Transformer):
            inside = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
            module.d_model = next((len(m.out_proj.weight) for m in inside), module.d_model)
        if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
            continue
        assert isinstance(module, nn.MultiheadAttention)
        inner, size = module.out_proj.weight.shape[1], module.out_proj.weight.shape[0]
        packed = module.in_proj_weight
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        query, key, value = weights if packed is None else [packed] * 3
        module.embed_dim, module.kdim, module.vdim = size, key.shape[1], value.shape[1]
        if query.shape[1] == size == inner == module.num_heads * module.head_dim:
            continue
        module._qkv_same_embed_dim = False  # torch's encoder layer then takes no fast path
        module.__class__ = MultiheadAttention
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _holds_own(module):
            module.use_nested_tensor = False  # torch decides on it when it makes the encoder


def _holds_own(module: nn.Module) -> bool:
    return any(isinstance(part, MultiheadAttention) for part in module.modules())


@contextmanager
def attending_as(model: nn.Module, small: nn.Module) -> Iterator[None]:
    """Inside, the model's attention runs as the smaller model's does: with tensors of its order."""
    swapped = [
        module for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
        and type(small.get_submodule(name)) is MultiheadAttention
    ]  # fmt: skip
    fast = [module._qkv_same_embed_dim for module in swapped]
    try:
        for module in swapped:
            module.__class__, module._qkv_same_embed_dim = MultiheadAttention, False
        yield
    finally:
        for module, known in zip(swapped, fast, strict=True):
            module.__class__, module._qkv_same_embed_dim = nn.MultiheadAttention, known
