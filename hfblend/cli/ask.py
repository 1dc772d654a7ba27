"""`hfblend ask`: a question about one's own files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..arguments import require_text
from ..documents import Document, Passage, Unreadable, files_of, nearest, passages_of, read
from ..trace.progress import told
from ..util import require_folders_of, visible
from .common import load, shown_on, stderr, store_at, write_json
from .explain import config_of
from .options import Correction, Device, DType, Json, Model, NewTokens, Ratio, Rule

if TYPE_CHECKING:
    from rich.console import Console

    from ..patching import Blender
    from ..prompts.prompt import Prompt
    from ..trace.trace import BlendTrace


def ask(
    sources: Annotated[list[Path], Argument(metavar="FOLDER|FILES", help="Text, Markdown, HTML and PDF files.")],
    question: Annotated[str, Argument(metavar="QUESTION", help="The question, in quotes.")],
    passages: Annotated[int, Option(help="So many, nearest to the question, are read.", min=1)] = 8,
    encoding: Annotated[str, Option(help="Of text and HTML files.")] = "utf-8",
    skip_unreadable: Annotated[bool, Option("--skip-unreadable", help="Leave out files that cannot be read.")] = False,
    compare: Annotated[bool, Option(help="Measure a full prefill too, for the last line.")] = True,
    html: Annotated[Path | None, Option(help="Write answer, passages and trace to this page.")] = None,
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    correction: Correction = None,
    store: Annotated[
        str | None,
        Option(help="Folder or URL that keeps the chunk KV.", show_default=".hfblend next to the documents"),
    ] = None,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    dtype: DType = None,
    json_file: Json = None,
) -> None:
    """Answer a question about the files of a folder; a passage's KV is stored, and later questions reuse it.

    Example: hfblend ask examples/notes "Who was the builder of Gannet Light?"

    Example: hfblend ask examples/notes/*.pdf "What is the main ingredient of pellow soup?" --html answer.html
    """
    require_folders_of(html, json_file)
    asked, config = _question(question, sources), config_of(ratio, selection, correction)
    files, others = files_of(sources)
    if html is not None and html.resolve() in {file.resolve() for file in files.values()}:
        raise ValueError(f"--html {html} is one of the documents, and would replace it; name another file.")
    found = _read_all(files, others, encoding, skip_unreadable)
    ranked = nearest(found, asked, passages)
    kept_in = store_at(store or str(_folder_beside(sources)))
    loaded, tokenizer, _ = load(model, device, dtype)
    chosen, prompt = _fitting(loaded, tokenizer, found, ranked, asked, max_new_tokens)
    of_files = ", ".join(f"{name} ({count})" for name, count in Counter(one.name for one in chosen).items())
    _note(f"{len(found)} passage{'s' * (len(found) > 1)}; given to the model: {len(chosen)}, of {of_files}.")

    from ..display import Display
    from ..patching import patch

    with patch(loaded, config, tokenizer, kept_in, trace="summary" if html is None else "tokens") as blender:
        answer, trace, full_ms = _answer(blender, prompt, max_new_tokens, compare, shown_on(json_file))
    _note(summary_of(trace, full_ms))
    if html is not None:
        Display(trace, title=asked, answers={"answer": answer, "cost": summary_of(trace, full_ms)}).save(html)
        _note(f"Wrote {html}")
    passages_as_json = [{"file": one.name, "text": one.text} for one in chosen]
    figures = {"question": asked, "answer": answer, "full_prefill_ttft_ms": full_ms, "passages": passages_as_json}
    write_json(json_file, {**figures, "trace": trace.to_dict()})


def _note(text: str) -> None:
    stderr.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def _question(text: str, sources: Sequence[Path]) -> str:
    """Returns the question; refuses a path in its place, and its words in the place of paths."""
    missing = [str(source) for source in sources if not os.path.exists(source)]
    if not text.strip() or os.path.exists(text) or len(missing) > 1:
        got = f"the path {text}" if text.strip() else "an empty text"
        got = f"{' '.join([*missing, text])!r} without quotes" if len(missing) > 1 else got
        raise ValueError(f'The last argument is the question, in quotes; got {got}. Write: hfblend ask FOLDER "Who?"')
    return require_text("The question", text.strip())


# --- the documents ----------------------------------------------------------------------------------------------------


def _read_all(files: dict[str, Path], others: Sequence[str], encoding: str, skip: bool) -> list[Passage]:
    """Returns the passages of all files; says on stderr what was left out, which files of other kinds are, too.

    Raises:
        Unreadable: files that cannot be read, all in one message; with `skip`, if none can.
    """
    documents: list[Document] = []
    unreadable: list[str] = []
    with told("Reading files", total=len(files)) as line:
        for name, file in files.items():
            try:
                documents.append(read(name, file, encoding))
            except Unreadable as error:
                unreadable.append(str(error))
            line.advance()
    if unreadable and not (skip and documents):
        hint = "" if skip or len(files) == 1 else "\nOr leave them out: --skip-unreadable."
        raise Unreadable("\n".join(unreadable) + hint)
    notes = [f"Left out: {reason}" for reason in unreadable]
    notes += [f"Left out, of other kinds: {', '.join(others[:5])}{' …' * (len(others) > 5)}"] * bool(others)
    for note in [*notes, *(f"{one.name}: {one.note}" for one in documents if one.note)]:
        _note(note)
    return [passage for document in documents for passage in passages_of(document)]


def _folder_beside(sources: Sequence[Path]) -> Path:
    """Returns the folder `.hfblend` in the first folder that was named, or next to the first file."""
    folder = (sources[0] if sources[0].is_dir() else sources[0].absolute().parent) / ".hfblend"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}); name another folder with --store.") from error
    return folder


def _fitting(
    model: Any, tokenizer: Any, passages: Sequence[Passage], ranked: Sequence[int], question: str, new_tokens: int
) -> tuple[list[Passage], Prompt]:
    """Returns as many of the nearest passages as the model's context holds, in the order of the files, and the prompt.

    Raises:
        ValueError: not even the nearest one fits.
    """
    from ..demo.passages import demo_data, question_prompt

    system = demo_data()["system"]
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for count in range(len(ranked), 0, -1):
        chosen = [passages[i] for i in sorted(ranked[:count])]
        prompt = question_prompt(tokenizer, system, [str(one) for one in chosen], question)
        if len(prompt) + new_tokens <= room:
            if left := len(ranked) - count:
                _note(f"Left out: the {left} passages farthest from the question; the context is {room:,} tokens.")
            return chosen, prompt
    raise ValueError(
        f"The question and one passage have {len(prompt):,} tokens, and the answer may have {new_tokens}; this model's "
        f"context is {room:,}. Ask a shorter question, lower --max-new-tokens, or take a model with a longer context."
    )


# --- the answer -------------------------------------------------------------------------------------------------------


def _answer(
    blender: Blender, prompt: Prompt, num_tokens: int, compare: bool, console: Console
) -> tuple[str, BlendTrace, float | None]:
    """Answers; returns the answer, its trace and, if they are compared, full prefill's time to the first token."""
    from ..demo.passages import FULL_PREFILL, Typed, greedy_answer

    model, tokenizer = blender.model, blender.tokenizer
    with told(f"Reading {len(prompt.chunk_spans)} passages") as line:
        answer = greedy_answer(model, tokenizer, prompt, num_tokens, streamer=Typed(tokenizer, console, line))
    trace = blender.trace
    if not (compare and trace.blended):
        return answer, trace, None
    with told("Measuring a full prefill, to compare (--no-compare leaves it out)"):
        greedy_answer(model, tokenizer, prompt, 1, FULL_PREFILL)
    return answer, trace, blender.trace.ttft_ms


def summary_of(trace: BlendTrace, full_ms: float | None) -> str:
    """Returns the line after an answer: what was reused and recomputed, and the time to the first token."""
    if not trace.blended or trace.ttft_ms is None:
        return f"{trace}"
    compared = f"; full prefill {full_ms:,.0f} ms ({full_ms / trace.ttft_ms:.1f}×)" if full_ms else ""
    share = (trace.computed_pairs + trace.isolated_pairs) / trace.total_pairs
    return (
        f"{trace.hits} of {len(trace.chunks)} passages reused, {trace.misses} computed and stored; "
        f"{share:.0%} of a full prefill's rows computed; "
        f"first token after {trace.ttft_ms:,.0f} ms{compared}"
    )
