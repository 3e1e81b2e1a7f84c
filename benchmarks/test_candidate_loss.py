"""One greedy step's candidates: the fused kernel beside plain torch at its best chunk size.

    make bench

The column in brackets is the ratio to the fastest of the group, measured in the same run.
"""

import pytest
import torch
from baselines import best_chunk, eager
from pytest_benchmark.fixture import BenchmarkFixture

from greedyprune import ops
from greedyprune.losses import Criterion

M, N, C = 1024, 8192, 10
torch.manual_seed(0)
FEATURES = torch.randn(N, M).relu()
OUTGOING = torch.randn(N, C)
BASE = torch.randn(M, C)
TARGETS = {
    "cross_entropy": torch.randint(C, (M,)),
    "mse": torch.randn(M, C),
    "bce_with_logits": torch.rand(M, C),
}


@pytest.mark.parametrize("how", ["fused kernel", "torch eager"])
@pytest.mark.parametrize("kind", TARGETS)
def test_candidate_loss(benchmark: BenchmarkFixture, kind: str, how: str) -> None:
    targets = TARGETS[kind]
    target = Criterion(kind).target(targets, (M, C))
    outgoing, base = OUTGOING.double(), BASE.T.double().contiguous()

    def fused() -> torch.Tensor:
        return (
            ops.candidate_loss(FEATURES, outgoing, base, target, dtype=torch.float32) / target.mass
        )

    chunk = best_chunk(kind, FEATURES, OUTGOING, BASE, targets)

    def plain() -> torch.Tensor:
        return eager(kind, FEATURES, OUTGOING, BASE, targets, chunk)

    torch.testing.assert_close(fused(), plain().double(), rtol=1e-5, atol=0)
    benchmark.group = f"{kind}, m={M} N={N} C={C}"
    benchmark.extra_info["chunk"] = chunk
    benchmark.pedantic(fused if how == "fused kernel" else plain, rounds=5, warmup_rounds=1)
