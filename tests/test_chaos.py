"""Five kills of the crash harness (the long form is ``make chaos``), and the harness's own eyes."""

import random
import shutil
from dataclasses import replace

import pytest
import torch

from tests.chaos.compare import differences, unlike
from tests.chaos.lives import Life
from tests.chaos.place import Aim
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.story import tell, whole


@pytest.fixture(scope="module", autouse=True)
def images_only():
    """The server of processes imports timm, and not what text needs: a few seconds less."""
    Life.preload, before = ["tests.chaos.preload"], Life.preload
    yield
    Life.preload = before


@pytest.fixture(scope="module")
def prelora(tmp_path_factory):
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("prelora")
    return directory, whole(SCENARIOS["prelora"], directory)


def test_prelora_killed_inside_the_switch_in_a_checkpoint_and_in_a_line_of_metrics(prelora, tmp_path):
    reference, seconds = prelora
    aims = [Aim("groups", 1), Aim("bytes", 3, "middle"), Aim("log", 3, "middle")]
    story = tell(SCENARIOS["prelora"], tmp_path / "killed", reference, seconds, random.Random(0), kills=3, aims=aims)
    assert [place for _, place in story.kills] == [
        "training/switch/groups", "training/save last.ckpt/bytes", "training/log"
    ]  # fmt: skip
    assert not story.wrong and story.lives == 4


def test_a_worker_of_lte_that_is_left_behind_ends_by_itself_with_one_line_and_both_go_on(tmp_path):
    scenario = SCENARIOS["lte"]
    scenario = replace(scenario, args=[*scenario.args, "trainer.max_epochs=2"])
    seconds = whole(scenario, tmp_path / "whole")
    rng = next(rng for rng in map(random.Random, range(99)) if _dies_alone(rng))
    story = tell(
        scenario, tmp_path / "killed", tmp_path / "whole", seconds, rng, kills=2, aims=[Aim("exchange", 2), Aim("finish", 1)]
    )
    assert [place.rpartition("/")[2] for _, place in story.kills] == ["exchange", "finish"]  # the second: nothing left to train
    assert not story.wrong and story.noticed and story.noticed[0] < 15


def _dies_alone(rng: random.Random) -> bool:
    """Whether the first life of a story kills one worker of two; leaves the generator as it was."""
    state = rng.getstate()
    rng.randrange(2)
    alone = rng.random() >= 0.5
    rng.setstate(state)
    return alone


def test_the_comparison_sees_what_differs(prelora, tmp_path):
    """One bit of a weight, a metric, a file left over: a harness that sees nothing would pass everything."""
    ours, theirs = tmp_path / "run", prelora[0] / "run"
    shutil.copytree(theirs, ours)
    assert not differences(ours, theirs)
    (ours / "checkpoints" / ".last.ckpt.1.part").write_text("half")
    metrics = (ours / "metrics.csv").read_text()
    (ours / "metrics.csv").write_text(metrics.rstrip("\n").rpartition("\n")[0] + "\n")
    checkpoint = torch.load(ours / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name].view(torch.int32).view(-1)[0] ^= 1
    torch.save(checkpoint, ours / "checkpoints" / "last.ckpt")
    found = differences(ours, theirs)
    assert len(found) == 3
    assert found[0] == f"last.ckpt.state_dict.{name}: other values"
    assert found[1].startswith("metrics.csv: ") and found[2] == "checkpoints/.last.ckpt.1.part: left over or missing"
    assert unlike([float("nan")], [float("nan")], "") == [] and unlike(0.0, 0, "x") == ["x: float and int"]
    assert unlike(torch.tensor(0.0), torch.tensor(-0.0), "x") == ["x: other values"]
