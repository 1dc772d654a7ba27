"""Later turns of a conversation: their documents are blended after the cache of the earlier ones, as stock continues
it; answers that become documents; documents in another order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_mistral, shared, store_of_true_kv
from transformers import DynamicCache, StaticCache, pipeline

import hfblend
from hfblend.model.hf_model import CACHE

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PREFIX, GAP = [11, 12, 13, 14], [8]


def ids_of(count, seed):
    return torch.randint(9, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENTS = [ids_of(20 + i, seed=i) for i in range(5)]
TURNS = [(0, 1), (2, 3), (4, 0), (3, 1)]  # the documents of each: others, and earlier ones again
QUESTIONS = [ids_of(5, seed=20 + turn) for turn in range(4)]


def prompt_of(turn, before=None):
    """A turn's ids, after those of the earlier turns with their answers, and the spans of all turns."""
    prompt = hfblend.Prompt.from_ids(PREFIX, [], []) if before is None else before
    ids, spans = list(prompt.ids), list(prompt.chunk_spans)
    for one in TURNS[turn]:
        spans.append((len(ids), len(ids) + len(DOCUMENTS[one])))
        ids += DOCUMENTS[one] + GAP
    return hfblend.Prompt(torch.tensor([ids + QUESTIONS[turn]]), spans)


def conversation(model, blender=None, turns=4, store_for=None, **options):
    """The outputs of the turns, each of which continues one cache; with a blender, their prompts and traces."""
    prompt, cache, told = None, DynamicCache(config=model.config), []
    for turn in range(turns):
        prompt = prompt_of(turn, prompt)
        if store_for is not None:
            store_for(prompt)
        inputs = prompt.inputs(model.device)
        if blender is None:
            inputs.pop("chunk_spans")
        held = [(one.keys.clone(), one.values.clone()) for one in cache.layers if one.is_initialized]
        output = generate(model, inputs, **{CACHE: cache}, **options)
        told.append((output, blender and blender.trace, len(held) and held[0][0].shape[2]))
        assert output.past_key_values is cache
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        for layer, (keys, values) in zip(cache.layers, held):  # what earlier turns left is untouched
            assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
            assert torch.equal(layer.values[:, :, : keys.shape[2]], values)
        prompt = hfblend.Prompt(output.sequences.cpu(), prompt.chunk_spans)
    return told


def check(model, stock, blended, tolerance):
    for (expected, *_), (output, trace, held) in zip(stock, blended):
        assert trace.blended
        assert torch.equal(output.sequences, expected.sequences)
        assert largest_difference(output, expected) <= tolerance
        assert trace.prefix.span == (0, held or len(PREFIX))
        assert trace.prefix.exact or not held
        assert trace.computed_pairs <= (trace.num_tokens - held) * trace.num_layers


def full_mistral():
    return make_mistral(None)


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
@pytest.mark.parametrize("make", [make_llama, pytest.param(full_mistral, marks=pytest.mark.thorough)])
def test_every_turn_at_ratio_1_is_stock(make, selection):
    model = shared(make)
    stock = conversation(model)
    with hfblend.patch(model, config(1.0, selection=selection)) as blender:
        blended = conversation(model, blender)
    check(model, stock, blended, 2e-4)
    assert [(trace.hits, trace.misses) for _, trace, _ in blended] == [(0, 2), (0, 2), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("selection", "ratios"), [("suffix_attention", (0.2,)), ("kv_deviation", (0.2,)), ("kv_deviation", (0.4, 0.2))]
)
def test_every_turn_with_true_kv_from_elsewhere_is_stock(selection, ratios):
    """What was computed after the conversation's first prefix holds in every turn, whatever is selected."""
    model = shared()
    stock, store = conversation(model), hfblend.MemoryStore()
    settings = {"selection": selection, "correction": None, "recompute_ratios": ratios}
    settings["check_layers"] = (1, 2)[: len(ratios)]
    with hfblend.patch(model, config(**settings), store=store) as blender:
        blended = conversation(model, blender, store_for=lambda prompt: store_of_true_kv(model, prompt, store=store))
    check(model, stock, blended, 1e-3)
    for _, trace, held in blended:
        assert trace.misses == 0
        assert 0 < trace.selected_tokens < trace.reused_tokens
        assert trace.fresh_idx.min() >= held


def test_documents_precomputed_once_serve_every_turn():
    model = shared()
    with hfblend.patch(model, config(0.2)) as blender:
        blender.precompute(DOCUMENTS, prefix=PREFIX)
        blended = conversation(model, blender)
    assert [(trace.hits, trace.misses) for _, trace, _ in blended] == [(2, 0)] * 4
    assert [trace.prefix.span[1] for _, trace, _ in blended[1:]] == [held for *_, held in blended[1:]]
    assert all("Continues a cache" in trace.notes[0] for _, trace, _ in blended[1:])
    assert all(trace.ttft_ms is not None for _, trace, _ in blended)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}, {"prefill_chunk_size": 8}], ids=str)
def test_options_of_generate(options):
    model, outputs = shared(), []
    for patched in (False, True):
        first = generate(model, {"input_ids": prompt_of(0).input_ids})
        prompt = prompt_of(1, hfblend.Prompt(first.sequences, prompt_of(0).chunk_spans))
        given = {CACHE: first.past_key_values}
        torch.manual_seed(0)
        if patched:
            with hfblend.patch(model, config(1.0)) as blender:
                outputs.append(generate(model, prompt.inputs(), **given, **options))
                assert blender.trace.blended
        else:  # stock cannot expand a filled cache for beams, nor 5.17 cut a prompt after one: it begins anew there
            given = given if "do_sample" in options else {}
            outputs.append(generate(model, {"input_ids": prompt.input_ids}, **given, **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_a_first_document_after_turns_without_any():
    """Its prefix is all before it, which continues from the cache."""
    model, seen = shared(), []
    ids = torch.tensor([ids_of(30, 1)])
    prompts = [hfblend.Prompt.from_ids([*ids_of(30, 1), *ids_of(6, 2)], [DOCUMENTS[0], DOCUMENTS[1]], [7, 8])]
    outputs = []
    for patched in (False, True):
        cache = DynamicCache(config=model.config)
        generate(model, {"input_ids": ids}, max_new_tokens=1, **{CACHE: cache})
        inputs = prompts[0].inputs()
        if not patched:
            inputs.pop("chunk_spans")
            outputs.append(generate(model, inputs, **{CACHE: cache}))
            continue
        with hfblend.patch(model, config(1.0)) as blender:
            handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
            outputs.append(generate(model, inputs, **{CACHE: cache}))
            handle.remove()
            assert blender.trace.blended
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert max(seen) < len(prompts[0])  # no pass computed the whole prompt


def test_a_chunk_that_the_cache_ends_in_is_computed():
    model, prompt = shared(), prompt_of(1, prompt_of(0))
    start, stop = prompt.chunk_spans[1]
    outputs = []
    for patched in (False, True):
        cache = DynamicCache(config=model.config)
        generate(model, {"input_ids": prompt.input_ids[:, : start + 5]}, max_new_tokens=1, **{CACHE: cache})
        if not patched:
            outputs.append(generate(model, {"input_ids": prompt.input_ids}, **{CACHE: cache}))
            continue
        with hfblend.patch(model, config(1.0)) as blender:
            outputs.append(generate(model, prompt.inputs(), **{CACHE: cache}))
            assert [chunk.span for chunk in blender.trace.chunks] == list(prompt.chunk_spans[2:])
            assert set(range(start + 5, stop)) <= set(blender.trace.fresh_idx.tolist())
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def filled(model, ids, cache):
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    return cache


def static(model, ids):
    return filled(model, ids[:, :60], StaticCache(config=model.config, max_cache_len=400))


def dynamic(model, ids):
    return filled(model, ids, DynamicCache(config=model.config))


@pytest.mark.parametrize(
    ("make", "cache_of"),
    [
        (make_llama, static),
        (make_llama, dynamic),
        (make_mistral, lambda model, ids: dynamic(model, ids[:, :60])),
        (lambda: make_llama("dynamic"), lambda model, ids: dynamic(model, ids[:, :50])),
        (make_llama, lambda model, ids: dynamic(model, ids[:, :60].expand(2, -1))),
    ],
    ids=["static", "of all ids", "sliding", "another regime", "a batch"],
)
def test_other_caches_are_continued_by_stock(make, cache_of):
    model, prompt = make(), prompt_of(1, prompt_of(0))
    with hfblend.patch(model, config(1.0)) as blender:
        cache = cache_of(model, prompt.input_ids)
        batch = next((one.keys.shape[0] for one in cache.layers if getattr(one, "keys", None) is not None), 1)
        inputs = {**prompt.inputs(), "input_ids": prompt.input_ids.expand(batch, -1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        generate(model, inputs, max_new_tokens=2, **{CACHE: cache})
        assert blender.trace.fallback == "filled_cache"
        assert type(cache).__name__ in blender.trace.fallback_reason


def test_new_documents_below_the_least_fall_back():
    model = shared()
    first = generate(model, {"input_ids": prompt_of(0).input_ids})
    prompt = prompt_of(1, hfblend.Prompt(first.sequences, prompt_of(0).chunk_spans))
    with hfblend.patch(model, config(0.2, min_reused_tokens=60)) as blender:
        generate(model, prompt.inputs(), **{CACHE: first.past_key_values})
        assert blender.trace.fallback == "too_few_tokens"  # all turns together have 86
        assert "45 reusable tokens in 2 chunks" in blender.trace.fallback_reason


# --- chats ------------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ '<s> ' + m.content + ' </s> ' }}{% endfor %}"


@pytest.fixture
def chat_tokenizer(word_tokenizer):
    word_tokenizer.chat_template = TEMPLATE
    return word_tokenizer


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def test_from_chat_over_a_conversation(chat_tokenizer):
    """Each message has a list of documents; the earlier turn's ids are the beginning of the later one's."""
    first = [{"role": "system", "content": "w9"}, {"role": "user", "content": "{documents}w10 w11"}]
    both = [*first, {"role": "assistant", "content": "w80 w81"}, {"role": "user", "content": "w12 {documents}w13"}]
    documents = [[words(DOCUMENTS[0]), words(DOCUMENTS[1])], [words(DOCUMENTS[2])]]
    alone = hfblend.Prompt.from_chat(chat_tokenizer, first, documents[0])
    prompt = hfblend.Prompt.from_chat(chat_tokenizer, both, documents)
    assert prompt.ids[: len(alone)] == alone.ids
    assert prompt.chunk_ids == DOCUMENTS[:3]
    assert prompt.chunk_spans[:2] == alone.chunk_spans
    assert (alone.num_earlier, prompt.num_earlier) == (0, 2)
    none_later = hfblend.Prompt.from_chat(chat_tokenizer, both, [documents[0], []])
    assert none_later.chunk_spans == alone.chunk_spans
    with pytest.raises(ValueError, match="once for each list of documents, got 2 for 3 lists"):
        hfblend.Prompt.from_chat(chat_tokenizer, both, [*documents, []])
    with pytest.raises(ValueError, match="pass a list of documents for each"):
        hfblend.Prompt.from_chat(chat_tokenizer, both, documents[0])


def test_a_cache_is_cut_where_an_answer_reads_otherwise():
    """An answer's text may tokenise to other ids than were generated."""
    model = shared()
    first = generate(model, {"input_ids": prompt_of(0).input_ids})
    others = first.sequences.clone()
    others[0, -2] = (others[0, -2] + 1) % 97
    prompt = prompt_of(1, hfblend.Prompt(others, prompt_of(0).chunk_spans))
    stock = generate(model, {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)})
    cache = first.past_key_values
    for wrong in (first.sequences[0], first.sequences.tolist(), first.sequences.float(), -first.sequences):
        with pytest.raises((TypeError, ValueError), match="held_ids must be"):
            prompt.crop(cache, wrong)
    with pytest.raises(ValueError, match="held_ids must be the"):
        prompt.crop(cache, first.sequences[:, :-2])
    assert prompt.crop(cache, first.sequences) == cache.get_seq_length() == others.shape[1] - 2
    with hfblend.patch(model, config(1.0)) as blender:
        output = generate(model, prompt.inputs(), **{CACHE: cache})
        assert blender.trace.prefix.span == (0, others.shape[1] - 2)
    assert torch.equal(output.sequences, stock.sequences)
    assert hfblend.Prompt(others[:, :9], ()).crop(cache, output.sequences) == 8  # its last token is computed


def test_a_pipeline_that_sends_all_turns_finds_the_earlier_ones(chat_tokenizer):
    model, messages, traces = make_llama(), [{"role": "system", "content": "w9 w10"}], []
    chat = pipeline("text-generation", model=model, tokenizer=chat_tokenizer)
    with hfblend.patch(model, config(1.0, separator=" ## "), chat_tokenizer) as blender:
        for turn in range(3):
            documents = " ## ".join(words(DOCUMENTS[i]) for i in TURNS[turn])
            messages.append({"role": "user", "content": f"w7 ## {documents} ## {words(QUESTIONS[turn])}"})
            blended = chat(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"]
            traces.append(blender.trace)
            stock = chat(messages, max_new_tokens=4, do_sample=False, blend_config=hfblend.BlendConfig(enabled=False))
            assert blended == stock[0]["generated_text"]
            messages = blended
    # What stands between two turns' documents, an answer and a question, is a chunk as well: new once, then found.
    assert [(trace.hits, trace.misses) for trace in traces] == [(0, 2), (2, 3), (6, 2)]


# --- answers as documents ---------------------------------------------------------------------------------------------


def test_an_answer_becomes_a_document(chat_tokenizer):
    """One agent's answer, stored while nothing else runs, is a document of the next agent's prompt."""
    model, ask = make_llama(), {"role": "user", "content": "{documents}w10 w11"}
    messages = [{"role": "system", "content": "w9"}, ask]
    prompt = hfblend.Prompt.from_chat(chat_tokenizer, messages, [words(DOCUMENTS[0])])
    with hfblend.patch(model, config(0.2), chat_tokenizer) as blender, ThreadPoolExecutor(1) as background:
        output = generate(model, prompt.inputs(), max_new_tokens=20)
        answer = chat_tokenizer.decode(output.sequences[0, len(prompt) :], skip_special_tokens=True)
        stored = background.submit(blender.precompute, [answer], prefix=prompt.prefix_ids)
        assert stored.result().computed == 1
        following = hfblend.Prompt.from_chat(chat_tokenizer, messages, [words(DOCUMENTS[1]), answer])
        generate(model, following.inputs())
        assert [chunk.status for chunk in blender.trace.chunks] == ["miss", "hit"]
        # As ids, where no text comes between.
        ids = output.sequences[0, len(prompt) :].tolist()
        blender.precompute([ids], prefix=[11, 12])
        generate(model, hfblend.Prompt.from_ids([11, 12], [DOCUMENTS[1], ids], [7]).inputs())
        assert [chunk.status for chunk in blender.trace.chunks] == ["miss", "hit"]


# --- the order of documents -------------------------------------------------------------------------------------------


def of_documents(*order, suffix=(7, 9)):
    return hfblend.Prompt.from_ids(PREFIX, [DOCUMENTS[i] for i in order], list(suffix), [8])


def test_order_for_an_exact_prefix():
    """What an earlier prompt computed in a row is found in a row, and nothing of it is computed again."""
    model = shared()
    with hfblend.patch(model, config(0.2, on_miss="in_context")) as blender:
        generate(model, of_documents(1, 0, 2).inputs())
        assert [chunk.status for chunk in blender.trace.chunks] == ["fresh"] * 3
        prompt = blender.reordered(of_documents(3, 0, 2, 1), "prefix")
        assert prompt.ids == of_documents(1, 0, 2, 3).ids
        generate(model, prompt.inputs())
        assert [chunk.exact for chunk in blender.trace.chunks] == [True, True, True, False]
        assert prompt.note == blender.trace.notes[0]
        assert "prefix (4, 2, 3, 1 of those given): 63 of their tokens" in prompt.note
    with hfblend.patch(model, config(0.2)) as blender:
        blender.precompute(DOCUMENTS[:3], prefix=[*PREFIX, 8])
        # Computed alone after the prefix, one can be exact: the longest.
        assert blender.reordered(of_documents(3, 0, 2), "prefix").ids == of_documents(2, 3, 0).ids


def test_the_most_relevant_stands_last():
    pytest.importorskip("bm25s")
    model = shared()
    with hfblend.patch(model, config(0.2)) as blender:
        prompt = blender.reordered(of_documents(0, 1, 2, suffix=DOCUMENTS[0][3:8]), "relevance")
        assert prompt.chunk_ids[-1] == DOCUMENTS[0]
        assert "by relevance" in prompt.note
        assert sorted(prompt.chunk_ids) == sorted(DOCUMENTS[:3])


def test_order_keeps_what_it_may_not_move(chat_tokenizer):
    messages = [{"role": "user", "content": "{documents}w10"}, {"role": "assistant", "content": "w11"}]
    messages.append({"role": "user", "content": "{documents}w12"})
    texts = [words(one) for one in DOCUMENTS]
    with hfblend.patch(shared(), config(0.2)) as blender:
        several = hfblend.Prompt.from_chat(chat_tokenizer, messages, [texts[:2], [texts[2], texts[4], texts[3]]])
        blender.precompute(DOCUMENTS[3:4], prefix=several.ids[: several.chunk_spans[2][0]])
        ordered = blender.reordered(several, "prefix")
        assert ordered.chunk_ids[:2] == DOCUMENTS[:2]  # earlier turns stay
        assert (ordered.num_earlier, len(ordered)) == (2, len(several))
        one = of_documents(1)
        assert blender.reordered(one, "prefix") is one
        titled = hfblend.Prompt(torch.tensor([[*range(10, 40)]]), [(2, 8), (10, 20), (21, 28)])
        with pytest.raises(ValueError, match="equal text between them"):
            blender.reordered(titled, "prefix")
        with pytest.raises(ValueError, match="order"):
            blender.reordered(one, "length")
