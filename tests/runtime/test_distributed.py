"""Several processes, for real, on this CPU: nothing may depend on how many there are. Where it matters that torchrun
starts and restarts them, it does; elsewhere they are forked with what it would tell them, which is sooner done.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from config import EvalConfig, TrainConfig, UserError

import pandas as pd
import pytest
import torch
from conftest import TIMINGS, as_processes, make_policy, make_rollout, run, run_script, sample

import eval as eval_script
import ppo
import train
from runtime import cli
from runtime.distributed import own_gpu, process_group, world_size
from training.checkpoints import find_corruption, list_checkpoints

NIGHTLY = int(os.environ.get("FAULT_CASES", "200")) > 200


ROOT = Path(train.__file__).parent


STEPS = {
    "total_steps": "20",
    "batch_size": "9",
    "minibatch_size": "3",
    "ppo_epochs": "2",
    "max_new_tokens": "8",
    "save_every": "20",
    "eval_every": "10",
    "eval_prompts": "2",
    "sample_every": "20",
    "adaptive_kl_target": "0.5",
    "lr": "2e-4",
}


def torchrun(processes: int, script: str, *words: str, restarts: int = 0) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}",
        script,
        *words,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def words_of(flags: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).drop(columns=TIMINGS, errors="ignore")


@pytest.mark.parametrize(
    ("seen", "visible", "processes", "expected"),
    [(8, None, 8, 3), (8, "0,1,2,3,4,5,6,7", 4, 3), (1, "5", 4, 0), (1, "GPU-1a2b", 4, 0)],
)
def test_each_process_has_its_own_gpu(
    seen: int, visible: str | None, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 3 of a machine; a launcher may show it all GPUs or one of its own."""
    gpus(monkeypatch, seen, visible, processes)
    assert own_gpu() == expected


@pytest.mark.parametrize(("seen", "visible"), [(2, None), (1, None), (1, ""), (2, "0,1"), (0, "")])
def test_too_few_gpus_are_refused(seen: int, visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, seen, visible, 4)
    with pytest.raises(UserError, match=f"this machine has {seen} GPUs: lower --nproc_per_node"):
        own_gpu()


def gpus(monkeypatch: pytest.MonkeyPatch, seen: int, visible: str | None, processes: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "3")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "without MASTER_PORT"),
        ({"RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK='first'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "less than WORLD_SIZE=2"),
    ],
)
def test_an_environment_in_which_processes_cannot_meet_is_one_line(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def main() -> None:
        with process_group("cpu"):
            pass

    assert cli.run(main) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT={port} are no place"), process_group("cpu"):
            pass


@pytest.mark.parametrize(("launched", "printed"), [(False, True), (True, False)])
def test_a_message_is_swallowed_only_where_another_process_of_the_machine_prints_it(
    launched: bool, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell within a job, or a notebook, keeps LOCAL_RANK."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    if launched:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.setenv(name, "3")

    def main() -> None:
        raise UserError("lr=-1 must be at least 0")

    assert cli.run(main) == 2
    assert ("lr=-1" in capsys.readouterr().err) == printed


def test_with_gpus_what_is_on_the_cpu_goes_through_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see how the processes would meet."""
    gpus(monkeypatch, 4, None, 4)
    chosen: list[object] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **named: chosen.extend([backend, named["device_id"]])
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with process_group("cuda"):
        pass
    assert chosen == [torch.device("cuda", 3), "cpu:gloo,cuda:nccl", torch.device("cuda", 3)]


@pytest.mark.parametrize("count", [2, 4] if NIGHTLY else [4])  # 2: also in the next test
def test_the_result_does_not_depend_on_the_number_of_processes(
    count: int, flags: dict[str, str], tmp_path: Path
) -> None:
    """Rollouts of the first step within 1e-6, tables of 20 steps within 1e-4. 9 rows in minibatches of 3 fall unevenly
    on 2 and on 4 processes, of which one then has no row at all. Gradients: below.
    """
    alone = run({**flags, **STEPS, "ckpt_dir": str(tmp_path / "alone")})
    many = {**flags, **STEPS, "ckpt_dir": str(tmp_path / "many")}
    printed = tmp_path / "printed.txt"
    assert as_processes(count, partial(run, many), printed) == [0] * count, printed.read_text()
    assert printed.read_text().count("self-check") == 1, "only the main process prints"
    for name in ("metrics.csv", "eval.csv"):
        ours, theirs = table(tmp_path / "many" / name), table(alone / name)
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-4, check_dtype=False)
    rollout = [
        "score_mean",
        "positive_rate",
        "kl_seq",
        "kl_seq_exact",
        "reward_mean",
        "entropy",
        "response_len",
        "distinct_rate",
    ]
    first, expected = (table(folder / "metrics.csv")[rollout].iloc[0] for folder in (tmp_path / "many", alone))
    assert (first - expected).abs().max() <= 1e-6
    samples = [(folder / "samples.csv").read_text().split('",')[0] for folder in (tmp_path / "many", alone)]
    assert samples[0] == samples[1]


def test_resume_with_another_number_of_processes(flags: dict[str, str], tmp_path: Path) -> None:
    more = {"kl_in_loss": "true", "critic": "own", "lambda_warmup_steps": "2"}  # to gather, to sum and to send to all
    flags = {**flags, **more}
    whole = run({**flags, **STEPS, "total_steps": "6", "save_every": "3", "ckpt_dir": str(tmp_path / "whole")})
    shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "state" / "step_000006")
    printed = tmp_path / "printed.txt"
    again = {"ckpt_dir": str(tmp_path / "broken")}
    assert as_processes(2, partial(run, again, "--resume"), printed) == [0, 0], printed.read_text()
    assert "resuming after step 3" in printed.read_text()
    pd.testing.assert_frame_equal(
        table(tmp_path / "broken" / "metrics.csv"),
        table(whole / "metrics.csv"),
        rtol=1e-4,
        atol=1e-4,
        check_dtype=False,
    )


def processes_of(folder: Path) -> list[int]:
    """The processes that torchrun started to train into this folder, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = dict(x.partition("=")[::2] for x in (path / "environ").read_text().split("\0"))
            if str(folder) in (path / "cmdline").read_text() and "LOCAL_RANK" in variables:
                found[int(variables["RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_killed_process_is_one_line_and_torchrun_resumes(flags: dict[str, str], tmp_path: Path) -> None:
    steps = {**STEPS, "total_steps": "36", "save_every": "6", "eval_every": "0", "sample_every": "36"}
    folder = tmp_path / "run"
    job = torchrun(2, "train.py", *words_of({**flags, **steps, "ckpt_dir": str(folder)}), restarts=1)
    while not list_checkpoints(folder / "state"):
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    os.kill(processes_of(folder)[1], signal.SIGKILL)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    assert err.count("another process of this run has died") == 1, err
    assert "resuming after step" in out
    assert table(folder / "metrics.csv").step.tolist() == list(range(1, 37))
    assert find_corruption(list_checkpoints(folder / "state")[-1]) is None


def run_with_another_lr(flags: dict[str, str]) -> None:
    run(flags, f"--lr={1 + int(os.environ['RANK'])}e-4")


def test_ranks_that_differ_are_refused_at_the_start(flags: dict[str, str], tmp_path: Path) -> None:
    printed = tmp_path / "printed.txt"
    assert as_processes(2, partial(run_with_another_lr, {**flags, **STEPS}), printed) == [2, 2]
    errors = [line for line in printed.read_text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: process 1 has lr=0.0002 where process 0 has 0.0001: make them alike on all machines"]
    assert not Path(flags["ckpt_dir"]).exists()


def test_world_size_without_rank_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu"):
        assert world_size() == 1


def test_wrong_input_is_still_one_line(flags: dict[str, str]) -> None:
    job = torchrun(2, "train.py", *words_of({**flags, "target_label": "joy"}))
    _, err = job.communicate(timeout=100)
    assert job.returncode != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "joy" in errors[0]


def one_update(folder: Path) -> None:
    """One rank: an update of the same policy on the same rollout."""
    rank = int(os.environ["RANK"])
    with process_group("cpu"):
        policy, rollout = make_policy(), one_rollout()
        row = ppo.ppo_update(policy, torch.optim.SGD(policy.parameters()), rollout, ONE_STEP, 1)
    torch.save([p.detach() for p in policy.parameters()], folder / f"weights_{rank}.pt")
    (folder / f"row_{rank}.txt").write_text(f"{row['updates']} {row['skipped']}")


def one_rollout() -> ppo.Rollout:
    policy = make_policy()
    return make_rollout(policy, make_policy(seed=1), sample(policy), torch.linspace(-1, 1, 8), 0.1)


ONE_STEP = TrainConfig(  # no gradient is scaled down, which would hide a wrong factor
    batch_size=8, minibatch_size=8, micro_batch_size=2, ppo_epochs=1, lr=1.0, lr_schedule="constant", max_grad_norm=1e9
)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients_do_not_depend_on_the_number_of_processes(count: int, tmp_path: Path) -> None:
    """Of one minibatch, to 1e-6; 8 rows leave three processes with shares of different sizes."""
    policy = make_policy()
    ppo.ppo_update(
        policy, torch.optim.SGD(policy.parameters()), one_rollout(), replace(ONE_STEP, micro_batch_size=0), 1
    )
    printed = tmp_path / "printed.txt"
    assert as_processes(count, partial(one_update, tmp_path), printed) == [0] * count, printed.read_text()
    for rank in range(count):
        assert (tmp_path / f"row_{rank}.txt").read_text() == "1 0"
        for ours, theirs in zip(torch.load(tmp_path / f"weights_{rank}.pt"), policy.parameters(), strict=True):
            assert (ours - theirs).abs().max() <= 1e-6


def test_an_evaluation_by_several_processes_gives_the_same_file(flags: dict[str, str], tmp_path: Path) -> None:
    folder = run({**flags, "total_steps": "1"})
    words = [
        f"--policy_path={folder / 'policy_lm'}",
        "--split=train",
        "--n_samples=20",
        "--batch_size=6",
        "--frontier=3",
        "--device=cpu",
        "--dtype=float32",
    ]
    sys.argv = ["eval.py", *words, f"--out_csv={tmp_path / 'alone' / 'eval_results.csv'}"]
    run_script(EvalConfig, eval_script.main)
    sys.argv[-1] = f"--out_csv={tmp_path / 'many' / 'eval_results.csv'}"
    printed = tmp_path / "printed.txt"
    assert as_processes(2, partial(run_script, EvalConfig, eval_script.main), printed) == [0, 0], printed.read_text()
    assert printed.read_text().count("written: ") == 1
    files = [(tmp_path / name / "eval_results.csv").read_bytes() for name in ("alone", "many")]
    assert files[0] == files[1]
