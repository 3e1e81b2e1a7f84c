"""`copied`: a copy of a model that runs its own tensors, whatever functions its modules hold.

copy.deepcopy keeps a function as it is. A function that a module holds, such as a closure in the
place of its forward or a hook, then still runs the modules of the original. So `copied` makes these
functions anew, with the copy's modules in the place of the original's.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CACHED = type(functools.lru_cache(len))  # of what functools.lru_cache and functools.cache return

_WEAK = (weakref.ref, weakref.WeakMethod)


def copied(model: nn.Module, checked: bool = False) -> nn.Module:
    """A copy of the model that shares no parameter and no buffer with it, and runs its own modules.

    It is copy.deepcopy's, except:

    - Functions that the modules hold (as an attribute such as `forward`, in lists and dicts, as
      hooks) are made anew if their closures, defaults or globals hold modules or tensors of the
      model. So are functions in functools.partial and functools.lru_cache, and a weakref.ref. The
      new functions keep the values that other globals have now.
    - What torch.compile made of such a function is dropped: the copy runs the function that was
      compiled. Compile the pruned model again.
    - Tensors that are not leaves of autograd, such as activations that a forward has kept, are
      copied without their history. Inference tensors become ordinary ones.

    checked: `check_functions` has been called for this model

    Raises:
        ValueError: an attribute can't be copied; or see `check_functions`
    """
    if not checked:
        check_functions(model)
    memo: dict[int, Any] = {}
    try:
        with torch.inference_mode(False), _Detaching():
            new = copy.deepcopy(model, memo)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: it can't be copied ({reason}), expected attributes that copy.deepcopy takes"
        ) from error
    _Rebinding(memo).renew(new)
    return new


def _is_compressed(tensor: Tensor) -> bool:
    """Is it a sparse tensor of a layout that copy.deepcopy does not take, as CSR?"""
    return tensor.layout not in (torch.strided, torch.sparse_coo)


def check_functions(model: nn.Module) -> None:
    """ValueError if a function in the place of a forward holds tensors from outside the model.

    A copy of the model cannot have a copy of these. Hooks may hold other modules, such as a teacher
    in distillation: the copy's hooks then use the same ones.
    """
    own = {id(part) for part in _reached(model, lambda part: isinstance(part, types.FunctionType))}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _HOOKS:
                continue
            for part in _reached(value, lambda part: id(part) in own and _tensors_in(part)):
                if any(id(tensor) not in own for tensor in _tensors_in(part)):
                    place = f"{name}.{key}" if name else key
                    raise ValueError(
                        f"model: {place!r} is a function that holds another "
                        f"{type(part).__name__}, which is not a part of the model; expected a "
                        "method, or a function of the model's own modules"
                    )


def _tensors_in(value: object) -> list[Tensor]:
    """A parameter, or all parameters and buffers of a module; empty for other values."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    return [value] if isinstance(value, nn.Parameter) else []


class _Detaching(TorchFunctionMode):
    """Lets copy.deepcopy copy tensors that are not leaves, without their history, and CSR."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and (not args[0].is_leaf or _is_compressed(args[0])):
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


class _Rebinding:
    """Makes the functions that hold parts of the original anew, with the parts of the copy.

    memo: copy.deepcopy's: from the identity of an original to its copy
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self._new = memo
        self._copies = {id(new) for new in memo.values()}
        self._todo: list[Any] = []  # copies whose entries are still to be replaced

    def renew(self, copy: Any) -> None:
        """Replaces functions in a copy and all that it holds, in place."""
        renewed = set[int]()
        self._todo.append(copy)
        while self._todo:
            holder = self._todo.pop()
            if id(holder) in renewed:
                continue
            renewed.add(id(holder))
            entries = holder if isinstance(holder, (dict, list)) else vars(holder)
            items = entries.items() if isinstance(entries, dict) else enumerate(entries)
            for key, value in list(items):
                new = self._mapped(value)
                if isinstance(holder, nn.Module) and _is_class_method(holder, key, new):
                    del entries[key]
                elif new is not value:
                    entries[key] = new

    def _mapped(self, value: Any) -> Any:
        """What takes the place of a value in the copy: itself, if it holds nothing of the original.

        A value that does is in the memo, or a function or collection of which a new one is made.
        """
        if self._is_renewed(value):
            self._todo.append(value)
            return value
        if not self._holds_original(value):
            return value
        if id(value) in self._new:
            return self._new[id(value)]
        if isinstance(value, types.FunctionType):
            plain = _not_compiled(value)
            return self._function(value) if plain is value else self._mapped(plain)
        return self._remember(value, self._made_anew(value))

    def _is_renewed(self, value: Any) -> bool:
        """Is this a copy whose entries `renew` replaces?"""
        return id(value) in self._copies and _is_changeable(value)

    def _holds_original(self, value: Any) -> bool:
        return any(id(part) in self._new for part in _reached(value, self._is_renewed))

    def _remember(self, value: Any, new: Any) -> Any:
        self._new[id(value)] = new
        self._new[id(self._new)].append(value)  # which keeps its identity valid
        return new

    def _made_anew(self, value: Any) -> Any:
        def each(parts: Iterable[Any]) -> list[Any]:
            return [self._mapped(part) for part in parts]

        def entries(parts: dict[str, Any]) -> dict[str, Any]:
            return {name: self._mapped(part) for name, part in parts.items()}

        new: Any
        if isinstance(value, types.MethodType):
            return types.MethodType(self._mapped(value.__func__), self._mapped(value.__self__))
        if isinstance(value, functools.partial):
            function, keywords = self._mapped(value.func), entries(value.keywords)
            new = type(value)(function, *each(value.args), **keywords)
            vars(new).update(entries(vars(value)))
            return new
        if isinstance(value, _CACHED):
            return functools.lru_cache(**value.cache_parameters())(self._mapped(value.__wrapped__))
        if type(value) in _WEAK:
            return type(value)(self._mapped(value()))
        if isinstance(value, dict):
            new = copy.copy(value)
            new.clear()
            new.update(zip(each(value), each(value.values()), strict=True))
            return new
        if isinstance(value, (list, tuple, set, frozenset)):
            parts = each(value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        new = copy.deepcopy(value, self._new)  # a module outside the model that holds its modules
        self._copies |= {id(part) for part in self._new.values()}
        self._todo.append(new)
        return new

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function with the copy's parts in its closure, defaults, attributes and globals."""
        cells = []
        for cell in function.__closure__ or ():
            new_cell = self._new.get(id(cell))
            if new_cell is None and self._holds_original(cell):
                new_cell = self._remember(cell, types.CellType())
            cells.append(new_cell or cell)
        read = {
            name: value for name, value in _globals_of(function).items()
            if self._holds_original(value)
        }  # fmt: skip
        names = dict(function.__globals__) if read else function.__globals__
        new = types.FunctionType(
            function.__code__, names, function.__name__, None, tuple(cells) or None
        )
        self._remember(function, new)  # before its parts, which may hold the function
        functools.update_wrapper(new, function, updated=())
        del new.__wrapped__  # type: ignore[attr-defined]
        vars(new).update({name: self._mapped(part) for name, part in vars(function).items()})
        new.__defaults__ = self._mapped(function.__defaults__)
        new.__kwdefaults__ = self._mapped(function.__kwdefaults__)
        for cell, new_cell in zip(function.__closure__ or (), cells, strict=True):
            if new_cell is not cell:
                new_cell.cell_contents = self._mapped(cell.cell_contents)
        if read:
            names.update({name: self._mapped(value) for name, value in read.items()})
        return new


def _reached(value: Any, stop: Callable[[Any], object] = lambda part: False) -> Iterator[Any]:
    """The value and its parts, the parts of these, and so on; but not the parts of a `stop` one."""
    seen, todo = set[int](), [value]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if not stop(value):
            todo += _parts_of(value)


def _parts_of(value: Any) -> list[Any]:
    """What a function, a collection or a module holds; empty for other objects."""
    if isinstance(value, types.FunctionType):
        held = [value.__defaults__, value.__kwdefaults__, *vars(value).values()]
        return [*held, *(value.__closure__ or ()), *_globals_of(value).values()]
    if isinstance(value, types.CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # it is empty
            return []
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if isinstance(value, _CACHED):
        return [value.__wrapped__]
    if type(value) in _WEAK:
        return [value()]
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return list(vars(value).values()) if isinstance(value, nn.Module) else []


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function reads; of functions among them only those of its own file."""
    names, codes = set[str](), [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names |= {
            step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"
        }
    values = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    return {
        name: value for name, value in values.items()
        if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__
    }  # fmt: skip


def _not_compiled(function: Any) -> Any:
    """The function that torch.compile was given; the function itself if it was not compiled."""
    while hasattr(function, "_torchdynamo_orig_callable") and not hasattr(
        function, "_torchdynamo_disable"
    ):
        function = function._torchdynamo_orig_callable
        if getattr(function, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
            function = function.__wrapped__
    return function


def _is_class_method(module: nn.Module, name: Any, value: object) -> bool:
    """Is this the method that the module's class has under this name?"""
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is module
        and value.__func__ is getattr(type(module), str(name), None)
    )


def _is_changeable(value: object) -> bool:
    """Can entries of this value be replaced in place?"""
    kinds = (Tensor, types.FunctionType, types.MethodType, functools.partial, tuple)
    return isinstance(value, (dict, list)) or (
        hasattr(value, "__dict__") and not isinstance(value, (*kinds, type, types.ModuleType))
    )
