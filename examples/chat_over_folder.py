"""A chat about the files of a folder: each turn finds passages, and blends those that an earlier turn has computed.

pip install 'hfblend[ask]'
python examples/chat_over_folder.py examples/notes
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from transformers import TextStreamer

import hfblend
from hfblend.demo.model import load
from hfblend.documents import Passage, files_of, nearest, passages_of, read

SYSTEM = "You answer questions using only the passages given. Keep the answer short."
PLACE = "{the passages of this turn}"
PASSAGES, TURNS = 3, 2  # nearest to a question; earlier turns in a prompt


class Chat:
    """A conversation over passages, with a patched model."""

    def __init__(self, blender: hfblend.Blender, passages: list[Passage]) -> None:
        self.blender, self.passages = blender, passages
        self.questions: list[str] = []
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        model, tokenizer = self.blender.model, self.blender.tokenizer
        self.questions.append(question)
        asked = " ".join(self.questions[-2:])  # "And where was she born?" needs the question before
        chosen = [str(self.passages[i]) for i in sorted(nearest(self.passages, asked, PASSAGES))]
        self.turns.append({"role": "user", "content": f"Question: {question}\nAnswer with a few words."})
        # Passages stand before the conversation: their KV is reused after the same prefix only.
        first, *others = self.turns[-2 * TURNS - 1 :]
        first = {"role": "user", "content": f"Passages:\n{PLACE}{first['content']}"}
        messages = [{"role": "system", "content": SYSTEM}, first, *others]
        prompt = hfblend.Prompt.from_chat(tokenizer, messages, chosen, placeholder=PLACE)
        shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"max_new_tokens": 64, "do_sample": False, "streamer": shown}
        output = model.generate(**prompt.inputs(model.device), **options)
        answer = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def passages_in(folder: Path) -> list[Passage]:
    files, _ = files_of([folder])
    return [passage for name, file in files.items() for passage in passages_of(read(name, file))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat about the files of a folder; an empty line ends it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    given = parser.parse_args()
    if not given.folder.is_dir():
        parser.error(f"there is no folder {given.folder}")
    try:
        passages = passages_in(given.folder)
    except ValueError as error:  # it holds nothing that can be read
        parser.error(str(error))
    model, tokenizer = load(given.model)
    config = hfblend.BlendConfig(min_reused_tokens=0)  # short passages, too
    with hfblend.patch(model, config, tokenizer, given.folder / ".hfblend") as blender:
        chat = Chat(blender, passages)
        with suppress(EOFError, KeyboardInterrupt):
            while question := input("> ").strip():
                chat.ask(question)
                print(f"  {blender.trace}")


if __name__ == "__main__":
    main()
