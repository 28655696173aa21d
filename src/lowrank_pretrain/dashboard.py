"""Save a Weights & Biases workspace for a project's runs: ``python -m lowrank_pretrain.dashboard ENTITY/PROJECT``.

Its sections and axes are those of ``loggers.wandb.SECTIONS``; runs of one sweep are grouped. It needs wandb-workspaces
(``pip install wandb-workspaces``), a W&B key, and the network.
"""

import argparse
import sys
from typing import Any

from lowrank_pretrain.core.arguments import as_flags
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.metrics import AXES, STEP
from lowrank_pretrain.loggers.wandb import SECTIONS
from lowrank_pretrain.run.loggers import has_wandb_key


def workspace(entity: str, project: str, name: str = "lowrank_pretrain") -> Any:
    """Build the workspace without saving it: a ``wandb_workspaces.workspaces.Workspace``.

    Args:
        entity: the user or team that owns the project.
        project: the project that ``logger=wandb`` writes to.
        name: of the saved view.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    with optional_import("dashboard", project):
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2

    sections: list[Any] = []
    for section, panels in SECTIONS.items():
        plots: list[Any] = [
            v2.LinePlot(
                title=title, x=axis, title_x=AXES[axis], title_y=unit,
                **({"metric_regex": metrics} if isinstance(metrics, str) else {"y": metrics}),
            )
            for title, metrics, axis, unit in panels
        ]  # fmt: skip
        if section == "Low rank":
            plots += [v2.MediaBrowser(title="Ranks: layer by family", media_keys=["lowrank/rank_map"])]
        sections.append(workspaces.Section(name=section, panels=plots, is_open=section in ("Loss", "Throughput")))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=30),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit codes: 0; 2: no key, no wandb-workspaces, or a wrong project."""
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_pretrain.dashboard", description="Save a W&B workspace for the runs of a project."
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="as in the address of the project's page")
    parser.add_argument("--name", default="lowrank_pretrain", help="of the saved view")
    given = parser.parse_args(as_flags(arguments, parser))
    entity, _, project = given.project.partition("/")
    try:
        if not entity or not project or "/" in project:
            raise ConfigError("ENTITY/PROJECT", given.project, "must be a user or team, a slash and a project")
        made = workspace(entity, project, given.name)
        if not has_wandb_key():
            raise ConfigError("WANDB_API_KEY", None, "is not set and nobody has logged in: wandb login")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"workspace: {made.save_as_new_view().url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
