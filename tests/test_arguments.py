"""Every command takes ``key=value`` and ``--key value``."""

import argparse

import pytest

from lowrank_pretrain.core.arguments import as_flags, key_values
from lowrank_pretrain.core.errors import ConfigError

WANTED = {"ckpt": "a.ckpt", "out": "b=c"}


@pytest.mark.parametrize(
    "argv",
    [
        ["ckpt=a.ckpt", "out=b=c"],
        ["--ckpt", "a.ckpt", "--out", "b=c"],
        ["--ckpt=a.ckpt", "out=b=c"],
        ["--out=b=c", "--ckpt", "a.ckpt"],
    ],
)
def test_both_styles_mean_the_same(argv):
    assert key_values(argv, ("ckpt", "format", "out")) == WANTED


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt"], "--ckpt=None: needs a value: ckpt=VALUE or --ckpt VALUE"),
        (["ckpt"], "ckpt=None: needs a value"),
        (["ckptt=a"], "ckptt='a': no such argument; close matches: ckpt"),
        (["--format", "timm", "stray"], "stray=None: no such argument"),
    ],
)
def test_what_is_no_argument_is_one_line(argv, message):
    with pytest.raises(ConfigError) as wrong:
        key_values(argv, ("ckpt", "format", "out"))
    assert str(wrong.value).startswith(message)


def test_argparse_commands_take_keys_too_and_leave_directories_alone():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--text-key")
    argv = ["runs/a", "runs/method=full,seed=0", "method=full", "out=x=y.html", "text_key=t", "--out=z", "text-key=u"]
    given = parser.parse_args(as_flags(argv, parser))
    assert given.run_dir == ["runs/a", "runs/method=full,seed=0", "method=full"]
    assert (given.out, given.text_key) == ("z", "u")


@pytest.mark.parametrize("style", ["keys", "flags"])
def test_each_command(tmp_path, style, capsys):
    from lowrank_pretrain.data import prepare
    from lowrank_pretrain.export import weights as export

    def call(command, **arguments):
        pairs = arguments.items()
        argv = [f"{k}={v}" for k, v in pairs] if style == "keys" else [w for k, v in pairs for w in (f"--{k}", str(v))]
        return command(argv)

    (tmp_path / "a.txt").write_text("In the beginning. " * 200)
    found = call(prepare.main, out=tmp_path / "tokens", tokenizer="kjv", root=tmp_path, files="a.txt")
    assert found == 0 and (tmp_path / "tokens" / "train.bin").is_file()
    assert call(export.main, ckpt="none.ckpt", out=tmp_path / "x") == 2
    assert "no such file" in capsys.readouterr().err
