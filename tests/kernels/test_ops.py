"""The arguments that `ops` refuses, and the structs that tensors reach the kernels in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_problems import Problem, moments_of

from greedyprune.kernels import least_squares, ops, products
from greedyprune.kernels.backend import extension
from greedyprune.kernels.path import Rule
from greedyprune.kernels.structs import Structs


def loss_with(**changes: Callable[[Problem], object]) -> Callable[[Problem], object]:
    """candidate_loss on a problem with changed arguments."""

    def call(p: Problem) -> object:
        names = ("features", "outgoing", "outputs", "target")
        arguments = {name: getattr(p, name) for name in names}
        return ops.candidate_loss(**arguments | {n: change(p) for n, change in changes.items()})

    return call


def bad_gram(p: Problem, backend: str = "cpu") -> object:
    return ops.greedy_gram(torch.ones(3, 3), moments_of(p)[1], Rule(1, 1, True), backend=backend)


def bad_bias(p: Problem) -> object:
    return ops.greedy_pointwise(p.features, p.outgoing, p.bias[:1], p.target, Rule(1, 1, True))


BAD: list[tuple[str, Callable[[Problem], object], type[Exception]]] = [
    ("features", loss_with(features=lambda p: p.features.half()), TypeError),
    ("features", loss_with(features=lambda p: p.features.T), ValueError),
    ("outgoing", loss_with(outgoing=lambda p: p.outgoing[1:]), ValueError),
    ("outputs", loss_with(outputs=lambda p: p.outputs.T), ValueError),
    ("target", loss_with(target=lambda p: p.target[:5]), ValueError),
    ("units", loss_with(units=lambda p: torch.tensor([9])), ValueError),
    ("units", loss_with(units=lambda p: torch.tensor([0.5])), TypeError),
    ("gradient", lambda p: ops.candidate_slope(p.features, p.outgoing, p.outputs[:1]), ValueError),
    ("gram", bad_gram, ValueError),
    ("backend", partial(bad_gram, backend="gpu"), ValueError),
    ("bias", bad_bias, ValueError),
]


@pytest.mark.parametrize(("name", "call", "error"), BAD)
def test_bad_tensors(name: str, call: Callable[[Problem], object], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: found .* expected"):
        call(Problem(6, 30, 2, "mse"))


def test_a_struct_is_made_with_all_its_fields_or_not_at_all() -> None:
    """A field that csrc/kernels.h gains is missed at once, and so is one that it loses."""
    rule = {"steps": 3, "size": 2, "replacement": True, "candidates": 0, "draws": None}
    with pytest.raises(TypeError, match=r"^Rule: .*: shortlist$"):
        Structs().make(extension().Rule, **rule)
    with pytest.raises(TypeError, match=r"^Rule: .*: unknown$"):
        Structs().make(extension().Rule, **rule, shortlist=0, unknown=1)
    made = Structs().make(extension().Rule, **rule, shortlist=5)
    assert (made.steps, made.size, made.replacement, made.shortlist) == (3, 2, True, 5)
    assert made.draws == 0


def test_structs_keep_their_tensors_alive() -> None:
    structs, seen = Structs(), []
    for _ in range(3):  # memory that was freed would be used again
        draws = torch.rand(1, 1000, dtype=torch.float64)
        rule = structs.make(
            extension().Rule, steps=1, size=1, replacement=True, candidates=1000, draws=draws,
            shortlist=0,
        )  # fmt: skip
        seen.append(rule.draws)
        del draws
    assert len(set(seen)) == 3


def test_an_empty_tensor_is_not_null() -> None:
    """torch gives it the address 0, which would mean that there is none."""
    empty = torch.empty(0, dtype=torch.float64)
    path = Structs().make(
        extension().Path, order=empty, losses=empty, gap=empty, length=0, scored=0, rescored=0
    )
    assert empty.data_ptr() == 0
    assert path.gap != 0


def test_constants_that_are_in_c_and_in_python() -> None:
    assert extension().product_tile == products.PRODUCT
    assert extension().dependent == least_squares.DEPENDENT
