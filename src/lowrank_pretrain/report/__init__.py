"""Turn run directories into one HTML page that needs no network and no script.

python -m lowrank_pretrain.report RUN_DIR... [--out FILE|DIR]
"""

from lowrank_pretrain.report.collection import find_runs
from lowrank_pretrain.report.page import render, write_report
from lowrank_pretrain.report.runs import Run, read_run

__all__ = ["Run", "find_runs", "read_run", "render", "write_report"]
