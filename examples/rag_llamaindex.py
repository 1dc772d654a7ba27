"""RAG with LlamaIndex, through its own HuggingFaceLLM; a separator in the text marks the chunks.

pip install llama-index-llms-huggingface
python examples/rag_llamaindex.py
"""

from llama_index.core import PromptTemplate, get_response_synthesizer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.huggingface import HuggingFaceLLM

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

SEPARATOR = " # # "  # BlendConfig's default
QUESTIONS = ("Where was the builder of Gannet Light born?", "Who was the first keeper of Gannet Light?")


class WordRetriever(BaseRetriever):
    """The passages that share most words with the question; an index's retriever goes here."""

    def __init__(self, passages: list[str], count: int = 6) -> None:
        super().__init__()
        self.passages, self.count = passages, count

    def _retrieve(self, query: QueryBundle) -> list[NodeWithScore]:
        words = set(query.query_str.lower().strip("?").split())
        shared = {text: len(words & set(text.lower().split())) for text in self.passages}
        best = sorted(self.passages, key=lambda text: -shared[text])[: self.count]
        return [NodeWithScore(node=TextNode(text=text), score=float(shared[text])) for text in best]


def make_engine(model, tokenizer) -> RetrieverQueryEngine:
    """question -> answer."""
    data = demo_data()
    passages = [passage["text"] for passage in data["passages"]]
    llm = HuggingFaceLLM(
        model=model, tokenizer=tokenizer, context_window=4096, max_new_tokens=24, generate_kwargs={"do_sample": False}
    )

    def as_chunks(context_str: str, **_: object) -> str:
        """LlamaIndex joins the passages' texts with an empty line."""
        return SEPARATOR.join(context_str.split("\n\n"))

    template = PromptTemplate(
        f"<|im_start|>system\n{data['system']}<|im_end|>\n<|im_start|>user\nPassages:{SEPARATOR}{{context_str}}"
        f"{SEPARATOR}{{query_str}}<|im_end|>\n<|im_start|>assistant\n",
        function_mappings={"context_str": as_chunks},
    )
    synthesizer = get_response_synthesizer(llm=llm, text_qa_template=template, response_mode=ResponseMode.COMPACT)
    return RetrieverQueryEngine(WordRetriever(passages), synthesizer)


if __name__ == "__main__":
    model, tokenizer = load()
    with hfblend.patch(model, tokenizer=tokenizer) as blender:
        engine = make_engine(model, tokenizer)
        for question in QUESTIONS:
            print(f"{question}\n  {str(engine.query(question)).strip()}\n  {blender.trace}")
