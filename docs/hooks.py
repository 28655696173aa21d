"""Add to the site what is kept elsewhere: the configuration keys, the studies' records, and what the studies say."""

import ast
import re
from functools import cache
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RECORDS = (
    "experiments/*/*.csv",
    "experiments/*/*.png",
    "experiments/*/*.py",
    "experiments/*/README.md",
    "benchmarks/results/**/*",
)
# Whose arguments the keys of `method` are, by what the method uses; the first that has a key says its type and meaning.
METHOD_OWNERS = {
    "prelora": "PreLoRA", "lte": "LTEStrategy", "lora": "LoRA", "galore": "GaLoreAdamW", "jagged": "JaggedRestarts",
    "muon": "muon_optimizer", "sinkgd": "sinkgd_optimizer", "adamw8bit": "adamw8bit_optimizer",
    "galore_torch": "galore_torch_optimizer",
}  # fmt: skip
GROUPS = {
    "method": "What trains, and how: see [methods](methods.md). Every method has a name, `uses` (the plug-ins that it is made "
    "of) and the arguments of these.",
    "data": "What it trains on: see [data](data.md).",
    "model": "The network.",
    "optim": "AdamW (or the method's optimizer) and its schedule.",
    "trainer": "The keys are those of Lightning's `Trainer`. One that is not listed is added with `+trainer.KEY=VALUE`.",
    "logger": "Where metrics go besides `metrics.csv`.",
}


@cache
def signatures() -> dict[str, dict[str, str]]:
    """Return the annotations of every class's constructor and every function, by name, without importing anything.

    Under ``NAME?`` are the arguments' descriptions in the docstring.
    """
    found: dict[str, dict[str, str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                fields, init = {}, node if isinstance(node, ast.FunctionDef) else None
                if isinstance(node, ast.ClassDef):
                    fields = {f.target.id: ast.unparse(f.annotation) for f in node.body if isinstance(f, ast.AnnAssign)}
                    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
                if init:
                    arguments = [*init.args.args, *init.args.kwonlyargs]
                    fields = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
                found.setdefault(node.name, fields)
                said = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
                described = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", said, re.M)
                found.setdefault(f"{node.name}?", {key: " ".join(words.split()) for key, words in described})
    return found


def type_of(key: str, value: object, classes: list[str]) -> str:
    """Return a key's type: its annotation in the constructor, else that of its default."""
    for name in classes:
        if key in signatures().get(name, {}):
            return signatures()[name][key]
    return "" if value is None else type(value).__name__


def meaning_of(key: str, commented: dict[str, str], classes: list[str]) -> str:
    """Return what a key means: the comment on its line, else the argument's description."""
    described = (signatures().get(f"{name}?", {}).get(key) for name in classes)
    return commented.get(key) or next((words for words in described if words), "")


def comments(text: str) -> dict[str, str]:
    """Return each key's comment on its line."""
    return dict(re.findall(r"^([\w.]+):[^#\n]*#\s*(.*)$", text, re.M))


def table(path: Path) -> str:
    """Return one YAML file as a table: key, type, default, meaning."""
    text = path.read_text()
    values = yaml.safe_load(text) or {}
    target = values.pop("_target_", None) or ""
    values.pop("defaults", None), values.pop("hydra", None)
    owners, commented = [target.rpartition(".")[2]], comments(text)
    if path.parent.name == "method":
        owners = [METHOD_OWNERS[use] for use in values.get("uses") or METHOD_OWNERS]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in values.items():
        shown = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...").strip()
        cells = [f"`{key}`", f"`{type_of(key, value, owners)}`", f"`{shown}`", meaning_of(key, commented, owners)]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") if cell != "``" else "" for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


def head(path: Path) -> tuple[str, list[str]]:
    """Return the prose and the commands of a YAML file's opening comment."""
    lines = [line[1:].strip() for line in re.match(r"(?:#.*\n)*", path.read_text())[0].splitlines() if "@package" not in line]
    commands = [line for line in lines if line.startswith("python -m")]
    return " ".join(line for line in lines if line and line not in commands), commands


def configuration() -> str:
    """Return the page of all configuration keys."""
    conf = ROOT / "conf"
    parts = [
        "# Configuration keys",
        "Which keys are there, of what type, and what is the default? This page is made from `conf/`. `--cfg job` prints the "
        "configuration of a run, and a wrong key or value is one line that says what is allowed.",
        "## Top level",
        table(conf / "train.yaml"),
    ]
    for group, words in GROUPS.items():
        parts += [f"## {group}", words]
        paths = sorted((conf / group).glob("*.yaml"))
        others = {path.stem for path in paths}
        for path in paths:
            prose, commands = head(path)
            rows = table(path)
            escaped = re.sub(r"([<>*_])", r"\\\1", prose)
            parts += [f"### `{group}={path.stem}`", escaped]
            parts += ["```text\n" + "\n".join(commands) + "\n```"] if commands else []
            base = [name for name in (yaml.safe_load(path.read_text()) or {}).get("defaults", []) if name in others]
            parts += [f"As [`{group}={name}`](#{group}{name}), but for:" for name in base]
            parts += [rows] if rows else []
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page, and the studies with their records under the paths that they have in the repository."""
    files.append(File.generated(config, "reference/configuration.md", content=configuration()))
    for pattern in RECORDS:
        for path in filter(Path.is_file, sorted(ROOT.glob(pattern))):
            inside = str(path.relative_to(ROOT))
            files.append(File(inside, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the repository the records are next to docs/; on the site they are inside it."""
    if page.file.src_uri in ("results.md", "index.md"):
        return re.sub(r"\]\(\.\./(experiments|benchmarks)/", r"](\1/", markdown)
    return markdown
