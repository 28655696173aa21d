"""Broken files: truncated, flipped, empty, foreign, hostile. Each ends as one line that names the file, or loads unharmed."""

import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_pretrain.checkpoints.files import inspect, newest_whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.images.datasets import ImageData
from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST
from lowrank_pretrain.data.images.medmnist import MedMNIST
from lowrank_pretrain.data.text.bins import write_bin
from lowrank_pretrain.data.text.stream import TextData
from lowrank_pretrain.data.text.tokenizer import load_tokenizer
from lowrank_pretrain.data.text.tokens import TokenData
from lowrank_pretrain.export import weights as export
from lowrank_pretrain.run import failures
from lowrank_pretrain.run.run_dir import start_from
from lowrank_pretrain.run.train import train
from tests.conftest import TINY, Started
from tests.data_helpers import image_folder, jsonl_gz, medmnist_npz, sentences, write_idx

SECONDS = 20  # that one file may take


@contextlib.contextmanager
def limited():
    """A case that hangs is a failure, not a test session that never ends."""

    def stop(*_):
        raise AssertionError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(size: int, count: int, seed: int = 0) -> list[int]:
    """`count` positions in a file of `size` bytes: its beginning and end, and others spread over it."""
    rng = random.Random(seed)
    return sorted({0, 1, 5, size - 1, size - 10, size // 2, *(rng.randrange(size) for _ in range(count))} & {*range(size)})[
        :count
    ]


def truncated(data: bytes, count: int):
    for at in places(len(data), count):
        yield f"cut at {at}", data[:at]


def flipped(data: bytes, count: int):
    for at in places(len(data), count, seed=1):
        yield f"bit of byte {at}", data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def is_one_line(error: ConfigError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 1200, text
    assert all(word in text for word in words), text


# -- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory, composed):
    """A checkpoint of the low-rank phase, its configuration, and its bytes."""
    directory = tmp_path_factory.mktemp("written") / "run"
    config = composed(*TINY)
    train(config, directory)
    path = directory / "checkpoints" / "last.ckpt"
    return config, path, path.read_bytes()


@pytest.fixture
def resume(written, tmp_path, shut):
    """``resume(bytes or dict)``: the line and exit code of a run that goes on from such a file; ("", 0) if it would train."""

    def go(content) -> tuple[str, int]:
        path, directory = tmp_path / "file.ckpt", tmp_path / "run"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        config = copy.deepcopy(written[0])
        config.ckpt_path = str(path)
        try:
            with limited():
                train(config, directory)
        except Started:
            return "", 0
        except Exception as error:
            described = failures.describe(error, config, directory)
            if described is None:
                raise
            assert not [*directory.rglob("*")], "something was written"
            return described
        raise AssertionError("a whole run")

    return go


def opened(path: Path):
    """What a resume reads before anything is built, or the ConfigError that it ends with."""
    try:
        with limited():
            return inspect(start_from(path.parent / "fresh", str(path)))
    except ConfigError as error:
        is_one_line(error, "ckpt_path", str(path))
        return error


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


def test_a_truncated_checkpoint_is_one_line(written, tmp_path):
    path = tmp_path / "file.ckpt"
    for what, data in truncated(written[2], 40):
        path.write_bytes(data)
        assert isinstance(opened(path), ConfigError), what


def test_a_flipped_bit_in_a_checkpoint_is_found_or_harmless(written, tmp_path):
    path, whole, found = tmp_path / "file.ckpt", torch.load(written[1], weights_only=True), 0
    for what, data in flipped(written[2], 60):
        path.write_bytes(data)
        read = opened(path)
        found += isinstance(read, ConfigError)
        assert isinstance(read, ConfigError) or same(read, whole), f"{what} was loaded"
    assert found >= 40  # the rest hit the padding between tensors


def test_a_flipped_bit_in_a_tensor_is_found_though_torch_loads_it(written, tmp_path):
    with zipfile.ZipFile(written[1]) as file:
        part = max((part for part in file.infolist() if "/data/" in part.filename), key=lambda part: part.file_size)
    data = bytearray(written[2])
    data[part.header_offset + 2000] ^= 4
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    last.write_bytes(data), best.write_bytes(written[2])
    assert not same(torch.load(last, weights_only=True), torch.load(best, weights_only=True)), "torch noticed by itself"
    is_one_line(opened(last), "checksum", part.filename)
    with pytest.warns(UserWarning, match="skipped .*last.ckpt: is damaged: the checksum"):
        assert newest_whole(tmp_path) == best


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def spoiled(whole: dict):
    """(what, checkpoint, words that the line must hold; None: it may as well train)."""
    for key in sorted(whole):
        fresh = copy.copy(whole)
        del fresh[key]
        yield f"without {key}", fresh, None
        for wrong in (None, 7, []):
            yield f"{key}={wrong!r}", {**whole, key: wrong}, None
    for key, state in whole["callbacks"].items():
        yield f"without {key}'s state", {**whole, "callbacks": {k: v for k, v in whole["callbacks"].items() if k != key}}, None
        for name in state if isinstance(state, dict) and key != "Monitor" else ():
            cut = {k: v for k, v in state.items() if k != name}
            yield f"{key} without {name}", {**whole, "callbacks": {**whole["callbacks"], key: cut}}, None
    side = whole["lowrank_pretrain"]
    for key, wrong, words in (
        ("format", 2, ["format 2", "reads up to 1", "update"]), ("format", "new", ["lowrank_pretrain.format"]),
        ("phase", "late", ["lowrank_pretrain.phase"]), ("phase", 3, ["lowrank_pretrain.phase"]),
        ("plan", {"model.nowhere": 4}, None), ("plan", {"model.blocks.0.mlp.fc1": -1}, ["lowrank_pretrain.plan"]),
        ("plan", ["fc1"], ["lowrank_pretrain.plan"]), ("exact", {"a": 1}, ["lowrank_pretrain.exact"]),
        ("exact", {"a": torch.zeros(2)}, None), ("exact", {}, None), ("groups", [], None), ("groups", "x", None),
        ("exact", {k: v[:1] if v.ndim else v for k, v in side["exact"].items()}, None),
        ("exact", dict([*side["exact"].items()][1:]), None), ("alpha", 3.0, ["alpha"]),
    ):  # fmt: skip
        yield f"side {key}={str(wrong)[:40]}", {**whole, "lowrank_pretrain": {**side, key: wrong}}, words
    state = whole["state_dict"]
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    yield "a weight is NaN", {**whole, "state_dict": {**state, name: state[name] * float("nan")}}, ["not finite", name]
    yield "a weight is no tensor", {**whole, "state_dict": {**state, name: 3}}, ["another model", name]
    yield "a weight of another shape", {**whole, "state_dict": {**state, name: state[name][:1]}}, ["another model", name]
    yield "a weight is lacking", {**whole, "state_dict": {k: v for k, v in state.items() if k != name}}, ["absent", name]
    yield "code among the weights", {**whole, "state_dict": {**state, name: Code()}}, ["cannot be read"]
    yield "code in a callback", {**whole, "callbacks": {"PreLoRA": Code()}}, ["cannot be read"]
    moments = copy.deepcopy(whole["optimizer_states"])
    first = next(iter(moments[0]["state"]))
    moments[0]["state"][first]["exp_avg"] = torch.zeros(3)
    yield "moments of another shape", {**whole, "optimizer_states": moments}, None
    fewer = copy.deepcopy(whole["optimizer_states"])
    fewer[0]["param_groups"] = fewer[0]["param_groups"][:1]
    yield "fewer groups", {**whole, "optimizer_states": fewer}, None


def test_a_checkpoint_with_wrong_entries_is_one_line(written, resume, tmp_path):
    tried, refused = 0, 0
    for what, checkpoint, words in spoiled(torch.load(written[1], weights_only=True)):
        try:
            line, code = resume(checkpoint)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        tried, refused = tried + 1, refused + (code == 2)
        assert code in (0, 2) and "\n" not in line, f"{what}: {line}"
        if words is not None:
            assert code == 2 and all(word in line for word in words), f"{what}: {line}"
    print(tried, refused)
    assert tried > 60 and refused > 30, (tried, refused)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_from_before_formats_were_counted_still_resumes(written, resume):
    old = torch.load(written[1], weights_only=True)
    assert old["lowrank_pretrain"].pop("format") == 1
    assert resume(old) == ("", 0)


def test_export_refuses_what_resume_refuses(written, tmp_path):
    path = tmp_path / "file.ckpt"
    for what, data in [*truncated(written[2], 8), ("nothing", b""), ("words", b"words")]:
        path.write_bytes(data)
        with pytest.raises(ConfigError) as wrong, limited():
            export.export(path, None, tmp_path / "out")
        is_one_line(wrong.value, str(path))
        assert not (tmp_path / "out").exists(), what


# -- data ---------------------------------------------------------------------------------------------------------------


def read(data) -> list[torch.Tensor] | ConfigError:
    """The first batches of training and validation, or the error in one line."""
    try:
        with limited():
            data.prepare_data()
            data.setup("fit")
            batches = [next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))]
            data.teardown()
            return [t for batch in batches for t in (batch.values() if isinstance(batch, dict) else batch)]
    except ConfigError as error:
        is_one_line(error)
        return error


def fashion(folder: Path) -> FashionMNIST:
    return FashionMNIST(root=str(folder), batch_size=4, img_size=8, seed=0)


def fashion_files(folder: Path, images=(12, 8, 8), labels=(12,), top=10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, images, np.uint8))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", rng.integers(0, top, labels, np.uint8))
    return folder


def medmnist(folder: Path) -> MedMNIST:
    return MedMNIST(root=str(folder), size=28, batch_size=4, img_size=28, seed=0)


def tokens(folder: Path) -> TokenData:
    return TokenData(root=str(folder), batch_size=2, seq_len=8, vocab_size=64, seed=0)


def text(folder: Path, **more) -> TextData:
    more = {"tokenizer": "kjv", **more}
    return TextData(root=str(folder), batch_size=2, num_workers=0, seq_len=8, vocab_size=2048, shuffle_block=4, seed=0, **more)


def pictures(folder: Path) -> ImageData:
    return ImageData(root=str(folder), val_split="val", batch_size=2, num_workers=0, num_classes=2, img_size=8, seed=0)


def make(kind: str, folder: Path) -> Path:
    """Good data in `folder`; the file that will be broken."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "images":
        return fashion_files(folder) / "train-images-idx3-ubyte.gz"
    if kind == "labels":
        return fashion_files(folder) / "train-labels-idx1-ubyte.gz"
    if kind == "npz":
        medmnist_npz(folder / "pathmnist.npz", size=28)
        return folder / "pathmnist.npz"
    if kind == "bin":
        for name in ("train", "val"):
            write_bin(folder / f"{name}.bin", [np.arange(200) % 64], 64)
        return folder / "train.bin"
    if kind == "jsonl":
        for name in ("train", "val"):
            jsonl_gz(folder / f"{name}.jsonl.gz", sentences(20))
        return folder / "train.jsonl.gz"
    if kind == "txt":
        for name in ("train", "val"):
            (folder / f"{name}.txt").write_text(" ".join(sentences(20)))
        return folder / "train.txt"
    image_folder(folder, per_class=4)
    return folder / "train" / "cat" / "1.png"


READERS = {
    "images": fashion,
    "labels": fashion,
    "npz": medmnist,
    "bin": tokens,
    "jsonl": text,
    "txt": text,
    "picture": pictures,
}
MANY = {"images": 14, "labels": 8, "npz": 12, "bin": 14, "jsonl": 4, "txt": 3, "picture": 5}
CHECKED = ("images", "labels", "npz")  # formats with a checksum: a flipped bit is found, or changed nothing
MAY_LOAD = ("bin", "txt", "jsonl", "picture")  # another token, letter or colour is no error; an unreadable image is replaced


@pytest.mark.parametrize("kind", READERS)
def test_a_broken_data_file_is_one_line(kind, tmp_path):
    path, reader = make(kind, tmp_path / "data"), READERS[kind]
    good = read(reader(tmp_path / "data"))
    assert not isinstance(good, ConfigError), good
    data = path.read_bytes()
    cases = [("empty", b""), ("foreign", b"GIF89a" + bytes(range(256))), ("zeros", bytes(len(data)))]
    cases += [*truncated(data, MANY[kind]), *flipped(data, MANY[kind])]
    refused = 0
    for what, content in cases:
        path.write_bytes(content)
        found = read(reader(tmp_path / "data"))
        refused += isinstance(found, ConfigError)
        if isinstance(found, ConfigError):
            short = "seq_len=8: must be at most" in str(found)  # what is left is text, and there is little of it
            assert path.name in str(found) or short, f"{what}: {found}"
        elif kind in CHECKED:
            assert same(found, good), f"{what} was loaded"
    assert refused >= (0 if kind == "picture" else 3), refused
    path.unlink()
    path.mkdir()
    found = read(reader(tmp_path / "data"))
    assert isinstance(found, ConfigError) or kind == "picture", found
    path.rmdir()
    if os.geteuid():  # root may read everything
        path.write_bytes(data)
        path.chmod(0)
        assert isinstance(read(reader(tmp_path / "data")), ConfigError) or kind == "picture"


SHAPES = {
    "fewer labels": {"labels": (11,)}, "no images": {"images": (0, 8, 8), "labels": (0,)},
    "two dimensions": {"images": (12, 8)},    "four dimensions": {"images": (12, 8, 8, 2)}, "labels out of range": {"top": 255},
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_idx_files_that_do_not_fit_together(what, tmp_path):
    found = read(fashion(fashion_files(tmp_path / "data", **SHAPES[what])))
    assert isinstance(found, ConfigError), found


def test_arrays_of_a_wrong_kind(tmp_path):
    medmnist_npz(tmp_path / "pathmnist.npz", size=28)
    good = dict(np.load(tmp_path / "pathmnist.npz"))
    images, labels = good["train_images"], good["train_labels"]
    wrong = {
        "floats": {"train_images": images.astype(np.float32)}, "two channels": {"train_images": images[..., :2]},
        "flat": {"train_images": images.reshape(len(images), -1)}, "fewer labels": {"train_labels": labels[:-1]},
        "labels out of range": {"train_labels": labels + 200}, "negative": {"train_labels": labels.astype(np.int64) - 200},
        "objects": {"train_images": np.array([Code()] * 12)}, "words": {"train_labels": np.array(["cat"] * 12)},
        "empty": {"train_images": images[:0], "train_labels": labels[:0]}, "fractions": {"train_labels": labels + 0.5},
        "scalar": {"train_images": np.uint8(3)},
    }  # fmt: skip
    for what, arrays in wrong.items():
        np.savez(tmp_path / "pathmnist.npz", **good | arrays)
        found = read(medmnist(tmp_path))
        assert isinstance(found, ConfigError), what
    for name in good:
        np.savez(tmp_path / "pathmnist.npz", **{key: value for key, value in good.items() if key != name})
        assert isinstance(read(medmnist(tmp_path)), ConfigError), name
    assert not Path("executed").exists()


def test_token_files_with_wrong_headers(tmp_path):
    path = make("bin", tmp_path)
    data = path.read_bytes()
    for offset, width, values in (
        (8, 4, (0, 2, 2**31)),
        (12, 4, (0, 1, 3, 8)),
        (16, 4, (1, 65, 2**31)),
        (24, 8, (0, 1, 2**62)),
    ):
        for value in values:
            path.write_bytes(data[:offset] + value.to_bytes(width, "little") + data[offset + width :])
            found = read(tokens(tmp_path))
            assert isinstance(found, ConfigError), (offset, value)


def test_texts_that_hold_no_text(tmp_path):
    for name, content in {
        "no column": '{"words": "a b"}\n' * 9, "a number": '{"text": 3}\n' * 9, "null": '{"text": null}\n' * 9,
        "a list": "[1, 2]\n" * 9, "half a line": '{"text": "a', "not json": "text\n" * 9, "latin": '{"text": "\xe9"}\n' * 9,
    }.items():  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        for part in ("train", "val"):
            (folder / f"{part}.jsonl").write_bytes(content.encode("latin-1"))
        found = read(text(folder))
        assert isinstance(found, ConfigError), name


def test_all_pictures_broken_or_none(tmp_path):
    image_folder(tmp_path / "a", per_class=2)
    for path in (tmp_path / "a" / "train").rglob("*.*"):
        path.write_bytes(b"no picture")
    found = read(pictures(tmp_path / "a"))
    assert isinstance(found, ConfigError) and "cannot" in str(found), found
    image_folder(tmp_path / "b", per_class=2)
    shutil.rmtree(tmp_path / "b" / "train")
    assert isinstance(read(pictures(tmp_path / "b")), ConfigError)
    (tmp_path / "b" / "train").mkdir()
    assert isinstance(read(pictures(tmp_path / "b")), ConfigError)


def test_broken_tokenizers(tmp_path):
    from lowrank_pretrain.data import SAMPLES

    whole = (SAMPLES / "kjv_tokenizer.json").read_bytes()
    cases = [*truncated(whole, 12), ("empty", b""), ("list", b"[]"), ("number", b"3"), ("no end", b'{"model": {}}')]
    cases += [("no utf-8", b"\xff\xfe" + whole[:99]), ("null", b"null")]
    path = tmp_path / "tokenizer.json"
    for what, content in cases:
        path.write_bytes(content)
        with pytest.raises(ConfigError) as wrong, limited():
            load_tokenizer(str(path))
        is_one_line(wrong.value, str(path))
        assert what
    path.unlink()
    vocab = {chr(33 + i): i for i in range(90)}
    merges = "#version: 0.2\na b\n"
    for v, m in (
        ("", merges), ("{}", "a b c d\n"), ("[]", merges), (json.dumps(vocab), "\xff\n"), ("{", ""),
        (json.dumps({"a": "b"}), merges), (json.dumps(vocab), "one\n"), (json.dumps({"a": -1}), merges),
    ):  # fmt: skip
        (tmp_path / "vocab.json").write_bytes(v.encode("latin-1"))
        (tmp_path / "merges.txt").write_bytes(m.encode("latin-1"))
        with pytest.raises(ConfigError) as wrong, limited():
            load_tokenizer(str(tmp_path))
        is_one_line(wrong.value, str(tmp_path))


def test_a_packed_file_cut_in_the_middle_of_training_is_named(tmp_path):
    path = make("jsonl", tmp_path)
    buffer = io.BytesIO()
    with gzip.open(buffer, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in sentences(4000))
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    found = read(text(tmp_path, batches_per_epoch=10_000))
    assert isinstance(found, ConfigError) and path.name in str(found), found
