"""How settings are read, and how programs end: one line and exit code 2 for wrong input, tracebacks for bugs only."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

from config import PRESETS, EvalConfig, TrainConfig, UserError

import pytest
from conftest import run_script

import train
from runtime.cli import parse_config, parse_flags


def test_run_cli_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(cfg: TrainConfig) -> None:
        raise UserError("dataset x does not exist: check --dataset")

    for argv, word in (([], "dataset x"), (["--lr", "-1"], "lr"), (["--nope"], "nope")):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as caught:
            run_script(TrainConfig, main)
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.strip().count("\n") == 0
        assert "Traceback" not in err


def test_run_cli_hands_on_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "5"])
    run_script(TrainConfig, seen.append)
    assert seen == [TrainConfig(seed=5)]


def test_run_cli_lets_other_errors_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is no wrong input: its traceback must be seen."""

    def main(cfg: TrainConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(TrainConfig, main)


def test_a_closed_pipe_is_no_traceback(flags: dict[str, str]) -> None:
    """python train.py | head -1"""
    words = " ".join(f"--{name}={value}" for name, value in flags.items())
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -u {train.__file__} {words} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# --- how settings are read ------------------------------------------------------------------------------------------

CLASSES = (TrainConfig, EvalConfig)


def refused(cls: type, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(cls, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_parse_config_without_flags_gives_the_defaults(cls: type) -> None:
    assert parse_config(cls, []) == cls()


def test_parse_config_reads_every_type() -> None:
    cfg = parse_config(
        TrainConfig, ["--lr", "3e-4", "--total-steps", "7", "--ref_name=other", "--target_kl", "0.5", "--overwrite"]
    )
    assert cfg == TrainConfig(lr=3e-4, total_steps=7, ref_name="other", target_kl=0.5, overwrite=True)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--overwrite"], True),
        (["--overwrite", "true"], True),
        (["--overwrite", "false"], False),
        (["--overwrite=no"], False),
        (["--overwrite", "1"], True),
    ],
)
def test_parse_config_reads_switches(argv: list[str], value: bool) -> None:
    assert parse_config(TrainConfig, argv).overwrite is value


def test_parse_config_reads_switches_that_may_be_unset() -> None:
    assert parse_config(EvalConfig, []).reward_on_prompt is None
    assert parse_config(EvalConfig, ["--reward_on_prompt", "false"]).reward_on_prompt is False
    assert parse_config(EvalConfig, ["--reward_on_prompt", "true"]).reward_on_prompt is True


def test_a_value_may_begin_with_a_negative_number() -> None:
    given = "-1=bad,0=neutral,1=good"
    assert parse_config(EvalConfig, ["--label_names", given, "--seed", "5"]).label_names == given


@pytest.mark.parametrize("cls", CLASSES)
def test_parse_config_refuses_what_it_does_not_know(cls: type) -> None:
    assert "--learning_rate" in refused(cls, "--learning_rate", "1")
    assert "stray" in refused(cls, "stray")
    assert "--see" in refused(cls, "--see", "3"), "no abbreviations"
    assert "seed" in refused(cls, "--seed")


def test_parse_config_presets_come_before_flags() -> None:
    tiny = parse_config(TrainConfig, ["--preset", "tiny"])
    default = TrainConfig()
    changed = {f.name for f in dataclasses.fields(TrainConfig) if getattr(tiny, f.name) != getattr(default, f.name)}
    assert {"preset", "policy_name", "rm_name", "dataset", "device"} <= changed
    assert tiny.preset == "tiny"
    assert tiny.device == "cpu"
    for argv in (["--lr", "0.5", "--preset", "tiny"], ["--preset=tiny", "--lr", "0.5"]):
        assert parse_config(TrainConfig, argv) == dataclasses.replace(tiny, lr=0.5)
    # a flag wins even where it repeats the plain default
    argv = ["--preset", "tiny", "--lr", str(default.lr), "--device", "auto"]
    cfg = parse_config(TrainConfig, argv)
    assert cfg.lr == default.lr
    assert cfg.device == "auto"
    assert cfg.dataset == tiny.dataset
    assert parse_config(EvalConfig, ["--preset", "tiny"]).preset == "tiny"


@pytest.mark.parametrize("cls", CLASSES)
def test_parse_config_refuses_an_unknown_preset(cls: type) -> None:
    message = refused(cls, "--preset", "huge")
    assert "preset" in message
    assert "huge" in message
    assert "default" in message
    assert "tiny" in message
    assert "preset" in refused(cls, "--preset")
    assert "preset" in refused(cls, "--preset", "--seed", "3")


def test_parse_config_leaves_nothing_behind() -> None:
    """A call must not change the defaults of the next one."""
    parse_config(TrainConfig, ["--preset", "tiny", "--seed", "9"])
    assert parse_config(TrainConfig, []) == TrainConfig()
    assert TrainConfig().seed == 0


TEXTS = {  # settings that are no path
    "preset",
    "policy_revision",
    "rm_revision",
    "dataset_revision",
    "target_label",
    "split",
    "lm_split",
    "text_column",
    "label_column",
    "chosen_label",
    "report_to",
    "prompt",
    "sweep",
    "peer",
    "peer_name",
    "train",
    "evaluate",
    "tokens",
    "reward_every",
    "reward_weights",
    "gae_lambda",
    "alphas",
    "at_kl",
    "bug",
    "seeds",
    "grid",
    "methods",
    "lrs",
    "betas",
    "responses",
    "dataset_config",
    "label_names",
}


TOOLS = [
    getattr(importlib.import_module(f"{path.parent.name}.{path.stem}"), name)
    for room in ("tools", "experiments")
    for path in sorted((Path(train.__file__).parent / room).glob("*.py"))
    for name in re.findall(r"^class (\w+Config)", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("cls", [*CLASSES, *TOOLS])
def test_the_tilde_is_the_home_folder_in_every_path(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as --name=~/x, which most shells hand on as it is; a text such as a prompt may begin with one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    hints = typing.get_type_hints(cls)
    texts = {name for name, hint in hints.items() if {str, list[str]} & {hint, *typing.get_args(hint)}}
    listed = {"draw"} if cls.__name__ == "InterpolateConfig" else set()  # several, with commas between them
    paths = {f.name for f in dataclasses.fields(cls) if f.metadata.get("path")}
    assert texts - paths - listed <= TEXTS, "say what the setting is: opt(…, path=…), or a text"
    assert not paths & TEXTS
    for name in paths:
        given = [
            f"--{other.name}=x"
            for other in dataclasses.fields(cls)
            if other.default is dataclasses.MISSING and other.default_factory is dataclasses.MISSING
        ]
        read = parse_config if cls in CLASSES else lambda kind, argv: parse_flags(kind, argv, None)
        if name == "resume":
            (tmp_path / "deep").mkdir()
            (tmp_path / "deep" / "config.json").write_text(json.dumps({"total_steps": 7}))
            assert read(cls, ["--resume=~/deep"]).ckpt_dir == str(tmp_path / "deep")
            continue
        value = getattr(read(cls, [*given, f"--{name}=~/deep/x"]), name)
        assert value in (str(tmp_path / "deep" / "x"), [str(tmp_path / "deep" / "x")]), name
        with pytest.raises(UserError, match="no such user"):
            read(cls, [*given, f"--{name}=~no_such_user_here/x"])


def test_a_python_reward_of_ones_own_config_is_not_replaced_by_that_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"total_steps": 7, "rm_name": "theirs.py:f", "seed": 3}))
    monkeypatch.setitem(PRESETS[TrainConfig], "default", dataclasses.replace(TrainConfig(), rm_name="mine.py:f"))
    cfg = parse_config(TrainConfig, ["--resume", str(tmp_path)])
    assert (cfg.rm_name, cfg.seed, cfg.total_steps) == ("mine.py:f", 3, 7)
    assert parse_config(TrainConfig, ["--resume", str(tmp_path), "--rm_name", "other.py:f"]).rm_name == "other.py:f"
