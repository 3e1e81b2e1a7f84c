"""Which layers keep their columns, because the sums of their products would be too large.

One rule decides, from a layer's features and how many positions the data have. It does not ask how
much memory there is: the same data give the same selection on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data.batch import samples_of
from ..data.positions import KEPT_ROWS, is_wide, stride_for
from ..graph.groups import Group
from ..graph.names import slice_of, weight_of
from ..graph.unfold import outputs_of
from .job import Job


def wide_groups(
    job: Job, groups: Sequence[Group], flops: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """The layers with a wide consumer: how many columns each of their consumers keeps, by name.

    flops: of each module in the first batch, which tell its positions; the first rank's count
    """
    wide = dict[str, dict[str, int]]()
    samples = samples_of(job.batches.first())
    batches = job.batches.samples / samples if samples else 0.0
    for group in groups:
        if group.heads > 1 or group.scores:
            continue
        columns, is_any_wide = dict[str, int](), False
        for name in group.consumers:
            weight, at = weight_of(job.model, name), slice_of(group.slices, name)
            inputs = weight.numel() // outputs_of(job.model, group, name)
            features = inputs // weight.shape[at.dim] * at.places.numel()
            positions = int(flops.get(name, 0) / (2 * weight.numel()) * batches)
            stride = 1 if job.imitation.exact_losses else stride_for(positions, KEPT_ROWS)
            columns[name] = positions // stride
            asked = bool(job.imitation.swaps)  # for exchanges, which need sums
            is_any_wide |= is_wide(features, 0 if asked else positions)
        if is_any_wide and all(columns.values()):
            wide[group.producer] = columns
    return job.ranks.from_rank(0, "wide layers", wide)
