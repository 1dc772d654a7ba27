"""Chunk KV stored ahead of time: a prompt finds it, and answers as if it had filled the store itself."""

from __future__ import annotations

import gc
import json
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import VOCABULARY, config, generate, make_llama, make_mistral, make_prompt
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.generate import precompute as precomputing
from hfblend.generate.precompute import prefill_chunk
from hfblend.model import prefill as batched_prefill
from hfblend.model.prefill import prefill, prefill_batch
from hfblend.store import DiskStore, MemoryStore, TieredStore
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
FILLER = tuple(range(20, 60))
SETTINGS = {
    "prompt": {},
    "bos": {"chunk_prefix": "bos"},
    "none": {"chunk_prefix": "none"},
    "filler": {"chunk_prefix": "filler", "filler_ids": FILLER},
    "namespace": {"namespace": "tenant"},
    "in_context": {"on_miss": "in_context"},
}


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module", autouse=True)
def _two_batches_in_a_window():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(precomputing, "_BATCHES_IN_WINDOW", 2)
        yield


def ids_of(*sizes, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(7, VOCABULARY, (size,), generator=draw).tolist() for size in sizes]


def keys_of(store):
    return set(store._entries)


def figures(report):
    return report.chunks, report.computed, report.skipped, report.failed


def largest_kv_difference(one, other):
    pairs = [pair for i in range(one.num_layers) for pair in zip(one.layer(i), other.layer(i))]
    return max((a - b).abs().max().item() for a, b in pairs)


# --- a prompt finds what was stored -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch_size"), [*((name, 1) for name in SETTINGS), ("prompt", 3), ("filler", 2)])
def test_a_prompt_finds_every_chunk_and_answers_as_with_a_store_of_its_own(model, name, batch_size):
    settings = config(0.3, **SETTINGS[name])
    own = MemoryStore()
    with hfblend.patch(model, config=settings, store=own) as blender:
        generate(model, PROMPT.inputs())
        expected, expected_trace = generate(model, PROMPT.inputs()), blender.trace
    with hfblend.patch(model, config=settings) as blender:
        report = blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids, batch_size=batch_size)
        stored = keys_of(blender.store)
        output, trace = generate(model, PROMPT.inputs()), blender.trace
        assert keys_of(blender.store) == stored
    assert figures(report) == (3, 3, 0, 0)
    assert report.tokens == sum(map(len, PROMPT.chunk_ids))
    assert (trace.hits, trace.misses, trace.prefix.status) == (3, 0, "hit")
    if name != "in_context":  # whose own store keeps what was computed in the prompt
        assert stored == keys_of(own)
        assert torch.equal(output.sequences, expected.sequences)
        assert trace.selected_idx.tolist() == expected_trace.selected_idx.tolist()
        assert [chunk.exact for chunk in trace.chunks] == [chunk.exact for chunk in expected_trace.chunks]


def test_without_a_prefix(model):
    prompt = make_prompt(prefix=0, separator=())
    with hfblend.patch(model, config=config(0.3)) as blender:
        blender.precompute(prompt.chunk_ids)
        assert len(blender.store) == 3
        generate(model, prompt.inputs())
        assert (blender.trace.hits, blender.trace.misses) == (3, 0)


def test_texts_are_tokenised_as_a_prompts_are(model, word_tokenizer):
    texts, system = ["w7 w8 w9 w10", "w11 </s> w12", "w20 w21 w22"], "<s> w30 w31"
    prompt = hfblend.Prompt.from_texts(
        word_tokenizer, prefix=system, chunks=texts, suffix="w40 w41", separator=(5, 6), add_special_tokens=True
    )
    with hfblend.patch(model, config=config(0.3), tokenizer=word_tokenizer) as blender:
        documents = [texts[0], {"page_content": texts[1]}, SimpleNamespace(text=texts[2])]
        blender.precompute(documents, prefix=system, separator=(5, 6), add_special_tokens=True)
        generate(model, prompt.inputs())
        assert (blender.trace.hits, blender.trace.misses, blender.trace.prefix.status) == (3, 0, "hit")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_keys_are_known_before_anything_is_computed(model, settings):
    store, options = MemoryStore(), {"prefix": PROMPT.prefix_ids, "config": config(**settings)}
    keys = precomputing.chunk_keys(model, PROMPT.chunk_ids, **options)
    precomputing.precompute(model, PROMPT.chunk_ids[:1], store=store, **options)
    assert [key in store for key in keys] == [True, False, False]
    precomputing.precompute(model, PROMPT.chunk_ids, store=store, **options)
    assert [key in store for key in keys] == [True] * 3


def test_an_edited_weight_makes_new_keys():
    model = make_llama()
    with hfblend.patch(model, config=config(0.3)) as blender:
        blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        report = blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids)
        assert report.computed == 3
        generate(model, PROMPT.inputs())
        assert (blender.trace.hits, blender.trace.misses) == (3, 0)


# --- skipping and resuming ----------------------------------------------------------------------------------------


def test_what_is_there_is_skipped_and_a_stopped_run_goes_on(model, tmp_path):
    chunks, store = ids_of(*range(5, 25)), DiskStore(tmp_path)
    told = []

    def stop(report):
        told.append(figures(report))
        if report.computed == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precomputing.precompute(model, chunks, store=store, config=config(), progress=stop)
    assert told == [(i, i, 0, 0) for i in range(1, 8)]
    assert len(store) == 7
    again = precomputing.precompute(model, [*chunks, chunks[0]], store=DiskStore(tmp_path), config=config())
    assert figures(again) == (21, 13, 8, 0)
    assert again.num_bytes > 0
    assert again.seconds > 0
    third = precomputing.precompute(model, chunks, store=TieredStore([MemoryStore(), store]), config=config())
    assert figures(third) == (20, 0, 20, 0)


def test_of_tiers_the_last_one_counts(model, tmp_path):
    fast, disk = MemoryStore(), DiskStore(tmp_path)
    chunks = ids_of(9, 10)
    precomputing.precompute(model, chunks, store=fast, config=config())
    report = precomputing.precompute(model, chunks, store=TieredStore([fast, disk]), config=config())
    assert (report.computed, len(disk)) == (2, 2)


def test_a_damaged_prefix_is_prefilled_again(model, tmp_path):
    first = ids_of(9)
    precomputing.precompute(model, first, prefix=PROMPT.prefix_ids, store=DiskStore(tmp_path), config=config())
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    chunks = ids_of(12, 13, seed=5)
    store = DiskStore(tmp_path)
    assert precomputing.precompute(model, chunks, prefix=PROMPT.prefix_ids, store=store, config=config()).computed == 2
    with hfblend.patch(model, config=config(0.3), store=store) as blender:
        generate(model, hfblend.Prompt.from_ids(PROMPT.prefix_ids, chunks, [9, 8, 7]).inputs())
        assert (blender.trace.hits, blender.trace.prefix.status) == (2, "hit")


def test_a_generator_is_taken_a_window_at_a_time(model):
    taken = 0

    def chunks():
        nonlocal taken
        for ids in ids_of(*[6] * 30):
            taken += 1
            yield ids

    def within_a_window(report):
        assert taken <= report.computed + report.skipped + 2 * 3

    with hfblend.patch(model, config=config()) as blender:
        report = blender.precompute(chunks(), batch_size=3, progress=within_a_window)
    assert (taken, report.computed) == (30, 30)


def test_a_run_that_is_over_holds_no_kv(model, tmp_path, monkeypatch):
    """That of the prefix, perhaps on a GPU, would wait for the garbage collector."""
    held, read = [], precomputing.in_memory

    def read_and_note(entry):
        found = read(entry)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(precomputing, "in_memory", read_and_note)
    gc.disable()
    try:
        precomputing.precompute(model, [[7, 8, 9]], prefix=[5, 6], store=DiskStore(tmp_path))
        precomputing.precompute(model, [[7, 8, 10]], prefix=[5, 6], store=DiskStore(tmp_path))
        assert len(held) == 2
        assert not any(one() for one in held)
    finally:
        gc.enable()


def test_what_a_store_does_not_keep_is_counted_and_one_too_small_is_said(model, caplog):
    chunks = ids_of(8, 400, 8, 8, 8, 8)
    size = prefill_chunk(model, chunks[0]).held_bytes
    report = precomputing.precompute(model, chunks, store=MemoryStore(2 * size), config=config())
    assert figures(report) == (6, 5, 0, 1)
    assert "1 not kept by the store" in str(report)
    assert "too small for these chunks" in caplog.text


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [(), tuple(PROMPT.prefix_ids)], ids=["alone", "behind a prefix"])
@pytest.mark.parametrize("make", [make_llama, make_mistral], ids=["llama", "mistral with a window"])
def test_a_batch_is_as_one_by_one(make, behind):
    model, chunks = make(), ids_of(5, 17, 29, 41)
    hf_model = model_of(model)
    continues = prefill(hf_model, behind, (), None) if behind else None
    batch = prefill_batch(hf_model, chunks, behind, continues)
    for ids, chunk_kv in zip(chunks, batch):
        alone = prefill(hf_model, ids, behind, continues)
        assert largest_kv_difference(chunk_kv, alone) < 1e-5
        assert chunk_kv.cached_positions.tolist() == alone.cached_positions.tolist()
        assert (chunk_kv.behind_ids, chunk_kv.regime) == (alone.behind_ids, alone.regime)


def test_batches_are_of_similar_length_and_within_the_tokens_allowed(monkeypatch):
    monkeypatch.setattr(batched_prefill, "_TOKENS", 100)
    chunks = {str(size): [1] * size for size in (30, 5, 90, 6, 31, 200, 4)}
    batches = batched_prefill.in_batches(chunks.items(), 3, num_after=10)
    assert [[len(ids) for _, ids in batch] for batch in batches] == [[4, 5, 6], [30, 31], [90], [200]]


@pytest.mark.parametrize("rope", ["default", "dynamic", "longrope"])
def test_length_dependent_models_take_chunks_one_by_one(rope, monkeypatch):
    model, sizes = make_llama(rope), []
    batched = batched_prefill.prefill_batch
    monkeypatch.setattr(
        batched_prefill, "prefill_batch", lambda hf_model, c, *rest: sizes.append(len(c)) or batched(hf_model, c, *rest)
    )
    precomputing.precompute(model, ids_of(50, 60, 70, 80), store=MemoryStore(), config=config(), batch_size=4)
    assert [size for size in sizes if size > 1] == ([4] if rope == "default" else [])


def test_a_model_that_fails_the_check_takes_chunks_one_by_one(model, monkeypatch, caplog):
    """Here, as if rows saw the padding behind them."""
    chunks, store = ids_of(8, 9, 10, 11, 12), MemoryStore()
    own = batched_prefill.prefill_batch

    def wrong(hf_model, batch, *rest):
        return own(hf_model, batch if len(batch) == 1 else [[*ids[1:], 7] for ids in batch], *rest)

    monkeypatch.setattr(batched_prefill, "prefill_batch", wrong)
    report = precomputing.precompute(model, chunks, store=store, config=config(), batch_size=3)
    assert report.computed == 5
    assert "one by one" in caplog.text
    for ids in chunks:
        key = hfblend.store.chunk_key(model_of(model).fingerprint.digest, torch.float32, ids, ())
        assert largest_kv_difference(store.open(key), prefill_chunk(model, ids)) == 0.0


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "options", "error", "message"),
    [
        ("w7 w8", {}, TypeError, r"write \[text\]"),
        ([7, 8], {}, TypeError, "Chunk 0 must be a text or a list of token ids, got 7"),
        ([[7], [8, 1.5]], {}, TypeError, "Chunk 1 must be"),
        ([[7], []], {}, ValueError, "Chunk 1 has no tokens"),
        (["w7"], {}, ValueError, "need a tokenizer"),
        ([[7]], {"prefix": "w7"}, ValueError, "need a tokenizer"),
        ([[7], [VOCABULARY]], {}, ValueError, "Chunk 1 has ids from 97 to 97"),
        ([[-1]], {}, ValueError, "ids from -1"),
        ([[7]], {"prefix": [1.5]}, TypeError, "The prefix must be"),
        ([[7]], {"batch_size": 0}, ValueError, "batch_size must be 1"),
    ],
)
def test_wrong_input_is_named(model, chunks, options, error, message):
    with pytest.raises(error, match=message):
        precomputing.precompute(model, chunks, store=MemoryStore(), **options)


def test_tensors_are_ids(model):
    store = MemoryStore()
    precomputing.precompute(model, [torch.tensor(PROMPT.chunk_ids[0])], store=store, prefix=PROMPT.input_ids[0, :7])
    assert len(store) == 2


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, word_tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def run(folder, lines, *words):
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
    arguments = ["--corpus", corpus, "--store", folder / "chunks", "--model", folder / "model", "--device", "cpu"]
    return CliRunner().invoke(app, ["precompute", *map(str, arguments), *words], catch_exceptions=False)


LINES = ['"w7 w8 w9 w10"', "", '{"text": "w11 w12 w13", "id": 4}', '"w20 w21 w22"']
TEXTS = ["w7 w8 w9 w10", "w11 w12 w13", "w20 w21 w22"]


@pytest.mark.parametrize("words", [(), ("--chunk-prefix", "filler", "--namespace", "tenant", "--batch-size", "2")])
def test_the_command_stores_a_corpus_that_generate_then_finds(folder, model, word_tokenizer, words):
    (folder / "prefix.txt").write_text("<s> w30 w31\n")
    words = (*words, "--prefix-file", str(folder / "prefix.txt"))
    first = run(folder, LINES[:2], *words)
    assert first.exit_code == 0, first.output
    assert "1 chunks: 1 computed and stored, 0 were there" in first.stdout
    assert first.stderr == ""  # no terminal, no bar
    second = json.loads(run(folder, LINES, *words, "--json").stdout)
    assert (second["chunks"], second["computed"], second["skipped"], second["tokens"]) == (3, 2, 1, 6)
    prompt = hfblend.Prompt.from_texts(word_tokenizer, prefix="<s> w30 w31\n", chunks=TEXTS, suffix="w40")
    settings = config(0.3, separator=None)
    if words[0] == "--chunk-prefix":
        settings = config(0.3, separator=None, chunk_prefix="filler", namespace="tenant")
    with hfblend.patch(model, config=settings, tokenizer=word_tokenizer, store=folder / "chunks") as blender:
        generate(model, prompt.inputs())
        assert (blender.trace.hits, blender.trace.misses, blender.trace.prefix.status) == (3, 0, "hit")


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        (['"w7"', "{"], (), "line 2: no JSON"),
        (b'"w7"\n\n"\xff"', (), "line 3: no JSON"),
        (['{"text": " "}'], (), "line 1: the text is empty"),
        (['{"body": "w7"}'], (), "line 1: no field 'text', only body"),
        (['"w7"', "7"], (), "line 2: expected a text"),
        (['"w7"', '"w7 \\ud800 w8"'], (), "line 2: the text must be valid Unicode"),
        ([""], (), "holds no texts"),
        (['"w7"'], ("--dtype", "int8"), "floating-point type"),
        (['"w7"'], ("--chunk-prefix", "nothing"), "chunk_prefix must be one of"),
        (['"w7"'], ("--max-bytes", "much"), "max_bytes must be"),
        (['"w7"'], ("--prefix", "w8 \udcff"), "--prefix must be valid Unicode"),
        (['"w7"'], ("--prefix", "w8", "--prefix-file", "MODEL/config.json"), "use one"),
    ],
)
def test_the_command_names_the_bad_line_or_option(folder, lines, words, message):
    outcome = run(folder, lines, *(word.replace("MODEL", str(folder / "model")) for word in words))
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())
    assert "Traceback" not in outcome.output


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs pipes with names")
def test_a_pipe_is_refused(folder):
    """It is empty when it is read again: nothing would be stored, and nothing said."""
    reads, writes = os.pipe()
    os.write(writes, b'"w7"\n')
    os.close(writes)
    words = ["--corpus", f"/dev/fd/{reads}", "--store", str(folder / "chunks"), "--model", str(folder / "model")]
    outcome = CliRunner().invoke(app, ["precompute", *words])
    os.close(reads)
    assert outcome.exit_code == 2
    assert "the corpus is read twice" in " ".join(outcome.stderr.split())


def test_other_failures_of_the_command(folder, monkeypatch):
    none = CliRunner().invoke(app, ["precompute", "--corpus", str(folder / "none"), "--store", str(folder / "chunks")])
    assert none.exit_code == 2
    no_model = run(folder, LINES, "--model", str(folder / "none"))
    assert (no_model.exit_code, "Traceback" in no_model.output) == (1, False)
    small = run(folder, LINES, "--max-bytes", "10")
    assert small.exit_code == 1
    assert "3 not kept by the store" in small.stdout
    monkeypatch.setattr(precomputing._Run, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = run(folder, LINES)
    assert (stopped.exit_code, "goes on from there" in stopped.stderr) == (130, True)


def test_the_bar_counts_chunks():
    from hfblend.trace.progress import Line

    line, heard = Line("Computing chunks", 10), []
    for report in (precomputing.Precomputed(5, 2, 1, 0), precomputing.Precomputed(5, 2, 1, 1, tokens=30, seconds=2.0)):
        precomputing._tell(line, heard.append, report)
    assert str(line) == "Computing chunks, 15 tokens/s, 1 not kept: 4 of 10 …"
    assert heard[-1] is report


def test_the_example_of_the_documentation_runs(model, word_tokenizer):
    page = (Path(__file__).parent.parent / "docs" / "store.md").read_text(encoding="utf-8")
    block = re.search(r"## Before the first question\n.*?```python\n(.*?)```", page, re.DOTALL)[1]
    names = {
        "hfblend": hfblend,
        "model": model,
        "tokenizer": word_tokenizer,
        "documents": TEXTS * 40,
        "system": "<s> w30 w31",
    }
    exec(block.replace('store="chunks"', "store=None"), names)
    assert str(names["report"]).startswith("120 chunks: 3 computed and stored, 117 were there")
    assert (names["blender"].trace.hits, names["blender"].trace.misses) == (100, 0)
