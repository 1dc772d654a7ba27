"""One's own files: what is read of each kind, where it is cut, what is found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfblend.documents import Document, Passage, Unreadable, files_of, nearest, passages_of, read


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def pdf(file: Path, *pages: str, password: str = "", algorithm: str = "RC4-128") -> Path:
    """Writes a PDF file with a line of text on each page; an empty text leaves a page as a scanner does."""
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(name): NameObject(value) for name, value in names.items()})
    fonts = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
    writer = pypdf.PdfWriter()
    for text in pages:
        page, stream = writer.add_blank_page(612, 792), DecodedStreamObject()
        stream.set_data(f"BT /F1 11 Tf 50 750 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Resources")], page[NameObject("/Contents")] = fonts, writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm=algorithm)
    writer.write(file)
    return file


# --- finding ----------------------------------------------------------------------------------------------------------


def test_a_folders_files_are_found_and_hidden_ones_left(tmp_path):
    for name in ("b.md", "a/c.TXT", "photo.jpg", ".hidden.md", ".hfblend/x.txt", "a/.git/y.txt"):
        written(tmp_path, name, "w1")
    files, others = files_of([tmp_path])
    assert list(files) == ["a/c.TXT", "b.md"]
    assert others == ["photo.jpg"]


def test_files_of_the_same_name_are_told_apart(tmp_path):
    one, other = written(tmp_path, "a/x.md", "w1"), written(tmp_path, "b/x.md", "w2")
    assert list(files_of([one, other])[0].values()) == [one, other]
    assert list(files_of([tmp_path / "a", tmp_path / "b"])[0].values()) == [one, other]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "There is no file or folder"),
        ("empty", "it holds no files; known kinds are .txt"),
        ("pictures", "it holds 1 files of other kinds"),
        ("pictures/a.png", "is of an unknown kind; known kinds are"),
    ],
)
def test_nothing_to_read_is_refused(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    written(tmp_path, "pictures/a.png", b"\x89PNG")
    with pytest.raises(Unreadable, match=said):
        files_of([tmp_path / name])


# --- reading ----------------------------------------------------------------------------------------------------------

HTML = """<!doctype html><title>No</title><style>p {color: red}</style><h1>The light</h1>
<p>Built in <b>1871</b>
   by Orla&nbsp;&amp; Co.<br>It stands.</p><script>let no = 1 < 2</script><ul><li>one<li>two</ul>
<table><tr><td>a</td><td>b</td></tr></table>tail"""


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "\ufeffw1 ä\r\nw2", "w1 ä\nw2"),
        ("a.md", "# w1\n\nw2", "# w1\n\nw2"),
        ("a.rst", "w1 ä".encode("utf-16"), "w1 ä"),
        ("a.html", HTML, "# The light\n\nBuilt in 1871 by Orla & Co.\nIt stands.\n\none\n\ntwo\n\na b\n\ntail"),
    ],
)
def test_the_text_of_each_kind(tmp_path, name, content, text):
    assert read(name, written(tmp_path, name, content)) == Document(name, text)


def test_the_text_of_a_pdf_file(tmp_path):
    document = read("a.pdf", pdf(tmp_path / "a.pdf", "w1 w2", "", "w3"))
    assert document.text.split() == ["w1", "w2", "w3"]
    assert document.note == "1 of 3 pages hold no text; scanned?"
    assert read("b.pdf", pdf(tmp_path / "b.pdf", "w1")).note == ""


def test_another_encoding_is_named(tmp_path):
    file = written(tmp_path, "a.txt", "é".encode("latin-1"))
    with pytest.raises(Unreadable, match=r"not encoded as utf-8 \(byte 0xe9 at 0\).*--encoding cp1252"):
        read("a.txt", file)
    assert read("a.txt", file, "latin-1").text == "é"
    with pytest.raises(ValueError, match="There is no encoding 'latin-77'"):
        read("a.txt", file, "latin-77")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", " \n", "holds no text"),
        ("a.txt", b"w1\x00w2", "is no text: it holds zero bytes"),
        ("a.html", "<script>let a</script>", "holds no text"),
        ("a.md", None, "cannot be read: No such file"),
    ],
)
def test_files_without_text_are_refused(tmp_path, name, content, said):
    file = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(Unreadable, match=said):
        read(name, file)


def test_pdf_files_without_text_are_refused(tmp_path):
    with pytest.raises(Unreadable, match=r"no text on its 2 pages; they are probably scanned.*ocrmypdf"):
        read("a.pdf", pdf(tmp_path / "a.pdf", "", ""))
    for algorithm in ("RC4-128", "AES-256"):
        pytest.importorskip("cryptography")  # which only writing AES needs
        with pytest.raises(Unreadable, match=r"is encrypted\. Save a copy in the clear: `qpdf"):
            read("b.pdf", pdf(tmp_path / "b.pdf", "w1", password="secret", algorithm=algorithm))
    for content in (b"", b"no PDF", b"%PDF-1.7\n1 0 obj\n<<", (tmp_path / "b.pdf").read_bytes()[:300]):
        with pytest.raises(Unreadable, match=r"cannot be read as PDF|is encrypted|holds no text"):
            read("c.pdf", written(tmp_path, "c.pdf", content))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    file = written(tmp_path, "a.pdf", b"%PDF")
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    with pytest.raises(ImportError, match=r"PDF files needs the package pypdf: run `pip install 'hfblend\[ask\]'`"):
        read("a.pdf", file)


# --- passages ---------------------------------------------------------------------------------------------------------


def texts(text: str, characters: int) -> list[str]:
    return [one.text for one in passages_of(Document("a.md", text), characters)]


def test_passages_are_whole_paragraphs_with_their_headings():
    text = "# A\n\n## B\n\none two\n\nthree\n\n# C\n\nfour five six\n\n# D"
    assert texts(text, 22) == ["# A\n\n## B\n\none two", "three", "# C\n\nfour five six", "# D"]
    assert texts(text, 1000) == [text]


def test_long_paragraphs_are_cut_at_sentences_and_long_sentences_anywhere():
    assert texts("One is. Two is!\nThree is? Four", 15) == ["One is. Two is!", "Three is? Four"]
    assert texts("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert texts("一二。三四。五六。", 6) == ["一二。", "三四。", "五六。"]


def test_no_passage_is_longer_than_allowed_and_none_is_lost():
    text = "\n\n".join(f"Sentence number {i}. " * (i % 7 + 1) for i in range(40))
    found = texts(text, 90)
    assert max(map(len, found)) <= 90
    assert "".join("".join(found).split()) == "".join(text.split())


PASSAGES = [Passage("a.md", "The cat sat on a mat."), Passage("b.md", "A dog ran."), Passage("c.md", "日本語の文")]


@pytest.mark.parametrize(("question", "first"), [("Which dog RAN?", 1), ("a mat", 0), ("日本", 2), ("c.md", 2)])
def test_the_nearest_passage_comes_first(question, first):
    pytest.importorskip("bm25s")
    found = nearest(PASSAGES, question, 2)
    assert found[0] == first
    assert len(set(found)) == 2


@pytest.mark.parametrize("question", ["the", "?", "unknown words"])
def test_a_question_without_a_word_of_them_finds_some(question):
    pytest.importorskip("bm25s")
    assert sorted(nearest(PASSAGES, question, 9)) == [0, 1, 2]
    assert nearest([Passage("a.md", "?!")], question, 1) == [0]
