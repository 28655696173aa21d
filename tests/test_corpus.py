"""A corpus of what is installed: what goes in, how it is split, that it is the same twice, and what is refused."""

import csv
import hashlib
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import corpus
from lowrank_pretrain.data.corpus import Source, installed, make_corpus, read_texts
from lowrank_pretrain.data.text.bins import open_bin
from lowrank_pretrain.data.text.tokenizer import load_tokenizer
from lowrank_pretrain.data.text.tokens import TokenData

COUNT = 400
FILES = ("train.bin", "val.bin", "test.bin", "tokenizer.json", "sources.csv", "SHA256SUMS")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of the interpreter's own library, which is always there."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(library.glob("*.py")) + sorted((library / "encodings").glob("*.py"))
    return [Source(f"package{i % 3} 1.0", ("MIT", "BSD", "unknown")[i % 3], path) for i, path in enumerate(found[:COUNT])]


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    return out, make_corpus(out, vocab_size=300, least=1000, most=200_000, sources=sources)


def test_it_is_a_folder_that_data_tokens_reads(made):
    out, counts = made
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert 200_000 <= counts["train"] < 1_000_000 and counts["val"] > 0 < counts["test"]
    data = TokenData(str(out), 2, seq_len=16, vocab_size=300, test_file="test.bin")
    data.setup()
    sizes = {
        split: len(some.tokens) for split, some in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set))
    }
    assert sizes == counts
    tokenizer, end = load_tokenizer(str(out / "tokenizer.json"))
    ids = open_bin(out / "val.bin")[0].astype(int).tolist()
    assert ids[-1] == end and tokenizer.decode(ids[: ids.index(end)]).strip()


def test_without_a_test_file_the_validation_tokens_are_tested_on(made):
    data = TokenData(str(made[0]), 2, seq_len=16, vocab_size=300)
    data.setup()
    assert data.test_set is data.val_set


def test_the_same_files_make_the_same_corpus(made, sources, tmp_path):
    make_corpus(tmp_path, vocab_size=300, least=1000, most=200_000, sources=reversed(sources))
    for name in FILES:
        if name != "sources.csv":  # of two equal files the first one's package is named
            assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes(), name
    for line in (made[0] / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((made[0] / name).read_bytes()).hexdigest() == digest


def test_each_package_is_named_with_its_licence(made):
    with (made[0] / "sources.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["package"], row["licence"]) for row in rows] == [
        ("package0 1.0", "MIT"), ("package1 1.0", "BSD"), ("package2 1.0", "unknown"),
    ]  # fmt: skip
    assert all(int(row["files"]) > 0 < int(row["bytes"]) for row in rows)


def test_a_file_goes_in_once_and_tables_and_pictures_do_not(tmp_path):
    text = "def function():\n    return 'words and words'\n" * 10
    contents = {
        "a.py": text.encode(), "same.py": text.encode(), "windows.py": text.replace("\n", "\r\n").encode(),
        "short.py": b"x = 1\n", "numbers.py": b"0.123, 4.567, 89\n" * 100, "latin.txt": ("é" * 300).encode("latin-1"),
        "zeros.txt": b"word " * 100 + b"\0", "large.py": b"word " * 300_000, "other.md": b"Another text, of words. " * 20,
    }  # fmt: skip
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    texts = read_texts(Source("p 1", "MIT", tmp_path / name) for name in [*contents, "missing.py"])
    assert {text.source.path.name for text in texts} == {"a.py", "other.md"}
    assert [text.digest for text in texts] == sorted(text.digest for text in texts)


def test_a_split_follows_from_the_content_alone(sources, tmp_path):
    shutil.copy(sources[0].path, tmp_path / "another_name.py")
    (here,), (there,) = read_texts(sources[:1]), read_texts([Source("q 2", "MIT", tmp_path / "another_name.py")])
    assert here.split == there.split
    splits = [text.split for text in read_texts(sources)]
    assert set(splits) == {"train", "val", "test"} and splits.count("train") > 0.9 * len(splits)


def test_installed_names_packages_and_the_interpreter_but_not_this_one(monkeypatch):
    some = [
        package
        for package in metadata.distributions()
        if package.metadata["Name"] in ("numpy", "lowrank-pretrain", "lowrank_pretrain")
    ]
    monkeypatch.setattr(corpus.metadata, "distributions", lambda: some)
    found = list(installed())
    packages = {source.package.split()[0] for source in found}
    assert packages == {"numpy", "python"}
    assert all(source.licence != "unknown" for source in found)
    assert any(source.path.name == "METADATA" for source in found)
    assert not any(
        "site-packages" in str(source.path) for source in found if source.package == f"python {sys.version.split()[0]}"
    )


def test_too_few_sources_are_one_line_and_leave_what_was_there(made, sources, tmp_path, capsys, monkeypatch):
    (tmp_path / "train.bin").write_bytes(b"old")
    texts = read_texts(sources)
    few = [text.source for text in texts if text.split != "train"] + [text.source for text in texts if text.split == "train"][
        :40
    ]
    monkeypatch.setattr(corpus, "installed", lambda: iter(few))
    assert corpus.main(["--out", str(tmp_path), "--vocab-size", "300"]) == 2
    line = capsys.readouterr().err
    assert (
        line.count("\n") == 1 and "least=30000000: 3 packages gave" in line and "training tokens: install more packages" in line
    )
    assert (tmp_path / "train.bin").read_bytes() == b"old" and not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100: must be an integer of 257 or more tokens"),
        ({"least": 0}, "least=0: must be an integer of 1 or more tokens"),
        ({"least": 10, "most": 5}, "most=5: must be an integer of 10 or more tokens"),
        ({"sources": []}, "least=30000000: 0 different texts were found"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_corpus(tmp_path, **{"sources": [], **settings})


def test_the_config_says_how_it_is_made(composed):
    cfg = composed("experiment=none", "data=docs_corpus", "model=llama_pocket")
    assert cfg.data.test_file == "test.bin" and cfg.model.vocab_size == 4096
    data = TokenData(None)
    with pytest.raises(ConfigError, match=r"root=None: must be a folder .*for data=docs_corpus: `.data.corpus`"):
        data.setup()


def test_a_failed_attempt_leaves_a_corpus_whole_and_a_changed_one_is_refused(made, sources, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(made[0], folder)
    with pytest.raises(ConfigError, match="packages gave .* training tokens"):
        make_corpus(folder, vocab_size=290, least=10**9, most=10**9, sources=sources)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in made[0].iterdir()}
    raw = bytearray((folder / "val.bin").read_bytes())
    raw[-2] ^= 1
    (folder / "val.bin").write_bytes(bytes(raw))
    with pytest.raises(ConfigError, match="val.bin is not what SHA256SUMS names, so it was changed or damaged: make the set"):
        TokenData(str(folder), 2, seq_len=16, vocab_size=300).setup()
    (folder / "SHA256SUMS").unlink()
    TokenData(str(folder), 2, seq_len=16, vocab_size=300).setup()
