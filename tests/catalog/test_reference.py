"""What may be written for MODEL."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_phi3.catalog import ModelReferenceError, parse_reference
from edge_phi3.catalog.reference import HubCheckpoint, HubGguf, LocalCheckpoint, LocalGguf
from edge_phi3.demo import DEMO_CHECKPOINT


@pytest.mark.parametrize("text", [None, "", "demo", "phi-3-demo"])
def test_the_demo_is_the_default(text: str | None) -> None:
    assert parse_reference(text) == LocalCheckpoint(DEMO_CHECKPOINT, "phi-3-demo")


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
        ("Phi-3-Mini-128K-Instruct", "microsoft/Phi-3-mini-128k-instruct"),
    ],
)
def test_presets_are_repositories(text: str, repository: str) -> None:
    assert parse_reference(text) == HubCheckpoint(repository, "main", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubCheckpoint("owner/name", "main", "owner/name")),
        ("owner/name@v1.2", HubCheckpoint("owner/name", "v1.2", "owner/name")),
        ("owner/name@refs/pr/7", HubCheckpoint("owner/name", "refs/pr/7", "owner/name")),
        ("owner/name/file.gguf", HubGguf("owner/name", "main", ("file.gguf",))),
        ("owner/name@abc123/sub/file.gguf", HubGguf("owner/name", "abc123", ("sub/file.gguf",))),
        ("owner/name@refs/pr/7/file.gguf", HubGguf("owner/name", "refs/pr/7", ("file.gguf",))),
        (
            "owner/name/big-00001-of-00002.gguf",
            HubGguf("owner/name", "main", ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf")),
        ),
    ],
)
def test_the_hub(text: str, expected: object) -> None:
    reference = parse_reference(text)
    assert reference == expected
    assert parse_reference(reference.text) == reference


def test_names_to_serve_under(tmp_path: Path) -> None:
    assert parse_reference("owner/name/big-00001-of-00002.gguf").name == "big"
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    assert parse_reference(str(tmp_path / "mine.gguf")).name == "mine"


def test_what_lies_here_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert parse_reference("owner/name") == LocalCheckpoint(Path("owner/name"), "name")
    (folder / "file.gguf").write_bytes(b"GGUF...")
    assert parse_reference("owner/name/file.gguf") == LocalGguf(Path("owner/name/file.gguf"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "phi-3-mini-4k",
            r"'phi-3-mini-4k' is neither .* owner/name/file\.gguf\. Did you mean phi-3-mini-4k-instruct\?",
        ),
        ("llama", r"give phi-3-demo, phi-3-mini-4k-instruct, phi-3-mini-128k-instruct, a Hub repository"),
        ("/no/such/folder", r"/no/such/folder does not exist"),
        ("./model.gguf", r"\./model\.gguf does not exist"),
        ("https://example.org/model.gguf", r"is a URL; name a Hub repository as owner/name"),
        ("owner/name/file.bin", "is neither a file nor a folder here"),
        ("owner/name/../../etc/passwd.gguf", r"is not a path within a repository"),
        ("owner/name/..\\x.gguf", r"is not a path within a repository"),
        ("own..er/name", "has neither"),
        ("owner/na me", "is neither"),
    ],
)
def test_what_means_nothing_is_answered_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(ModelReferenceError, match=words):
        parse_reference(text)


def test_local_mistakes_are_answered_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelReferenceError, match=r"has no config\.json; give a Hugging Face checkpoint"):
        parse_reference(str(tmp_path))
    (tmp_path / "part-00002-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelReferenceError, match=r"has no config\.json; it holds part-00002-of-00002\.gguf"):
        parse_reference(str(tmp_path))
    with pytest.raises(ModelReferenceError, match=r"give its first part, part-00001-of-00002\.gguf"):
        parse_reference(str(tmp_path / "part-00002-of-00002.gguf"))
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelReferenceError, match=r"page\.gguf is not a GGUF file \(it begins with b'<htm'\)"):
        parse_reference(str(tmp_path / "page.gguf"))
