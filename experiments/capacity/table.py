"""results.csv and the README's table of ``capacity``."""

from pathlib import Path

from experiments.capacity.study import MIDDLE, final
from experiments.tables import fill, machines, need, plain_row, table, together, write_csv


def write(where: Path, here: Path) -> None:
    """Write all that stands next to this file.

    Raises:
        Missing: no size is finished.
    """
    sides = final(where)
    jobs = [*sides.values()]
    found = need(jobs, where)
    write_csv(here / "results.csv", [plain_row(job, one) for job, one in zip(jobs, found, strict=True)])
    fill(here / "README.md", "machine", machines(found, together(found)))
    lines = []
    for job, one in zip(jobs, found, strict=True):
        ended = one["summary"]["final"]
        accuracy = f"{100 * ended['test/acc1']:.1f}" if "test/acc1" in ended else "–"
        parameters = one["summary"]["phases"][0]["total"] / 1e6
        model = [job.facts["task"], job.facts["width"], f"{parameters:.2f}", f"{job.facts['lr']:g}"]
        lines.append([*model, f"{ended['test/loss']:.3f}", accuracy])
    head = ["task", "width", "parameters, M", "learning rate", "test loss, one seed", "accuracy, %"]
    left = [f"{task} at width {width}" for task, width in MIDDLE if (task, width) not in sides]
    fill(here / "README.md", "sizes", table(head, lines) + (f"\n\nNot run yet: {', '.join(left)}." if left else ""))
