"""hfblend's rules as methods of KVShareArena, a public leaderboard of KV cache reuse.

    git clone https://github.com/xishi404/KVShareArena && pip install --no-deps -e KVShareArena
    python examples/leaderboard/driver.py run --method hfblend --model Qwen/Qwen3-8B --subset hotpotqa \\
        --data_dir KVShareArena/data/queryset --out hfblend.json
    kva validate hfblend.json --data_dir KVShareArena/data/queryset
    kva score hfblend.json

The interface is that of its CONTRIBUTING.md and kvsharearena/contract.py at commit 95ddb43: `setup` loads the model,
`build_cache` encodes one source without the question, `answer` reuses these caches and reports its costs. Its `kva`
knows its own methods only; this script adds these, and hands the rest of the line to it. `--no-deps`: its runtime pins
Transformers 4.52, which only its own methods need. `--method_cfg` takes JSON: `'{"ratio": 0.05, "device": "cuda:1"}'`;
ratio 1 is a full prefill, for the TTFT to compare with.

A prompt is tokenised as by its own methods: the text before the sources, each source, and the question with the
template's end apart; a chat template that knows `enable_thinking` gets False. A source's KV is computed after the text
before the sources, which is the same for all questions of a subset.
"""

from __future__ import annotations

from typing import Any

from kvsharearena.contract import AnswerResult, BaseRepairMethod, register

import hfblend
from hfblend.demo.model import load

METHODS: dict[str, dict[str, Any]] = {  # name -> settings
    "hfblend": {},
    "hfblend_filler": {"chunk_prefix": "filler", "correction": None},
    "hfblend_suffix_attention": {"correction": None},
    "hfblend_kv_deviation": {"selection": "kv_deviation", "correction": None},
}
PORTS = ("hfblend_kv_deviation",)  # CacheBlend's rule
USER = "a0f31c55 the user's text 8d42"


class HFBlend(BaseRepairMethod):
    """One of `METHODS`."""

    track = frozenset({"re"})
    mechanism_class = 1  # selective recomputation
    backend = "hf"
    training_data = None
    cost_notes = (
        "recomputed_layer_tokens: (token, layer) pairs computed in answer(), probes of the selection rule and all rows "
        "of the last layer included, less one pass of the rows that no cache holds (the question); "
        "dense_payload_layer_tokens: tokens of the sources x layers; kv_bytes: K/V tensors of the sources; ttft_ms: "
        "from the call of generate() to the first token on the host, look-up and realignment included."
    )

    def setup(self, model_id: str, config: dict[str, Any]) -> None:
        self.model, self.tokenizer = load(model_id, config.get("device"))
        ratio = float(config.get("ratio", 0.15))
        settings = hfblend.BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0, **METHODS[self.name])
        self.blender = hfblend.patch(self.model, settings, self.tokenizer)
        exam = config["exam"]
        before, self.end = frame(self.tokenizer, exam["system_prompt"], exam["pre_ctx"])
        self.prefix = self.ids_of(before)
        self.answer("Ready?", [self.build_cache("Nothing is asked yet. " * 20)], config)  # records CUDA graphs

    def build_cache(self, source_text: str) -> list[int]:
        """Stores the KV of a source; `answer` finds it by these ids."""
        ids = self.ids_of(source_text)
        self.blender.precompute([ids], prefix=self.prefix)
        return ids

    def answer(self, question: str, caches: list[list[int]], config: dict[str, Any]) -> AnswerResult:
        exam = config["exam"]
        suffix = self.ids_of(exam["mid_q"] + question + exam["tail"] + self.end)
        prompt = hfblend.Prompt.from_ids(self.prefix, caches, suffix)
        options = {"max_new_tokens": exam["max_new_tokens"], "do_sample": False}
        output = self.model.generate(**prompt.inputs(self.model.device), **options)
        text, trace = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True), self.blender.trace
        if not trace.blended:
            raise RuntimeError(f"Question {question!r} was not blended: {trace.fallback_reason}")
        store = self.blender.store
        kv_bytes = sum(store.open(chunk.key).num_bytes for chunk in trace.chunks)
        store.clear()  # the sources of the next question are others
        return AnswerResult(
            text=text,
            recomputed_layer_tokens=trace.computed_pairs - len(trace.fresh_idx) * trace.num_layers,
            dense_payload_layer_tokens=sum(map(len, caches)) * trace.num_layers,
            kv_bytes=kv_bytes,
            ttft_ms=trace.ttft_ms,
            aux={
                "hits": trace.hits,
                "misses": trace.misses,
                "selected_tokens": trace.selected_tokens,
                **trace.settings,
            },
        )

    def teardown(self) -> None:
        self.blender.remove()

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def frame(tokenizer: Any, system: str, user_start: str) -> tuple[str, str]:
    """The chat template's text up to the first source, and from the end of the user's text on."""
    options = {"enable_thinking": False} if "enable_thinking" in tokenizer.chat_template else {}

    def written(user: str, is_open: bool) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open, **options)

    closing, end = (written(USER, is_open).partition(USER)[2] for is_open in (False, True))
    return written(user_start, False).removesuffix(closing), end


for name in METHODS:
    register(name)(type(name, (HFBlend,), {"provenance": "port" if name in PORTS else "official"}))

if __name__ == "__main__":
    from kvsharearena.cli import main

    main()
