"""Reads the text of text, Markdown, HTML and PDF files."""

from __future__ import annotations

import codecs
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from ..util import require

OWN_PAGE = '<meta name="generator" content="hfblend">'  # stands in every page that hfblend writes


@dataclass(frozen=True)
class Document:
    """The text of a file.

    Attributes:
        name: the file's path from the folder that was given, or its name.
        note: a remark on what could not be read of it; empty if all was.
    """

    name: str
    text: str
    note: str = ""


class Unreadable(ValueError):
    """A file that cannot be read; the message names it and says what to do."""


# --- finding ----------------------------------------------------------------------------------------------------------


def files_of(sources: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Returns the files of folders and paths by name, and the names of files in the folders that are of other kinds.

    Hidden files and folders are not looked at, nor pages in folders that hfblend wrote. A file counts once.

    Raises:
        Unreadable: a path that does not exist, a file of another kind that was named, or nothing to read at all.
    """
    found: dict[str, Path] = {}
    others: list[str] = []
    seen: set[Path] = set()
    for source in sources:
        if os.path.isdir(source):
            for name, file in _inside(source):
                if file.suffix.lower() in _READERS and not _is_own_page(file):
                    _add(found, seen, name, file)
                else:
                    others.append(name)
        elif not os.path.isfile(source):
            raise Unreadable(f"There is no file or folder {source}.")
        elif source.suffix.lower() not in _READERS:
            raise Unreadable(f"{source} is of an unknown kind; {_KNOWN}. Convert it to one of these.")
        else:
            _add(found, seen, source.name, source)
    if not found:
        where, holds = ", ".join(map(str, sources)), f"{len(others)} files of other kinds" if others else "no files"
        raise Unreadable(f"There is nothing to read in {where}: it holds {holds}; {_KNOWN}.")
    return found, others


def _add(found: dict[str, Path], seen: set[Path], name: str, file: Path) -> None:
    """Adds a file once, under a name that can be printed; its path, where another has its name."""
    where = file.resolve()
    if where not in seen:
        seen.add(where)
        found[_printable(name if name not in found else str(file))] = file


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def _is_own_page(file: Path) -> bool:
    """Whether hfblend wrote the page, such as an answer's: its text would be a source of the next answer."""
    try:
        with file.open("rb") as page:
            return OWN_PAGE.encode() in page.read(2048)
    except OSError:
        return False


def _inside(folder: Path) -> Iterable[tuple[str, Path]]:
    """Yields the visible files of a folder and of those in it, in order of their names."""
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in inner.parts):
            yield inner.as_posix(), file


# --- reading ----------------------------------------------------------------------------------------------------------


def read(name: str, file: Path, encoding: str = "utf-8") -> Document:
    """Returns the text of a file, as its ending says.

    Raises:
        Unreadable: a file without text, in another encoding, encrypted or damaged.
        ImportError: a PDF file, without the package `pypdf`.
    """
    try:
        text, note = _READERS[file.suffix.lower()](file, encoding)
    except OSError as error:
        raise Unreadable(f"{file} cannot be read: {error.strerror or error}.") from error
    if not text.strip():
        raise Unreadable(f"{file} holds no text.")
    return Document(name, text.replace("\r\n", "\n"), note)


def _read_text(file: Path, encoding: str) -> tuple[str, str]:
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else encoding
    try:
        text = content.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    except LookupError as error:
        raise ValueError(
            f"There is no encoding {encoding!r}; Python's are names such as 'latin-1' or 'cp1252'."
        ) from error
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{file} is not encoded as {encoding} (byte {content[error.start]:#04x} at {error.start:,}). Name its "
            "encoding, such as --encoding cp1252, or convert it: `iconv -f CP1252 -t UTF-8 IN > OUT`."
        ) from error
    if "\0" in text:
        raise Unreadable(f"{file} is no text: it holds zero bytes.")
    return text, ""


def _read_html(file: Path, encoding: str) -> tuple[str, str]:
    page = _Page()
    page.feed(_read_text(file, encoding)[0])
    page.close()
    return page.text, ""


_UNSEEN = ("script", "style", "template", "title")
_INLINE = re.compile(
    "a|abbr|b|bdi|bdo|cite|code|data|del|dfn|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strong|sub|sup|time|u|var"
)
_GAPS = {"br": "\n", "tr": "\n", "td": " ", "th": " ", "wbr": ""}


class _Page(HTMLParser):
    """Collects the text of a page: blocks become paragraphs, headings those of Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._unseen = 0  # elements around that are not shown

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._unseen += tag in _UNSEEN
        self._parts.append(_gap(tag) + ("# " if re.fullmatch("h[1-6]", tag) else ""))

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        self._parts.append(_gap(tag))

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._parts.append(re.sub(r"\s+", " ", data))

    @property
    def text(self) -> str:
        lines = (re.sub(r"[ \t]+", " ", line).strip() for line in "".join(self._parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _gap(tag: str) -> str:
    """Returns what parts the text before and after a tag: a blank line, unless it is one within a paragraph."""
    return "" if _INLINE.fullmatch(tag) else _GAPS.get(tag, "\n\n")


def _read_pdf(file: Path, encoding: str) -> tuple[str, str]:
    pypdf = require("pypdf", "pypdf", "ask", "Reading PDF files needs")
    logging.getLogger("pypdf").addHandler(logging.NullHandler())  # else its remarks on a damaged file go to stderr
    pages = None
    try:
        reader = pypdf.PdfReader(file)
        if not reader.is_encrypted or reader.decrypt(""):
            pages = [page.extract_text() for page in reader.pages]
    except pypdf.errors.DependencyError:
        pass  # encrypted by AES, which another package reads
    except (pypdf.errors.PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{file} cannot be read as PDF: {error}") from error
    if pages is None:
        raise Unreadable(f"{file} is encrypted. Save a copy in the clear: `qpdf --decrypt --password=… IN OUT`.")
    blank = sum(not page.strip() for page in pages)
    if blank == len(pages):
        raise Unreadable(
            f"{file} holds no text on its {len(pages)} pages; they are probably scanned. Recognise the text first: "
            "`ocrmypdf IN OUT`."
        )
    return "\n\n".join(pages), f"{blank} of {len(pages)} pages hold no text; scanned?" if blank else ""


_READERS: dict[str, Callable[[Path, str], tuple[str, str]]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), _read_text),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _read_html),
    ".pdf": _read_pdf,
}
_KNOWN = f"known kinds are {', '.join(_READERS)}"
