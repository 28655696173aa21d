"""The page: what it says of finished, failed and killed runs, that it needs nothing from outside, and how it looks."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowrank_pretrain.report import charts, find_runs, render, write_report
from lowrank_pretrain.report.__main__ import main
from lowrank_pretrain.report.runs import best, by_seed
from lowrank_pretrain.report.sections import shortened, smooth

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PLAN = {f"model.blocks.{i}.{name}": 4 * (i + 1) for i in range(2) for name in ("attn.qkv.q", "mlp.fc1")}


def phase(name: str, steps: int, seconds: float, rate: float, trainable: int = 1000) -> dict:
    return {
        "phase": name, "steps": steps, "seconds": seconds, "samples_per_sec": rate, "peak_gib": 1.5,
        "trainable": trainable, "total": 1000, "optimizer_gib": 0.5, "flops_per_sample": 2e6,
    }  # fmt: skip


def make(directory: Path, job: int | None = None, overrides: tuple[str, ...] = (), loss: float = 1.0, rows: int = 20) -> Path:
    """A run directory of two phases and 20 steps: 10 at 1 s, 10 at 0.5 s."""
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra" / "config.yaml").write_text("method:\n  name: prelora\n  weight_tol: 0.05\n  targets: ${x}\nx: a<b\n")
    (directory / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    if job is not None:
        (directory / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    num: {job}\n")
    keys = ["step", "train/loss", "val/loss", "val/acc1", "time/train_seconds", "throughput/samples_per_sec"]
    keys += ["lowrank/weight_norm/model.blocks.*.mlp.fc1", "lowrank/weight_norm/model.head", "lowrank/weight_change/m.fc1"]
    keys += ["lte/merge_mib", "lte/merge_ms", "lowrank/phase"]
    lines = [",".join(keys)]
    for step in range(rows):
        seconds = step + 1 if step < 10 else 10 + (step - 9) / 2
        lines.append(f"{step},{loss / (step + 1)},,,{seconds},8,3.5,1.5,0.04,0,12.5,{int(step > 9)}")
        if step % 5 == 4:
            lines.append(f"{step},,{loss / (step + 1)},{step / 20},,,,,,,,")
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    phases = [phase("full", 10, 10.0, 8.0), phase("lowrank", 10, 5.0, 16.0, trainable=100)]
    summary = {"phases": phases, "switch_step": 5, "freeze_step": 10, "plan": PLAN, "final": {"val/loss": loss / 20}}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Four jobs: two finished, one refused, one killed in its third step."""
    top = tmp_path_factory.mktemp("runs") / "a <sweep>"
    make(top / "z", 0, ("method=full", "seed=0"))
    make(top / "m", 1, ("method=prelora", "seed=0"), loss=2.0)
    refused = make(top / "a", 2, ("method=lte", "seed=0", "method.rank=99"))
    for name in ("metrics.csv", "summary.json"):
        (refused / name).unlink()
    (refused / "failure.txt").write_text("error: method.rank=99: must be below <64>\n")
    killed = make(top / "b", 10, ("method=galore", "seed=0"), rows=3)
    (killed / "summary.json").unlink()
    (killed / "metrics.csv").open("a").write("3,0.1")  # half a row
    (top / "multirun.yaml").write_text("")
    return top


@pytest.fixture(scope="module")
def text(sweep) -> str:
    return render(find_runs([sweep]), sweep.name)


class Page(HTMLParser):
    """Everything that a browser would fetch or run, ids, texts by tag, and whether tags are closed."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.asks, self.refs, self.stack, self.svgs, self.cells = [], [], [], [], [], [], []
        self.feed(text)
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.stack.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "svg":
            self.svgs.append([attributes.get("aria-label"), []])
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "data", "action", "xlink:href"):
                (self.refs if value.startswith("#") else self.asks).append(value)
            self.refs += re.findall(r"url\((#[^)]*)\)", value or "")
            assert not key.startswith("on"), f"{tag} {key}"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "text":
            self.svgs[-1][1].append(data)
        if self.stack and self.stack[-1] in ("td", "th", "small", "b"):
            self.cells.append(data.strip())


def test_the_page_asks_for_nothing_and_every_chart_has_names_and_units(text):
    page = Page(text)
    assert "script" not in page.tags and page.asks == ["data:,"] and "@import" not in text and "http" not in text
    assert len(page.ids) == len(set(page.ids)), "two charts share an id, and with it clip paths or hatches"
    assert {ref[1:] for ref in page.refs} <= set(page.ids)
    assert len(page.svgs) == len({name for name, _ in page.svgs}) >= 15 and page.tags.count("figure") == len(page.svgs)
    units = r"steps|seconds|nats|fraction|samples|GiB|MiB|million|MFLOP|‖|ms|family|layer"
    for name, texts in page.svgs:
        assert re.search(units, " ".join(texts)), (name, texts)
    shown = {name for name, _ in page.svgs}
    assert {
        "train/loss by step",
        "train/loss by time",
        "val/acc1 by time",
        "samples_per_sec",
        "peak_gib",
        "full: ranks",
    } <= shown
    assert not re.search(r"#0[0-9a-f]0\w{3}\b", text), "a stand-in was left where a colour belongs"
    assert "<sweep>" not in text and "a &lt;b" not in text and "a&lt;b" in text


def test_a_sweeps_failed_and_killed_jobs_are_there_with_their_reasons(sweep, text):
    runs = find_runs([sweep])
    assert [run.label for run in runs] == ["full", "prelora", "lte, rank=99", "galore"], "jobs in Hydra's order"
    assert [run.state for run in runs] == ["finished", "finished", "failed", "unfinished"]
    assert "<b>lte, rank=99</b> · error: method.rank=99: must be below &lt;64&gt;" in text
    assert "<b>galore</b> · no summary.json and no reason: still running, or killed after step 3" in text
    assert "4 runs: 2 finished, 1 failed, 1 unfinished." in text


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are chosen but not drawn, which is nearly all of a page's time."""
    for kind in ("lines", "bars", "heat_map"):
        monkeypatch.setattr(charts, kind, lambda *args, **kwargs: "<svg></svg>")


def rows(text: str) -> dict[str, list[str]]:
    """{first cell: all cells} of the table of runs; a ratio is a cell of its own."""
    table = text[text.index("<h2>Runs, with ratios to the first</h2>") :]
    table = table[: table.index("</table>")]
    found = [[cell for cell in Page(row).cells if cell] for row in re.findall("<tr>.*?</tr>", table)]
    return {row[0]: row for row in found}


def test_ratios_are_to_the_first_run_and_to_the_full_phase(text):
    found = rows(text)
    assert found["run"][:5] == ["run", "val/loss", "val/acc1", "train/loss", "optimizer steps"], "losses and accuracy first"
    assert found["prelora"][:6] == ["prelora", "0.1", "0.95", "0.1", "20", "15.0"], "equal steps need no ratio"
    assert found["prelora"][6] == "1.00×" and "10.67" in found["prelora"], "20 steps in 10/8 + 10/16 units of time"
    cells = Page(text).cells
    assert ["100", "0.10×", "1,000"] == [c for c in cells if c in ("1,000", "100", "0.10×")][-3:], "of the last phase"


def test_the_best_of_each_column_is_marked_and_named_above(text):
    found = rows(text)
    assert found["full"][1] == "0.05 ★" and found["prelora"][1] == "0.1", "the lowest loss"
    assert not any("★" in cell for cell in found["prelora"]) and found["full"][2] == "0.95", "equal ones are not marked"
    assert "Best val/loss: <b>full</b>, 0.05." in text


@pytest.mark.parametrize(("metric", "values", "expected"), [
    ("val/loss", [2.0, 1.0, None], 1.0), ("val/acc1", [0.5, 0.75], 0.75), ("test/ppl", [9.0, 8.0], 8.0),
    ("val/loss", [1.0, 1.0], None), ("val/loss", [1.0], None), ("val/loss", [], None), ("lowrank/phase", [1.0, 2.0], None),
])  # fmt: skip
def test_which_is_the_best_depends_on_the_metric(metric, values, expected):
    assert best(values, metric) == expected


def test_what_failed_is_folded_after_the_results_and_no_row_of_the_table(text):
    assert "lte, rank=99" not in rows(text) and "unfinished" in rows(text)["galore"]
    fold = text.index('<details class="unwell">')
    assert text.index("Runs, with ratios") < fold < text.index("<b>lte, rank=99</b>") < text.index("Side by side")
    assert "Failed, damaged or unfinished: 2" in text


def seeds(top: Path) -> Path:
    """Two methods, three seeds each, and one seed of a third."""
    jobs = [(m, seed) for m in ("full", "lora") for seed in range(3)] + [("galore", 0)]
    for job, (name, seed) in enumerate(jobs):
        made = make(top / f"{job}", job, (f"method={name}", f"seed={seed}"), loss=1.0 + seed + 10 * (name == "lora"))
        (made / ".hydra" / "config.yaml").write_text(f"method: {{name: {name}}}\nseed: {seed}\nckpt_path: null\n")
    return top


def test_runs_that_differ_by_their_seed_only_have_a_mean_and_a_deviation(undrawn, tmp_path):
    runs = find_runs([seeds(tmp_path / "sweep")])
    groups = by_seed(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("full", 3), ("lora", 3)]
    assert groups[0].mean("val/loss") == pytest.approx(2 / 20) and groups[0].deviation("val/loss") == pytest.approx(0.05)
    text = render(runs, "sweep")
    assert "Mean ± standard deviation over seeds" in text and "0.1 ★</b> <small>± 0.05</small>" in text
    runs[0].failure = "error: x"
    assert [len(group.runs) for group in by_seed(runs)] == [2, 3], "a failed run is in no mean"


def test_other_differences_than_the_seed_make_no_mean(tmp_path):
    for job, extra in enumerate(["optim.lr=1", "optim.lr=2"]):
        make(tmp_path / extra, job, (f"seed={job}", extra))
    assert by_seed(find_runs([tmp_path])) == []
    for job in range(2):  # the same seed twice is no sample of two
        make(tmp_path / "again" / f"{job}", None, ("seed=0",))
    assert by_seed(find_runs([tmp_path / "again"])) == []


def test_a_directory_that_somebody_named_is_the_label_and_its_path_is_in_the_fold(undrawn, tmp_path):
    many = [f"model.model_kwargs.key{i}" for i in range(9)]
    for i in range(12):
        make(tmp_path / f"my run {i}", None, ("~model.config.x", *(f"{key}={i}" for key in many)), loss=1 + i)
    runs = find_runs([tmp_path])
    assert sorted(run.label for run in runs) == sorted(f"my run {i}" for i in range(12))
    text = render(runs, "named")
    assert "~model.config.x" in text and f"key8={3}" in text and "my run 3</code>" in text


@pytest.mark.parametrize(("overrides", "expected"), [
    ([("method=full",), ("method=lora", "method.rank=4")], ["full", "lora, rank=4"]),
    ([("~model.config.x",), ("seed=1",)], ["without x", "seed=1"]),
    ([("++a.b=1", "+c=2"), ("++a.b=2", "+c=2")], ["b=1", "b=2"]),
    ([(f"a.b={'1' * 60}",), (f"a.b={'1' * 59}2",)], None),
    ([tuple(f"a.key{i}={i + j}" for i in range(9)) for j in range(3)], None),
])  # fmt: skip
def test_labels_are_short_and_unique(tmp_path, overrides, expected):
    for job, some in enumerate(overrides):
        make(tmp_path / f"job{job}", job, some)
    found = [run.label for run in find_runs([tmp_path])]
    assert len(set(found)) == len(found) and max(map(len, found)) <= 40 and (expected is None or found == expected)


def test_runs_of_one_name_in_two_places_are_told_apart(tmp_path):
    for place in "ab":
        make(tmp_path / place / "run", None, ("seed=1",))
    assert [run.label for run in find_runs([tmp_path])] == ["a/run", "b/run"]


DAMAGE = {
    "summary.json": [
        "{",
        "[]",
        '"x"',
        '{"phases": [1]}',
        '{"phases": [{"phase": "full"}]}',
        '{"plan": 3}',
        "\0",
        '{"switch_step": "x"}',
    ],
    "metrics.csv": ["", "no header at all", "step,train/loss\n1,abc\n2", "\0\0"],
    ".hydra/config.yaml": ["a: [", "- 1", "just words", "\0"],
    ".hydra/overrides.yaml": ["a: [", "3", "\0"],
    ".hydra/hydra.yaml": ["a: [", "- 1", ""],
    "failure.txt": [""],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_run_is_listed_and_the_others_are_shown(undrawn, tmp_path, name, text):
    make(tmp_path / "sound", None, ("seed=0",))
    (make(tmp_path / "hurt", None, ("seed=1",)) / name).write_text(text)
    runs = find_runs([tmp_path])
    page = render(runs, "runs")
    assert {run.path.name for run in runs} == {"sound", "hurt"} and "0.05" in page
    if name == "summary.json":
        hurt = next(run for run in runs if run.path.name == "hurt")
        assert hurt.state == "damaged" and "summary.json is damaged: " in page and "Failed, damaged or unfinished: 1" in page


def test_binary_files_and_a_folder_where_a_file_should_be_are_damage(tmp_path):
    hurt = make(tmp_path / "hurt", None)
    (hurt / "summary.json").write_bytes(b"\xff\xfe\x00")
    other = make(tmp_path / "other", None)
    (other / "metrics.csv").unlink()
    (other / "metrics.csv").mkdir()
    assert {run.path.name: run.state for run in find_runs([tmp_path])} == {"hurt": "damaged", "other": "damaged"}


@pytest.mark.parametrize(("out", "written"), [
    ("page.html", "page.html"), ("new/page.html", "new/page.html"), ("folder", "folder/report.html"),
    ("there", "there/report.html"), ("there.d", "there.d/report.html"), ("a.b/c.htm", "a.b/c.htm"),
])  # fmt: skip
@pytest.mark.parametrize("style", ["--out=", "out="])
def test_out_is_a_file_or_a_folder(undrawn, tmp_path, monkeypatch, out, written, style):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there.d").mkdir()
    make(tmp_path / "run")
    assert main(["run", f"{style}{out}"]) == 0 and (tmp_path / written).is_file()


def test_out_that_cannot_be_written_is_one_line(undrawn, tmp_path, capsys):
    make(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "file" / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out=") and error.count("\n") == 1


def test_a_run_that_is_still_going_can_be_looked_at(undrawn, tmp_path):
    going = make(tmp_path / "going", rows=7)
    (going / "summary.json").unlink()
    longer = make(tmp_path / "longer", rows=30)  # finished after 20 steps, then made longer
    states = {run.path.name: (run.state, run.reason) for run in find_runs([tmp_path])}
    assert states["going"] == ("unfinished", "no summary.json and no reason: still running, or killed after step 7")
    assert states["longer"] == ("unfinished", "goes on after its end: still running, or killed after step 30")
    (longer / "metrics.csv").unlink()
    assert render(find_runs([tmp_path]), "x")


def test_time_comes_from_the_run_or_from_its_phases(tmp_path):
    run = find_runs([make(tmp_path / "run")])[0]
    expected = [(1.0, 1.0), (10.0, 10.0), (15.0, 20.0)]
    found = [(t, step) for (t, _), (step, _) in zip(run.by_time("train/loss"), run.series["train/loss"], strict=True)]
    assert [pair for pair in found if pair in expected] == expected
    assert run.by_time("val/loss")[2] == (12.5, 1 / 15)
    del run.series["time/train_seconds"]
    assert run.by_time("train/loss")[-1][0] == 15.0 and run.by_time("train/loss")[4][0] == 5.0
    run.summary = {}
    assert run.by_time("train/loss") == []


def test_one_run_alone_shows_its_phases_ranks_and_norms(tmp_path, capsys):
    directory = make(tmp_path / "run", overrides=("seed=3",))
    assert main([str(directory)]) == 0 and "report.html" in capsys.readouterr().out
    text = (directory / "report.html").read_text()
    page = Page(text)
    charts = dict(page.svgs)
    assert {"0", "1", "4", "8", "attn.qkv.q", "mlp.fc1", "layer"} <= set(charts["ranks"])
    assert {"switch", "freeze"} <= set(charts["train/loss by step"]) and {"switch", "freeze"} <= set(charts["val/loss by time"])
    assert {"blocks.mlp.fc1", "head"} <= set(charts["lowrank/weight_norm"]) and "weight_tol" in charts["lowrank/weight_change"]
    assert "lte/merge_mib" not in charts and "lte/merge_ms" in charts, "one worker sends nothing"
    assert "python -m lowrank_pretrain seed=3" in text and "Switch after step 5; freeze after step 10." in text
    assert not list(directory.glob(".*.part"))


def test_lines_differ_by_dash_and_marker_and_bars_by_hatch(text):
    chart = text[text.index('aria-label="train/loss by step"') :]
    chart = chart[: chart.index("</svg>")]
    dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+); stroke-dashoffset: 0; stroke: var\(--s\d", chart))
    assert len(dashes) == 2 and {f"var(--s{i})" for i in (0, 1, 2)} <= set(re.findall(r"var\(--s\d\)", chart))
    bars = text[text.index('aria-label="samples_per_sec"') :]
    assert "<pattern" in bars[: bars.index("</svg>")]


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_a_directory_without_a_readable_run_is_one_line(tmp_path, capsys, what):
    directory = tmp_path / what
    if what != "missing":
        directory.mkdir()
    if what == "damaged":
        (directory / "summary.json").write_text("{")
    assert main([str(directory)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RUN_DIR=") and error.count("\n") == 1 and str(directory) in error


def test_ticks_of_steps_are_whole_and_both_charts_of_the_optimizer_have_one_unit(tmp_path):
    run = find_runs([make(tmp_path / "run")])[0]
    run.series = {"train/loss": [(10.0, 1.0), (30.0, 0.5)], "memory/optimizer_gib": [(10.0, 0.5), (30.0, 0.25)]}
    charts = dict(Page(render([run], "one")).svgs)
    numbers = [text for text in charts["train/loss by step"] if re.fullmatch(r"[\d.]+", text) and float(text) > 2]
    assert len(numbers) >= 3 and all("." not in number for number in numbers)
    assert "MiB" in charts["memory/optimizer_gib"] and {"300", "400", "500"} <= set(charts["memory/optimizer_gib"])


def test_names_and_curves_are_shortened_only_so_far():
    assert shortened(["model.blocks.*.attn.q", "model.blocks.*.mlp.fc1", "model.head"]) == ["attn.q", "mlp.fc1", "head"]
    assert shortened(["model.a.fc"]) == ["model.a.fc"] and shortened(["a.x", "b.x"]) == ["a.x", "b.x"]
    points = [(float(i), float(i % 2)) for i in range(1000)]
    assert len(smooth(points, "train/loss")) <= 120 and smooth(points, "train/loss")[0] == (4.0, 4 / 9)
    assert smooth(points, "val/loss") == points


def test_a_real_run_becomes_a_page(run):
    directory, summary = run("run")
    text = write_report([directory]).read_text()
    charts = dict(Page(text).svgs)
    assert {"train/loss by time", "val/acc1 by step", "ranks", "lowrank/weight_norm", "lowrank/adapter_norm"} <= set(charts)
    assert {"mfu"} & set(charts) == set() and "flops_per_sample" in charts
    assert f"Switch after step {summary['switch_step']}" in text


# -- in a browser -------------------------------------------------------------------------------------------------------


PROBE = """
<!DOCTYPE html><meta name="color-scheme" content="light dark"><body>
<iframe id="f390" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<iframe id="f1280" style="width:1280px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, svgs = [...page.querySelectorAll("figure svg")];
    svgs.forEach(svg => svg.closest("details")?.setAttribute("open", ""));
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
      outside,
    }};
  }}
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}});
</script>"""


def browse(tmp_path: Path, page: str, *flags: str) -> tuple[dict, str]:
    """What the probe found in a real browser, at a phone's width and a desktop's, and what went to the console."""
    file = tmp_path / "probe.html"
    file.write_text(PROBE.format(page=html.escape(page)))
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_it_fits_a_phone_and_a_desktop_in_light_and_in_dark(text, tmp_path):
    text = text.replace("lte, rank=99", "lte" * 50)  # a sweep's directory names are as long, and nothing breaks them
    found, said = browse(tmp_path, text)
    assert not said
    phone, desktop = found["f390"], found["f1280"]
    assert phone["charts"] == desktop["charts"] == text.count("<figure>")
    assert phone["width"] == 390 and desktop["width"] == 1280, "the page scrolls sideways"
    assert phone["narrowest"] > 300 and phone["columns"] == 1 and desktop["columns"] >= 2
    assert phone["column"] < 390 / 2 and desktop["column"] < 300, "the column that stays in sight hides the others"
    assert phone["smallest"] >= 9, "text too small to be read"
    assert phone["outside"] == desktop["outside"] == []
    assert phone["paper"] == "rgb(255, 255, 255)"
    dark, _ = browse(tmp_path, text, "--blink-settings=preferredColorScheme=0")
    assert dark["f390"]["paper"] == "rgb(20, 22, 26)"
