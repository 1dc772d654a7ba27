"""Time to first token: full prefill, full reuse and blending in one run, the methods taking turns.

    python benchmarks/ttft.py                                        SmolLM2-135M-Instruct
    python benchmarks/ttft.py --shape llama-8b --device cuda         random weights in the shape of Llama-3.1-8B

Prompts are random tokens: time does not depend on what they say. Chunks are stored beforehand. A speed-up is taken
per turn (full prefill over the method, in the same turn), then the median, lowest and highest of all turns.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hfblend
from hfblend.demo_model import HUB_NAME, load
from hfblend.measures import describe_machine

CHUNK_TOKENS = 512
PREFIX_TOKENS = SUFFIX_TOKENS = 32
DECODED_TOKENS = 64
STORE_BYTES = 32 * 2**30  # 32K tokens of an 8B model are 4.3 GB

SHAPES = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}
METHODS = {
    "full prefill": hfblend.BlendConfig(enabled=False),
    "full reuse": hfblend.BlendConfig(check_layers=(), recompute_ratios=(), min_reused_tokens=0),
    **{
        f"{selection} {ratio}": hfblend.BlendConfig(selection=selection, recompute_ratios=(ratio,), min_reused_tokens=0)
        for selection in ("suffix_attention", "kv_deviation")
        for ratio in (0.15, 0.05)
    },
}
BLENDED = "suffix_attention 0.15"  # whose decoding is measured


@dataclass
class Turn:
    """One call."""

    ttft_ms: float
    phase_ms: dict[str, float]
    pairs_share: float  # computed (token, layer) pairs over those of a full prefill
    peak_gib: float | None  # of GPU memory, weights and stored chunks included


@dataclass
class Row:
    """A method's line of the table; medians over the turns."""

    method: str
    ttft_ms: float
    ttft_ms_range: tuple[float, float]
    speed_up: float
    speed_up_range: tuple[float, float]
    pairs_share: float
    speed_up_limit: float  # 1 / pairs_share: where computing those pairs were all there is to do
    share_of_limit: float
    phase_ms: dict[str, float]
    peak_gib: float | None


def make_model(args: argparse.Namespace) -> Any:
    if args.shape is None:
        return load(args.model, args.device)[0]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**SHAPES[args.shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):  # weights and rotary tables are made where they stay
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_prompt(vocabulary: int, context_tokens: int) -> hfblend.Prompt:
    generator = torch.Generator().manual_seed(0)

    def random_ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    sizes = [min(CHUNK_TOKENS, context_tokens - start) for start in range(0, context_tokens, CHUNK_TOKENS)]
    return hfblend.Prompt.from_ids(
        random_ids(PREFIX_TOKENS), [random_ids(size) for size in sizes], random_ids(SUFFIX_TOKENS)
    )


def run(blender: hfblend.Blender, inputs: dict[str, Any], config: hfblend.BlendConfig, num_tokens: int = 1) -> float:
    """Milliseconds of a whole greedy `generate` of exactly `num_tokens`."""
    on_gpu = blender.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    blender.model.generate(
        **inputs, blend_config=config, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
    )
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def measure_ttft(blender: hfblend.Blender, inputs: dict[str, Any], repeats: int) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {method: [] for method in METHODS}
    for i in range(-1, repeats):  # turn −1 stores the chunks and warms up
        for method, config in METHODS.items():
            run(blender, inputs, config)
            trace = blender.trace
            share = trace.recomputed_pairs_share if trace.blended else 1.0
            peak = torch.cuda.max_memory_allocated() / 2**30 if blender.model.device.type == "cuda" else None
            if i >= 0:
                turns[method].append(Turn(trace.ttft_ms, trace.phase_ms, share, peak))
    return turns


def summarise(turns: dict[str, list[Turn]]) -> list[Row]:
    full = turns["full prefill"]
    rows = []
    for method, own in turns.items():
        times = [turn.ttft_ms for turn in own]
        speed_ups = [whole.ttft_ms / turn.ttft_ms for whole, turn in zip(full, own)]
        share = own[0].pairs_share
        rows.append(
            Row(
                method=method,
                ttft_ms=median(times),
                ttft_ms_range=(min(times), max(times)),
                speed_up=median(speed_ups),
                speed_up_range=(min(speed_ups), max(speed_ups)),
                pairs_share=share,
                speed_up_limit=1 / share,
                share_of_limit=median(speed_ups) * share,
                phase_ms={phase: median(turn.phase_ms[phase] for turn in own) for phase in own[0].phase_ms},
                peak_gib=None if own[0].peak_gib is None else median(turn.peak_gib for turn in own),
            )
        )
    return rows


def measure_decoding(blender: hfblend.Blender, inputs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Tokens per second after the first token, stock and after a blend, in turns; medians."""
    speeds: dict[str, list[float]] = {"full prefill": [], BLENDED: []}
    for _ in range(repeats):
        for method, found in speeds.items():
            whole_ms = run(blender, inputs, METHODS[method], 1 + DECODED_TOKENS)
            found.append(1000 * DECODED_TOKENS / (whole_ms - blender.trace.ttft_ms))
    ratios = [blended / stock for stock, blended in zip(*speeds.values())]
    return {
        "stock_tokens_per_s": median(speeds["full prefill"]),
        "blended_tokens_per_s": median(speeds[BLENDED]),
        "blended_over_stock": median(ratios),
    }


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    lines = [
        f"{report['model']}, {report['dtype']}, {report['machine']}; {report['prompt_tokens']} tokens of prompt, "
        f"{report['repeats']} turns\n",
        "| method | TTFT ms (lowest … highest) | speed-up (lowest … highest) | computed | limit | reached "
        "| peak GiB | phase ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        phases = ", ".join(f"{phase} {ms:.1f}" for phase, ms in row.phase_ms.items())
        low, high = row.speed_up_range
        lines.append(
            f"| {row.method} | {row.ttft_ms:.1f} ({row.ttft_ms_range[0]:.1f} … {row.ttft_ms_range[1]:.1f}) "
            f"| {row.speed_up:.2f} ({low:.2f} … {high:.2f}) | {row.pairs_share:.1%} | {row.speed_up_limit:.1f} "
            f"| {row.share_of_limit:.0%} | {'' if row.peak_gib is None else f'{row.peak_gib:.2f}'} | {phases} |"
        )
    decoding = report["decoding"]
    lines.append(
        f"\nDecoding, {DECODED_TOKENS} tokens: stock {decoding['stock_tokens_per_s']:.1f} tokens/s, after a blend "
        f"{decoding['blended_tokens_per_s']:.1f} tokens/s (median ratio {decoding['blended_over_stock']:.3f}).\n\n"
        "Computed: (token, layer) pairs over those of a full prefill; limit: 1 / computed; reached: speed-up / limit."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-tokens", type=int, default=2000, help="tokens of all chunks together")
    parser.add_argument("--repeats", type=int, default=7)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help=f"hub id or folder; default {HUB_NAME}")
    which.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.context_tokens < 1 or args.repeats < 1:
        parser.error(f"--context-tokens and --repeats must be 1 or more, got {args.context_tokens} and {args.repeats}")

    model = make_model(args)
    prompt = make_prompt(model.config.vocab_size, args.context_tokens)
    inputs = prompt.inputs(model.device)
    store = hfblend.MemoryStore(max_bytes=STORE_BYTES)
    with hfblend.patch(model, store=store) as blender:
        rows = summarise(measure_ttft(blender, inputs, args.repeats))
        decoding = measure_decoding(blender, inputs, args.repeats)
    report = {
        "model": args.shape or args.model or HUB_NAME,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": describe_machine(model.device),
        "prompt_tokens": len(prompt),
        "repeats": args.repeats,
        "decoding": decoding,
        "rows": [asdict(row) for row in rows],
    }
    print(markdown(report, rows))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
