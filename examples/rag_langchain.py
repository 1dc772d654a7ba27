"""RAG with LangChain, through its own HuggingFace wrappers; a separator in the text marks the chunks.

pip install langchain-huggingface
python examples/rag_langchain.py
"""

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import pipeline

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

SEPARATOR = " # # "  # BlendConfig's default
QUESTIONS = ("Where was the builder of Gannet Light born?", "Who was the first keeper of Gannet Light?")


def retrieve(question: str, passages: list[str], count: int = 6) -> list[str]:
    """The passages that share most words with the question; a vector store's retriever goes here."""
    words = set(question.lower().strip("?").split())
    return sorted(passages, key=lambda text: -len(words & set(text.lower().split())))[:count]


def make_chain(model, tokenizer) -> Runnable:
    """question -> answer, a chat message."""
    data = demo_data()
    passages = [passage["text"] for passage in data["passages"]]

    def fill(question: str) -> dict[str, str]:
        return {"passages": SEPARATOR.join(retrieve(question, passages)), "question": question}

    user = f"Passages:{SEPARATOR}{{passages}}{SEPARATOR}{{question}}"
    template = ChatPromptTemplate([("system", data["system"]), ("user", user)])
    generate = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, max_new_tokens=24, do_sample=False, return_full_text=False
    )
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=generate), tokenizer=tokenizer)
    return RunnableLambda(fill) | template | chat


if __name__ == "__main__":
    model, tokenizer = load()
    with hfblend.patch(model, tokenizer=tokenizer) as blender:
        chain = make_chain(model, tokenizer)
        for question in QUESTIONS:
            print(f"{question}\n  {chain.invoke(question).content.strip()}\n  {blender.trace}")
