"""RAG with Haystack, through its own wrapper of Transformers; a separator in the template marks the chunks.

pip install haystack-ai transformers-haystack
python examples/rag_haystack.py
"""

from haystack import Document, Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.dataclasses import ChatMessage
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.generators.transformers import TransformersChatGenerator

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

SEPARATOR = " # # "  # BlendConfig's default
QUESTIONS = ("Where was the builder of Gannet Light born?", "Who was the first keeper of Gannet Light?")


def make_pipeline(model, tokenizer) -> Pipeline:
    """retriever -> prompt -> generator."""
    data = demo_data()
    documents = InMemoryDocumentStore()
    documents.write_documents([Document(content=passage["text"]) for passage in data["passages"]])
    user = f"Passages:{{% for document in documents %}}{SEPARATOR}{{{{ document.content }}}}{{% endfor %}}"
    template = [ChatMessage.from_system(data["system"]), ChatMessage.from_user(f"{user}{SEPARATOR}{{{{ question }}}}")]
    generator = TransformersChatGenerator(
        task="text-generation",
        generation_kwargs={"max_new_tokens": 24, "do_sample": False},
        huggingface_pipeline_kwargs={"model": model, "tokenizer": tokenizer, "device": model.device},
    )
    rag = Pipeline()
    rag.add_component("retriever", InMemoryBM25Retriever(documents, top_k=6))
    rag.add_component("prompt", ChatPromptBuilder(template, required_variables=["documents", "question"]))
    rag.add_component("generator", generator)
    rag.connect("retriever.documents", "prompt.documents")
    rag.connect("prompt.prompt", "generator.messages")
    return rag


def answer(rag: Pipeline, question: str) -> str:
    outcome = rag.run({"retriever": {"query": question}, "prompt": {"question": question}})
    return outcome["generator"]["replies"][0].text


if __name__ == "__main__":
    model, tokenizer = load()
    with hfblend.patch(model, tokenizer=tokenizer) as blender:
        rag = make_pipeline(model, tokenizer)
        for question in QUESTIONS:
            print(f"{question}\n  {answer(rag, question).strip()}\n  {blender.trace}")
