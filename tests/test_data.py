"""Every data set on small files in its real format, and what is said about bad ones."""

import gzip
import shutil
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.images.datasets import ImageData
from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST
from lowrank_pretrain.data.images.medmnist import MedMNIST
from lowrank_pretrain.data.make_samples import PER_CLASS
from lowrank_pretrain.data.prepare import main as prepare_main
from lowrank_pretrain.data.prepare import prepare
from lowrank_pretrain.data.text.bins import open_bin, write_bin
from lowrank_pretrain.data.text.stream import TextData
from lowrank_pretrain.data.text.tokenizer import load_tokenizer, train_bpe
from lowrank_pretrain.data.text.tokens import TokenData
from tests.data_helpers import cifar10, image_folder, jsonl_gz, medmnist_npz, picture, sentences, write_idx

CONF = SAMPLES.parents[3] / "conf" / "data"


def batches(data, split="train"):
    data.setup()
    try:
        return list(getattr(data, f"{split}_dataloader")())
    finally:
        data.teardown()


def refuses(match, function, *args, **kwargs):
    with pytest.raises(ConfigError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---- configs


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_names_every_argument(path):
    """Hydra refuses a key that the file lacks, so a file holds them all, and the constructor takes them all."""
    import inspect

    from hydra.utils import get_class

    config = OmegaConf.load(path)
    parameters = inspect.signature(get_class(config.pop("_target_"))).parameters
    assert set(config) == set(parameters)
    assert {"root", "batch_size", "num_workers", "seed"} <= set(config)
    assert {"num_classes", "img_size", "in_chans"} <= set(config) or {"seq_len", "vocab_size"} <= set(config)


# ---- embedded


def test_embedded_images_are_balanced_and_normalised():
    data = instantiate(OmegaConf.load(CONF / "fashion_mnist_sample.yaml"), _convert_="all")
    data.setup()
    assert torch.bincount(data.train_set.labels).tolist() == [PER_CLASS["train"]] * 10
    assert torch.bincount(data.val_set.labels).tolist() == [PER_CLASS["t10k"]] * 10
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (128, 1, 28, 28) and x.dtype == torch.float32
    assert y.shape == (128,) and y.dtype == torch.int64
    whole = torch.cat([x for x, _ in data.val_dataloader()])
    assert len(whole) == 2000
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05


def test_embedded_images_resized_for_a_large_model():
    data = FashionMNIST("sample", batch_size=4, img_size=224, in_chans=3, num_classes=1000, mixup=0.8, cutmix=1.0)
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (4, 3, 224, 224) and torch.equal(x[:, 0], x[:, 2])
    assert y.shape == (4, 1000) and torch.allclose(y.sum(1), torch.ones(4))


def test_flips_half_of_the_images_and_not_the_same_ones_each_epoch():
    data = FashionMNIST("sample", batch_size=4)
    data.setup()
    plain = FashionMNIST("sample", batch_size=4, flip=False)
    plain.setup()
    flipped = []
    for epoch in range(2):
        x, _ = data.train_set.fetch(epoch, list(range(400))).batch
        reference, _ = plain.train_set.fetch(epoch, list(range(400))).batch
        same = (x == reference).flatten(1).all(1)
        mirrored = (x == reference.flip(-1)).flatten(1).all(1)
        assert (same | mirrored).all()
        flipped.append(mirrored & ~same)
    assert 140 < flipped[0].sum() < 260
    assert not torch.equal(*flipped)


def test_embedded_text_reads_back_as_text():
    data = instantiate(OmegaConf.load(CONF / "kjv_sample.yaml"), _convert_="all")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (16, 128) and batch["input_ids"].dtype == torch.int64
    tokenizer, end = load_tokenizer("kjv")
    assert (tokenizer.get_vocab_size(), end) == (2048, 0)
    text = tokenizer.decode(np.asarray(data.train_set.tokens[:12]))
    assert text.startswith("In the beginning God created the heaven")
    sentence = "Büßt, 神! 1:1\n"  # bytes that the King James text does not have
    assert tokenizer.decode(tokenizer.encode(sentence).ids) == sentence


def test_provenance_lists_the_files_that_are_there():
    import hashlib

    text = (SAMPLES / "PROVENANCE.md").read_text()
    for path in SAMPLES.iterdir():
        if path.suffix != ".md":
            assert path.name in text and hashlib.sha256(path.read_bytes()).hexdigest() in text


def test_an_epoch_of_pieces_covers_the_ring_from_another_place():
    data = TokenData("kjv", batch_size=1, seq_len=1000, vocab_size=2048)
    data.setup()
    pieces = [data.train_set.fetch(epoch, [0, 1]).batch["input_ids"] for epoch in range(2)]
    assert not torch.equal(*pieces)
    joined = pieces[0].reshape(-1).numpy()
    ring = np.concatenate([data.train_set.tokens, data.train_set.tokens[:2000]])
    windows = np.flatnonzero(ring[:-2000] == joined[0])
    assert any(np.array_equal(ring[i : i + 2000], joined) for i in windows)


# ---- images


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for stem, count in (("train", 30), ("t10k", 10)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", rng.integers(0, 10, count).astype(np.uint8))
    return tmp_path


def test_idx_files(idx_folder, tmp_path):
    got = batches(FashionMNIST(str(idx_folder), batch_size=8))
    assert [x.shape for x, _ in got] == [(8, 1, 28, 28)] * 3  # 30 images, the last 6 are dropped
    assert sum(len(x) for x, _ in batches(FashionMNIST(str(idx_folder), batch_size=8), "val")) == 10
    raw = tmp_path / "torch" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in idx_folder.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))  # torchvision keeps both
    assert len(batches(FashionMNIST(str(tmp_path / "torch"), batch_size=8))) == 3


def test_idx_files_missing_or_truncated(idx_folder, tmp_path):
    refuses("root='.*nowhere': .*apt-get install dataset-fashion-mnist.*torchvision", FashionMNIST("/nowhere").setup)
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    refuses("train-images.*must hold 23520 bytes after its header, holds 23420", FashionMNIST(str(idx_folder)).setup)
    path.write_bytes(b"")
    refuses("train-images.*idx file", FashionMNIST(str(idx_folder)).setup)


def folder(root, **kwargs):
    return ImageData(str(root), **{"batch_size": 4, "num_workers": 0, "num_classes": 2, "img_size": 16} | kwargs)


def test_image_folder(tmp_path):
    root = image_folder(tmp_path)
    got = batches(folder(root))
    assert len(got) == 6
    x, y = got[0]
    assert x.shape == (4, 3, 16, 16) and y.dtype == torch.int64
    assert sorted(torch.cat([y for _, y in batches(folder(root), "val")]).tolist()) == [0] * 12 + [1] * 12
    x, y = batches(folder(root, in_chans=1, auto_augment="rand-m9-n2", mixup=0.2, smoothing=0.1))[0]
    assert x.shape == (4, 1, 16, 16) and y.shape == (4, 2)


def test_smoothing_alone():
    data = FashionMNIST("sample", batch_size=4, smoothing=0.1)
    data.setup()
    _, y = next(iter(data.train_dataloader()))
    assert torch.allclose(y.max(1).values, torch.full((4,), 0.91)) and torch.allclose(y.min(1).values, torch.full((4,), 0.01))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_counted_named_and_left_out(tmp_path, num_workers):
    root = image_folder(tmp_path)
    (root / "train" / "cat" / "3.png").write_bytes(b"no image")
    cut = root / "train" / "dog" / "4.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (root / "train" / "dog" / "5.png").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(batches(folder(root, num_workers=num_workers))) == 6
    lines = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(lines) == 3 and "unreadable input number 3" in lines[-1]
    for name in ("cat/3.png", "dog/4.jpg", "dog/5.png"):
        assert any(f"{root}/train/{name}" in line for line in lines), lines


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_readable_image_is_an_error(tmp_path, num_workers):
    root = image_folder(tmp_path, per_class=2)
    for path in (root / "train").rglob("*.*"):
        path.write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses(
            "root='.*train.*must hold images that can be read; 4 in a row cannot",
            batches,
            folder(root, num_workers=num_workers),
        )


def test_image_folder_refusals(tmp_path):
    root = image_folder(tmp_path, per_class=2)
    refuses("root=None: must be an existing folder", ImageData(num_classes=2).setup)
    refuses("root='/nowhere': must be an existing folder", folder("/nowhere").setup)
    refuses("val_split='test': must be a folder under .* there are: train, val", folder(root, val_split="test").setup)
    refuses("num_classes=1: must be at least 2, the classes of train", folder(root, num_classes=1).setup)
    refuses("batch_size=5: .*must be at most 4, the size of the training set", batches, folder(root, batch_size=5))
    refuses("name='imagnet': must be folder, torch/", folder(root, name="imagnet").setup)
    refuses("name='torch/cifar11': must be one of torch/", folder(root, name="torch/cifar11").setup)
    refuses("auto_augment='randd-9': must be timm's string", folder(root, auto_augment="randd-9").setup)
    refuses("batch_size=3: must be even for mixup", folder, root, batch_size=3, mixup=0.1)
    refuses("smoothing=1.0: must be a share", folder, root, smoothing=1.0)
    refuses("mixup=-1: must be 0", folder, root, mixup=-1)
    refuses("in_chans=4: must be 1 or 3", folder, root, in_chans=4)
    refuses("num_workers=-1: must be", folder, root, num_workers=-1)
    refuses("batch_size=0: must be", folder, root, batch_size=0)
    (root / "val" / "cow").mkdir()
    picture(np.random.default_rng(0)).save(root / "val" / "cow" / "1.png")
    refuses("val_split='validation': must have the classes of train; not in both: .'cow'", folder(root, num_classes=3).setup)
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    refuses("root=.*Found 0 images", folder(root).setup)


def test_torchvision_cifar10(tmp_path, monkeypatch):
    root = cifar10(tmp_path)
    refuses("root='.*Dataset not found or corrupted", folder(root, name="torch/cifar10", num_classes=10).setup)  # our checksums
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = folder(root, name="torch/cifar10", num_classes=10)
    x, y = batches(data)[0]
    assert x.shape == (4, 3, 16, 16) and len(data.train_set) == 40 and len(data.val_set) == 8
    refuses(
        "train_split='trian': must be one of", folder(root, name="torch/cifar10", num_classes=10, train_split="trian").setup
    )


def test_torchvision_set_without_splits(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("001.ak47", "002.flag"), 1):
        (tmp_path / "caltech256" / "256_ObjectCategories" / name).mkdir(parents=True)
        for i in range(1, 16):
            picture(rng).save(tmp_path / "caltech256" / "256_ObjectCategories" / name / f"{k:03d}_{i:04d}.jpg")
    data = folder(tmp_path, name="torch/caltech256", num_classes=257)
    data.setup()
    assert len(data.train_set) == 27 and len(data.val_set) == 3  # every tenth is held out
    assert {y.item() for _, ys in data.train_dataloader() for y in ys} == {0, 1}


def hub_set(folder, **counts):
    """Parquet files as the hub has them; each number is one file's images."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, shards in counts.items():
        for shard, count in enumerate(shards):
            rows = {"image": [picture(rng) for _ in range(count)], "label": [i % 2 for i in range(count)]}
            features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
            datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-{shard}.parquet")
    return folder


def test_hub_image_set_from_local_parquet(tmp_path):
    name = f"hfds/{hub_set(tmp_path / 'set', train=[12], validation=[4])}"
    assert [x.shape for x, _ in batches(folder(tmp_path / "cache", name=name))] == [(4, 3, 16, 16)] * 3
    refuses("val_split='test': .*test", folder(tmp_path / "cache", name=name, val_split="test").setup)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_hub_images(tmp_path, num_workers):
    hub_set(tmp_path / "set", train=[12, 12], validation=[3, 3])
    options = {"name": f"hfids/{tmp_path}/set", "train_samples": 24, "val_samples": 6, "num_workers": num_workers}
    data = folder(tmp_path / "cache", **options)
    data.setup()
    loader = data.train_dataloader()
    assert len(loader) == 6
    seen, state = [], None
    for number, (x, _) in enumerate(loader):
        seen.append(x)
        state = loader.state_dict() if number == 2 else state
    assert len(seen) == 6 and seen[0].shape == (4, 3, 16, 16)
    loader = data.val_dataloader()
    for _ in range(2):  # a second validation sees everything again
        assert sum(len(y) for _, y in loader) == 6
    data.teardown()
    again = folder(tmp_path / "cache", **options)
    again.setup()
    again.load_state_dict({"train": state})
    assert all(torch.equal(x, y) for (x, _), y in zip(again.train_dataloader(), seen[3:], strict=True))
    again.teardown()


def test_stream_of_hub_images_with_more_workers_than_files(tmp_path):
    hub_set(tmp_path / "set", train=[12], validation=[4])
    data = folder(tmp_path / "cache", name=f"hfids/{tmp_path}/set", train_samples=12, val_samples=4, num_workers=2)
    refuses("name='hfids.*cannot be read: .*1 shard.s. for this process but the loader has 2 workers", batches, data)


def test_medmnist(tmp_path):
    medmnist_npz(tmp_path / "pathmnist_64.npz")
    data = MedMNIST(str(tmp_path), size=64, batch_size=4, img_size=32)
    x, y = batches(data)[0]
    assert x.shape == (4, 3, 32, 32) and y.shape == (4,) and len(data.test_set) == 12
    pixels = np.load(tmp_path / "pathmnist_64.npz")["val_images"][:1].astype(np.float32)
    whole, _ = batches(MedMNIST(str(tmp_path), size=64, batch_size=1, img_size=64), "val")[0]
    assert torch.allclose(whole, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-5)
    gray, _ = batches(MedMNIST(str(tmp_path), size=64, batch_size=1, img_size=64, in_chans=1), "val")[0]
    luma = np.asarray(Image.fromarray(pixels[0].astype(np.uint8)).convert("L"), np.float32) / 127.5 - 1
    assert np.abs(gray[0, 0].numpy() - luma).max() < 1.1 / 127.5


def test_medmnist_refusals(tmp_path):
    refuses("root='.*': must hold pathmnist_224.npz: data.download=true", MedMNIST(str(tmp_path)).setup)
    refuses("root=None: must hold", MedMNIST().setup)
    refuses("size=100: must be one of 28, 64, 128, 224", MedMNIST, str(tmp_path), size=100)
    refuses("flag='pathmnits': must be one of pathmnist", MedMNIST(str(tmp_path), "pathmnits", download=True).prepare_data)
    medmnist_npz(tmp_path / "pathmnist_64.npz")
    refuses("num_classes=3: must be above every label", MedMNIST(str(tmp_path), size=64, num_classes=3).setup)
    path = tmp_path / "pathmnist.npz"
    path.write_bytes((tmp_path / "pathmnist_64.npz").read_bytes()[:5000])
    refuses("root='.*pathmnist.npz': must be a .npz file", MedMNIST(str(tmp_path), size=28).setup)
    np.savez(path, train_images=np.zeros(3))
    refuses("must hold .train,val,test", MedMNIST(str(tmp_path), size=28).setup)


# ---- token files


def test_token_file_round_trip(tmp_path):
    for vocab, dtype in ((300, np.uint16), (100_000, np.uint32)):
        assert write_bin(tmp_path / "a.bin", [[1, 2, 3], np.arange(250)], vocab) == 253
        tokens, size = open_bin(tmp_path / "a.bin")
        assert tokens.dtype == dtype and size == vocab and tokens[:4].tolist() == [1, 2, 3, 0] and len(tokens) == 253


def token_folder(root, vocab=100, count=500):
    for split in ("train", "val"):
        write_bin(root / f"{split}.bin", [np.arange(count) % vocab], vocab)
    return root


def test_token_files_refused(tmp_path):
    def tokens(**kwargs):
        return TokenData(str(tmp_path), **{"batch_size": 2, "seq_len": 16, "vocab_size": 100} | kwargs)

    refuses("root=None: must be a folder with train.bin", TokenData().setup)
    refuses("train_file='.*train.bin': no such file; .*prepare", tokens().setup)
    token_folder(tmp_path)
    assert batches(tokens())[0]["input_ids"].shape == (2, 16)
    refuses("val_file='.*valid.bin': no such file", tokens(val_file="valid.bin").setup)
    refuses("vocab_size=50: must be at least 100, the vocabulary of .*train.bin", tokens(vocab_size=50).setup)
    refuses("seq_len=501: must be from 2 to 500, the tokens in .*train.bin", tokens(seq_len=501).setup)
    refuses("batch_size=32: .*must be at most 31", batches, tokens(batch_size=32))
    refuses("vocab_size=5: must be above every token id, found 7", write_bin, tmp_path / "x.bin", [[7]], 5)
    assert not list(tmp_path.glob("x.bin*"))
    whole = (tmp_path / "train.bin").read_bytes()
    for content, said in (
        (b"", "is empty"),
        (b"\0" * 500, "has no token file header"),
        (whole[:-7], "must be 1064 bytes for its 500 tokens .*truncated"),
        (whole[:64], "must be 1064 bytes"),
        (whole + b"\0\0", "must be 1064 bytes"),
        (whole[:8] + b"\2" + whole[9:], "must be version 1"),
    ):
        (tmp_path / "train.bin").write_bytes(content)
        refuses(f"train_file='.*train.bin': .*{said}", tokens().setup)
    (tmp_path / "train.bin").write_bytes(whole[:-2] + b"\xff\x00")
    refuses("vocab_size=100: must be above every token id, .*train.bin holds 255", tokens().setup)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_large_token_file_is_checked_batch_by_batch(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr("lowrank_pretrain.data.text.bins.SCAN_LIMIT", 10)
    token_folder(tmp_path)
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-2] + b"\xff\x00")
    data = TokenData(str(tmp_path), batch_size=31, seq_len=16, vocab_size=100, num_workers=num_workers)
    refuses("vocab_size=100: .*train.bin holds 255", batches, data)


# ---- text


def write_text(root, kind, documents, stem):
    if kind == "jsonl.gz":
        jsonl_gz(root / f"{stem}.jsonl.gz", documents)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), root / f"{stem}.parquet")
    else:
        for i, document in enumerate(documents):
            (root / f"{stem}{i:02d}.txt").write_text(document)


def text(root, **kwargs):
    common = {"tokenizer": "kjv", "batch_size": 2, "seq_len": 32, "vocab_size": 2048, "num_workers": 0}
    return TextData(str(root), **common | {"batches_per_epoch": 4, "shuffle_block": 1} | kwargs)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "txt"])
def test_local_text_is_packed_in_order(tmp_path, kind):
    documents = sentences(20)
    write_text(tmp_path, kind, documents, "train")
    write_text(tmp_path, kind, documents[:5], "val")
    data = text(tmp_path)
    tokenizer, end = load_tokenizer("kjv")
    want = [i for document in documents for i in [*tokenizer.encode(document).ids, end]]
    got = [sorted(batch["input_ids"].tolist()) for batch in batches(data)]  # a block is one batch here: shuffled within
    rows = [want[i : i + 32] for i in range(0, 256, 32)]
    assert got == [sorted(rows[i : i + 2]) for i in range(0, 8, 2)]
    want = [i for document in documents[:5] for i in [*tokenizer.encode(document).ids, end]]
    assert torch.cat([batch["input_ids"] for batch in data.val_dataloader()]).flatten().tolist() == want[: len(want) // 32 * 32]


def test_text_refusals(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses("root=None: must be an existing folder", TextData(tokenizer="kjv").setup)
    refuses("val_files=.'val.'.: must match files under", text(tmp_path).setup)
    jsonl_gz(tmp_path / "val.jsonl.gz", sentences(5))
    refuses("train_files=.'train.'.: must match files under", text(tmp_path).setup)
    jsonl_gz(tmp_path / "train.jsonl.gz", sentences(5))
    refuses("vocab_size=100: must be at least 2048, the vocabulary of kjv", text(tmp_path, vocab_size=100).setup)
    refuses("seq_len=9999: must be at most the tokens of the validation text", text(tmp_path, seq_len=9999).setup)
    refuses("text_key='article': must name a column of text, there are: text, url", text(tmp_path, text_key="article").setup)
    refuses("tokenizer='/nowhere/t.json': must be kjv", text(tmp_path, tokenizer="/nowhere/t.json").setup)
    refuses("batches_per_epoch=0: must be", text, tmp_path, batches_per_epoch=0)
    jsonl_gz(tmp_path / "train.jsonl.gz", ["a b"])
    refuses("seq_len=32: must be at most .*, the tokens of one reader's text", batches, text(tmp_path))
    (tmp_path / "train.txt").write_text("x")
    refuses("train_files=.*must match one kind of file, matches json and text", text(tmp_path).setup)
    (tmp_path / "train.txt").rename(tmp_path / "train.doc")
    refuses("train_files='.*train.doc': must end in .json", text(tmp_path).setup)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_text_that_is_not_utf8(tmp_path, monkeypatch, num_workers):
    write_text(tmp_path, "txt", sentences(3), "train")
    write_text(tmp_path, "txt", sentences(3), "val")
    (tmp_path / "train02.txt").write_bytes("Wo bist du? Über allen Gipfeln".encode("latin-1"))
    said = r"train_files='.*train02.txt': must be UTF-8 text, byte 0xdc near position 12 is not; convert it with iconv"
    refuses(said, text(tmp_path).setup)
    monkeypatch.setattr("lowrank_pretrain.data.text.opening.PEEK", 5)  # as if it were beyond what is looked at first
    refuses(said, batches, text(tmp_path, num_workers=num_workers))


def test_broken_text_files(tmp_path):
    for stem in ("train", "val"):
        jsonl_gz(tmp_path / f"{stem}.jsonl.gz", sentences(50))
    whole = (tmp_path / "train.jsonl.gz").read_bytes()
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refuses("train_files='.*train.jsonl.gz': cannot be unpacked", text(tmp_path).setup)
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    refuses("train_files='.*train.jsonl.gz': must not be empty", text(tmp_path).setup)
    (tmp_path / "train.jsonl.gz").unlink()
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\nno json\n')
    refuses("seq_len=32: must be at most 2, the tokens of one reader's text", batches, text(tmp_path))


# ---- prepare


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "txt"])
def test_prepare_writes_what_data_tokens_reads(tmp_path, kind):
    documents = sentences(30)
    write_text(tmp_path, kind, documents, "part")
    counts = prepare(tmp_path / "out", "kjv", root=str(tmp_path), files="part*", val_every=10)
    tokenizer, _ = load_tokenizer("kjv")
    tokens, vocab = open_bin(tmp_path / "out" / "val.bin")
    assert vocab == 2048 and len(tokens) == counts["val"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "".join(d + "<|endoftext|>" for d in documents[9::10])
    data = TokenData(str(tmp_path / "out"), batch_size=2, seq_len=16, vocab_size=2048)
    assert len(batches(data)) == counts["train"] // 16 // 2


def test_prepare_command_line(tmp_path, capsys):
    (tmp_path / "book.txt").write_text(" ".join(sentences(200)))
    out = tmp_path / "out"
    assert prepare_main(["--out", str(out), "--train-bpe", "300", "--root", str(tmp_path), "--files", "*.txt"]) == 0
    assert "train.bin: " in capsys.readouterr().out
    train, val = open_bin(out / "train.bin")[0], open_bin(out / "val.bin")[0]
    assert 80 < len(train) / len(val) < 120  # one document: its last hundredth is held out
    assert load_tokenizer(str(out))[0].get_vocab_size() == 300
    assert prepare_main(["--out", str(out), "--tokenizer", "kjv", "--root", "/nowhere"]) == 2
    assert prepare_main(["--out", str(out), "--root", str(tmp_path)]) == 2
    assert prepare_main(["--out", str(out), "--train-bpe", "3", "--root", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and errors[0].startswith("root='/nowhere': must be")


def test_gpt2_files_under_both_names(tmp_path):
    trained = train_bpe(sentences(50), 300)
    trained.model.save(str(tmp_path))
    one, end = load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    two, _ = load_tokenizer(str(tmp_path))
    sentence = "the king went up, 神"
    assert one.encode(sentence).ids == two.encode(sentence).ids == trained.encode(sentence).ids and end == 0
    (tmp_path / "vocab.bpe").unlink()
    refuses("tokenizer='.*': must hold tokenizer.json, vocab.json . merges.txt or", load_tokenizer, str(tmp_path))
