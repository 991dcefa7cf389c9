"""Texts: the default one, every format, folders and the Hub; a bad one is one line that says what to do."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import pytest

from empirics.data import load_corpus, load_text
from empirics.texts import DEFAULT_BYTES, split


def test_default_text_is_the_same_on_every_machine() -> None:
    text = load_text()
    size = sum(len(document.encode()) for document in text.documents)
    assert size == pytest.approx(DEFAULT_BYTES, abs=4)
    assert "sympy" in text.description
    if importlib.metadata.version("sympy") == "1.14.0":
        assert text.digest == "4e6d6e2e0714e42cbac1d5e6a4e6f613c0420171fbee285934b7ea5bb31f0a07"


def test_default_text_is_spread_over_the_package() -> None:
    """A tenth of the budget already holds most of the large subpackages: a prefix is a fair sample."""
    text = "".join(load_text(limit=600_000).documents)
    large = ["polys", "physics", "core", "solvers", "functions", "printing", "matrices", "combinatorics"]
    assert sum(f"sympy.{name}" in text for name in large) >= 6


@pytest.mark.parametrize(
    "lengths", [[1000], [10, 10_000], [10_000, 10], [1] * 30 + [9000]], ids=["one", "last", "first", "giant"]
)
def test_split_is_near_the_share_even_where_documents_are_not(lengths: list[int]) -> None:
    documents = ["line\n" * length for length in lengths]
    train, heldout, is_whole = split(documents)
    assert 0.02 < len("".join(heldout)) / len("".join(documents)) < 0.11
    assert train[-1].endswith("\n")
    assert "".join(train + heldout) == "".join(documents)
    assert is_whole == (train == documents[: len(train)])


def test_formats_hold_the_same_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["first\u00e9", "second\nline", "third"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps({"text": text, "id": 1}) for text in texts), encoding="utf-8")
    columns = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4, 5], "text": [*texts, None, " "]}), columns)
    assert load_text(str(lines)).documents == load_text(str(columns)).documents == tuple(texts)
    assert load_text(str(lines)).digest == load_text(str(columns)).digest
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"\xef\xbb\xbffirst\r\nsecond")
    assert load_text(str(plain)).documents == ("first\r\nsecond",)
    assert load_text(str(plain)).description == "a.txt, 1 document, 1.3e-05 MB"


def test_limit_cuts_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\u00e9" * 10, encoding="utf-8")
    assert load_text(str(path), limit=5).documents == ("\u00e9\u00e9",)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n', encoding="utf-8")
    assert load_text(str(path)).documents == ("a?b",)


def hub(rows: list[dict[str, str]], calls: list[tuple[tuple[str | None, ...], dict[str, object]]]) -> types.ModuleType:
    module = types.ModuleType("datasets")

    def load_dataset(*names: str | None, **options: object) -> list[dict[str, str]]:
        calls.append((names, options))
        if not rows:
            raise ConnectionError("Couldn't reach the Hub\nmany more lines")
        return rows

    setattr(module, "load_dataset", load_dataset)  # noqa: B010  (a module has no such attribute to a type checker)
    return module


def test_hub_is_streamed_and_runs_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[tuple[str | None, ...], dict[str, object]]] = []
    rows = [{"text": f"document {i} " * 10} for i in range(100)]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, calls))
    text = load_text("hf:allenai/c4", limit=1000)
    assert sum(len(document) for document in text.documents) == 1000
    load_text("hf:allenai/c4:de")
    load_text("hf:someone/words")
    assert [names for names, _ in calls] == [("allenai/c4", "en"), ("allenai/c4", "de"), ("someone/words", None)]
    assert all(options == {"split": "train", "streaming": True} for _, options in calls)
    built = load_corpus("hf:allenai/c4", vocab_size=300, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_corpus("hf:allenai/c4", vocab_size=300, cache=tmp_path).digest == built.digest


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(module: types.ModuleType | None, spec: str = "hf:allenai/c4") -> str:
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(ValueError, match="hf:") as caught:
            load_text(spec)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "pip install 'spikecheck[hf]'" in message(None)
    assert "Couldn't reach the Hub" in message(hub([], []))
    assert 'no column "text"' in message(hub([{"words": "a"}], []))
    assert "names no data set" in message(hub([], []), "hf:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no text .*missing.txt.*; use sympy"),
        ("a.txt", b"", "holds no text; use"),
        ("a.txt", b" \n\n", "holds no text; use"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text; convert"),
        ("a.jsonl", b"", "holds no text; use"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "b"}\n', 'line 2 has no string "text"; write'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no string "text"; write'),
        ("a.jsonl", b"[1]\n", 'line 1 has no string "text"; write'),
        ("a.jsonl", b'{"text": "a"\n', "line 1 is not JSON; write"),
        ("a.jsonl", b"\xff\n", "is not UTF-8 text; convert"),
        ("a.parquet", b"PAR1", "is not a readable parquet file; write"),
    ],
)
def test_bad_texts_name_the_remedy(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message) as caught:
        load_text(str(path))
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "words.txt"
    plain.write_text("words")

    def fail(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ValueError, match=r"cannot read .*words.txt \(Input/output error\); name a readable"):
        load_text(str(plain))


def test_parquet_without_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"words": ["a"]}), path)
    with pytest.raises(ValueError, match='no column "text", only words; rename'):
        load_text(str(path))
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(ValueError, match="holds int; make it a string"):
        load_text(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"spikecheck\[hf\]"):
        load_text(str(path))


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "1.json.gz").write_bytes(gzip.compress(b'{"text": "third"}\n{"text": "fourth"}\n'))
    (tmp_path / "b" / "2.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "notes.md").write_text("no part of it")
    (tmp_path / "x [1].txt").write_text("fifth")
    documents = load_text(str(tmp_path)).documents
    assert documents == ("first", "second", "third", "fourth", "fifth")
    assert load_text(str(tmp_path / "**" / "*.gz")).documents == ("second", "third", "fourth")
    assert load_text(str(tmp_path / "*.md")).documents == ("no part of it",)
    assert load_text(str(tmp_path / "x [1].txt")).documents == ("fifth",)  # a name before it is a pattern
    (tmp_path / "b" / "2.txt.gz").write_bytes(gzip.compress(b"second")[:-9])
    with pytest.raises(ValueError, match=r"2.txt.gz is not a whole gzip file; fetch or write it again"):
        load_text(str(tmp_path))
    (tmp_path / "b" / "2.txt.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_text(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file of .* ends in .txt, .*; name a glob"):
        load_text(str(tmp_path / "empty"))
