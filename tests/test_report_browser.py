"""The page in a real browser: it fits a phone and a desktop, in light and in dark, over each axis, without a script."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowrank_pretrain.report import find_runs, render
from tests.test_report import make, seeds, sweep, text  # noqa: F401 - fixtures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

PROBE = """
<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>
<iframe id="f390" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<iframe id="f1280" style="width:1280px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, width = box => box.getBoundingClientRect().width;
    page.querySelectorAll("details").forEach(fold => fold.setAttribute("open", ""));
    const shown = {{}};
    for (const radio of page.querySelectorAll("input[name=axis]")) {{
      radio.click();
      shown[radio.nextElementSibling.textContent] = [...page.querySelectorAll(".curves svg")].filter(svg => width(svg)).map(
        svg => svg.getAttribute("aria-label"));
    }}
    page.querySelector("style").append(" figure {{ display: block !important; }}");  // measure them all
    const svgs = [...page.querySelectorAll("figure svg")];
    const sizes = svgs.flatMap(svg => [...svg.querySelectorAll("text")].map(text =>
      parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width));
    const outside = svgs.flatMap(svg => {{
      const box = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter(t => {{
        const r = t.getBoundingClientRect();
        return r.left < box.left - 2 || r.right > box.right + 2 || r.top < box.top - 2 || r.bottom > box.bottom + 2;
      }}).map(t => svg.getAttribute("aria-label") + ": " + t.textContent);
    }});
    found[frame.id] = {{
      width: page.documentElement.scrollWidth,
      charts: svgs.length,
      narrowest: Math.min(...svgs.map(svg => svg.getBoundingClientRect().width)),
      smallest: Math.min(...sizes),
      column: Math.max(...[...page.querySelectorAll("th:first-child")].map(th => th.getBoundingClientRect().width)),
      paper: getComputedStyle(page.body).backgroundColor,
      columns: new Set(svgs.map(svg => Math.round(svg.getBoundingClientRect().left))).size,
      sideways: [...page.querySelectorAll("section, main, table")].filter(box => box.scrollWidth > box.clientWidth + 2).map(
        box => box.className + ": " + box.scrollWidth),
      cut: [...page.querySelectorAll("td, th")].filter(
        cell => width(cell) && cell.getBoundingClientRect().right > frame.clientWidth + 1).map(cell => cell.textContent),
      shown,
      outside,
    }};
  }}
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}});
</script>"""


def browse(tmp_path: Path, page: str, *flags: str) -> tuple[dict, str]:
    """What the probe found in a real browser, at a phone's width and a desktop's, and what went to the console."""
    file = tmp_path / "probe.html"
    file.write_text(PROBE.format(page=html.escape(page)), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"FOUND(\{.*\})END", done.stdout)
    return json.loads(html.unescape(found)), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_in_a_browser_it_fits_a_phone_and_a_desktop_in_light_and_in_dark(text, tmp_path):  # noqa: F811
    text = text.replace("lte, rank=99", "lte" * 50)  # a sweep's directory names are as long, and nothing breaks them
    found, said = browse(tmp_path, text)
    assert not said
    phone, desktop = found["f390"], found["f1280"]
    assert phone["charts"] == desktop["charts"] == text.count("<figure")
    assert phone["width"] == 390 and desktop["width"] == 1280, "the page scrolls sideways"
    assert phone["narrowest"] > 300 and phone["columns"] == 1 and desktop["columns"] >= 2
    assert desktop["column"] < 300, "the first column leaves no room for the others"
    assert phone["smallest"] >= 9, "text too small to be read"
    assert phone["outside"] == desktop["outside"] == []
    assert phone["sideways"] == desktop["sideways"] == phone["cut"] == desktop["cut"] == []
    assert phone["paper"] == "rgb(255, 255, 255)"
    dark, _ = browse(tmp_path, text, "--blink-settings=preferredColorScheme=0")
    assert dark["f390"]["paper"] == "rgb(20, 22, 26)"


def test_a_reader_chooses_the_axis_of_the_curves_without_a_script(text, tmp_path):  # noqa: F811
    found, _ = browse(tmp_path, text)
    for shown in (found["f390"]["shown"], found["f1280"]["shown"]):
        assert list(shown) == ["by step", "by time", "by bytes sent"]
        curves = {words: [name for name in names if name.startswith(("train/", "val/"))] for words, names in shown.items()}
        for words, names in curves.items():
            assert names == [f"{metric} {words}" for metric in ("train/loss", "val/loss", "val/acc1")]
        rest = [[name for name in names if name not in curves[words]] for words, names in shown.items()]
        assert rest[0] == rest[1] == rest[2] and "peak_gib" in rest[0], "what has one axis only is always there"


@pytest.mark.parametrize("several", [True, False])
def test_no_table_scrolls_sideways(tmp_path, several):
    """With all metrics, numbers of a large model, and long names."""
    top = tmp_path / "wide"
    if several:
        seeds(top)
    else:
        make(top / "one")
    for directory in top.iterdir():
        head, *lines = (directory / "metrics.csv").read_text().splitlines()
        more = [f"{step},{','.join(['1234.56789'] * 5)}" for step in (5, 6)]
        names = ",".join(("test/loss", "test/acc1", "test/acc5", "test/ppl", "val/ppl"))
        gap = "," * (head.count(",") + 1)
        rows = [f"{line},,,,," for line in lines]
        rows += [line.replace(",", gap, 1) for line in more]
        (directory / "metrics.csv").write_text("\n".join([f"{head},{names}", *rows]) + "\n")
        summary = json.loads((directory / "summary.json").read_text())
        for phase in summary["phases"]:
            phase |= {"total": 7_234_567_890, "trainable": 6_234_567_890, "seconds": 1_234_567.8, "steps": 1_234_567}
        (directory / "summary.json").write_text(json.dumps(summary))
    runs = find_runs([top])
    for run in runs:
        run.label = f"prelora_exp1, scale_lr=0.00{run.path.name}"
    found, _ = browse(tmp_path, render(runs, "wide"))
    for size in (390, 1280):
        assert found[f"f{size}"]["sideways"] == found[f"f{size}"]["cut"] == [] and found[f"f{size}"]["width"] == size
