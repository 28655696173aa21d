"""Checkpoints that earlier versions wrote are loaded to the bit, and go on to the weights that those versions reached.

``tests/fixtures/write.py`` says what the files are. Loading: what is saved again before the first step equals the file, in all
that training depends on. Going on: bits depend on the kind of CPU, so the same run is repeated here from its beginning: if it
passes the stored checkpoint's weights to the bit, this machine computes as the writing one did, and the resumed run must reach
the stored end to the bit. On another kind of CPU the ends may differ by 1e-4, because a decomposition amplifies the rounding of
its input. Runs with adapters (PreLoRA's) may differ by 1e-5 of a tensor's norm on any CPU: the adapters' sums in float32 were
given another, faster order of terms after the files were written.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import write
from tests.fixtures.write import FIXTURES, HERE, run, run_command

ADAPTERS = ("prelora_joint", "command_line")  # whose sums were reordered
NOT_LOADED_YET = ("/lte_state/random", "/callbacks/ModelCheckpoint")  # set by the first batch; holds paths and file names


def assert_reaches(reached, stored, name, exact):
    assert reached.keys() == stored.keys()
    for key, value in stored.items():
        if name in ADAPTERS:
            assert (reached[key] - value).norm() <= 1e-5 * value.norm(), key
        elif exact:
            assert torch.equal(reached[key], value), key
        else:
            torch.testing.assert_close(reached[key], value, rtol=0, atol=1e-4)


def leaves(tree, path=""):
    """Path and value of everything in nested dicts and lists."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def assert_loaded(file, loaded):
    """All of the file's model, moments, schedules, plan and clocks, to the bit; newer versions may save more."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lowrank_pretrain", "lte_state", "global_step")
    old, new = ({k: v for k, v in torch.load(path, weights_only=True).items() if k in parts} for path in (file, loaded))
    new = dict(leaves(new))
    for path, value in leaves(old):
        if not path.startswith(NOT_LOADED_YET):
            same = torch.equal(new[path], value) if isinstance(value, torch.Tensor) else new[path] == value
            assert same and type(new[path]) is type(value), path


def same_start(here, stored):
    """Whether this machine's checkpoint holds the stored one's model, to the bit."""
    models = [torch.load(path, weights_only=True)["state_dict"] for path in (here, stored)]
    assert models[0].keys() == models[1].keys()
    return all(torch.equal(models[0][name], value) for name, value in models[1].items())


@pytest.mark.parametrize("name", FIXTURES)
def test_an_old_checkpoint_goes_on_as_it_did(tmp_path, name):
    stored = load_file(HERE / f"{name}.safetensors")
    whole = run(name, tmp_path)
    exact = same_start(tmp_path / f"{name}.ckpt", HERE / f"{name}.ckpt")
    for end in (whole, run(name, tmp_path, HERE / f"{name}.ckpt")):
        assert_reaches(end, stored, name, exact)
    assert_loaded(HERE / f"{name}.ckpt", tmp_path / f"{name}.loaded.ckpt")


def test_an_old_run_of_the_command_line_goes_on_as_it_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, cut = load_file(HERE / "command_line.safetensors"), tmp_path / "cut"
    with pytest.raises(RuntimeError, match="killed"):
        run_command(cut, write.KILL)
    last = cut / "checkpoints" / "last.ckpt"
    old, new = (torch.load(path, weights_only=True) for path in (HERE / "command_line.ckpt", last))
    # Lightning keeps the state of callbacks and data by class name: a renamed class would lose its own without an error
    assert old.keys() <= new.keys() and old["callbacks"].keys() - new["callbacks"].keys() == set()
    for path in [path for path in last.parent.iterdir() if path != last]:
        path.unlink()
    shutil.copy(HERE / "command_line.ckpt", last)
    loaded = tmp_path / "loaded.ckpt"
    saving = f"+trainer.callbacks=[{{_target_: tests.fixtures.write.SaveAtStart, path: {loaded}}}]"
    assert_reaches(run_command(cut, "ckpt_path=last", saving), stored, "command_line", exact=False)
    assert_loaded(HERE / "command_line.ckpt", loaded)
