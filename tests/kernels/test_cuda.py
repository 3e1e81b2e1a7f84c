"""The CUDA half, beyond the tests that it shares with the CPU: 16-bit features, streams, layout.

Without a GPU, the emulated one (tests/emulated) runs most of them.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import ON_GPU, TOLERANCE, Kernels
from kernel_problems import CRITERIA, Problem, moments_of
from networks import NETWORKS, network, outputs_of
from torch import nn

import greedyprune
from greedyprune import Imitation
from greedyprune.kernels import ops, reference
from greedyprune.kernels.backend import has_cuda
from greedyprune.kernels.path import Exact, Rule
from greedyprune.kernels.path import Path as GreedyPath
from greedyprune.surgery.cut import masked

ROOT = Path(__file__).parents[2]
on_cuda = pytest.mark.parametrize("on", ["emulated", ON_GPU], indirect=True)
# Around a warp's and a block's tile of samples, with more than one piece of them, and with more
# classes than a chunk holds.
SHAPES = [(1, 1, 1), (7, 127, 3), (9, 1025, 10), (17, 2500, 4), (20, 1030, 600)]


@on_cuda
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if "weighted cross" not in name])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_features_of_16_bits(
    on: Kernels, criterion: str, shape: tuple[int, int, int], narrow: torch.dtype
) -> None:
    p = Problem(*shape, criterion)
    features = p.features.to(narrow)
    expected = reference.candidate_loss(features, p.outgoing, p.outputs, p.target, shrink=0.4)
    for dtype in (torch.float32, torch.float64):
        arguments = features, p.outgoing, p.outputs, p.target
        losses = on.candidate_loss(*arguments, shrink=0.4, dtype=dtype)
        assert losses.equal(on.candidate_loss(*arguments, shrink=0.4, dtype=dtype))  # the same bits
        tolerance = 2 * TOLERANCE[dtype]  # the hardware's exp is good to 2 units in the last place
        torch.testing.assert_close(
            losses / p.target.mass, expected / p.target.mass, rtol=tolerance, atol=tolerance
        )


@on_cuda
@pytest.mark.parametrize("aligned", [True, False])
def test_rows_that_are_aligned_and_rows_that_are_not(on: Kernels, aligned: bool) -> None:
    """Rows at multiples of 16 bytes are loaded by vectors, other rows number by number."""
    p = Problem(11, 264, 5, "cross_entropy")
    padded = torch.zeros(11, 272, dtype=torch.float64)
    padded[:, :264] = p.features
    samples = slice(0, 264) if aligned else slice(1, 264)
    outputs = p.outputs[:, samples].contiguous()
    arguments = padded[:, samples], p.outgoing, outputs, p.target[samples]
    losses = on.candidate_loss(*arguments)
    torch.testing.assert_close(losses, reference.candidate_loss(*arguments), rtol=1e-12, atol=0)


@on_cuda
def test_a_model_in_bfloat16(on: Kernels) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 4)).bfloat16().to(on.device)
    data = torch.randn(200, 6).bfloat16(), torch.randint(4, (200,))
    selection = greedyprune.select(model, data, steps=10, layers={"0": "2"}, backend="cuda")
    expected = greedyprune.select(  # from the same activations
        model, data, steps=10, layers={"0": "2"}, backend="reference"
    )
    assert selection.order.equal(expected.order)
    torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-9, atol=0)


@on_cuda
def test_a_callback_stops_and_raises(on: Kernels) -> None:
    p = Problem(40, 130, 3, "mse")
    gram, sums = moments_of(p)
    rule = Rule(100, 100, True)
    whole = on.greedy_gram(gram, sums, rule)
    path = on.greedy_gram(gram, sums, rule, step=lambda k, *_: k == 37)
    assert path.order.equal(whole.order[:37])
    assert path.losses.equal(whole.losses[:37])
    assert path.gap is not None and whole.gap is not None
    assert path.gap.equal(whole.gap[:37])

    def step(k: int, unit: int, loss: float) -> bool:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        on.greedy_pointwise(p.features, p.outgoing, p.bias, p.target, rule, step=step)


def test_exact_is_refused(emulated_cuda: None) -> None:
    p = Problem(4, 20, 2, "mse")
    target = p.target.value - p.bias[:, None]
    exact = Exact(1e-6, p.features, p.outgoing, target)
    with pytest.raises(ValueError, match=r"^exact: found .* expected None"):
        ops.greedy_gram(*moments_of(p), Rule(1, 1, True), exact=exact, backend="cuda")


def test_tensors_on_another_device_are_refused(emulated_cuda: None) -> None:
    p = Problem(4, 20, 2, "mse")
    with pytest.raises(ValueError, match=r"^bias: found a tensor on meta, expected cpu"):
        ops.greedy_pointwise(
            p.features, p.outgoing, p.bias.to("meta"), p.target, Rule(1, 1, True), backend="cuda"
        )


@pytest.mark.parametrize("criterion", ["cross_entropy", "weighted logistic"])
def test_the_threads_order_does_not_matter(
    emulated_cuda: None, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation runs threads and blocks backwards: a missing barrier would show."""
    p = Problem(700, 90, 3, criterion)
    gram, sums = moments_of(Problem(70, 90, 3, "mse"))

    def results() -> list[GreedyPath]:
        rule = Rule(3, 40, False, torch.full((3, 600), 0.7, dtype=torch.float64))
        arguments = p.features, p.outgoing, p.bias, p.target
        return [
            ops.greedy_pointwise(*arguments, Rule(3, 800, True), backend="cuda"),
            ops.greedy_pointwise(*arguments, rule, backend="cuda"),
            ops.greedy_gram(gram, sums, Rule(30, 80, False), backend="cuda"),
        ]

    forwards = results()
    monkeypatch.setenv("EMULATED_ORDER", "reverse")
    for one, other in zip(forwards, results(), strict=True):
        assert one.order.equal(other.order)
        assert one.losses.equal(other.losses)
        assert one.gap is not None and other.gap is not None
        assert one.gap.equal(other.gap)


@pytest.mark.parametrize(
    "samples", [1, 2, 31, 1023, 1024, 1025, 65535, 65536, 65537, 10**6, 10**9 + 7]
)
def test_pieces_cover_the_samples(emulated_extension: ModuleType, samples: int) -> None:
    count, size = emulated_extension.cuda_pieces_of(samples)
    assert 1 <= count <= 64
    assert size % 1024 == 0  # the samples that a block takes at a time, in either type
    assert (count - 1) * size < samples <= count * size
    assert emulated_extension.cuda_candidate_pieces(samples) == count


def test_no_more_blocks_than_work_or_room(emulated_extension: ModuleType) -> None:
    blocks = emulated_extension.cuda_blocks_of
    assert [blocks(n, 132, 2) for n in (0, 1, 263, 264, 265, 10**9)] == [0, 1, 263, 264, 264, 264]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_nothing_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    """No kernel keeps in memory values that should be in registers."""
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-DGREEDYPRUNE_ISA=device",
         "-Xptxas=-v", "-Werror", "all-warnings", "-cubin", "-o", tmp_path / "x.cubin", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    stacks = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert len(stacks) == report.count("Compiling entry function") > 0
    assert set(stacks) == {("0", "0", "0")}


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="no GPU, or built without CUDA")
def test_two_streams_at_once() -> None:
    """A path is launched into the current stream, and paths do not disturb each other."""
    problems = [Problem(300, 4000, 5, "cross_entropy", scale=scale) for scale in (0.5, 2.0)]
    rule, gpu = Rule(20, 400, True), torch.device("cuda")

    def path(p: Problem) -> GreedyPath:
        return ops.greedy_pointwise(
            p.features.float().to(gpu), p.outgoing.to(gpu), p.bias.to(gpu), p.target.to(gpu), rule,
            backend="cuda",
        )  # fmt: skip

    def in_a_stream(p: Problem) -> GreedyPath:
        with torch.cuda.stream(torch.cuda.Stream()):
            return path(p)

    alone = [path(p) for p in problems]
    with ThreadPoolExecutor(len(problems)) as threads:
        together = list(threads.map(in_a_stream, problems))
    for one, other in zip(alone, together, strict=True):
        assert one.order.equal(other.order)
        assert one.losses.equal(other.losses)


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="no GPU, or built without CUDA")
def test_the_cpu_picks_the_same() -> None:
    """Invariant 2 on a layer of real size, from a model on either device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 2000), nn.ReLU(), nn.Linear(2000, 10))
    data = torch.randn(3000, 50), torch.randint(10, (3000,))
    expected = greedyprune.select(model, data, steps=40, backend="cpu")
    mixed = greedyprune.select(model, data, steps=40, backend="cuda")
    on_gpu = greedyprune.select(model.to("cuda"), data, steps=40)
    for selection in (mixed, on_gpu):
        assert selection.order.device.type == "cpu"
        assert selection.order.equal(expected.order)
        torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-5, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="no GPU, or built without CUDA")
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_networks_on_a_gpu(name: str) -> None:
    """The model stays on the GPU throughout, and the cut model computes as the masked."""
    model, inputs = network(name)
    gpu = torch.device("cuda")
    model = model.to(gpu)
    if isinstance(inputs, dict):
        on_gpu = {name: tensor.to(gpu) for name, tensor in inputs.items()}
    else:
        on_gpu = inputs.to(gpu)
    data = inputs if isinstance(inputs, dict) else [inputs]  # `select` moves it to the GPU
    selection = greedyprune.select(model, data, objective=Imitation(metric="fisher"))
    small = greedyprune.prune(model, selection)
    expected = outputs_of(masked(model, selection), on_gpu)
    error = outputs_of(small, on_gpu) - expected
    assert float(error.abs().max()) <= 1e-4 * float(expected.abs().max())
    refitted = greedyprune.refit(model, selection, data)
    assert outputs_of(refitted, on_gpu).isfinite().all()
    for module in (small, refitted):
        assert {p.device.type for p in module.parameters()} == {"cuda"}
