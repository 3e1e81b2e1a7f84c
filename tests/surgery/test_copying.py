"""Copies run their own modules and tensors, whatever functions the model's modules hold."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.surgery.copying import copied

X, Y = torch.randn(64, 6), torch.randint(3, (64,))


class Block(nn.Module):
    """Half of x plus a hidden layer; ways to say so by other functions are below."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc2(functional.relu(self.fc1(x)))


class Half(Block):
    scale = 0.5


def half(block: Block, x: Tensor) -> Tensor:
    return x + 0.5 * block.fc2(functional.relu(block.fc1(x)))


def use_bound_method(block: Block) -> None:
    block.forward = types.MethodType(half, block)


def use_partial(block: Block) -> None:
    block.forward = functools.partial(half, block)


def use_closure(block: Block) -> None:
    old = block.forward
    block.forward = lambda x: 0.5 * (x + old(x))


def use_wrapped_closure(block: Block) -> None:
    old = block.forward

    @functools.wraps(old)
    def forward(x: Tensor) -> Tensor:
        return 0.5 * (x + old(x))

    block.forward = forward


def use_default(block: Block) -> None:
    block.forward = lambda x, inner=block: half(inner, x)


def use_keyword_default(block: Block) -> None:
    block.forward = lambda x, *, inner=block: half(inner, x)


def use_parameter(block: Block) -> None:
    weight = block.fc1.weight
    block.forward = lambda x: (
        x + 0.5 * block.fc2(functional.relu(functional.linear(x, weight, block.fc1.bias)))
    )


def use_closure_in_method(block: Block) -> None:
    inner = block
    block.forward = types.MethodType(lambda self, x: half(inner, x), block)


def use_functions_in_a_dict(block: Block) -> None:
    inner = block
    block.table = {"steps": [lambda x: half(inner, x)], "pair": (lambda x: half(inner, x), 1)}
    block.table["unused"] = lambda x: inner(x)
    block.forward = lambda x: block.table["steps" if x.dim() > 2 else "pair"][0](x)


def use_recursion(block: Block) -> None:
    def forward(x: Tensor, times: int = 1) -> Tensor:
        return forward(x, times - 1) if times else half(block, x)

    block.forward = forward


def use_cache(block: Block) -> None:
    block.layer = functools.lru_cache(lambda name: getattr(block, name))
    block.layer("fc1")
    block.forward = lambda x: x + 0.5 * block.layer("fc2")(functional.relu(block.layer("fc1")(x)))


def use_weak_reference(block: Block) -> None:
    reference = weakref.ref(block)
    block.forward = lambda x: half(reference(), x)


def use_compiled(block: Block) -> None:
    old = block.forward
    block.forward = torch.compile(lambda x: 0.5 * (x + old(x)), backend="eager")


def use_hook(block: Block) -> None:
    second = block.fc2
    second.register_forward_hook(lambda module, _, out: out * (0.5 if module is second else 3.0))


def use_pre_hook(block: Block) -> None:
    second = block.fc2
    second.register_forward_pre_hook(lambda m, args: (args[0] * (1.0 if m is second else 3.0),))
    block.forward = functools.partial(half, block)


def use_outer_module(block: Block) -> None:
    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return half(self.inner[0], x)

    outer = Outer()
    outer.inner = [block]
    block.forward = lambda x: outer(x)


WAYS = [value for name, value in list(globals().items()) if name.startswith("use_")]


def model_with(change: Callable[[Block], None] | None, kind: type[Block]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(6, 3)).eval()
    if change is not None:
        change(model[0])
    return model


def zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_a_copy_runs_its_own_tensors(change: Callable[[Block], None]) -> None:
    model = model_with(change, Block)
    expected = model_with(None, Half)(X)
    torch.testing.assert_close(model(X), expected)
    copy = copied(model)
    torch.testing.assert_close(copy(X), expected)
    zero(copy[0])
    torch.testing.assert_close(copy(X), copy[1](X))  # the block adds nothing
    torch.testing.assert_close(model(X), expected)
    again = copied(model)
    zero(model[0])
    torch.testing.assert_close(again(X), expected)


@pytest.mark.parametrize(
    "change", [way for way in WAYS if way is not use_parameter], ids=lambda way: way.__name__
)
def test_the_pruned_model_is_that_of_the_plain_model(change: Callable[[Block], None]) -> None:
    plain, model = model_with(None, Half), model_with(change, Block)
    options = {"size": 0.25, "layers": "0.fc1"}
    expected = greedyprune.select(plain, (X, Y), **options)
    selection = greedyprune.select(model, (X, Y), **options)
    assert selection.kept.equal(expected.kept)
    small = greedyprune.prune(model, selection)
    torch.testing.assert_close(small(X), greedyprune.prune(plain, expected)(X))
    assert small[0].fc1.weight.shape == (4, 6)
    small(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    refitted = greedyprune.refit(model, selection, (X, Y))
    torch.testing.assert_close(
        refitted(X), greedyprune.refit(plain, expected, (X, Y))(X), rtol=1e-3, atol=1e-4
    )
    zero(small[0])
    torch.testing.assert_close(small(X), small[1](X))


def test_a_function_may_read_globals() -> None:
    """As in a notebook, where the old forward is a global name."""
    names: dict[str, object] = {"torch": torch}
    model = model_with(None, Block)
    names["old"] = model[0].forward
    names["block"] = model[0]
    exec("def forward(x): return helper(x)", names)
    exec("def helper(x): return 0.5 * (x + old(x)) + 0 * block.fc1.weight.sum()", names)
    model[0].forward = names["forward"]
    copy = copied(model)
    zero(model[0])
    torch.testing.assert_close(copy(X), model_with(None, Half)(X))
    zero(copy[0])
    torch.testing.assert_close(copy(X), copy[1](X))
    assert names["old"].__self__ is model[0]  # the user's names stay


def test_a_function_of_nothing_in_the_model_stays_the_same() -> None:
    model, seen = model_with(None, Block), []
    model[0].register_forward_hook(lambda _, __, output: seen.append(output))
    model[0].activation = functional.relu
    model[0].fast = fast = torch.compile(functional.gelu, backend="eager")
    [hook] = model[0]._forward_hooks.values()
    copy = copied(model)
    assert [*copy[0]._forward_hooks.values()] == [hook]
    assert copy[0].activation is functional.relu
    assert copy[0].fast is fast
    copy(X)
    assert len(seen) == 1


def test_the_class_s_own_forward_is_not_compiled_in_the_copy() -> None:
    model = model_with(None, Block)
    model.forward = torch.compile(model.forward, backend="eager")
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    expected = model(X)
    copy = copied(model)
    assert "forward" not in vars(copy)
    assert "forward" not in vars(copy[0])
    assert hasattr(model[0].forward, "_torchdynamo_orig_callable")
    torch.testing.assert_close(copy(X), expected)


@pytest.mark.parametrize("wrap", [torch.compile, lambda m, backend: m.compile(backend=backend)])
def test_compiled_models_and_blocks(wrap: Callable[..., nn.Module | None]) -> None:
    plain = model_with(None, Block)
    expected = greedyprune.prune(plain, greedyprune.select(plain, (X, Y), size=4))(X)
    model = model_with(None, Block)
    compiled = wrap(model, backend="eager")
    compiled = model if compiled is None else compiled
    compiled(X)
    assert set(greedyprune.layers(compiled, X)) == {"0.fc1"}
    selection = greedyprune.select(compiled, (X, Y), size=4)
    assert set(selection.layers) == {"0.fc1"}
    small = greedyprune.prune(compiled, selection)
    assert type(small) is nn.Sequential
    torch.testing.assert_close(small(X), expected)
    torch.testing.assert_close(torch.compile(small, backend="eager")(X), expected)
    assert greedyprune.recalibrate(compiled, X) is compiled
    greedyprune.refit(compiled, selection, (X, Y))
    monitor = greedyprune.PretrainingMonitor(compiled, (X, Y), size=4, every=1, max_overhead=None)
    monitor.step()
    assert monitor.selection.kept.equal(selection.kept)
    inside = model_with(None, Block)
    wrapped = wrap(inside[0], backend="eager")
    inside[0] = inside[0] if wrapped is None else wrapped
    inside(X)
    selection = greedyprune.select(inside, (X, Y), size=4)
    torch.testing.assert_close(greedyprune.prune(inside, selection)(X), expected)


def test_another_module_in_a_forward_is_refused() -> None:
    model, other = model_with(None, Block), model_with(None, Block)
    old = other[0].forward
    model[0].forward = lambda x: old(x)
    message = r"model: '0.forward' is a function that holds another Block, which is not a part"
    for call in (
        lambda: greedyprune.select(model, (X, Y), layers={"0.fc1": "0.fc2"}),
        lambda: copied(model),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    weight = nn.Parameter(torch.ones(6))
    model[0].forward = lambda x: x * weight
    with pytest.raises(ValueError, match=r"'0\.forward' .* holds another Parameter"):
        copied(model)


def test_a_hook_may_hold_a_teacher() -> None:
    model, teacher, errors = model_with(None, Block), model_with(None, Half), []
    model.register_forward_hook(lambda _, args, output: errors.append(output - teacher(args[0])))
    selection = greedyprune.select(model, (X, Y), size=4)
    small = greedyprune.prune(model, selection)
    errors.clear()
    output = small(X)
    torch.testing.assert_close(errors[0], output - teacher(X))


def test_tensors_with_a_history_are_copied_without_it() -> None:
    model = model_with(None, Block)
    model.kept = model(X)
    model.losses = [model.kept, model.kept.mean()]
    copy = copied(model)
    assert copy.kept.equal(model.kept)
    assert copy.kept is copy.losses[0] is not model.kept
    assert not copy.kept.requires_grad
    assert model.kept.requires_grad


def test_what_cannot_be_copied_is_one_sentence() -> None:
    model = model_with(None, Block)
    model.stream = (i for i in range(3))
    with pytest.raises(ValueError, match=r"model: it can't be copied \(cannot pickle 'generator'"):
        copied(model)


def test_a_compiled_forward_is_selected_as_the_plain_one() -> None:
    """Compiled code may not call the hooks with which `select` reads a layer's values."""
    torch.compiler.reset()  # torch stops compiling a forward that other tests have compiled often
    plain = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )  # fmt: skip
    expected = greedyprune.select(plain, (X, Y), size=4)
    compiled_calls: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*args: object) -> object:
            compiled_calls.append(args)
            return graph(*args)

        return run

    model = copied(plain)
    model.forward = torch.compile(model.forward, backend=backend)
    model(X)
    compiled_calls.clear()
    for named in (None, {"0": "2"}):
        selection = greedyprune.select(model, (X, Y), size=4, layers=named)
        small = greedyprune.prune(model, selection)
        assert selection.layers["0"].kept.equal(expected.layers["0"].kept)
    assert greedyprune.refit(model, expected, (X, Y))(X).shape == (64, 3)
    assert small[0].out_features == 4
    assert not compiled_calls
    model(X)
    assert compiled_calls  # it is compiled as before
