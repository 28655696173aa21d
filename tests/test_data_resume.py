"""A run that stops in the middle of an epoch and goes on in a new Trainer sees the batches it would have seen."""

import os
import pickle
import shutil
import signal
import subprocess
import threading
import time

import lightning as L
import pytest
import torch

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.images.datasets import ImageData
from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST
from lowrank_pretrain.data.loaders.batch import Fetched, end_workers
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader
from lowrank_pretrain.data.text.stream import TextData
from lowrank_pretrain.data.text.tokens import TokenData
from tests.data_helpers import SaveAt, fingerprint, fit, image_folder, jsonl_gz, sentences

PER_EPOCH = 6  # batches


def sample(num_workers=0, batch_size=32, **kwargs):
    return FashionMNIST("sample", batch_size, num_workers, mixup=0.2, cutmix=1.0, smoothing=0.1, **kwargs)


def kjv(num_workers=0):
    return TokenData("kjv", batch_size=4, num_workers=num_workers, seq_len=64, vocab_size=2048)


def folder(root, num_workers=0):
    recipe = {"auto_augment": "rand-m9-n2-mstd0.5", "re_prob": 0.25, "mixup": 0.2, "cutmix": 1.0}
    return ImageData(str(root), batch_size=4, num_workers=num_workers, num_classes=2, img_size=16, **recipe)


def stream(root, num_workers=0, **kwargs):
    sizes = {"seq_len": 32, "vocab_size": 2048, "batches_per_epoch": PER_EPOCH, "shuffle_block": 7} | kwargs
    return TextData(str(root), "train*", "val*", tokenizer="kjv", batch_size=2, num_workers=num_workers, **sizes)


class Numbers:
    """A set of 16 numbers."""

    def __len__(self):
        return 16

    def fetch(self, epoch, indices):
        return Fetched(torch.tensor(indices), [])


def check(make, tmp_path, hook, step, per_epoch=PER_EPOCH, **kwargs):
    kwargs = {"limit_train_batches": PER_EPOCH, "limit_val_batches": 1} | kwargs
    path = tmp_path / "mid.ckpt"
    whole, weight = fit(make(), callbacks=[SaveAt(path, hook, step)], **kwargs)
    assert len(set(whole)) == len(whole) == 3 * per_epoch  # nothing repeats, so equality below says something
    torch.manual_seed(123)  # the resumed process has another global state
    rest, resumed = fit(make(), ckpt=path, **kwargs)
    assert rest == whole[step:]
    assert resumed == weight


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    for shard in range(3):
        jsonl_gz(root / f"train-{shard}.jsonl.gz", sentences(40, seed=shard))
    jsonl_gz(root / "val.jsonl.gz", sentences(10, seed=9))
    return root


MOMENTS = [("batch", 2), ("batch", 8), ("batch", 6), ("epoch", 6), ("epoch", 12), ("validation", 6), ("validation", 12)]


@pytest.mark.parametrize(("hook", "step"), MOMENTS)
def test_images_in_memory(tmp_path, hook, step):
    check(sample, tmp_path, hook, step)


@pytest.mark.parametrize(("hook", "step"), [("batch", 2), ("batch", 8), ("validation", 9)])
def test_validation_in_mid_epoch(tmp_path, hook, step):
    check(sample, tmp_path, hook, step, val_check_interval=3)


@pytest.mark.parametrize(("hook", "step"), [("batch", 8), ("epoch", 6)])
def test_tokens(tmp_path, hook, step):
    check(kjv, tmp_path, hook, step)


def test_images_in_memory_with_two_workers(tmp_path):
    check(lambda: sample(2), tmp_path, "batch", 8)


THREADS = []  # kinds of threads that a library starts in each new process


@pytest.fixture(scope="module")
def threads_at_fork():
    """A library that starts a thread in every new process, as those for linear algebra and tables may."""

    def start():
        for seconds in THREADS:
            threading.Thread(target=time.sleep, args=(seconds,), daemon=True).start()

    os.register_at_fork(after_in_child=start)
    THREADS.append(20)
    yield
    THREADS.clear()


@pytest.mark.usefixtures("threads_at_fork")
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS cannot tell who sent a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_processes_outlive_a_signal_to_the_whole_group(number):
    """``timeout``, SLURM and Ctrl-C signal them too; the training process must be able to write its checkpoint."""
    loader = EpochLoader(Numbers(), EpochBatches(16, 2, False), num_workers=2)
    batches = iter(loader)
    first = [next(batches), next(batches)]  # of each process one: both have begun
    workers = loader._loader._iterator._workers
    subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in workers)], check=True)  # not their parent
    assert len([*first, *batches]) == 8 and all(worker.is_alive() for worker in workers)
    end_workers(loader._loader)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS cannot tell who sent a signal")
def test_a_loading_process_obeys_the_training_process():
    loader = EpochLoader(Numbers(), EpochBatches(16, 2, False), num_workers=1)
    next(iter(loader))
    (worker,) = loader._loader._iterator._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_augmentation_of_an_image_folder(tmp_path, pictures, num_workers):
    check(lambda: folder(pictures, num_workers), tmp_path, "batch", 8)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_images_of_an_archive_whose_validation_is_held_out(tmp_path, pictures, kind):
    archive = shutil.make_archive(str(tmp_path / "set"), kind, pictures / "train")
    options = {"batch_size": 4, "img_size": 16, "val_fraction": 0.2, "num_workers": 2}
    check(lambda: ImageData(archive, **options), tmp_path, "batch", 3, limit_train_batches=4, per_epoch=4)


@pytest.mark.parametrize(
    ("num_workers", "hook", "step"), [(0, "batch", 8), (0, "epoch", 6), (0, "validation", 12), (2, "batch", 8)]
)
def test_stream_of_text(tmp_path, documents, num_workers, hook, step):
    check(lambda: stream(documents, num_workers), tmp_path, hook, step)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_resumes_at_every_batch(documents, num_workers):
    """Across block ends, document ends and the end of the text (a pass is about 60 batches here)."""
    count = 75
    data = stream(documents, num_workers, seq_len=64, batches_per_epoch=count)
    data.setup()
    loader, states, whole = data.train_dataloader(), [], []
    for batch in loader:
        whole.append(fingerprint(batch))
        states.append(pickle.dumps(loader.state_dict()))
    data.teardown()
    for done in (1, 4, 5, 9, 30, 58, 59, 60, 61) if num_workers == 0 else (5, 60):
        again = stream(documents, num_workers, seq_len=64, batches_per_epoch=count)
        again.setup()
        again.load_state_dict({"train": pickle.loads(states[done - 1])})
        assert [fingerprint(batch) for batch in again.train_dataloader()] == whole[done:], done
        again.teardown()


def test_the_same_data_module_in_a_second_fit(documents):
    """Afresh means from the beginning, also after a fit that ended in the middle of an epoch."""
    for data in (sample(), stream(documents)):
        options = {"limit_train_batches": PER_EPOCH, "limit_val_batches": 1, "max_epochs": -1}
        whole, _ = fit(data, max_steps=10, **options)
        assert fit(data, max_steps=8, **options)[0] == whole[:8]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_checkpoint_written_after_the_fit_knows_the_place_in_the_stream(tmp_path, documents, num_workers):
    class SaveAfter(L.Callback):
        def teardown(self, trainer, module, stage):
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    options = {"limit_val_batches": 1, "max_epochs": -1}
    whole, _ = fit(stream(documents, num_workers), max_steps=10, **options)
    fit(stream(documents, num_workers), max_steps=8, callbacks=[SaveAfter()], **options)
    assert fit(stream(documents, num_workers), max_steps=10, ckpt=tmp_path / "after.ckpt", **options)[0] == whole[8:]


def test_workers_and_ranks_read_different_text(documents):
    seen = []
    for rank in range(2):
        data = stream(documents, batches_per_epoch=4)
        data.setup()
        data.train_set.rank, data.train_set.world_size = rank, 2  # as two processes would set up
        seen += [row.tobytes() for batch in data.train_dataloader() for row in batch["input_ids"].numpy()]
    assert len(set(seen)) == len(seen)


def test_other_number_of_workers_gives_the_same_batches(tmp_path, pictures):
    path = tmp_path / "mid.ckpt"
    whole, _ = fit(folder(pictures, 0), callbacks=[SaveAt(path, "batch", 2)], max_epochs=1)
    rest, _ = fit(folder(pictures, 2), ckpt=path, max_epochs=1)
    assert rest == whole[2:]


def test_resume_with_another_batch_size_says_so(tmp_path):
    path = tmp_path / "mid.ckpt"
    fit(sample(), callbacks=[SaveAt(path, "batch", 2)], max_epochs=1, limit_train_batches=3)
    with pytest.raises(ConfigError, match="batch_size=16: .* must be 32, as in the checkpoint"):
        fit(sample(batch_size=16), ckpt=path, max_epochs=1, limit_train_batches=3)
    fit(sample(), callbacks=[SaveAt(path, "epoch", 3)], max_epochs=1, limit_train_batches=3)
    assert len(fit(sample(batch_size=16), ckpt=path, max_epochs=2, limit_train_batches=3)[0]) == 3  # a new epoch: no harm


def test_stream_resumed_with_other_workers_says_so(tmp_path, documents):
    path = tmp_path / "mid.ckpt"
    fit(stream(documents), callbacks=[SaveAt(path, "batch", 2)], max_epochs=1, limit_val_batches=0)
    with pytest.raises(ConfigError, match="num_workers=2: must be 0, as in the checkpoint"):
        fit(stream(documents, 2), ckpt=path, max_epochs=1, limit_val_batches=0)


def test_loaders_leave_the_global_generators_alone(pictures, documents):
    for data in (sample(), sample(2), kjv(), folder(pictures), folder(pictures, 2), stream(documents)):
        data.setup()
        before = torch.get_rng_state()
        next(iter(data.train_dataloader()))
        assert len(list(data.val_dataloader())) > 0
        data.teardown()
        assert torch.equal(torch.get_rng_state(), before), data


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch(world):
    parts = []
    for rank in range(world):
        batches = EpochBatches(25, 12 // world, shuffle=True, rank=rank, world_size=world, seed=1)
        batches.set_epoch(3)
        parts.append([set(indices) for _, indices in batches])
    union = [set().union(*batch) for batch in zip(*parts, strict=True)]
    whole = EpochBatches(25, 12, shuffle=True, seed=1)
    whole.set_epoch(3)
    assert union == [set(indices) for _, indices in whole]
    assert [len(batch) for batch in union] == [12, 12]


def test_validation_sees_everything_once_on_one_process():
    assert [i for _, indices in EpochBatches(10, 4, shuffle=False) for i in indices] == list(range(10))


def rank(kind, documents, folder, ckpt=None, save=False):
    """One of two processes' batches; runs in the pool of ranks."""
    make = {"sample": sample, "stream": lambda: stream(documents)}[kind]
    callbacks = [SaveAt(folder / "mid.ckpt", "batch", 8)] if save else []
    options = {"limit_train_batches": PER_EPOCH, "limit_val_batches": 1, "max_epochs": 2}
    return fit(make(), ckpt, callbacks, devices=2, strategy="ddp", **options)[0]


@pytest.mark.parametrize("kind", ["sample", "stream"])
def test_each_of_two_processes_goes_on_where_it_was(ranks, tmp_path, documents, kind):
    whole = ranks(2, rank, kind, documents, tmp_path, save=True)
    assert len(set(whole[0] + whole[1])) == 4 * PER_EPOCH
    rest = ranks(2, rank, kind, documents, tmp_path, ckpt=tmp_path / "mid.ckpt")
    assert rest == [seen[8:] for seen in whole]
