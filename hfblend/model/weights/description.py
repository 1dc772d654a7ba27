"""What a model is apart from its weights, in words that are the same in every process: keys of chunk KV contain them.

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
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compiled import as_written
from . import adapters
from .contents import digest

PLAIN = (bool, int, float, str, type(None))
OURS = ("hfblend.",)
WRAPPERS = (*OURS, "accelerate.", "torch.", "transformers.")  # they run the module's own code
ATTENTION = "_attn_implementation_internal"  # of a config; a pass puts "hfblend_" before it while it runs

_LIBRARIES = (*WRAPPERS, "peft.", "kernels.")  # what is theirs is told by its name
CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
                 "architectures", "_attn_implementation", "attn_implementation", "output_attentions",
                 "output_hidden_states", "return_dict")  # fmt: skip
# Of modules: what forwards change themselves, what matters in training only, and what others note about the model.
_NOISE = ("training", "forward", "name_or_path", "gradient_checkpointing", "loss_type", "kernel_config", "rope_deltas",
          "attention_dropout", "hf_device_map", "_is_hf_initialized", "_old_forward", "_hf_hook", "meta",
          "all_tied_weights_keys", "_tp_size", "_device_mesh", "_use_kernels", "_weight_conversions",
          "_hf_tp_plan", "_hf_device_mesh", "_is_hooked", "peft_config")  # fmt: skip
_BOOKKEEPING = frozenset((*vars(nn.Module()), *dir(PreTrainedModel)))
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_SETTINGS = (*PLAIN, *_FUNCTIONS, torch.dtype, torch.Tensor, list, tuple, dict, set)
_DEPTH = 4  # objects in objects
_HERE = uuid.uuid4().hex  # stands for what cannot be told


def described(model: nn.Module) -> list[Any]:
    """The model's modules with their classes and settings, the code that is not of a library, its configs."""
    parts = list(_own_modules(model))
    kinds: set[Any] = {type(module) for _, module in parts}
    return [
        [(path, _name(type(module)), *_told(module)) for path, module in parts],
        sorted({text for kind in kinds for text in _code_of_class(kind)}),
        _configs(parts, model),
        sorted({text for config in configs_of(model) for text in _attention(config)}),
    ]


def hooks_described(hooks: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The hooks of modules, by their paths."""
    return [(adapters.plain_name(path), code(hook)) for path, hook in hooks]


def settings_of(module: nn.Module) -> list[str]:
    """The attributes that say how it computes, and those of its class that an attribute may come to hide."""
    own = [name for name, value in vars(module).items() if isinstance(value, _SETTINGS) and not is_noise(name)]
    return [*own, *(name for name in _members_of(type(module)) if name not in own)]  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _members_of(kind: type) -> tuple[str, ...]:
    """The names in a module's class, PyTorch's and Transformers' own left out."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins", "typing"))]
    return tuple(sorted({name for base in bases for name in vars(base) if name[:2] != "__" and not is_noise(name)}))


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module holds as plain attributes, or in a list or dict."""
    for name, value in vars(module).items():
        if not is_noise(name) and isinstance(value, (torch.Tensor, list, tuple, dict)):
            for key, tensor in _inside(name, value):
                if torch.is_tensor(tensor):
                    yield key, tensor


def is_noise(name: str) -> bool:
    return name in _NOISE or name in _BOOKKEEPING or name.endswith(("_cached", "_cache", "long_inv_freq"))


def configs_of(model: nn.Module) -> list[Any]:
    """Every config that a module holds, once."""
    held = (value for module in model.modules() for value in vars(module).values())
    return list({id(value): value for value in held if isinstance(value, PreTrainedConfig)}.values())


def config_text(config: Any) -> str:
    """The settings of a config that K/V may depend on, in JSON."""
    values = {k: v for k, v in config.to_dict().items() if k not in CONFIG_NOISE}
    return json.dumps(values, sort_keys=True, default=str)


def attention_of(config: dict[str, Any]) -> list[Any]:
    """The functions that a config's attention implementation stands for, of attention and of its mask."""
    name = str(config.get(ATTENTION)).removeprefix("hfblend_")
    return [all_of.get(name) for all_of in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]


def is_of(function: Any, packages: tuple[str, ...]) -> bool:
    """Whether code of one of these packages stands there: hfblend's, say, while a pass of another thread runs."""
    return _home(function).startswith(packages)


def is_foreign(function: Any) -> bool:
    """Whether it is of none of the libraries whose functions are told by their names."""
    return not is_of(function, _LIBRARIES)


# --- modules ----------------------------------------------------------------------------------------------------------


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules as they are without adapters, by their paths."""
    named = list(model.named_modules())
    brought = tuple(f"{path}.{name}" for path, m in named if adapters.is_part_of_peft(m) for name in _brought(m))
    for path, module in named:
        if not adapters.is_part_of_peft(module) and not f"{path}.".startswith(brought):
            yield adapters.plain_name(path), module


def _brought(module: nn.Module) -> list[str]:
    return [f"{name}." for name in module._modules if name not in ("base_layer", "original_module")]


def _told(module: nn.Module) -> list[tuple[str, str]]:
    own = vars(module)
    told = {name: own[name] for name in settings_of(module) if name in own and not torch.is_tensor(own[name])}
    forward = own.get("_old_forward", own.get("forward"))
    if forward is not None and not is_of(as_written(forward), WRAPPERS):
        told["forward"] = as_written(forward)
    return sorted((name, _text(value, strict=False)) for name, value in told.items() if not _is_theirs(value))


def _is_theirs(value: Any) -> bool:
    """Whether accelerate, peft or we have put a function there, which runs the model's own."""
    return isinstance(value, _FUNCTIONS) and is_of(value, (*OURS, "accelerate.", "peft."))


def _code_of_class(kind: Any) -> Iterator[str]:
    """The functions of a class that is not a library's, and a `forward` that was put into one of a library."""
    if _has_other_forward(kind):
        yield f"{_name(kind)}: {code(kind.forward)}"
    for base in kind.__mro__:
        if not base.__module__.startswith((*_LIBRARIES, "builtins", "typing")):
            for name, value in sorted(vars(base).items()):
                if isinstance(value, (*PLAIN, types.FunctionType)) and not name.startswith("__"):
                    yield f"{_name(base)}.{name}: {_text(value)}"


def _has_other_forward(kind: Any) -> bool:
    """Whether a class has another `forward` than it was written with."""
    names = {f"{one.__qualname__}.forward" for one in kind.__mro__} | {"_forward_unimplemented"}
    homes = (*WRAPPERS, *(one.__module__ for one in kind.__mro__))
    return getattr(kind.forward, "__qualname__", "") not in names or not is_of(kind.forward, homes)


def _configs(parts: list[tuple[str, nn.Module]], model: nn.Module) -> list[tuple[str, str, str]]:
    """The configs of modules that say something else than the model's."""
    texts = {id(config): config_text(config) for config in configs_of(model)}
    main = config_text(model.config)
    held = ((path, name, value) for path, module in parts for name, value in vars(module).items())
    found = [(path, name, texts[id(value)]) for path, name, value in held if id(value) in texts]
    return [one for one in found if one[2] != main]


def _attention(config: Any) -> list[str]:
    """Foreign functions of attention. Transformers' own differ by rounding."""
    functions = [one for one in attention_of(vars(config)) if one is not None and is_foreign(one)]
    return [f"{getattr(config, ATTENTION, None)}".removeprefix("hfblend_"), *map(code, functions)] if functions else []


# --- code and values --------------------------------------------------------------------------------------------------


def code(function: Any, depth: int = 0) -> str:
    """A function in words: where it is from, what it does, with which constants, defaults and captured values."""
    if isinstance(function, functools.partial):
        return f"partial {_text([function.func, function.args, function.keywords], depth)}"
    owner = getattr(function, "__self__", None)
    bound = "" if owner is None or isinstance(owner, types.ModuleType) else f" of {_text(owner, depth)}"
    function = getattr(function, "__func__", function)
    name = f"{_home(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}{bound}"
    if not isinstance(function, types.FunctionType):
        return name if isinstance(function, (types.BuiltinFunctionType, type)) else f"{name} {_object(function, depth)}"
    cells = [_content(cell) for cell in function.__closure__ or ()]
    values = [function.__defaults__, function.__kwdefaults__, cells, _globals(function)]
    return f"{name} {_instructions(function.__code__)} {_text(values, depth)}"


def _instructions(of: types.CodeType) -> str:
    constants = [
        _instructions(one) if isinstance(one, types.CodeType) else _text(one) if not isinstance(one, str) else one
        for one in of.co_consts
    ]
    return str((of.co_code.hex(), of.co_names, constants))


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The numbers, tensors and functions of its module that foreign code reads and does not write."""
    if not is_foreign(function):
        return {}
    written = {one.argval for one in dis.get_instructions(function.__code__) if one.opname == "STORE_GLOBAL"}
    read = {name: function.__globals__.get(name) for name in function.__code__.co_names if name not in written}
    return {name: v for name, v in read.items() if v is not None and isinstance(v, (*PLAIN, *_FUNCTIONS, torch.Tensor))}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _text(value: Any, depth: int = 0, strict: bool = True) -> str:
    """A value in words.

    Args:
        strict: what cannot be told is another thing in every process; else its class stands for it.
    """
    then: Callable[..., str] = functools.partial(_text, depth=depth + 1, strict=strict)
    if isinstance(value, PLAIN):
        return repr(value)
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {value.dtype} {_numbers(value)}" if strict else "tensor"  # it is a weight
    if depth > 2 * _DEPTH:
        return f"{_name(type(value))} {_HERE if strict else ''}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(then, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(then, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{key}: {then(member)}' for key, member in value.items()))}}}"
    return _named(value, depth, strict)


def _named(value: Any, depth: int, strict: bool) -> str:
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, (torch.dtype, torch.device, types.ModuleType, types.EllipsisType, slice, complex, bytes)):
        return repr(value) if not isinstance(value, types.ModuleType) else value.__name__
    if isinstance(value, _FUNCTIONS):
        return code(value, depth + 1)
    if isinstance(value, PreTrainedConfig):
        return config_text(value)
    if isinstance(value, nn.Module) or not strict:
        return _name(type(value))
    return _object(value, depth)


def _object(value: Any, depth: int) -> str:
    members = getattr(value, "__dict__", None)
    if members is None or depth > _DEPTH:
        return f"{_name(type(value))} {_HERE} {id(value)}"
    called = getattr(type(value), "__call__", None)  # noqa: B004
    return f"{_name(type(value))} {_text([called, members], depth + 1)}"


def _numbers(tensor: torch.Tensor) -> str:
    try:
        return digest(tensor).hex()
    except (NotImplementedError, RuntimeError):  # on meta, or of a subclass
        return f"{_HERE} {id(tensor)}"


def _inside(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple, dict)) and depth < _DEPTH:
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in members:
            yield from _inside(f"{name}.{key}", member, depth + 1)
    else:
        yield name, value


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _home(function: Any) -> str:
    """The module in which a function was written, whatever it says of itself."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
