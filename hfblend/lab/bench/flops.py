"""The operations and bytes that a method needs, counted: functions of numbers alone, without a model or a clock.

A multiply-add counts 2. Counted are the linear layers, attention over the keys that a row sees (causal: a row at
position p sees p + 1), and the LM head for one row; norms, rotations, softmax and look-ups are left out.

                    layer 0 … c − 1    layer c                  … L − 2     layer L − 1          LM head
    full prefill    all rows           all rows                 all rows    all rows             last row
    full reuse      suffix             suffix                   suffix      K, V; last row       last row
    CacheBlend      all rows           K, V of all; S rows      S rows      K, V of S; last row  last row
    suffix-guided   S rows             S rows                   S rows      K, V of S; last row  last row
                    and before it the suffix through all layers, for its attention weights

S rows are the selected ones and the suffix. Three choices make the counts those of the method, not of one
implementation of it, hfblend's included:

* At the check layer c CacheBlend needs the K and V of every row, to rank them, and nothing else of the rows that are
  not selected. Layers below c are paid once: their results stay.
* Tokens whose KV is exact (the prefix, a chunk where it was computed) are in no pass.
* In the last layer only the last row is read, so the others need their K and V only. A full prefill is counted as
  every stock model does it, with all rows: a speed-up is taken from its time.

Shapes: T all tokens, S rows of the last pass, C hidden, H heads, Hkv KV heads, D head_dim, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...blend.selection import budget


@dataclass(frozen=True)
class Shape:
    """The sizes and weights of a Llama-like model: grouped-query attention and a gated MLP in every layer.

    >>> Shape(32, 4096, 14336, 32, 8, 128, 128256).layer_weights  # Llama-3.1-8B
    218103808
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape | None:
        """The shape that a model's config tells; `None` if its layers hold other weights than a Llama's would.

        A mixture of experts, shared layers or a sliding window would be counted wrongly, so they are not counted.
        """
        config: Any = model.config
        try:
            heads, hidden = config.num_attention_heads, config.hidden_size
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            head_dim = getattr(config, "head_dim", None) or hidden // heads
            sizes = (config.num_hidden_layers, hidden, config.intermediate_size, heads, kv_heads, head_dim)
            shape = cls(*sizes, config.vocab_size)
        except AttributeError:
            return None
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        is_llama_like = sum(module.weight.numel() for module in linear) == shape.layers * shape.layer_weights
        return shape if is_llama_like and not getattr(config, "sliding_window", None) else None

    @property
    def kv_weights(self) -> int:  # of a layer's K and V projections
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def query_weights(self) -> int:  # of a layer's Q projection; O has as many
        return self.hidden * self.heads * self.head_dim

    @property
    def other_weights(self) -> int:  # of a layer's Q, O and gated MLP
        return 2 * self.query_weights + 3 * self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        return self.kv_weights + self.other_weights

    @property
    def head_weights(self) -> int:  # of the LM head
        return self.hidden * self.vocabulary


# --- operations -------------------------------------------------------------------------------------------------------


def full_prefill_flops(tokens: int, *, shape: Shape) -> float:
    """A full prefill as stock models do it: every row through every layer, one row through the LM head."""
    return shape.layers * _layer(shape, tokens, causal_keys(0, tokens)) + 2 * shape.head_weights


def flops(
    tokens: int,
    ratio: float,
    check_layer: int | None,
    suffix: int,
    *,
    shape: Shape,
    exact: int = 0,
    scored: bool = True,
) -> float:
    """The operations that a method needs to blend a prompt whose chunks are all stored.

    >>> shape = Shape(32, 4096, 14336, 32, 8, 128, 128256)
    >>> round(full_prefill_flops(16448, shape=shape) / flops(16448, 0.15, 1, 32, shape=shape, exact=544), 1)
    5.8

    Args:
        tokens: T, of the whole prompt.
        ratio: of the reused tokens, in [0, 1]. 0 is full reuse; 1 computes every row and scores none.
        check_layer: of CacheBlend's rule; `None`: the suffix's attention, over all layers, guides the selection.
        suffix: tokens after the last chunk, always computed; a prefix cache has all after the prefix as its suffix.
        exact: tokens whose KV is exact: the prefix, and a first chunk computed after it.
        scored: `False` for rules that look at positions only.

    Raises:
        ValueError: tokens, ratio or layer out of range.
    """
    if not 0 <= exact <= tokens - suffix or suffix < 1:
        raise ValueError(f"{tokens} tokens cannot hold {exact} exact ones and a suffix of {suffix} (1 or more).")
    if not 0 <= ratio <= 1 or not 0 <= (check_layer or 0) < shape.layers:
        bounds = f"in [0, 1] and check_layer below {shape.layers}"
        raise ValueError(f"ratio must lie {bounds}, got {ratio} and {check_layer}.")
    if ratio == 1:
        return _recompute(shape, tokens, causal_keys(0, tokens), tokens)
    start = tokens - suffix
    selected = budget(ratio, start - exact)
    suffix_keys = causal_keys(start, tokens)
    rows, keys = selected + suffix, selected * (exact + start + 1) / 2 + suffix_keys
    if selected == 0 or not scored:
        return _recompute(shape, rows, keys, tokens)
    if check_layer is None:
        return _suffix_pass(shape, suffix, suffix_keys) + _recompute(shape, rows, keys, tokens)
    ranked = tokens - exact
    below = check_layer * _layer(shape, ranked, causal_keys(exact, tokens))
    return below + 2 * (ranked - rows) * shape.kv_weights + _recompute(shape, rows, keys, tokens, check_layer)


def causal_keys(start: int, stop: int) -> float:
    """Keys that the rows at positions `start` … `stop` − 1 see, summed: Σ (position + 1).

    >>> causal_keys(2, 4)
    7.0
    """
    return (stop * (stop + 1) - start * (start + 1)) / 2


def _layer(shape: Shape, rows: int, keys: float) -> float:
    """A whole layer for some rows, which see `keys` keys in all."""
    return 2 * rows * shape.layer_weights + 4 * shape.heads * shape.head_dim * keys


def _recompute(shape: Shape, rows: int, keys: float, tokens: int, first_layer: int = 0) -> float:
    """Rows from a layer on; in the last layer K and V of all of them, the rest of the last row only; the LM head."""
    last = 2 * rows * shape.kv_weights + 2 * shape.other_weights + 4 * shape.heads * shape.head_dim * tokens
    return (shape.layers - 1 - first_layer) * _layer(shape, rows, keys) + last + 2 * shape.head_weights


def _suffix_pass(shape: Shape, suffix: int, keys: float) -> float:
    """The suffix over reused KV, as far as the attention weights of the last layer: there K, V, Q and QKᵀ."""
    last = 2 * suffix * (shape.kv_weights + shape.query_weights) + 2 * shape.heads * shape.head_dim * keys
    return (shape.layers - 1) * _layer(shape, suffix, keys) + last


# --- bytes ------------------------------------------------------------------------------------------------------------


def kv_bytes(tokens: int, *, shape: Shape, element_bytes: int = 2) -> int:
    """Keys and values of that many tokens in all layers.

    >>> kv_bytes(1, shape=Shape(32, 4096, 14336, 32, 8, 128, 128256))
    131072
    """
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * element_bytes


def least_bytes(tokens: int, *, shape: Shape, element_bytes: int = 2, passes: int = 1) -> int:
    """The bytes that must move between memory and processor: the prompt's KV read and written once, all weights of the
    layers once a pass (2 for suffix-guided selection, else 1), the LM head's once."""
    weights = passes * shape.layers * shape.layer_weights + shape.head_weights
    return weights * element_bytes + 2 * kv_bytes(tokens, shape=shape, element_bytes=element_bytes)
