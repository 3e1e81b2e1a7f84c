"""The package as a whole: docstrings, examples, builds without the extension."""

import doctest
import importlib
import inspect
import os
import pydoc
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from backends import INSTRUCTION_SETS
from torch import nn

import greedyprune
from greedyprune.data.losses import Criterion
from greedyprune.kernels import ops
from greedyprune.kernels.path import Rule

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )


def modules_with_examples() -> list[str]:
    """Every module of the package that has an example in a docstring."""
    files = sorted((ROOT / "greedyprune").rglob("*.py"))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files if ">>> " in file.read_text()
    ]  # fmt: skip


@pytest.mark.parametrize("module", modules_with_examples())
def test_docstring_examples(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if module.startswith("greedyprune.integrations."):
        pytest.importorskip(module.rpartition(".")[2], reason="not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "greedyprune": greedyprune}
    failed, tried = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert tried > 0
    assert not failed


def test_public_functions_have_examples() -> None:
    """Each function of the public interface shows how it is called."""
    functions = [getattr(greedyprune, name) for name in greedyprune.__all__]
    without = [
        function.__name__ for function in functions
        if inspect.isfunction(function) and ">>> " not in (function.__doc__ or "")
    ]  # fmt: skip
    assert without == []


def test_the_demo(tmp_path: Path) -> None:
    """The demo's table, small: greedy ahead of random and magnitude at the same size."""
    options = ["--units", "256", "--iterations", "400", "--tune", "50", "--steps", "30"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "digits_mlp.py", *options, "--out", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    accuracy = dict(re.findall(r"^ (\w+(?: \+ tuning)?) .*?([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(accuracy["greedy"]) > float(accuracy["random"]) + 10
    assert float(accuracy["greedy"]) > float(accuracy["magnitude"]) + 10
    assert (tmp_path / "digits_mlp.png").stat().st_size > 10_000


def test_without_the_extension_the_reference_works() -> None:
    code = """
import sys
sys.modules["greedyprune._C"] = None
import torch, greedyprune
model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
data = torch.randn(20, 3), torch.randn(20, 2)
print(len(greedyprune.select(model, data, steps=4).order))
greedyprune.show_config()
try:
    greedyprune.select(model, data, backend="cpu")
except ValueError as error:
    print(error)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "the compiled extension is missing" in done.stderr
    assert "pip install ." in done.stderr
    assert done.stdout.startswith("4\n")
    assert re.search("extension +missing", done.stdout)
    assert "backend: found 'cpu', but the compiled extension is missing" in done.stdout


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_isa_override(name: str) -> None:
    code = "import greedyprune; greedyprune.show_config()"
    assert f"(in use: {name})" in run(code, GREEDYPRUNE_ISA=name).stdout


def test_isa_override_of_what_is_not_there() -> None:
    done = run("import greedyprune", GREEDYPRUNE_ISA="mmx")
    assert done.returncode != 0
    assert "GREEDYPRUNE_ISA: found 'mmx', expected one of" in done.stderr


def test_kernels_release_the_interpreter() -> None:
    features, outgoing = torch.rand(2000, 3000), torch.rand(2000, 5).double()
    target = Criterion("cross_entropy").target(torch.randint(5, (3000,)), (3000, 5))
    bias = torch.zeros(5)
    worker = threading.Thread(
        target=ops.greedy_pointwise, args=(features, outgoing, bias, target, Rule(20, 2000, True))
    )
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20  # with the lock held it would be one or two


def test_progress_bars(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greedyprune.runtime.progress.BAR_DELAY", 1e-9)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    data = torch.randn(20, 3), torch.randn(20, 2)

    def slow(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return nn.functional.l1_loss(outputs, targets)

    for progress, shown in ((None, True), (False, False)):
        with pytest.warns(UserWarning, match="slow path"):
            greedyprune.select(model, data, steps=4, loss=slow, progress=progress)
        assert ("greedy steps" in capfd.readouterr().err) == shown


INTERRUPTED = """
import signal
import torch, greedyprune
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from torch import nn
from greedyprune.kernels import ops
model = nn.Sequential(nn.Linear(4, 4096), nn.ReLU(), nn.Linear(4096, 50))
inputs, targets = torch.randn(40000, 4), torch.randint(50, (40000,))
kernel = ops.greedy_pointwise
def announced(*arguments, **options):
    print("in the kernel", flush=True)
    return kernel(*arguments, **options)
ops.greedy_pointwise = announced
try:
    greedyprune.select(
        model, (inputs, targets), steps={steps}, progress=False, objective={objective}
    )
except KeyboardInterrupt:
    assert not model[2]._forward_pre_hooks and model.training
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    "objective", ["'loss'", "greedyprune.Loss(batch_size=30000)"], ids=["full", "mini-batches"]
)
def test_ctrl_c_stops_a_kernel_within_a_second(objective: str) -> None:
    code = INTERRUPTED.format(steps=300, objective=objective)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in the kernel\n"
    time.sleep(2)  # of the first step, which takes longer
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - start < 1
    process.wait(20)


def test_show_config_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    greedyprune.show_config()
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert greedyprune.__version__ in text


KEYWORDS = [
    "size", "steps", "tolerance", "round_to", "layers", "loss", "objective", "weights",
    "replacement", "mask", "seed", "backend", "memory_limit", "process_group", "checkpoint",
    "progress",
]  # fmt: skip


def test_sixteen_keywords() -> None:
    parameters = inspect.signature(greedyprune.select).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "data"]
    assert [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == KEYWORDS
    assert len(parameters) == 18


def test_refit_reads_the_data_as_select_does() -> None:
    """What says how data are read has the same name and default in both."""
    select, refit = (
        inspect.signature(f).parameters for f in (greedyprune.select, greedyprune.refit)
    )
    for name in ("mask", "memory_limit", "process_group", "progress"):
        assert (refit[name].default, refit[name].kind) == (select[name].default, select[name].kind)


def test_help_is_two_screens() -> None:
    text = pydoc.render_doc(greedyprune.select, renderer=pydoc.plaintext)
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines()[4:])) <= 104  # the docstring, which help indents
    for name in KEYWORDS:
        assert f"        {name}: " in text, name
