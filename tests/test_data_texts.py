"""Texts as people have them: kinds of files, sizes, many readers of one file, rows without text, other people's tokenizers."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import random
import warnings

import numpy as np
import pytest
import torch

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.prepare import main as prepare_main
from lowrank_pretrain.data.prepare import prepare
from lowrank_pretrain.data.text import documents
from lowrank_pretrain.data.text import files as text_files
from lowrank_pretrain.data.text.bins import open_bin
from lowrank_pretrain.data.text.documents import FileDocuments, in_parts
from lowrank_pretrain.data.text.files import Blocks
from lowrank_pretrain.data.text.opening import find_files
from lowrank_pretrain.data.text.packing import Packer
from lowrank_pretrain.data.text.stream import TextData
from lowrank_pretrain.data.text.tokenizer import DocumentEncoder, load_tokenizer, special_tokens, train_bpe
from lowrank_pretrain.data.text.tokens import TokenData
from tests.data_helpers import fingerprint, fit, sentences

KJV, END = load_tokenizer("kjv")


def text(root, **kwargs):
    common = {"tokenizer": "kjv", "batch_size": 2, "seq_len": 16, "vocab_size": 2048, "num_workers": 0, "seed": 0}
    return TextData(str(root), **common | {"batches_per_epoch": 4, "shuffle_block": 2} | kwargs)


def refuses(match, function, *args, **kwargs):
    with pytest.raises(ConfigError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def first_batches(data):
    data.setup()
    try:
        return [batch["input_ids"] for batch in data.train_dataloader()]
    finally:
        data.teardown()


def packed(path, content: bytes):
    how = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix.lower() == ".zst":
        how[".zst"] = pytest.importorskip("zstandard", reason="it unpacks .zst").ZstdCompressor().compress
    path.write_bytes(how.get(path.suffix.lower(), bytes)(content))


def rows_as(ending: str, texts: list[str]) -> bytes:
    """The texts as the content of a file of this kind."""
    ending = ending.lower()
    if ending in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if ending == ".json":
        return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1).encode()
    if ending in (".csv", ".tsv"):
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter="\t" if ending == ".tsv" else ",")
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
        return buffer.getvalue().encode()
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="it reads parquet")
        pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=7)
        return buffer.getvalue()
    return "\n".join(texts).encode()


# ---- kinds of files

ENDINGS = [".txt", ".TXT", ".md", ".text", ".jsonl", ".JSONL", ".ndjson", ".json", ".csv", ".CSV", ".tsv", ".parquet"]
PACKINGS = ["", ".gz", ".bz2", ".xz", ".zst", ".GZ"]
FOLDERS = [
    (ending, packing) for ending in ENDINGS for packing in PACKINGS if packing == "" or ending not in (".parquet", ".TXT")
]


@pytest.mark.parametrize(("ending", "packing"), FOLDERS)
def test_a_folder_of_any_kind_gives_its_text(tmp_path, ending, packing):
    texts = [*sentences(12), 'with "quotes", commas;\tand\nlines', "Büßt, 神!"]
    for stem in ("train", "val"):
        packed(tmp_path / f"{stem}{ending}{packing}", rows_as(ending, texts))
    data = text(tmp_path, val_sequences=10_000)
    data.setup()
    whole = ["\n".join(texts)] if ending.lower() in (".txt", ".md", ".text") else texts
    want = [i for one in whole for i in [*KJV.encode(one).ids, END]]
    got = np.asarray(data.val_set.tokens)
    assert got.tolist() == want[: len(want) // 16 * 16]
    assert len(list(data.train_dataloader())) == 4


def test_marks_of_byte_order_and_ends_of_lines_are_not_trained_on(tmp_path):
    plain = "In the beginning\nGod created\n\nthe heaven"
    want = KJV.encode(plain).ids
    contents = {
        "a.txt": b"\xef\xbb\xbf" + plain.encode(), "b.txt": plain.replace("\n", "\r\n").encode(),
        "c.md": plain.replace("\n", "\r").encode(), "d.jsonl": b"\xef\xbb\xbf" + rows_as(".jsonl", [plain]),
        "e.json": b"\xef\xbb\xbf" + rows_as(".json", [plain]), "f.csv": b"\xef\xbb\xbf" + rows_as(".csv", [plain]),
        "g.jsonl": b"\n\n" + rows_as(".jsonl", [plain]).replace(b"\n", b"\r\n\r\n"),
        "h.json": b'{\n "text": ' + json.dumps(plain).encode() + b"\n}\n",
        "i.json": rows_as(".jsonl", [plain]), "j.json": b"[" + rows_as(".jsonl", [plain]).strip() + b"]",
        "k.csv": b'"id";"text"\r\n1;"' + plain.encode() + b'"\r\n',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = list(FileDocuments([tmp_path / name], "train_files", "text").read(None))
        assert [KJV.encode(piece.text).ids for piece in found] == [want], name


@pytest.mark.parametrize("files", ["", ["train*", ""], "/etc/*"])
def test_patterns_are_globs_below_the_root(tmp_path, files):
    (tmp_path / "train.txt").write_text("a")
    refuses("train_files=.*must be globs for files below", find_files, str(tmp_path), files, "train_files")
    refuses("seq_len=1000000000000: must be a whole number, 2 to", text, tmp_path, seq_len=10**12)


def test_a_folder_that_matches_stands_for_the_files_in_it(tmp_path):
    for name in ("train/a.txt", "train/old/b.txt", "train/.c.swp", "train-more.txt", "val/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    found = [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path), "train*", "train_files")]
    assert found == ["train/a.txt", "train/old/b.txt", "train-more.txt"]
    (tmp_path / "part").mkdir()
    refuses("train_files=.*must match files under", find_files, str(tmp_path), "part*", "train_files")


def test_a_file_without_a_header_is_not_printed_whole(tmp_path):
    (tmp_path / "a.csv").write_text("a long row of words " * 50 + "\n")
    source = FileDocuments([tmp_path / "a.csv"], "train_files", "text")
    refuses(r"there are: (a long row of words ){1,2}.{0,19}… [(]in ", lambda: list(source.read(None)))


def test_hidden_files_are_passed_over_and_others_named(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / ".train.txt.swp").write_bytes(b"\0\1")
    assert find_files(str(tmp_path), ["*", ".*"], "train_files") == [tmp_path / "train.txt"]
    refuses(
        "train_files=.'part.'.: must match files under .*; there are: train.txt",
        find_files,
        str(tmp_path),
        "part*",
        "train_files",
    )
    (tmp_path / "train.docx").write_bytes(b"x")
    refuses("train_files='.*docx': must end in .json, .*; narrow the pattern", find_files, str(tmp_path), "*", "train_files")
    (tmp_path / "train.docx").rename(tmp_path / "train.parquet.gz")
    refuses("train_files='.*parquet.gz': must end in", find_files, str(tmp_path), "*", "train_files")


# ---- size


@pytest.mark.parametrize("kind", ["lines", "one line", "no spaces", "wide letters", "old lines"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_blocks_of_a_file_are_small_and_make_it_up(tmp_path, kind, packing):
    rng = random.Random(0)
    words = ["the", "king", "of", "Büßt", "神神", "went\n\n  up", "a"]
    content = {
        "lines": "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(200)),
        "one line": " ".join(rng.choices(words[:5], k=1500)),
        "no spaces": "x" * 6000,
        "wide letters": "神" * 2000,
        "old lines": "\r".join(" ".join(rng.choices(words[:5], k=9)) for _ in range(200)),
    }[kind]
    path = tmp_path / f"a.txt{packing}"
    packed(path, content.encode())
    blocks = Blocks(path, "train_files", block=256)
    found, k = [], 0
    while (block := blocks.text(k)) is not None:
        found.append(block)
        k += 1
        assert len(block[0].encode()) <= 512
    blocks.close()
    assert "".join(text for text, _ in found) == content.replace("\r", "\n") and len(found) > 20
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    if kind == "lines":
        assert all(text.endswith("\n") for text, _ in found[:-1])
        joined = [i for text, _ in found for i in KJV.encode(text).ids]
        assert len(joined) <= len(KJV.encode(content).ids) * 1.01
    if not packing:
        again = Blocks(path, "train_files", block=256)  # any block by itself
        assert again.text(7) == found[7] and again.text(3) == found[3] and again.text(len(found)) is None


def test_a_byte_that_is_not_utf8_is_named_wherever_it_is(tmp_path, monkeypatch):
    content = bytearray(("the king went up\n" * 500).encode())
    content[5000] = 0xFF
    (tmp_path / "a.txt").write_bytes(content)
    blocks = Blocks(tmp_path / "a.txt", "train_files", block=512)
    refuses(
        "train_files='.*a.txt': must be UTF-8 text, byte 0xff near position 5000", lambda: [blocks.text(k) for k in range(20)]
    )
    (tmp_path / "b.csv").write_bytes(b"id,text\n" + b"1,good\n" * 3000 + b"2,\xfc\n")
    found = FileDocuments([tmp_path / "b.csv"], "train_files", "text").read(None)
    refuses("train_files='.*b.csv': must be UTF-8 text, byte 0xfc near position 21010", lambda: [None for _ in found])


def test_a_long_text_is_cut_into_parts_that_make_it_up():
    for content in ("word " * 400, "line\n" * 300, "x" * 999, "", "ab", "神 \n" * 90):
        for count in (1, 2, 7):
            parts = in_parts(content, count)
            assert "".join(parts) == content and len(parts) == count
            assert max(map(len, parts)) <= len(content) / count * 1.5 + 2
    assert all(part.endswith("\n") for part in in_parts("some words of a line\n" * 300, 4))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 300 bytes, so that small texts are long."""
    for module in (text_files, documents):
        monkeypatch.setattr(module, "BLOCK", 300)
    monkeypatch.setattr(documents, "SMALL", 1200)
    monkeypatch.setattr(Blocks.__init__, "__defaults__", (300,))


SOURCES = {
    "txt": [".txt"], "txt.gz": [".txt.gz"], "three txt": [".txt"] * 3, "jsonl": [".jsonl"], "json": [".json"], "csv": [".csv"],
    "parquet": [".parquet"], "jsonl.gz": [".jsonl.gz"], "seven jsonl": [".jsonl"] * 7, "saved": [], "hub": [],
}  # fmt: skip


def source(root, what, texts):
    """Files of this kind under root/train…, a saved set, or a set as the hub has it; returns the data module's own options."""
    endings = SOURCES[what]
    if what == "hub":
        pytest.importorskip("datasets", reason="it reads such sets")
        (root / "set").mkdir()
        for split, part in (("train-0", texts[::2]), ("train-1", texts[1::2]), ("validation-0", texts[:5])):
            (root / "set" / f"{split}.parquet").write_bytes(rows_as(".parquet", part))
        return {"dataset": str(root / "set")}
    if not endings:
        datasets = pytest.importorskip("datasets", reason="it saves and reads such sets")
        split = datasets.Dataset.from_dict({"text": texts})
        datasets.DatasetDict({"train": split, "validation": split.select(range(5))}).save_to_disk(root)
        return {}
    for i, ending in enumerate(endings):
        ending, packing = ("." + part if part else "" for part in (ending + ".").split(".")[1:3])
        packed(root / f"train{i}{ending}{packing}", rows_as(ending, texts[i :: len(endings)]))
        packed(root / f"val{i}{ending}{packing}", rows_as(ending, texts[:5]))
    return {}


def tokens_of_readers(stream, readers, tokens_each):
    """What each reader packs in a pass or more, as one text, without ends."""
    said = []
    for reader in range(readers):
        part = stream.documents.share(reader, readers)
        divided = (reader, readers) if part is None else (0, 1)
        packer = Packer(part or stream.documents, stream.encode, 4, None, *divided)
        said.append(packer.rows(tokens_each // 4, endless=False))
    return said


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("what", SOURCES)
def test_readers_share_any_source_and_each_word_is_read_once(tmp_path, small_blocks, what, readers):
    texts = [f"{i} " + " ".join(f"w{i}x{j}." for j in range(5 + i % 50)) for i in range(300)]
    texts[7] = " ".join(f"w7x{j}." for j in range(400))  # longer than a block
    data = text(tmp_path, **source(tmp_path, what, texts))
    data.setup()
    rows = tokens_of_readers(data.train_set, readers, 1 << 20)
    read = [KJV.decode(part.ravel().tolist(), skip_special_tokens=False).replace("<|endoftext|>", " ") for part in rows]
    words = [word for part in read for word in part.split()]
    marks = {word for one in texts for word in one.split() if "x" in word}
    # packing leaves at most the end of a reader's text over, and a cut or a join may fall within a few words
    found = [word for word in words if word in marks]
    assert len(found) == len(set(found)) and len(found) >= len(marks) - 40
    sizes = [part.size for part in rows]
    assert min(sizes) > 0.5 * max(sizes), sizes


@pytest.mark.parametrize("what", ["txt", "jsonl", "csv", "parquet", "saved"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_short_file_serves_the_workers(tmp_path, what, num_workers):
    """One document of some hundred tokens: every worker has sequences to hand out, no two the same in a pass."""
    source(tmp_path, what, [" ".join(sentences(40))] * (5 if what == "saved" else 1))
    data = text(tmp_path, num_workers=num_workers, batches_per_epoch=10, batch_size=1, val_sequences=4)
    got = [tuple(batch.flatten().tolist()) for batch in first_batches(data)]
    assert len(set(got)) == 10


def test_text_too_short_for_one_sequence_says_how_long_it_is(tmp_path):
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.txt").write_text("the king went up " * 12)
    (tmp_path / "train.txt").write_text("the king")
    for workers in (0, 2):
        refuses(
            "seq_len=16: must be at most [34], the tokens of one reader's text",
            first_batches,
            text(tmp_path, num_workers=workers),
        )


@pytest.mark.parametrize("what", SOURCES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_source_resumes_at_every_batch(tmp_path, small_blocks, what, num_workers):
    if num_workers and what in ("three txt", "json", "jsonl.gz", "csv", "seven jsonl"):
        pytest.skip("as the other kinds, and each worker costs time")
    texts = sentences(60)
    texts[7] = " ".join(sentences(30, seed=3))
    options = source(tmp_path, what, texts) | {"num_workers": num_workers, "batches_per_epoch": 90, "shuffle_block": 7}
    data = text(tmp_path, **options)
    data.setup()
    loader, states, whole = data.train_dataloader(), [], []
    for batch in loader:
        whole.append(fingerprint(batch))
        states.append(pickle.dumps(loader.state_dict()))
    data.teardown()
    assert len(set(whole)) > 60
    for done in (1, 5, 17, 44, 45, 73) if num_workers == 0 else (5,):
        again = text(tmp_path, **options)
        again.setup()
        again.load_state_dict({"train": pickle.loads(states[done - 1])})
        assert [fingerprint(batch) for batch in again.train_dataloader()] == whole[done:], done
        again.teardown()


def test_a_place_of_an_earlier_version_is_refused():
    document = FileDocuments([SAMPLES / "PROVENANCE.md"], "train_files", "text")
    old = {"before": None, "tail": 3}
    refuses("ckpt_path=.*another version", Packer, document, DocumentEncoder(KJV, END), 8, old)


# ---- rows without text

BAD = {
    "null": '{"text": null}', "a number": '{"text": 3}', "a list": '{"text": ["a"]}', "another key": '{"words": "a"}',
    "no object": "[1, 2]", "no json": "{text: a}", "half": '{"text": "a', "a word": '"text"',
    "half a pair": r'{"text": "so \ud83d so"}',
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_without_text_is_left_out_and_named(tmp_path, what, num_workers):
    if num_workers and what != "null":
        pytest.skip("the same lines from a worker")
    good = rows_as(".jsonl", sentences(30)).decode()
    (tmp_path / "val.jsonl").write_text(good)
    (tmp_path / "train.jsonl").write_text(good + BAD[what] + "\n" + good)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_batches(text(tmp_path, num_workers=num_workers, batches_per_epoch=100))
    lines = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(lines) == 1 and f"left out: {tmp_path}/train.jsonl, row 31, " in lines[0], lines


def test_bad_rows_of_other_kinds_of_files_are_left_out_too(tmp_path):
    good = sentences(30)
    content = rows_as(".csv", good).decode().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([*content[:9], "9", *content[9:]]))
    pyarrow = pytest.importorskip("pyarrow", reason="it reads parquet")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [*good[:9], None, *good[9:]]}), tmp_path / "b.parquet", row_group_size=4)
    (tmp_path / "c.json").write_text(json.dumps([*({"text": t} for t in good[:9]), 3, *({"text": t} for t in good[9:])]))
    (tmp_path / "d.jsonl").write_bytes(
        b"".join(json.dumps({"text": t}).encode() + b"\n" for t in good[:9])
        + b'{"text": "\xfc"}\n'
        + b"".join(json.dumps({"text": t}).encode() + b"\n" for t in good[9:])
    )
    for name, kind in (("a.csv", "has only 1 cells"), ("b.parquet", "null"), ("c.json", "int"), ("d.jsonl", "is not UTF-8")):
        source = FileDocuments([tmp_path / name], "train_files", "text")
        assert [piece.text for piece in source.read(None)] == good, name
        assert len(source.bad) == 1 and f"{name}, row " in source.bad[0] and kind in source.bad[0], source.bad


@pytest.mark.parametrize("what", BAD)
def test_only_rows_without_text_are_an_error(tmp_path, what):
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.jsonl").write_text(f"{BAD[what]}\n" * 5)
    said = "there are: words" if what == "another key" else f"none is in the first 5 rows: {tmp_path}/val.jsonl, row 1, "
    refuses(f"text_key='text': must name a column of text[,;] {said}", text(tmp_path).setup)


def test_the_wrong_column_is_found_before_a_long_file_was_read(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"article": "a"}\n' * 5000)
    source = FileDocuments([tmp_path / "train.jsonl"], "train_files", "text")
    refuses("text_key='text': must name a column of text, there are: article", lambda: list(source.read(None)))
    assert source._left_out == documents.HOPELESS
    for name, content in (("a.csv", b"id,article\n1,x\n"), ("b.parquet", rows_as(".parquet", ["a"]))):
        (tmp_path / name).write_bytes(content)
        key = "story" if name == "b.parquet" else "text"
        source = FileDocuments([tmp_path / name], "train_files", key)
        refuses(f"text_key='{key}': must name a column of text, there are: .*{name}", lambda s=source: list(s.read(None)))


def test_many_bad_rows_are_a_number(tmp_path):
    good = rows_as(".jsonl", sentences(30)).decode()
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.jsonl").write_text(good + '{"text": null}\n' * 300 + good)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = text(tmp_path, val_sequences=10_000)
        data.setup()
    lines = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(lines) == 21 and "of further ones only the number" in lines[19] and "number 100," in lines[20]


def test_empty_texts_add_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows_as(".jsonl", ["one", "", "  \n", "two"]))
    source = FileDocuments([tmp_path / "a.jsonl"], "train_files", "text")
    assert [piece.text for piece in source.read(None)] == ["one", "two"] and not source.bad


def test_a_row_without_text_of_a_set_on_the_hub_is_left_out(tmp_path):
    texts = [*sentences(9), None, *sentences(9, seed=1)]
    for what in ("hub", "saved"):
        (tmp_path / what).mkdir()
        data = text(tmp_path / what, **source(tmp_path / what, what, texts), val_sequences=2)
        data.setup()
        pieces = list(data.train_set.documents.read(None))
        assert sorted(piece.text for piece in pieces) == sorted(filter(None, texts))
        assert len(data.train_set.documents.bad) == 1 and "row " in data.train_set.documents.bad[0]
        assert "holds no text in 'text' but null" in data.train_set.documents.bad[0]


# ---- saved sets


def test_a_saved_set_is_read_from_root_or_by_name(tmp_path):
    datasets = pytest.importorskip("datasets", reason="it saves such sets")
    texts = sentences(20)
    one = datasets.Dataset.from_dict({"text": texts, "id": list(range(20))})
    datasets.DatasetDict({"train": one, "validation": one}).save_to_disk(tmp_path / "dict")
    for name in ("train", "validation"):
        one.save_to_disk(tmp_path / "parts" / name)
    one.save_to_disk(tmp_path / "single")
    options = {
        "tokenizer": "kjv",
        "batch_size": 2,
        "seq_len": 16,
        "vocab_size": 2048,
        "num_workers": 0,
        "batches_per_epoch": 3,
        "seed": 0,
    }
    ways = [{"root": "dict"}, {"root": "parts"}, {"dataset": "dict"}]
    got = [first_batches(TextData(**options, **{key: str(tmp_path / name) for key, name in way.items()})) for way in ways]
    assert all(torch.equal(a, b) for other in got[1:] for a, b in zip(got[0], other, strict=True))
    refuses(
        "val_split='test': must be a split of the saved set, there are: train, validation",
        text(tmp_path / "dict", val_split="test").setup,
    )
    refuses(
        "val_split='validation': is not told apart in .*single, a saved set without splits: save a DatasetDict",
        text(tmp_path / "single").setup,
    )
    refuses(
        "text_key='story': must name a column of text, there are: id, text", text(tmp_path / "dict", text_key="story").setup
    )
    (tmp_path / "dict" / "train" / "state.json").write_text("{")
    refuses("root='.*dict': cannot be read as a saved set", text(tmp_path / "dict").setup)


# ---- tokenizers


def spoiled(root, **changes):
    """The embedded tokenizer with other settings in its file."""
    content = json.loads((SAMPLES / "kjv_tokenizer.json").read_text()) | changes
    (root / "tokenizer.json").write_text(json.dumps(content))
    return str(root / "tokenizer.json")


def template(single):
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in (("<|endoftext|>", 0), ("the", 300))}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


TEXT, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
BEGIN = {"SpecialToken": {"id": "the", "type_id": 0}}
TRUNCATION = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 7,
    "pad_type_id": 0,
    "pad_token": "a",
}
TOKENIZERS = {
    "plain": ({}, [], True), "truncation": ({"truncation": TRUNCATION}, [], True), "padding": ({"padding": PADDING}, [], True),
    "both": ({"truncation": TRUNCATION, "padding": PADDING}, [], True),
    "left truncation": ({"truncation": TRUNCATION | {"direction": "Left"}}, [], True),
    "truncation in tokens of one": ({"truncation": TRUNCATION | {"max_length": 1}}, [], True),
    "padding on the left": ({"padding": PADDING | {"direction": "Left"}}, [], True),
    "padding to eights": ({"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 8}}, [], True),
    "own end": ({"post_processor": template([TEXT, SPECIAL])}, [], True),
    "own beginning": ({"post_processor": template([BEGIN, TEXT])}, [300], True),
    "own beginning and end": ({"post_processor": template([BEGIN, TEXT, SPECIAL])}, [300], True),
    "own end and truncation": ({"post_processor": template([TEXT, SPECIAL]), "truncation": TRUNCATION}, [], True),
    "end at the beginning": ({"post_processor": template([SPECIAL, TEXT])}, [0], True),
    "end on both sides": ({"post_processor": template([SPECIAL, TEXT, SPECIAL])}, [0], True),
}  # fmt: skip


def other_kinds():
    """Tokenizers that are no byte-level BPE, each with a beginning and an end of its own."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    texts = sentences(60)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    words = pre_tokenizers.Whitespace()
    space = pre_tokenizers.Metaspace()
    few = {"vocab_size": 200, "special_tokens": special}
    pieces = {
        "words": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=special), words),
        "known words": (models.WordLevel(), trainers.WordLevelTrainer(special_tokens=special), words),
        "pieces of words": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**few), words),
        "unigrams": (models.Unigram(), trainers.UnigramTrainer(**few, unk_token="[UNK]"), space),
        "letters": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**few), space),
    }
    for name, (model, trainer, before) in pieces.items():
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), before
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=32)
        yield name, tokenizer


def test_tokenizers_of_other_kinds(tmp_path):
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.txt").write_text("\n".join(sentences(60)))
    tried = 0
    for name, tokenizer in other_kinds():
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        tokenizer.no_truncation(), tokenizer.no_padding()
        data = text(tmp_path, tokenizer=str(tmp_path), val_sequences=10_000)
        data.setup()
        want = [1, *tokenizer.encode("\n".join(sentences(60)), add_special_tokens=False).ids, 2]
        assert np.asarray(data.val_set.tokens).tolist() == want[: len(want) // 16 * 16] and data.end_id == 2, name
        tried += 1
    assert tried == 5


def test_a_folder_with_wordpieces_only_is_read_through_transformers(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "king", "##s"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer, end = load_tokenizer(str(tmp_path))
    assert DocumentEncoder(tokenizer, end)("the kings") == [2, 5, 6, 7, 3] and end == 3


@pytest.mark.parametrize("what", TOKENIZERS)
def test_no_tokenizer_cuts_fills_up_or_doubles_the_end(tmp_path, what):
    changes, begin, _ = TOKENIZERS[what]
    tokenizer, end = load_tokenizer(spoiled(tmp_path, **changes))
    encode = DocumentEncoder(tokenizer, end)
    document = "In the beginning God created the heaven and the earth. " * 5
    want = KJV.encode(document).ids
    assert encode(document) == [*begin, *want, 0]
    assert encode(document, ends=False) == [*begin, *want] and encode(document, begins=False) == [*want, 0]
    assert encode(document, False, False) == want
    (tmp_path / "a.txt").write_text(document)
    prepare(tmp_path / "out", str(tmp_path / "tokenizer.json"), root=str(tmp_path), files="a.txt", val_every=2)
    both = np.concatenate([open_bin(tmp_path / "out" / f"{part}.bin")[0] for part in ("train", "val")])
    assert both.tolist() == [*begin, *want, 0]
    # what is kept next to the tokens is told to an export
    data = TokenData(str(tmp_path / "out"), batch_size=1, seq_len=4, vocab_size=2048)
    data.setup()
    assert data.end_id == 0 and data.tokenizer_file == tmp_path / "out" / "tokenizer.json"
    assert data.tokenizer.truncation is None and data.tokenizer.padding is None


def with_tokens(root, *tokens, **config):
    from tokenizers import AddedToken

    tokenizer, _ = load_tokenizer("kjv")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.save(str(root / "tokenizer.json"))
    for name, content in config.items():
        (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(root)


END_TOKENS = {
    "a word": ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, 2048),
    "an object": ({"tokenizer_config": {"eos_token": {"content": "<|eot_id|>", "special": True}}}, 2049),
    "the map": ({"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}}, 2049),
    "config first": (
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "special_tokens_map": {"eos_token": "<|eot_id|>"}}, 2048,
    ),
    "no such token": ({"tokenizer_config": {"eos_token": "<nowhere>"}}, 0),
    "null": ({"tokenizer_config": {"eos_token": None}}, 0),
    "broken": ({"tokenizer_config": "{"}, 0),
    "no object": ({"tokenizer_config": "[]"}, 0),
    "none": ({}, 0),
}  # fmt: skip


@pytest.mark.parametrize("what", END_TOKENS)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_the_end_is_what_the_tokenizers_files_say(tmp_path, what, by):
    config, want = END_TOKENS[what]
    name = with_tokens(tmp_path, "<|im_end|>", "<|eot_id|>", **config)
    assert load_tokenizer(name if by == "folder" else f"{name}/tokenizer.json")[1] == want


def test_the_end_can_be_named(tmp_path):
    name = with_tokens(tmp_path, "<|im_end|>", tokenizer_config={"bos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    assert load_tokenizer(name, end_token="<|im_end|>")[1] == 2048
    refuses("end_token='<nope>': must be a token of .*, it has none of that name", load_tokenizer, name, end_token="<nope>")
    tokenizer, _ = load_tokenizer(name)
    assert special_tokens(name, tokenizer) == (tmp_path / "tokenizer.json", tmp_path, 2048, 0)
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.txt").write_text(" ".join(sentences(30)))
    data = text(tmp_path, tokenizer=name, end_token="<|im_end|>", vocab_size=2049)
    data.setup()
    assert (data.end_id, data.bos_id, data.pad_id) == (2048, 2048, 0) and data.dataset_name == tmp_path.name
    assert data.tokenizer_file == tmp_path / "tokenizer.json" and data.tokenizer_folder == tmp_path
    refuses("vocab_size=2048: must be at least 2049", text(tmp_path, tokenizer=name).setup)
    without = train_bpe(sentences(20), 300)
    content = json.loads(without.to_str())
    content["added_tokens"], content["model"]["vocab"]["<stop>"] = [], content["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "stop.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    refuses(
        "tokenizer='.*stop.json': must have an end-of-document token, .*; name another with data.end_token",
        load_tokenizer,
        str(tmp_path / "stop.json"),
    )
    assert load_tokenizer(str(tmp_path / "stop.json"), end_token="<stop>")[1] == 0


def test_a_vocabulary_with_holes_counts_to_its_last_id(tmp_path):
    content = json.loads((SAMPLES / "kjv_tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.txt").write_text(" ".join(sentences(30)))
    tokenizer, _ = load_tokenizer(str(tmp_path))
    far = tokenizer.token_to_id("<far>")
    refuses(f"vocab_size={far}: must be at least {far + 1}", text(tmp_path, tokenizer=str(tmp_path), vocab_size=far).setup)


# ---- prepare


def test_prepare_writes_the_same_tokens_of_a_long_text_in_little_pieces(tmp_path, small_blocks):
    content = "\n".join(sentences(200))
    (tmp_path / "book.txt").write_text(content)
    counts = prepare(tmp_path / "out", "kjv", root=str(tmp_path), files="book.txt", val_every=10)
    train, val = (open_bin(tmp_path / "out" / f"{part}.bin")[0] for part in ("train", "val"))
    assert (len(train), len(val)) == (counts["train"], counts["val"])
    assert KJV.decode(np.concatenate([train, val]).tolist()) == content
    assert 0.09 < len(val) / (len(train) + len(val)) < 0.11


def test_prepare_counts_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(rows_as(".jsonl", sentences(30)) + b'{"text": 1}\n')
    with pytest.warns(UserWarning, match="unreadable input number 1, left out: .*a.jsonl, row 31, holds no text"):
        prepare(tmp_path / "out", "kjv", root=str(tmp_path), files="*.jsonl")
    name = with_tokens(tmp_path, "<|im_end|>")
    arguments = ["--out", str(tmp_path / "o2"), "--tokenizer", name, "--root", str(tmp_path), "--files", "a.jsonl"]
    assert prepare_main([*arguments, "--end-token", "<|im_end|>"]) == 0
    assert json.loads((tmp_path / "o2" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert load_tokenizer(str(tmp_path / "o2"))[1] == 2048
    assert prepare_main([*arguments, "--end-token", "<nope>"]) == 2


# ---- quiet


def test_a_streamed_run_says_nothing_of_torchdatas_own_business(tmp_path):
    for stem in ("train", "val"):
        (tmp_path / f"{stem}.txt").write_text(" ".join(sentences(60)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen, _ = fit(text(tmp_path, num_workers=2), max_epochs=2)
    assert len(seen) == 8 and not [w for w in caught if "set_vital" in str(w.message)]


@pytest.mark.parametrize("readers", [1, 3])
def test_a_packers_state_is_where_it_goes_on(tmp_path, readers):
    (tmp_path / "a.jsonl").write_bytes(rows_as(".jsonl", sentences(50)))

    def packer(state=None):
        whole = FileDocuments([tmp_path / "a.jsonl"], "train_files", "text")
        return Packer(whole, DocumentEncoder(KJV, END), 8, state, readers - 1, readers)

    first = packer()
    for count in (3, 1, 7, 2, 200, 5):
        first.rows(count)
        state = pickle.loads(pickle.dumps(first.state()))
        assert np.array_equal(packer(state).rows(60), packer(state).rows(60))
    assert np.array_equal(packer(first.state()).rows(9), first.rows(9))
