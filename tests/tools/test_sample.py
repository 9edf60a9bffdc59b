"""Sampling by hand: KL and scores are the models' own, pipes get pure JSON, prompts are asked for and end calmly."""

import io
import json
import os
import pty
import shutil
import signal
import sys
import time
from pathlib import Path

from config import UserError

import pytest
import torch
from conftest import PROCESSES, save_classifier
from transformers import AutoTokenizer

from evaluation.comparison import token_kl
from model import GPT2WithValueHead, sample_responses
from runtime import cli
from tools.sample import main, pieces
from utils import uniforms

SAME = ("--device", "cpu", "--dtype", "float32")
PROMPT = "A film this good"


def sampled(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    """The objects that a call with --json writes."""
    capsys.readouterr()
    main([*words, "--json", *SAME])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def with_settings(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **changes}))


def test_base_and_policy_answer_with_the_same_random_numbers(
    finished_run: Path, gpt2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sampled(capsys, str(finished_run), "--prompt", PROMPT, "--n", "3", "--seed", "5", "--top_k", "40")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    base, policy = (GPT2WithValueHead.from_pretrained(str(path)) for path in (gpt2_dir, finished_run / "policy_lm"))
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * 3)
    noise = uniforms(5, 0, 3, 8)
    for name, lm in (("base", base), (str(finished_run), policy)):
        seqs = sample_responses(lm, ids, torch.ones_like(ids).bool(), noise, eos_id=tokenizer.eos_token_id, top_k=40)
        kl = token_kl(lm, base, seqs).sum(1)
        own = [one for one in found if one["model"] == name]
        assert [one["response"] for one in own] == seqs.texts(tokenizer)
        assert [one["kl"] for one in own] == pytest.approx(kl.tolist(), abs=2e-4)
        assert [len(one["tokens"]) for one in own] == seqs.response_mask.sum(1).tolist()
        for one in own:
            assert sum(x for _, x in one["tokens"]) == pytest.approx(one["kl"], abs=1e-3)
            assert one["score"] is None
        last = seqs.responses.gather(1, seqs.response_mask.sum(1, keepdim=True) - 1).squeeze(1)
        assert [one["ended"] for one in own] == (last == tokenizer.eos_token_id).tolist()
    assert [one["model"] for one in found[:2]] == ["base", str(finished_run)], "pairs, one after the other"
    assert (
        sampled(capsys, str(finished_run), "--prompt", PROMPT, "--n", "1", "--seed", "5", "--top_k", "40") == found[:2]
    )


def test_several_policies_share_a_base_and_decode_alike(
    finished_run: Path, gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    with_settings(other, max_new_tokens=3)
    found = sampled(capsys, str(finished_run), str(other / "policy_lm"), "--prompt", PROMPT)
    assert [one["model"] for one in found] == ["base", str(finished_run), str(other / "policy_lm")]
    assert found[1]["tokens"] == found[2]["tokens"], "the same weights, decoded as in the first run"
    with_settings(other, ref_name=str(other / "policy_lm"))
    found = sampled(capsys, str(finished_run), str(other), "--prompt", PROMPT)
    assert [one["model"] for one in found] == [
        f"base {gpt2_dir}",
        f"base {other / 'policy_lm'}",
        str(finished_run),
        str(other),
    ]
    assert found[3]["kl"] == pytest.approx(0, abs=1e-4), "it is its own base"
    assert found[2]["kl"] > 1e-3


def test_scores_are_those_of_the_runs_reward_and_code_must_be_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found, *_) = sampled(capsys, str(finished_run), "--prompt", PROMPT, "--score")
    assert -1 <= found["score"] <= 1
    swapped = save_classifier(tmp_path / "swapped", {0: "positive", 1: "negative"}, swap=True)
    (again, *_) = sampled(capsys, str(finished_run), "--prompt", PROMPT, "--rm_name", str(swapped))
    assert again["score"] == pytest.approx(found["score"], abs=1e-5)
    (tmp_path / "ours.py").write_text("def length(responses):\n    return [float(len(r)) for r in responses]\n")
    name = f"{tmp_path / 'ours.py'}:length"
    with_settings(finished_run, rm_name=name)
    assert sampled(capsys, str(finished_run), "--prompt", PROMPT)[0]["score"] is None, "no reward is needed"
    with pytest.raises(UserError, match="which is never run because"):
        main([str(finished_run), "--prompt", PROMPT, "--score", *SAME])
    for one in sampled(capsys, str(finished_run), "--prompt", PROMPT, "--rm_name", name):
        assert one["score"] == len(one["response"])


def test_lines_from_a_pipe_are_prompts_and_nothing_is_shaded(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("A film\n\n  \nThe plot\n"))
    main([str(finished_run), *SAME])
    out = capsys.readouterr().out
    assert out.startswith("A film\n\n[base]")
    assert "\nThe plot\n\n[base]" in out
    assert " nats, " in out
    assert "\x1b" not in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The plot\nThe plot\n"))
    first, _, second, _ = sampled(capsys, str(finished_run))
    assert first["response"] != second["response"], "a prompt that is asked again gets another response"


def test_notes_do_not_get_among_the_objects(gpt2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(gpt2_dir), "--ref_name", str(gpt2_dir), "--prompt", PROMPT, "--max_new_tokens", "4"]
    assert len(sampled(capsys, *words)) == 2
    main([*words, "--json", *SAME])
    assert "is not part of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "n=0 must"),
        (["--temperature", "0"], "temperature=0.0 must"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "film " * 200], "is more than the context of 128: shorten it"),
        (["--ref_name", "./no"], "./no"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], message: str, finished_run: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([str(finished_run), "--prompt", PROMPT, *SAME, *words])


def test_pieces_are_the_text_and_characters_stay_whole(gpt2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    ids = tokenizer("schöner 😀 Film")["input_ids"]
    found = pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(found) == len(ids) + 1
    assert "".join(found) == "schöner 😀 Film"
    assert "😀" in "".join(found).split()


def ask(folder: Path, slave: str) -> None:
    """The command at a terminal, in a process of its own; leaves with its exit code."""
    with open(slave, "r+b", buffering=0) as terminal:
        os.dup2(terminal.fileno(), 0)
        os.dup2(terminal.fileno(), 1)
        os.dup2(terminal.fileno(), 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ.update(TERM="xterm", NO_COLOR="")
    os._exit(cli.run(lambda: main([str(folder), "--max_new_tokens", "4", *SAME])))


@pytest.mark.parametrize(("end", "code"), [(b"\x04", 0), (None, 130)])
def test_prompts_are_asked_for_until_the_end(end: bytes | None, code: int, finished_run: Path) -> None:
    """At a terminal: shaded responses, an error that ends nothing, Ctrl-D or Ctrl-C."""
    master, slave = pty.openpty()
    process = PROCESSES.Process(target=ask, args=(finished_run, os.ttyname(slave)), daemon=True)
    process.start()
    said = read_until(master, b"> ")
    assert b"Ctrl-D ends" in said
    os.write(master, b"film " * 150 + b"\n")
    assert b"error: prompt has" in read_until(master, b"> ", b"error")
    os.write(master, b"The plot\n")
    assert b"\x1b[30;48;5;" in read_until(master, b"> ", b"nats, ")
    if end is not None:
        os.write(master, end)
    for _ in range(10):  # a signal just before readline waits is only seen with the next one
        if end is None and process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
        process.join(6)
    os.close(slave)
    os.close(master)
    assert process.exitcode == code


def read_until(master: int, last: bytes, first: bytes = b"") -> bytes:
    """What a terminal shows up to some characters that follow some others."""
    said, ends = b"", time.monotonic() + 100
    while last not in said.partition(first)[2] if first else last not in said:
        assert time.monotonic() < ends, said
        said += os.read(master, 4096)
    return said


def test_piped_prompts_lose_a_byte_order_mark_and_must_be_utf8(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "\ufeff电 film\r\n\nplain\u2028text".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    found = sampled(capsys, str(finished_run))
    assert [one["prompt"] for one in found[::2]] == ["电 film", "plain\u2028text"]
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve\n"), "utf-8", errors))
        with pytest.raises(UserError, match=r"prompt.* not UTF-8: save"):
            main([str(finished_run), "--json", *SAME])
    with pytest.raises(UserError, match=r"prompt='na\\udcefve' is not UTF-8"):
        main([str(finished_run), "--prompt", "na\udcefve", *SAME])
