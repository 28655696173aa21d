"""Checkpoints that earlier versions wrote go on to the weights that those versions reached.

``tests/fixtures/write.py`` says what the files are. Bits depend on the kind of CPU. So the same run is repeated here from its
beginning: if it passes the stored checkpoint's weights to the bit, this machine computes as the writing one did, and the
resumed run must reach the stored end to the bit. On another kind of CPU the ends may differ by 1e-4, because a decomposition
amplifies the rounding of its input.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import write
from tests.fixtures.write import FIXTURES, HERE, run, run_command


def assert_reaches(reached, stored, exact, tolerance):
    assert reached.keys() == stored.keys()
    for name, value in stored.items():
        if exact:
            assert torch.equal(reached[name], value), name
        else:
            torch.testing.assert_close(reached[name], value, rtol=0, atol=tolerance)


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
        assert_reaches(end, stored, exact, 1e-4)


def test_an_old_run_of_the_command_line_goes_on_as_it_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, cut = load_file(HERE / "command_line.safetensors"), tmp_path / "cut"
    with pytest.raises(RuntimeError, match="killed"):
        run_command(cut, write.KILL)
    last = cut / "checkpoints" / "last.ckpt"
    exact = same_start(last, HERE / "command_line.ckpt")
    old, new = (torch.load(path, weights_only=True) for path in (HERE / "command_line.ckpt", last))
    # Lightning keeps the state of callbacks and data by class name: a renamed class would lose its own without an error
    assert old.keys() <= new.keys() and old["callbacks"].keys() - new["callbacks"].keys() == set()
    for path in [path for path in last.parent.iterdir() if path != last]:
        path.unlink()
    shutil.copy(HERE / "command_line.ckpt", last)
    assert_reaches(run_command(cut, "ckpt_path=last"), stored, exact, 1e-4)
