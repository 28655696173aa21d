"""What an installation needs: a core of four packages, extras by purpose, and one line where an extra is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import EXTRAS, missing_words, optional_import

ROOT = Path(__file__).parents[1]

# Hide all that does not come with the four packages of the core, from imports and from whoever asks what is installed.
CORE_ALONE = """
import importlib.machinery, importlib.metadata, importlib.util, re, sys
from packaging.requirements import Requirement

def spelled(name):
    return re.sub("[-_.]+", "-", name).lower()

kept = {"lowrank-pretrain"}
def keep(name):
    if spelled(name) in kept:
        return
    kept.add(spelled(name))
    for line in importlib.metadata.requires(name) or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            keep(needed.name)

for name in ("torch", "lightning", "numpy", "omegaconf"):
    keep(name)
hidden = {
    module for module, owners in importlib.metadata.packages_distributions().items()
    if not kept & {spelled(owner) for owner in owners}
}
assert {"timm", "transformers", "torchvision", "hydra", "wandb", "rich", "torchdata", "safetensors"} <= hidden

class CoreAlone(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args, **kwargs):
        for found in importlib.machinery.PathFinder.find_distributions(*args, **kwargs):
            if spelled(found.metadata["Name"] or "") in kept:
                yield found

sys.meta_path[:] = [CoreAlone if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""

FITS = """
import lightning.pytorch as pl, torch
from lowrank_pretrain import GaLoreAdamW, LTEStrategy, PreLoRA, galore_param_groups

class Toy(pl.LightningModule):
    def __init__(self, galore):
        super().__init__()
        self.net, self.galore = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), galore

    def training_step(self, batch):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        if self.galore:
            return GaLoreAdamW(galore_param_groups(self, rank=2), lr=1e-2)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 16)), batch_size=8)
quiet = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, max_steps=4)
prelora = PreLoRA(targets="all", ranks=(2, 4), window=1, window_unit="step", windows=2, latest=2, warmup=1)
lte = LTEStrategy(rank=2, heads=2, merge_every=2)
for galore, more in ((True, {}), (False, {"callbacks": [prelora]}), (False, {"strategy": lte})):
    trainer = pl.Trainer(**quiet, **more)
    trainer.fit(Toy(galore), data)
    assert trainer.global_step == 4
assert prelora.phase == "lowrank", prelora.phase
"""

MISSING = """
for module in ("lowrank_pretrain.models.vision", "lowrank_pretrain.models.language", "lowrank_pretrain.data.images.folders"):
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        print(error)
import runpy
sys.argv[1:] = ["experiment=prelora_pocket"]
runpy.run_module("lowrank_pretrain", run_name="__main__")
"""


def alone(script, folder):
    return subprocess.run([sys.executable, "-c", CORE_ALONE + script], cwd=folder, capture_output=True, text=True)


def test_the_plug_ins_train_with_torch_and_lightning_alone(tmp_path):
    done = alone(FITS, tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_needs_an_extra_says_which_in_one_line(tmp_path):
    done = alone(MISSING, tmp_path)
    assert done.returncode == 2, done.stderr
    vision, language, pictures = done.stdout.splitlines()
    assert "[images]" in vision and "[images]" in pictures and "[text]" in language
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "[cli]" in error and "Traceback" not in done.stderr


def requirements():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"], project["optional-dependencies"]


def package(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower()


def whole(extras, name):
    """Return the packages of an extra, with those of the extras that it names."""
    found = set()
    for requirement in extras[name]:
        others = re.fullmatch(r"lowrank_pretrain\[([\w,]+)\]", requirement)
        found |= set().union(*(whole(extras, other) for other in others[1].split(","))) if others else {package(requirement)}
    return found


def test_the_core_is_four_packages_and_every_extra_is_in_all_and_dev():
    core, extras = requirements()
    assert {package(line) for line in core} == {"torch", "lightning", "numpy", "omegaconf"}
    for name in extras.keys() - {"bench", "dev", "docs", "all"}:
        assert whole(extras, name) <= whole(extras, "all") <= whole(extras, "dev"), name
    present = {"hub", "wds", "medmnist", "glyphs", "dashboard", "tensorboard", "bench", "dev", "docs", "sweep", "8bit"}
    assert present | {"cli", "images", "text", "report", "wandb", "all"} == extras.keys()


def test_every_extra_that_a_message_names_brings_the_package():
    _, extras = requirements()
    within = {"pyarrow": "datasets", "huggingface-hub": "transformers"}  # come with another package of the extra
    for module, (name, extra) in EXTRAS.items():
        assert within.get(name, name) in whole(extras, extra), module


def test_a_missing_package_is_named_with_a_line_that_is_true_everywhere():
    for module, (name, extra) in EXTRAS.items():
        words = missing_words(f"{module}.sub")
        assert words.startswith(f"needs {name}: pip install {name}") and f"[{extra}]" in words and "\n" not in words
    assert missing_words("comet-ml") == "needs comet-ml: pip install comet-ml"


def test_only_a_missing_optional_package_is_turned_into_a_line():
    with pytest.raises(ConfigError, match="root='x': needs zstandard"), optional_import("root", "x"):
        raise ModuleNotFoundError("No module named 'zstandard'", name="zstandard")
    with pytest.raises(ModuleNotFoundError, match=r"\[images\]") as error, optional_import():
        raise ImportError("broken") from ModuleNotFoundError("No module named 'timm.layers'", name="timm.layers")
    assert error.value.name == "timm"
    with pytest.raises(ImportError, match="^broken$"), optional_import("root", "x"):
        raise ImportError("broken", name="zstandard")  # it is there, and cannot be loaded
    with pytest.raises(ModuleNotFoundError, match="^No module named 'mine'$"), optional_import("root", "x"):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")
