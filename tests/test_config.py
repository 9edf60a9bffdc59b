"""Every setting has help and a range, and what is wrong is refused in one line that names it."""

import dataclasses
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from config import EvalConfig, TrainConfig, UserError, check_prompt_lengths, check_values, opt

import pytest

from runtime.cli import FIRST, parse_config
from tools.make_models import main as make_models

CLASSES = (TrainConfig, EvalConfig)


COUNTS = {
    "total_steps",
    "batch_size",
    "ppo_epochs",
    "minibatch_size",
    "reward_batch_size",
    "max_prompt_len",
    "min_prompt_len",
    "max_new_tokens",
    "save_every",
    "sample_every",
    "n_samples",
    "eval_prompts",
    "keep_last",
}


FROM_ZERO = {
    "micro_batch_size",
    "reward_every",
    "top_k",
    "warmup_steps",
    "seed",
    "eval_every",
    "frontier",
    "lambda_warmup_steps",
}


REAL_FROM_ZERO = {"lr", "kl_coef", "value_coef", "ent_coef"}


REAL_POSITIVE = {
    "temperature",
    "adaptive_kl_target",
    "adaptive_kl_gain",
    "clip_range",
    "value_clip_range",
    "max_grad_norm",
    "target_kl",
    "kl_budget",
    "critic_lr",
}


UNIT = {"gamma", "gae_lambda"}


SHARES = {"top_p"}


def wrong_values(name: str) -> list[Any]:
    if name in COUNTS:
        return [0, -1, 1.5, math.nan, "3", True]
    if name in FROM_ZERO:
        return [-1, 0.5, math.nan, "3", True]
    wrong: list[Any] = [math.nan, math.inf, -math.inf, -0.5, "0.1", True]
    if name in REAL_FROM_ZERO:
        return wrong
    if name in REAL_POSITIVE:
        return [*wrong, 0.0]
    if name in UNIT:
        return [*wrong, 1.01]
    if name in SHARES:
        return [*wrong, 0.0, 1.01]
    raise AssertionError(
        f"{name} is a number: give it a range in config.py, opt(..., AT_LEAST_1), and a row in this table"
    )


def kinds(cls: type) -> dict[str, set[Any]]:
    """Field -> the types that it may have, None left out. Read from the annotations."""
    hints = typing.get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        is_literal = typing.get_origin(hint) is Literal
        options = {hint} if is_literal else set(typing.get_args(hint)) or {hint}
        result[field.name] = options - {type(None)}
    return result


def fields_of(*wanted: type) -> list[tuple[type, str]]:
    return [(cls, name) for cls in CLASSES for name, types in kinds(cls).items() if types & set(wanted)]


def refused(cls: type, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(cls, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("cls", "name"), fields_of(int, float))
def test_number_out_of_range_is_refused(cls: type, name: str) -> None:
    for wrong in wrong_values(name):
        with pytest.raises(UserError, match=rf"\b{name}\b") as caught:
            cls(**{name: wrong})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cls", "name"), fields_of(int, float))
def test_number_out_of_range_is_refused_as_a_flag(cls: type, name: str) -> None:
    for wrong in wrong_values(name):
        if not isinstance(wrong, str | bool):
            assert name in refused(cls, f"--{name}={wrong}").replace("-", "_")
    assert name in refused(cls, f"--{name}", "many").replace("-", "_")


@pytest.mark.parametrize(("cls", "name"), fields_of(str))
def test_text_of_wrong_type_is_refused(cls: type, name: str) -> None:
    for wrong in (3, True, "", ["x"]):
        with pytest.raises(UserError, match=rf"\b{name}\b"):
            cls(**{name: wrong})


@pytest.mark.parametrize(("cls", "name"), fields_of(bool))
def test_switch_of_wrong_type_is_refused(cls: type, name: str) -> None:
    for wrong in (1, "true", 0.0):
        with pytest.raises(UserError, match=rf"\b{name}\b"):
            cls(**{name: wrong})
    assert name in refused(cls, f"--{name}", "maybe")


@pytest.mark.parametrize("cls", CLASSES)
def test_none_is_refused_where_there_is_a_default(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for name in kinds(cls):
        if type(None) in typing.get_args(hints[name]):
            assert getattr(cls(**{name: None}), name) is None
        else:
            with pytest.raises(UserError, match=rf"\b{name}\b"):
                cls(**{name: None})


@pytest.mark.parametrize("cls", CLASSES)
def test_choice_is_one_of_the_choices(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    chosen = [name for name, hint in hints.items() if typing.get_origin(hint) is Literal]
    assert {"device", "dtype"} <= set(chosen)
    for name in chosen:
        for choice in typing.get_args(hints[name]):
            assert getattr(parse_config(cls, [f"--{name}", choice]), name) == choice
        with pytest.raises(UserError, match=name) as caught:
            cls(**{name: "nonsense"})
        assert all(choice in str(caught.value) for choice in typing.get_args(hints[name]))
        assert name in refused(cls, f"--{name}", "nonsense")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_has_help_and_is_a_flag(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(cls, ["--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cls):
        help_text = field.metadata.get("help", "")
        assert len(help_text) > 5, field.name
        assert help_text.endswith("."), field.name
        assert f"--{field.name}" in out
        assert help_text.split()[0] in out


@pytest.mark.parametrize("cls", CLASSES)
def test_help_shows_every_flag_once_and_what_matters_first(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(cls, ["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    titles = [group.split(":\n")[0].strip() for group in groups]
    flags = {title: re.findall(r"^  --(\w+)", group, re.MULTILINE) for title, group in zip(titles, groups, strict=True)}
    assert titles[3] == "What matters first"
    assert set(flags["What matters first"]) == set(FIRST[cls])
    assert not heading_problems(cls), "\n".join(heading_problems(cls))
    assert sorted(itertools.chain(*flags.values())) == sorted(field.name for field in dataclasses.fields(cls))


def heading_problems(cls: type) -> list[str]:
    """Settings that --help would show under no heading, and headings of too many or too few, each with the remedy."""
    under: dict[str, list[str]] = {}
    heading = ""
    for field in dataclasses.fields(cls):
        heading = field.metadata["heading"] or heading
        if field.name not in FIRST.get(cls, ()):
            under.setdefault(heading, []).append(field.name)
    place = f"in {cls.__name__} of config.py"
    stray = under.pop("", [])
    choices = ", ".join(map(repr, under))
    problems = [
        f"{name} has no heading in --help: {place}, move it below a setting of its kind ({choices}), or begin a group "
        'of its own with opt(..., heading="...")'
        for name in stray
    ]
    for heading, names in under.items():
        if not 2 <= len(names) <= 12:
            problems.append(
                f"{heading!r} is the heading of {len(names)} settings in --help, where 2 to 12 read well: {place}, "
                f'begin another group with opt(..., heading="...") or move some of {", ".join(names)}'
            )
    return problems


def test_a_setting_without_a_heading_is_told_where_to_go() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Stray:
        patience: int = opt(3, "Steps without progress.")
        lr: float = opt(0.1, "Step size.", heading="PPO")
        gamma: float = opt(1.0, "Discount.")
        top_k: int = opt(0, "Likeliest tokens.", heading="Sampling")

    assert heading_problems(Stray) == [
        "patience has no heading in --help: in Stray of config.py, move it below a setting of its kind ('PPO', "
        "'Sampling'), or begin a group of its own with opt(..., heading=\"...\")",
        "'Sampling' is the heading of 1 settings in --help, where 2 to 12 read well: in Stray of config.py, begin "
        'another group with opt(..., heading="...") or move some of top_k',
    ]


def test_minibatch_size_must_divide_batch_size() -> None:
    for batch, mini in ((10, 3), (8, 16), (4, 5)):
        with pytest.raises(UserError, match="minibatch_size") as caught:
            TrainConfig(batch_size=batch, minibatch_size=mini)
        assert "batch_size" in str(caught.value)
    assert TrainConfig(batch_size=12, minibatch_size=4).minibatch_size == 4


def test_min_prompt_len_must_not_exceed_max_prompt_len() -> None:
    check_prompt_lengths(8, 8)
    with pytest.raises(UserError, match="min_prompt_len"):
        check_prompt_lengths(9, 8)
    with pytest.raises(UserError, match="min_prompt_len"):
        TrainConfig(min_prompt_len=9, max_prompt_len=8)


def test_warmup_must_be_shorter_than_the_run() -> None:
    with pytest.raises(UserError, match="warmup_steps"):
        TrainConfig(warmup_steps=10, total_steps=10)
    assert TrainConfig(warmup_steps=9, total_steps=10).warmup_steps == 9


def test_presets_of_published_set_ups_are_complete() -> None:
    """What their texts say: episodes, lengths, and the reward at the end alone."""
    episodes = {"original": 640, "trl": 24_832, "rl4lms": 1_400, "abc": 2_416}
    for name, count in episodes.items():
        cfg = parse_config(TrainConfig, ["--preset", name])
        assert cfg.total_steps * cfg.batch_size == count
        assert cfg.reward_every == 0
        assert cfg.dataset == "stanfordnlp/imdb"


def test_a_discount_with_partial_scores_is_refused() -> None:
    assert "reward_every" in refused(TrainConfig, "--gamma=0.99")
    assert parse_config(TrainConfig, ["--gamma=0.99", "--reward_every=0"]).gamma == 0.99


def test_replace_validates_and_copies() -> None:
    cfg = TrainConfig()
    changed = replace(cfg, lr=0.5, total_steps=3)
    assert (changed.lr, changed.total_steps) == (0.5, 3)
    assert cfg == TrainConfig()
    with pytest.raises(UserError, match="lr"):
        replace(cfg, lr=-1.0)
    with pytest.raises(UserError, match="minibatch_size"):
        replace(cfg, batch_size=10)


def test_settings_cannot_be_changed_in_place() -> None:
    cfg = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0  # type: ignore[misc]
    check_values(cfg)


def test_importing_config_does_not_load_torch() -> None:
    """A wrong flag is refused at once, not after seconds of imports."""
    root = str(Path(__file__).parent.parent)
    code = "import config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def documented_commands() -> list[str]:
    root = Path(__file__).parent.parent
    pages = [root / "README.md", root / "results" / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    found = re.findall(r"(?:python|torchrun|srun)[^`\n]*?\b(?:train|eval)\.py[^`\n#&]*", lines)
    return sorted({re.sub(r"\$\(.*?\)", "X", command).split("|")[0].strip() for command in found})


NAMES = {"\udcff.csv": "encode", "a\0b": "NUL", "x" * 256: "255|223", "é" * 128: "255|223", "y/" * 2050: "longer"}


@pytest.mark.parametrize(("name", "word"), NAMES.items())
def test_a_path_that_no_system_stores_is_refused_before_anything_is_made(
    name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for cls, setting in ((TrainConfig, "ckpt_dir"), (EvalConfig, "out_csv"), (TrainConfig, "dataset")):
        for make in (cls, lambda cls=cls, **given: parse_config(cls, [f"--{k}={v}" for k, v in given.items()])):
            with pytest.raises(UserError, match=word) as caught:
                make(**{setting: name})
            assert str(caught.value).startswith(setting)
            assert len(str(caught.value)) < 200 or "encode" in word
    with pytest.raises(UserError, match=word):
        make_models([f"--out={name}", "--dataset=x.csv"])
    assert not list(tmp_path.iterdir())


def test_names_that_a_system_stores_are_taken(tmp_path: Path) -> None:
    for name in ("x" * 200, "ä ö 日本", "-", ".hidden"):
        assert TrainConfig(ckpt_dir=name).ckpt_dir == name
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command: str) -> None:
    script, _, flags = re.search(r"(train|eval)\.py( (.*))?$", command).groups()
    words = [word for word in shlex.split(flags or "") if word not in ("…", "--help")]
    if "--resume" not in words:  # which looks for the run
        parse_config({"train": TrainConfig, "eval": EvalConfig}[script], words)


def test_links_lead_somewhere() -> None:
    """Of the README and the docs, to files here."""
    root = Path(__file__).parent.parent
    for page in [root / "README.md", root / "results" / "README.md", *(root / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_there_are_documented_commands() -> None:
    assert len(documented_commands()) > 8


def written_by_default() -> list[str]:
    """Files and folders that the documented commands and the commands' defaults write, but for those in results/."""
    root = Path(__file__).parent.parent
    pages = [
        root / "README.md",
        *sorted((root / "docs").glob("*.md")),
        *sorted(root.glob("tools/*.py")),
        *sorted(root.glob("experiments/*.py")),
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"python [^`\n]*?--(?:out|csv|out_csv|ckpt_dir) ([\w./-]+)", text)
    found += re.findall(r"\b(?:out|csv|folder): str(?: \| None)? = opt\(\"([^\"]+)\"", text)
    found += ["ckpts", "eval_results.csv", "eval_summary.json", "eval_report.html"]
    pictures = [str(Path(name).with_suffix(".png")) for name in found if name.endswith((".csv", ".html"))]
    return sorted({name for name in [*found, *pictures] if not name.startswith(("results/", "/", "."))})


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_status_is_clean_after_the_documented_commands(tmp_path: Path) -> None:
    names = written_by_default()
    assert {"ckpts", "runs/imdb", "models", "interpolation.png", "study.csv", "compare.html"} <= set(names)
    shutil.copy(Path(__file__).parent.parent / ".gitignore", tmp_path)
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
        else:
            path.mkdir(exist_ok=True)
            (path / "written.txt").touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    status = subprocess.run(
        ["git", "status", "--short", "-uall"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert status.stdout.split() == ["??", ".gitignore"]
