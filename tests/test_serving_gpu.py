"""The engine on a CUDA GPU: our paged attention, graphs and asynchronous batches, while prompts are blended."""

from __future__ import annotations

import pytest
import torch
from helpers import config, make_llama, make_mistral, make_prompt

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)

from test_serving_engine import all_blocks_are_free, result_of, results_of

from hfblend.serving import attention
from hfblend.serving.engine import Engine
from hfblend.store import MemoryStore

pytestmark = pytest.mark.gpu

ROOMY = {"page_size": 64, "num_blocks": 256, "max_batch_tokens": 512, "max_requests_per_batch": 16}
PROMPTS = [make_prompt(seed=seed, sizes=(200, 311, 133), prefix=37, suffix=21) for seed in range(6)]


@torch.no_grad()
def surprises(model, prompt, answer):
    """By how much each token's logit lies under the highest one, by full prefill in fp32, in units of their spread."""
    ids = torch.tensor([[*prompt.ids, *answer]], device=model.device)
    logits = model.float()(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (logits.amax(1) - chosen) / logits.std(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_answers_are_those_of_full_prefill_within_rounding(dtype, ratio):
    """With nothing to reuse, or at ratio 1, blended requests and plain ones, in one batch, cold and warm."""
    model = make_llama(dtype=dtype).to("cuda")
    for store in (None, MemoryStore()) if ratio == 1.0 else (None,):
        settings = config(ratio) if ratio == 1.0 else config(enabled=False)
        with Engine(model, store, settings, **ROOMY) as engine:
            assert engine.model.config._attn_implementation == attention.NAME
            for _ in range(2):  # the second time from the store, or from equal prompts' blocks
                ids = [engine.add_request(prompt, max_new_tokens=12 + i) for i, prompt in enumerate(PROMPTS)]
                ids += [engine.add_request(prompt.ids, max_new_tokens=9) for prompt in PROMPTS[:3]]
                results = results_of(engine, ids)
                assert all(results[one].error is None for one in ids)
                answers = [results[one].generated_tokens for one in ids]
            assert all_blocks_are_free(engine)
        assert model.config._attn_implementation == "sdpa"
        reference = make_llama(dtype=torch.float32).to("cuda")
        reference.load_state_dict(model.state_dict())
        for prompt, answer in zip([*PROMPTS, *PROMPTS[:3]], answers):
            assert float(surprises(reference, prompt, answer).max()) < 0.2


def test_decoding_runs_with_block_tables_in_graphs():
    calls, decode = [], attention.decode

    def counted(*args):
        calls.append(torch.cuda.is_current_stream_capturing())
        return decode(*args)

    model = make_llama(dtype=torch.bfloat16).to("cuda")
    with pytest.MonkeyPatch.context() as patch, Engine(model, MemoryStore(), config(0.2), **ROOMY) as engine:
        processor = engine.batch_processor
        assert processor.use_async_batching
        assert processor.cb_config.use_cuda_graph == (False, True)
        patch.setattr(attention, "decode", counted)
        results = [result_of(engine, prompt, max_new_tokens=30) for prompt in PROMPTS]
        assert not calls, "each step replays a graph that was recorded before the first request"
        assert [result.trace.blended for result in results] == [True] * len(PROMPTS)
        assert engine.counts["blended"] == len(PROMPTS)
        assert not engine.counts["failed"]


def test_a_batch_answers_as_each_request_alone():
    """A blend on the steps' stream neither reads nor writes what a step in flight does."""
    model = make_llama(dtype=torch.bfloat16).to("cuda")
    with Engine(model, MemoryStore(), config(0.2), **ROOMY) as engine:
        alone = [result_of(engine, prompt, max_new_tokens=24).generated_tokens for prompt in PROMPTS]
    for _ in range(5):
        with Engine(model, MemoryStore(), config(0.2), **ROOMY) as engine:
            ids = [engine.add_request(prompt, max_new_tokens=24) for prompt in PROMPTS]
            results = results_of(engine, ids)
            together = [results[one].generated_tokens for one in ids]
            assert all_blocks_are_free(engine)
        same = sum(a == b for one, other in zip(alone, together) for a, b in zip(one, other))
        assert same >= 0.9 * 24 * len(PROMPTS)  # a batch of another size rounds otherwise


def test_models_that_attend_otherwise_keep_their_attention():
    model = make_mistral(dtype=torch.bfloat16).to("cuda")
    with Engine(model, MemoryStore(), config(0.2), **ROOMY) as engine:
        assert engine.model.config._attn_implementation == "sdpa"
        assert result_of(engine, PROMPTS[0]).trace.blended


def test_sampled_requests_have_graphs_of_their_own():
    """Each kind of sampling is recorded at its first step; a seed draws the same tokens again."""
    model = make_llama(dtype=torch.bfloat16).to("cuda")
    kinds = [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 5}, {"temperature": 0.9, "top_p": 0.8}]
    answers = []
    with Engine(model, MemoryStore(), config(0.2), **ROOMY) as engine:
        assert result_of(engine, PROMPTS[0]).trace.blended
        for _ in range(2):
            for kind in kinds:
                result = result_of(engine, PROMPTS[0], max_new_tokens=20, **({"seed": 7, **kind} if kind else {}))
                answers.append(result.generated_tokens)
        mixed = [engine.add_request(PROMPTS[i], max_new_tokens=20, **kind) for i, kind in enumerate(kinds)]
        assert all(result.error is None for result in results_of(engine, mixed).values())
        assert all_blocks_are_free(engine)
    assert answers[:4] == answers[4:]
    assert len({tuple(answer) for answer in answers}) == len(kinds)
