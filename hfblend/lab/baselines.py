"""Other ways to prefill the same prompt, to compare with: baselines, CacheBlend's three forms, EPIC, and controls.

CacheBlend is three different algorithms: the paper's, the research repository's, and LMCache v1's. Each is written here
as what it does, so that a reader can see what each departure costs. What they do otherwise than hfblend, and no setting
of `BlendConfig` says, is a small subclass of `Blend`; none of it is offered to users.

What others have published since is in `rivals.py`. `METHODS` names them all; `hfblend eval --methods a,b` takes these
names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from ..blend.algorithm import Blend
from ..blend.reuse import Piece, Reuse
from ..config import BlendConfig
from ..generate.blending import BlendResult, blend
from ..kv.chunk import ChunkKV
from ..kv.rows import KV, full_length_cache
from ..model.prefill import prefill
from ..prompts.filler import filler_ids
from ..prompts.prompt import ChunkSpans, Prompt
from ..store import Store, chunk_key
from ..support.registry import model_of
from .probes import FusionRAG, InfoFlowKV, ProphetKV, QCFuse
from .rivals import (
    AgentKVShift,
    CacheTune,
    RelaxKV,
    by_attention_at,
    by_divergence,
    by_low_frequencies,
    last,
    last_two,
    middle_three,
)
from .texts import Around, ChunkAfter, Ids, after_another_request, after_dummies, after_neighbours

STORE_BYTES = 2**50  # no chunk ever leaves a measurement's store

# --- what the references do otherwise -------------------------------------------------------------------------------


class LeakyMask(Blend):
    """The bottom-right causal triangle over the rows of a pass, as both references use: rows see keys after them.

        keys 0 1 2 3 4 5
    row 1    ■ ■ ■ ■ ⬚ ⬚      sees the keys of 2 and 3
    row 3    ■ ■ ■ ■ ■ ⬚
    row 5    ■ ■ ■ ■ ■ ■

    Source: the causal flag of flash-attn and xformers with fewer queries than keys.
    """

    def seen_from(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.length - len(rows), self.length, device=rows.device)

    def is_nearly_all(self) -> bool:
        return False  # a forward over all tokens has no leaky mask


class StaleRows(Blend):
    """Drops the results of the pass over all tokens: unselected rows stay reused up to the check layer, too.

    Source: LMCache v1, `LMCBlender.process_qkv`: at the check layer only selected rows are written back, below it none.
    """

    def recompute(self) -> Any:
        self.buffers.clear()
        self.entered = None
        return super().recompute()


class ResearchRepository(LeakyMask):
    """The ratio counts all tokens before the suffix, rounded down; the suffix is added.

    Source: the authors' fork of vLLM, `int((total_len - last_len) * recomp_ratio)`.
    """

    def budget(self, ratio: float) -> int:
        return int(self.look_up.spans[-1][1] * ratio)


class LMCacheV1(StaleRows, LeakyMask):
    """All tokens are ranked and none is forced in; what is not stored, separators and suffix, counts as KV of zeros.

    So a separator keeps zeros unless it is selected. Only the last token is added, because its output is asked for.
    That look-up ends at the first miss is not imitated.

    Source: LMCache v1, `max(int(len(tokens) * ratio), 1)` in `LMCBlender.process_qkv`; its GPU connector zeroes gaps.
    """

    def find(self) -> Reuse:
        reuse = super().find()
        last = self.length - 1
        like = (reuse.moved + reuse.exact)[0].entry
        unknown = enumerate(i for i in reuse.fresh_idx.tolist() if i != last)
        runs = groupby(unknown, lambda numbered: numbered[1] - numbered[0])
        reuse.moved += [_zeros(like, [i for _, i in run]) for _, run in runs]
        reuse.moved.sort(key=lambda piece: piece.span)
        reuse.candidate_idx = torch.cat([reuse.candidate_idx, reuse.fresh_idx[:-1]]).sort().values
        reuse.fresh_idx = reuse.fresh_idx[-1:]
        self.observer.partitioned(reuse.candidate_idx, reuse.fresh_idx)
        return reuse

    def budget(self, ratio: float) -> int:
        return max(int(self.length * ratio), 1)


class PrefixReuse(Blend):
    """Reuses what stands before the first chunk, as a prefix cache does; chunks are computed, and not kept."""

    def keep(self) -> None:
        prefix = self.look_up.prefix
        if prefix and prefix.status == "fresh":
            self.look_up.keep(prefix, self.buffers)

    def is_nearly_all(self) -> bool:
        return False  # it is measured unchanged


def _zeros(like: Any, rows: list[int]) -> Piece:
    """KV of zeros for neighbouring rows, in the form of another entry."""

    def zeros(layer: int) -> KV:
        keys, values = (t.new_zeros(*t.shape[:2], len(rows), t.shape[3]) for t in like.layer(layer))
        return keys, values

    cache = full_length_cache(map(zeros, range(like.num_layers)))
    return Piece((rows[0], rows[-1] + 1), ChunkKV(cache, torch.tensor(rows), regime=like.regime), exact=False)


# --- methods by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to prefill a prompt.

    Attributes:
        name: as in `METHODS`.
        config: ratio -> settings.
        algorithm: what does the phases.
        fixed_ratio: the ratio, where the method knows only one.
        chunk_after: returns the ids that a chunk's KV is computed after, where no setting of `BlendConfig` says it.
        takes: what `chunk_after` looks at besides the prompt.
        whole: no chunks: the prompt is prefilled in full.
        takes_correction: rows that stay reused may be corrected; references stay what their papers say.
        no_context: the chunks are left out: the model answers from the question alone, the floor of every score.
        source: of a published method, its paper.
        reproduced: whether it is the published method, but for what its docstring names, and comes out as its source
            says; where `False`, a table should say so.
    """

    name: str
    config: Callable[[float], BlendConfig]
    algorithm: type[Blend] = Blend
    fixed_ratio: float | None = None
    chunk_after: ChunkAfter | None = None
    takes: Literal["elsewhere", "corpus"] | None = None
    whole: bool = False
    takes_correction: bool = False
    no_context: bool = False
    source: str = ""
    reproduced: bool = True

    @property
    def takes_ratio(self) -> bool:
        """Whether the ratio makes a difference."""
        return self.fixed_ratio is None

    def corrected(self, correction: Any) -> Method:
        """This method with a correction, or without any, if it is one that takes it; itself if not."""
        if not self.takes_correction:
            return self
        return replace(self, config=lambda ratio: replace(self.config(ratio), correction=correction))

    def prompt_of(self, prompt: Prompt) -> Prompt:
        """The prompt that the model is given: unchanged, without marks of its chunks, or without the chunks."""
        if self.no_context:
            return Prompt.from_ids(prompt.prefix_ids, (), prompt.suffix_ids)
        return Prompt(prompt.input_ids, ChunkSpans(())) if self.whole else prompt

    def blend(
        self,
        model: nn.Module,
        prompt: Prompt,
        ratio: float,
        store: Store,
        *,
        tokenizer: Any = None,
        elsewhere: Ids = (),
        corpus: Sequence[Ids] = (),
    ) -> BlendResult:
        """Blends one prompt in this method's way.

        The result's cache holds `prompt_of(prompt)` but for its last token.

        Args:
            ratio: share in [0, 1] of tokens recomputed; not read where `takes_ratio` is false.
            store: chunk KV; methods may share one, their entries do not mix.
            tokenizer: for the filler's ids.
            elsewhere: ids of a passage of another request, after which in-context methods find their chunk KV.
            corpus: ids of the chunks of a knowledge base, for methods that take one; the prompt's own belong to it.

        Raises:
            ValueError: no tokenizer, or nothing `elsewhere`, where one is needed.
        """
        if self.whole or self.no_context:
            return blend(model, self.prompt_of(prompt), store=store)
        if self.takes == "elsewhere" and not elsewhere:
            raise ValueError(f'Method "{self.name}" takes chunk KV from another request: pass ids of its passage.')
        config = self.config(ratio)
        if config.chunk_prefix == "filler":
            if tokenizer is None:
                raise ValueError(f'Method "{self.name}" computes chunks after a filler text and needs a tokenizer.')
            config = replace(config, filler_ids=filler_ids(tokenizer))
        if self.chunk_after is not None:
            config = replace(config, on_miss="in_context", namespace=self.chunk_after.__name__)
            texts = [Around(ids, prompt, elsewhere, corpus, model.config) for ids in prompt.chunk_ids]
            self._prefill(model, texts, self.chunk_after, store, config)
        return blend(model, prompt, store=store, config=config, algorithm=self.algorithm)

    @staticmethod
    def _prefill(
        model: nn.Module, chunks: Sequence[Around], after: ChunkAfter, store: Store, config: BlendConfig
    ) -> None:
        """Stores the KV of chunks after ids of this method's choice, as if an earlier request had left it."""
        hf_model = model_of(model)
        for chunk in chunks:
            key = chunk_key(
                hf_model.fingerprint.current(hf_model.model), hf_model.dtype, chunk.ids, None, config.namespace
            )
            if store.open(key) is None:
                store.put(key, replace(prefill(hf_model, chunk.ids, after(chunk), None), provenance="in_context"))


@dataclass(frozen=True)
class Case:
    """A line of a table: a method at a ratio, with its chunk KV in a place of `hfblend.lab.settings.PLACES`
    (`None`: in no particular).

    Attributes:
        attention: of a stock model, if not the measured model's own.
    """

    method: Method
    ratio: float
    chunks_in: str | None = None
    attention: str | None = None

    @property
    def name(self) -> str:
        """The method's name, and an attention that is not the model's own."""
        return self.method.name if self.attention is None else f"{self.method.name} {self.attention}"

    @property
    def through_generate(self) -> bool:
        """Whether `generate` of a patched model can do it; other methods go through `hfblend.blend`."""
        return self.method.algorithm is Blend and self.method.chunk_after is None

    def __str__(self) -> str:
        return f"{self.name} {self.ratio:g}" + (f" from {self.chunks_in}" if self.chunks_in else "")


def _rule(selection: Any, times: Sequence[float] = (1.0,), **settings: Any) -> Callable[[float], BlendConfig]:
    """The settings of a selection rule, without a correction unless one is named; `times` is each check layer's ratio
    over the ratio asked for."""
    settings = {"correction": None, **settings}

    def config(ratio: float) -> BlendConfig:
        ratios = tuple(min(max(ratio, 1.0), ratio * more) for more in times)
        return BlendConfig(selection=selection, recompute_ratios=ratios, min_reused_tokens=0, **settings)

    return config


_in_context = partial(Method, chunk_after=after_another_request, takes="elsewhere")
_deviation = partial(_rule, "kv_deviation")
_probe = partial(_rule, cuda_graphs=False)  # a graph keeps no weights
_full_reuse = partial(_rule, "suffix_attention", (), check_layers=())
# filters over three layers, "r1 slightly higher than r", then shrinking to it
_PAPER = _deviation((1.2, 1.1, 1.0), check_layers=(1, 2, 3), deviation="key_value", chunk_prefix="none")

_RULES = ("suffix_attention", "chunk_start", "mixed", "random", "last")
_DEFAULT = BlendConfig.correction

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # hfblend's default: what the suffix attends to is recomputed, and the rest corrected by it
        Method("hfblend", _rule(BlendConfig.selection, correction=_DEFAULT), takes_correction=True),
        # baselines
        Method("full_prefill", _full_reuse(), fixed_ratio=1.0, whole=True),
        Method("no_context", _full_reuse(), fixed_ratio=0.0, no_context=True),
        Method(
            "prefix_reuse", _full_reuse(on_miss="in_context", namespace="prefix_reuse"), PrefixReuse, fixed_ratio=1.0
        ),
        Method("full_reuse", _full_reuse(), fixed_ratio=0.0),
        Method("full_reuse_filler", _full_reuse(chunk_prefix="filler"), fixed_ratio=0.0),
        # selection rules, over chunk KV computed after the prompt's prefix
        *(Method(name, _rule(name), takes_correction=True) for name in _RULES),
        Method("suffix_attention_filler", _rule("suffix_attention", chunk_prefix="filler")),
        Method("kv_deviation", _deviation()),
        # two of them, with the rows that stay reused corrected by the others
        *(Method(f"{name}_offset", _rule(name, correction="offset")) for name in ("suffix_attention", "kv_deviation")),
        # the references
        Method("cacheblend_paper", _PAPER),
        Method("research_repo", _deviation(chunk_prefix="bos"), ResearchRepository),
        _in_context("lmcache_v1", _deviation(deviation="key"), LMCacheV1),
        Method("epic", _rule("chunk_start", chunk_prefix="none")),
        # CacheBlend's rule with one departure each
        Method("kv_deviation_leaky", _deviation(), LeakyMask),
        Method("kv_deviation_stale", _deviation(), StaleRows),
        Method("kv_deviation_key", _deviation(deviation="key")),
        Method("kv_deviation_bos", _deviation(chunk_prefix="bos")),
        Method("kv_deviation_none", _deviation(chunk_prefix="none")),
        _in_context("kv_deviation_in_context", _deviation()),
        Method("kv_deviation_filler", _deviation(chunk_prefix="filler")),
        # rivals
        Method("prophetkv", _probe(by_attention_at(range)), ProphetKV, source="arXiv 2602.02579"),
        Method("infoflow_kv", _probe(by_attention_at(last_two)), InfoFlowKV, source="arXiv 2603.05353"),
        Method("qcfuse", _probe(by_attention_at(middle_three)), QCFuse, source="arXiv 2606.05875"),
        Method(
            "fusionrag", _probe(by_attention_at(last)), FusionRAG,
            chunk_after=after_neighbours, takes="corpus", source="arXiv 2601.12904",
        ),
        Method("relaxkv", _rule("suffix_attention"), RelaxKV, source="arXiv 2609.33503", reproduced=False),
        Method("cachetune", _rule(by_low_frequencies), CacheTune, source="arXiv 2605.24022", reproduced=False),
        Method("agentkvshift", _rule(by_divergence), AgentKVShift, source="arXiv 2607.21604"),
        Method(
            "link0", _full_reuse(), fixed_ratio=0.0,
            chunk_after=after_dummies, source="arXiv 2410.15332", reproduced=False,
        ),
        Method(
            "psr", _deviation(deviation="key"),
            chunk_after=after_dummies, source="arXiv 2603.20218", reproduced=False,
        ),
    )
}  # fmt: skip
