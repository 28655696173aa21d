"""Tune an experiment by coordinate descent: ``sweep=tuned``, a sweeper of Hydra's.

Each job is one training; the validation loss that it returns decides which are next. The space and the rule are those of the
optimizers' study (``run/search.py``). The search begins at the experiment's own values.
"""

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.run.search import LISTS, NAMES, RATES, Descent, Point, Space, from_file

PLUGINS = "hydra_plugins.lowrank_pretrain"  # Hydra takes sweepers whose module has such a name


@dataclass
class TunedConfig:
    """Hold the keys of ``hydra.sweeper``.

    Attributes:
        coordinates: what may change: rates, and names of ``lists``.
        factor: a step of a rate.
        budget: most runs of the search.
        gain: by how much the loss must fall for a step to count.
        lists: values of the coordinates that are no rates.
        params: as of Hydra's own sweeper; nothing may be swept by them.
    """

    _target_: str = f"{PLUGINS}.TunedSweeper"
    coordinates: list[str] = field(default_factory=lambda: list(RATES))
    factor: float = 1.5
    budget: int = 60
    gain: float = 0.001
    lists: dict[str, Any] = field(default_factory=lambda: {name: list(values) for name, values in LISTS.items()})
    params: dict[str, Any] | None = None


class TunedSweeper(Sweeper):
    """Run the jobs that a coordinate descent asks for. Its arguments are those of :class:`TunedConfig`."""

    def __init__(self, coordinates: Sequence[str], params: Any = None, **space: Any) -> None:
        self.coordinates, self.space, self.params = list(coordinates), space, params

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what Hydra hands over, and make the launcher."""
        self.config = config
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Search, and print the best settings as words for the command line."""
        assert self.config is not None and self.launcher is not None, "Hydra has called setup"
        optim = self.config.optim
        losses: dict[Point, float] = {}
        returned: list[Any] = []
        try:
            space, (point, origin) = self._space(arguments, optim)
            directory = Path(self.config.hydra.sweep.dir)
            directory.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, directory / "multirun.yaml")
            descent = Descent(space, point, tuple(self.coordinates), losses.__getitem__)
            for wanted in descent.requests():
                new = [one for one in wanted if one not in losses]
                jobs = [[*arguments, *words(space.values(one, origin), self.coordinates, optim)] for one in new]
                found = self.launcher.launch(jobs, initial_job_idx=len(losses)) if jobs else []
                losses.update(zip(new, map(loss_of, found), strict=True))
                returned += found
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if losses[descent.point] == math.inf:
            print(f"error: sweep=tuned: none of {len(losses)} runs has ended with a finite val/loss", file=sys.stderr)
            sys.exit(1)
        best = " ".join(words(space.values(descent.point, origin), self.coordinates, optim))
        end = "no neighbour is better" if descent.settled else f"the budget of {space.budget} runs ended the search"
        edges = descent.at_an_edge()
        edge = f"; at the edge of its list: {', '.join(edges)}" if edges else ""
        print(f"tuned: {best}  val/loss {losses[descent.point]:.4f} of {len(losses)} runs; {end}{edge}", flush=True)
        return [returned]

    def _space(self, arguments: list[str], optim: DictConfig) -> tuple[Space, tuple[Point, dict[str, float]]]:
        """Return the space, and the point at the experiment's values.

        Raises:
            ConfigError: several values of a key, an unknown coordinate, a budget without a comparison, or as :class:`Space`.
        """
        for override in OverridesParser.create(config_loader=self.loader).parse_overrides(arguments):
            if override.is_sweep_override() or self.params:
                given = (override.input_line or "").partition("=")[2]
                raise ConfigError(override.key_or_group, given, "sweep=tuned chooses values itself: give one")
        if not self.coordinates or any(name not in NAMES for name in self.coordinates):
            raise ConfigError("hydra.sweeper.coordinates", self.coordinates, f"must be some of {', '.join(NAMES)}")
        space = from_file({**self.space, "lists": OmegaConf.to_container(self.space["lists"])})
        here = {"beta1": optim.betas[0], "beta2": optim.betas[1], "weight_decay": optim.weight_decay, "warmup": optim.warmup}
        lr = number("optim.lr", optim.lr, above=0)
        point, origin = space.start(lr, lr if optim.rest_lr is None else number("optim.rest_lr", optim.rest_lr, above=0))
        nearest = {
            name: min(range(len(space.lists[name])), key=lambda i: abs(space.lists[name][i] - here[name])) for name in LISTS
        }
        point = tuple((name, nearest.get(name, place)) for name, place in point)
        first = 1 + len(space.neighbours(point, self.coordinates[0]))
        if space.budget < first:
            raise ConfigError(
                "hydra.sweeper.budget", space.budget, f"must be {first} or more: the first comparison takes so many runs"
            )
        return space, (point, origin)


def words(values: Mapping[str, float], coordinates: Sequence[str], optim: DictConfig) -> list[str]:
    """Return a point's overrides of the coordinates that may change."""
    found = [f"optim.{name}={values[name]:g}" for name in ("lr", "rest_lr", "weight_decay", "warmup") if name in coordinates]
    if "beta1" in coordinates or "beta2" in coordinates:
        betas = [values[name] if name in coordinates else optim.betas[i] for i, name in enumerate(("beta1", "beta2"))]
        found.append(f"optim.betas=[{betas[0]:g},{betas[1]:g}]")
    return found


def loss_of(job: Any) -> float:
    """Return a job's validation loss; infinite if it diverged or failed, which its own line has said.

    Raises:
        Exception: a wrong configuration, which every other job would have too.
        ConfigError: the job has no validation loss.
    """
    from lowrank_pretrain.run.train import JobFailed

    try:
        loss = job.return_value
    except JobFailed as error:
        if error.code != 1:
            raise
        return math.inf
    if loss is None:
        raise ConfigError("sweep", "tuned", "compares runs by val/loss, and a run without validation has none")
    return float(loss) if math.isfinite(loss) else math.inf


def register() -> None:
    """Make ``hydra/sweeper=tuned`` known to Hydra.

    Hydra imports a sweeper by its name, and only from the namespace ``hydra_plugins``. This module is entered there, and not
    installed there: a second top-level package would have to be found in editable installs and in zip files too.
    """
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ImportError:  # no plugin is installed
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    sys.modules[PLUGINS] = sys.modules[__name__]
    setattr(namespace, PLUGINS.rpartition(".")[2], sys.modules[__name__])
    TunedSweeper.__module__ = PLUGINS
    Plugins.instance().register(TunedSweeper)
    ConfigStore.instance().store(group="hydra/sweeper", name="tuned", node=TunedConfig, provider="lowrank_pretrain")
