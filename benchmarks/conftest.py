"""Settings of the benchmarks: the option --quick, the cases, and additions to the JSON results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))  # for reading MNIST and training

from harness import Bench, Notes, machine  # noqa: E402
from limits import Limits, measure  # noqa: E402

NOTES = pytest.StashKey[Notes]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="every benchmark once, at sizes that say nothing"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = Notes(quick=bool(config.getoption("--quick")))
    config.addinivalue_line(
        "markers", "cases(full, quick): what to measure; each case names its `hows`, ways to do it"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs all ways to compute one case in succession, so that their ratios are comparable."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    cases = marker.kwargs["quick" if metafunc.config.getoption("--quick") else "full"]
    both = [pytest.param(case, how, id=f"{case}, {how}") for case in cases for how in case.hows]
    metafunc.parametrize(("case", "how"), both)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, case: Any, how: str
) -> Iterable[Bench]:
    threads = torch.get_num_threads()
    yield Bench(benchmark, request.config.stash[NOTES], case, how)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> Limits:
    notes = request.config.stash[NOTES]
    if notes.limits is None:
        notes.limits = measure(notes.quick)
    return notes.limits


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: object, output_json: dict[str, Any]
) -> None:
    output_json["greedyprune"] = config.stash[NOTES].as_dict() | {"machine": machine()}
