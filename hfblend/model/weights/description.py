"""Values and code as text that is the same in every process, for keys of chunk KV.

Modules of equal weights may compute otherwise: other classes, settings, functions, configs, hooks.
"""

from __future__ import annotations

import dis
import functools
import json
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .digests import digest

PLAIN = (bool, int, float, str, type(None))
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
OURS = ("hfblend.",)
WRAPPERS = (*OURS, "accelerate.", "torch.", "transformers.")  # they run the module's own code

_LIBRARIES = (*WRAPPERS, "peft.", "kernels.")  # their functions are told by name
_CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
                 "architectures", "_attn_implementation", "attn_implementation", "output_attentions",
                 "output_hidden_states", "return_dict")  # fmt: skip
_AS_REPR = (torch.dtype, torch.device, types.EllipsisType, slice, complex, bytes)
_DEPTH = 4  # objects in objects
_HERE = uuid.uuid4().hex  # stands for values that have no text


def config_text(config: Any) -> str:
    """The settings of a config that K/V may depend on, in JSON."""
    values = {name: value for name, value in config.to_dict().items() if name not in _CONFIG_NOISE}
    return json.dumps(values, sort_keys=True, default=str)


def class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_of(function: Any, packages: tuple[str, ...]) -> bool:
    """Whether code of one of these packages stands there: hfblend's, say, while a pass of another thread runs."""
    return _home(function).startswith(packages)


def is_foreign(function: Any) -> bool:
    """Whether it belongs to none of the libraries whose functions are told by name."""
    return not is_of(function, _LIBRARIES)


def code_of_class(kind: Any) -> Iterator[str]:
    """The functions of a class that no library has, and a `forward` that was put into a library's class."""
    if _has_other_forward(kind):
        yield f"{class_name(kind)}: {code(kind.forward)}"
    for base in kind.__mro__:
        if not base.__module__.startswith((*_LIBRARIES, "builtins", "typing")):
            for name, value in sorted(vars(base).items()):
                if isinstance(value, (*PLAIN, types.FunctionType)) and not name.startswith("__"):
                    yield f"{class_name(base)}.{name}: {text(value)}"


def _has_other_forward(kind: Any) -> bool:
    """Whether a class has another `forward` than it was written with."""
    names = {f"{one.__qualname__}.forward" for one in kind.__mro__} | {"_forward_unimplemented"}
    homes = (*WRAPPERS, *(one.__module__ for one in kind.__mro__))
    return getattr(kind.forward, "__qualname__", "") not in names or not is_of(kind.forward, homes)


def code(function: Any, depth: int = 0) -> str:
    """A function as text: its home, instructions, constants, defaults and captured values."""
    if isinstance(function, functools.partial):
        return f"partial {text([function.func, function.args, function.keywords], depth)}"
    owner = getattr(function, "__self__", None)
    bound = "" if owner is None or isinstance(owner, types.ModuleType) else f" of {text(owner, depth)}"
    function = getattr(function, "__func__", function)
    name = f"{_home(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}{bound}"
    if not isinstance(function, types.FunctionType):
        return name if isinstance(function, (types.BuiltinFunctionType, type)) else f"{name} {_object(function, depth)}"
    cells = [_content(cell) for cell in function.__closure__ or ()]
    values = [function.__defaults__, function.__kwdefaults__, cells, _globals(function)]
    return f"{name} {_instructions(function.__code__)} {text(values, depth)}"


def _instructions(of: types.CodeType) -> str:
    constants = [
        _instructions(one) if isinstance(one, types.CodeType) else one if isinstance(one, str) else text(one)
        for one in of.co_consts
    ]
    return str((of.co_code.hex(), of.co_names, constants))


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The numbers, tensors and functions of its module that foreign code reads and does not write."""
    if not is_foreign(function):
        return {}
    written = {one.argval for one in dis.get_instructions(function.__code__) if one.opname == "STORE_GLOBAL"}
    read = {name: function.__globals__.get(name) for name in function.__code__.co_names if name not in written}
    return {name: v for name, v in read.items() if v is not None and isinstance(v, (*PLAIN, *FUNCTIONS, torch.Tensor))}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def text(value: Any, depth: int = 0, strict: bool = True) -> str:
    """A value as text.

    Args:
        strict: a value that has no text is another one in every process; else its class stands for it.
    """
    then: Callable[[Any], str] = functools.partial(text, depth=depth + 1, strict=strict)
    if isinstance(value, PLAIN):
        return repr(value)
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {value.dtype} {_numbers(value)}" if strict else "tensor"  # it is a weight
    if depth > 2 * _DEPTH:
        return f"{class_name(type(value))} {_HERE if strict else ''}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(then, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(then, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{key}: {then(member)}' for key, member in value.items()))}}}"
    return _named(value, depth, strict)


def _named(value: Any, depth: int, strict: bool) -> str:
    if isinstance(value, type):
        return class_name(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, _AS_REPR):
        return repr(value)
    if isinstance(value, FUNCTIONS):
        return code(value, depth + 1)
    if isinstance(value, PreTrainedConfig):
        return config_text(value)
    return class_name(type(value)) if isinstance(value, nn.Module) or not strict else _object(value, depth)


def _object(value: Any, depth: int) -> str:
    members = getattr(value, "__dict__", None)
    if members is None or depth > _DEPTH:
        return f"{class_name(type(value))} {_HERE} {id(value)}"
    called = getattr(type(value), "__call__", None)  # noqa: B004
    return f"{class_name(type(value))} {text([called, members], depth + 1)}"


def _numbers(tensor: torch.Tensor) -> str:
    try:
        return digest(tensor).hex()
    except (NotImplementedError, RuntimeError):  # on meta, or of a subclass
        return f"{_HERE} {id(tensor)}"


def _home(function: Any) -> str:
    """The module in which a function was written; its `__module__` may be set to another."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
