"""The command line before Hydra reads it: paths that its grammar refuses, the home directory, logger=null."""

import os
import re
import shlex
import warnings

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.run.command_line import prepare, refuse_unknown
from tests.test_cli import ONE_STEP, cli  # noqa: F401  a fixture

BEFORE = warnings.formatwarning


def value(argument: str) -> object:
    """What Hydra makes of it."""
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("path", [
    "a=b", "/x/method=full,seed=0/checkpoints/last.ckpt", "/a~b", "/x/~old/y", "runs/lr=1e-3", "C:\\data=x", "/a(1)/b=c",
    "ü=日", "a = b", "s3://bucket/key=1", "/home/müller/pics", "/data/日本", "größe", "/data/pets (copy)", "/a&b", "/a#b",
    "/a!b", "/a;b", "/a>b", "/a`b", "/a^b", "/data/it's", "/it's/a=b", "/data/“q”", "/data/€", "/müller\\", "/müller/it's\\",
    "runs/ü-${seed}",
])  # fmt: skip
@pytest.mark.parametrize("key", ["ckpt_path", "hydra.run.dir", "data.root", "+data.extra"])
def test_a_path_that_hydra_wants_in_quotes_gets_them(key, path):
    (found,) = prepare([f"{key}={path}"])
    assert value(found) == path
    assert prepare([found]) == [found], "processes that Lightning starts prepare it once more"


@pytest.mark.parametrize(("written", "meant"), [("~/x", "x"), ("~", ""), ("~/a=b", "a=b"), ("~/a~b", "a~b"), ("~/ü", "ü")])
def test_a_home_directory_is_one(monkeypatch, written, meant):
    monkeypatch.setenv("HOME", "/home/me")
    (found,) = prepare([f"data.root={written}"])
    assert value(found) == os.path.join("/home/me", meant).rstrip("/")


@pytest.mark.parametrize("argument", [
    "method=full", "data.root=/a/b", "seed=0,1", "method.targets=[attention,mlp]", "x={a: 1}", "data.root='a=b'", 'x="a=b"',
    "~logger",
    "~method.rank=4", "+trainer.callbacks=[{_target_: a.b, step: 2}]", "--cfg", "job", "-m", "--config-dir=a=b", "data.root=",
    "hydra.run.dir=a b", "seed=range(0,4)", "optim.lr=tag(log, interval(1e-4, 1e-2))", "seed=choice(0,1)", "logger=[csv,wandb]",
    "trainer.max_epochs=[1", "model.name=${x}", "method=null", "seed=choice(0,1", "data.root=choice(/a,/ü", "logger=[csv,/ü",
    "x={a: /ü", "seed=1 (copy)", "data.rööt=/ü",
])  # fmt: skip
def test_everything_else_stays_as_it_is(argument):
    assert prepare([argument]) == [argument]


def test_the_word_for_a_sweep_may_stand_anywhere():
    assert prepare(["method=full", "-m", "seed=0,1"]) == ["-m", "method=full", "seed=0,1"]


@pytest.mark.parametrize("nothing", ["null", "None", "none", "false", "''"])
def test_a_logger_that_is_nothing_is_the_group_for_nothing(nothing):
    assert prepare([f"logger={nothing}", "seed=1"]) == ["logger=none", "seed=1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "data.root=a=b,c=d"],
        ["data.root=[a=b"],
        ["x='a=b"],
        ["--multirun", "ckpt_path=x/method=full,seed=0/l"],
        ["data.root=/data/a[1]"],
        ["data.root=/data/{x}"],
        ['data.root=/ü/a"b'],
        ["data.root=/it's/a[1]"],
        ["-m", "data.root=/ü,/日"],
        ["x=/a'b/\"c"],
    ],
)
def test_what_could_mean_several_things_is_one_line_with_the_quotes_to_write(arguments):
    with pytest.raises(ConfigError, match="wants in quotes") as error:
        prepare(arguments)
    assert "\n" not in str(error.value)
    written, _, several = str(error.value).partition(" in the shell ")[2].partition(", or as several values ")
    (argument,) = shlex.split(written)
    assert value(argument) == error.value.value and prepare([argument]) == [argument]
    assert bool(several) == ("-m" in arguments or "--multirun" in arguments)
    if several:
        (argument,) = shlex.split(several)
        assert [
            word.text for word in OverridesParser.create().parse_override(argument).value().list
        ] == error.value.value.split(",")


def test_a_run_writes_to_and_goes_on_from_a_directory_with_letters_that_hydra_wants_in_quotes(cli, tmp_path):  # noqa: F811
    name = "lr=1 (müller's)"
    code, _, err = cli(*ONE_STEP, f"hydra.run.dir=runs/{name}")
    assert code == 0 and (tmp_path / "runs" / name / "summary.json").is_file(), err
    code, out, err = cli(*ONE_STEP, "hydra.run.dir=again", f"ckpt_path=runs/{name}/checkpoints/last.ckpt")
    assert code == 0 and f"going on from runs/{name}/checkpoints/last.ckpt" in out, err
    code, _, err = cli(*ONE_STEP, "data.root=[a=b")
    assert code == 2 and err.startswith("error: data.root='[a=b': ") and err.count("\n") == 1


@pytest.mark.parametrize(("argument", "line"), [
    ("method=preloar", r"method='preloar': Could not find '.*'; did you mean prelora\? There are adamw8bit, .*relora, .*"),
    ("method='prelörä'", r"method='prelörä': Could not find '.*'; did you mean prelora\? There are adamw8bit, .*"),
    ("experiment=prelora_poket", r".* did you mean prelora_pocket\? There are .*prelora_vitl"),
    ("methd=full", r"methd='full': Could not override 'methd', .*; did you mean method\? There are .*data.*"),
    ("trainer.max_epoch=3", r".* did you mean trainer.max_epochs\? .*; \+trainer.max_epoch=VALUE adds one"),
    ("batch_size=16", r"batch_size='16': .* did you mean data.batch_size\?"),
    ("data.nosuch=1", r".*'data.nosuch', which is no key; There are _target_, .*batch_size, .*"),
])  # fmt: skip
def test_an_unknown_name_or_key_is_one_line_with_the_nearest(argument, line):
    with pytest.raises(ConfigError) as error:
        refuse_unknown(["seed=1", argument])
    assert re.fullmatch(line, str(error.value)), str(error.value)


@pytest.mark.parametrize(("argument", "line"), [
    ("method=preloar", r"method='preloar': Could not find '.*'; did you mean prelora\? There are .*"),
    ("trainer.max_epoch=1,2", r"trainer.max_epoch='1,2': .* did you mean trainer.max_epochs\? .*"),
    ("methd=full,lora", r"methd='full,lora': Could not override 'methd', .*; did you mean method\? .*"),
    ("optim.lrr=interval(0,1)", r"optim.lrr='interval\(0,1\)': .* did you mean optim.lr\? .*"),
])  # fmt: skip
def test_an_unknown_name_or_key_of_a_sweep_is_the_same_line(argument, line):
    with pytest.raises(ConfigError) as error:
        refuse_unknown(["seed=0,1", argument, "method=full,lora", "-m"] if "method=" not in argument else [argument, "-m"])
    assert re.fullmatch(line, str(error.value)), str(error.value)


def test_a_sweep_with_an_unknown_key_starts_no_job(cli, tmp_path):  # noqa: F811
    code, out, err = cli("-m", *ONE_STEP, "seed=0,1", "trainer.max_epoch=1,2")
    assert code == 2 and err.startswith("error: trainer.max_epoch='1,2': ") and err.count("\n") == 1, err
    assert "run directory" not in out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [
    [], ["method=full", "hydra.run.dir=x"], ["-m", "method=nosuch,full"], ["--help"], ["sweep=seeds"], ["+trainer.new=1"],
    ["optim.lr=interval(0,1)"], ["hydra/launcher=nosuch"], ["-m", "method=glob(*)", "optim.lr=interval(0,1)", "seed=0,1"],
    ["-m", "trainer.nosuch=1,2", "--cfg", "job"], ["-m", "method=full,lora", "+trainer.new=1,2"],
])  # fmt: skip
def test_what_hydra_takes_or_tells_itself_is_left_to_it(arguments):
    refuse_unknown(arguments)


# -- the environment and the run directory ----------------------------------------------------------------------------------


def test_the_closing_table_is_shown_where_the_terminal_says_that_it_has_no_columns(monkeypatch, capsys, tmp_path):
    from lowrank_pretrain.report import closing, find_runs
    from lowrank_pretrain.run import summary
    from tests.test_report import make

    monkeypatch.setenv("COLUMNS", "0")
    summary.show([], {"val/loss": 1.5}, {"checkpoints": tmp_path})
    assert "val/loss 1.5" in (out := capsys.readouterr().out) and "checkpoints: " in out
    make(tmp_path / "seed=0")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    closing.show(find_runs([tmp_path]), tmp_path)
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 200])
@pytest.mark.parametrize("arguments", [["hydra.run.dir=runs/{}/a"], ["hydra.run.dir={}", "ckpt_path=last"],
                                       ["-m", "seed=0,1", "hydra.sweep.dir=runs/{}"]])  # fmt: skip
def test_a_directory_with_a_name_that_is_too_long_is_one_line(cli, tmp_path, name, arguments):  # noqa: F811
    code, _, err = cli(*ONE_STEP, *(argument.format(name) for argument in arguments))
    assert code == 2 and err.startswith("error: hydra.run.dir='") and "up to 255 bytes" in err or "too long" in err, err
    assert err.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["full", "lte"])
@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_a_rank_left_over_in_the_environment_is_one_line(cli, tmp_path, monkeypatch, variable, method):  # noqa: F811
    monkeypatch.setenv(variable, "1")
    code, _, err = cli(*ONE_STEP, "hydra.run.dir=run", f"method={method}")
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(f"error: {variable}='1': ") and f"unset {variable}" in err
    assert not (tmp_path / "run" / "failure.txt").exists(), "the directory may be another run's"


def test_a_directory_with_a_quote_in_its_name_is_refused_for_several_processes(cli, tmp_path):  # noqa: F811
    code, _, err = cli(
        *ONE_STEP, """hydra.run.dir='a"b'""", "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"
    )
    assert code == 2 and err.splitlines()[-1].startswith("error: hydra.run.dir='a\"b': must have no \""), err


def test_what_is_said_of_a_damaged_checkpoint_is_one_line(cli, tmp_path, monkeypatch):  # noqa: F811
    from lowrank_pretrain.run import train

    inner, said = train.start_from, []

    def start_from(*arguments: object) -> object:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = inner(*arguments)
        said.extend(warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in caught)
        return found

    code, _, err = cli(*ONE_STEP, "hydra.run.dir=run")
    assert code == 0 and [*(tmp_path / "run" / "checkpoints").iterdir()], err
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr("lowrank_pretrain.run.train.start_from", start_from)
    monkeypatch.setattr("warnings.formatwarning", BEFORE)
    code, _, err = cli(*ONE_STEP, "hydra.run.dir=run", "ckpt_path=last")
    assert code == 0 and said, err
    assert all(line.startswith("warning: skipped ") and line.count("\n") == 1 for line in said), said


# -- files of one's own -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "line"), [
    (b"defaults: [full, _self_]\nname: mine\nrank: : 2\n", r"line 3: mapping values are not allowed here"),
    (b"rank: 1\nrank: 2\n", r"line 2: found duplicate key rank"),
    (b"a: 1\nname: k\xe4se\n", r"line 2: is not UTF-8"),
])  # fmt: skip
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
def test_a_broken_file_of_ones_own_is_one_line_with_its_place(cli, tmp_path, content, line, sweep):  # noqa: F811
    (folder := tmp_path / "my ü=1" / "method").mkdir(parents=True)
    (folder / "mine.yaml").write_bytes(content)
    code, _, err = cli(*ONE_STEP, "method=mine", *sweep, "--config-dir", "my ü=1")
    assert code == 2 and err.count("\n") == 1, err
    assert re.match(rf"error: --config-dir='my ü=1': .*method/mine.yaml, {line}", err), err


def test_names_in_a_directory_of_ones_own_are_known(tmp_path):
    (folder := tmp_path / "it's" / "method").mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [lora, _self_]\nname: mine\n")
    flag = f"--config-dir={folder.parent}"
    assert prepare(["method=mine", flag, "seed=1"]) == [flag, "method=mine", "seed=1"]
    refuse_unknown(["method=mine", flag])
    with pytest.raises(ConfigError, match="did you mean mine"):
        refuse_unknown(["--config-dir", str(folder.parent), "method=mien"])
    with pytest.raises(ConfigError, match=r"did you mean method\.rank\?"):
        refuse_unknown(["method=mine", "method.rnk=3", flag])


@pytest.mark.parametrize("arguments", [["-m"], ["sweep=seeds", "seed=5"]])
def test_a_sweep_over_no_key_names_its_one_job_plainly(cli, tmp_path, arguments):  # noqa: F811
    code, _, err = cli(*ONE_STEP, *arguments, "hydra.sweep.dir=all")
    assert code == 0 and [path.name for path in (tmp_path / "all").iterdir() if path.is_dir()] == ["job"], err
