"""Between base and policy: the weights on the line, the KL asked for, and the curve as eval.py would measure it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from config import UserError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_eval
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from tools.interpolate import CLOSE, FARTHEST, Line, find_alpha, main, shares_at
from training.parts import GPT2WithValueHead

SAME = ("--n_samples", "20", "--batch_size", "8", "--device", "cpu", "--dtype", "float32", "--seed", "7")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def another_run(run: Path, path: Path, factor: float) -> Path:
    """A run like the first, with other weights."""
    shutil.copytree(run, path)
    moved = {name: weight * factor for name, weight in weights(run / "policy_lm").items()}
    save_file(moved, path / "policy_lm" / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 1.7])
def test_the_line_goes_from_base_through_the_average_of_the_runs(
    alpha: float, finished_run: Path, gpt2_dir: Path, tmp_path: Path
) -> None:
    other = another_run(finished_run, tmp_path / "other", 1.1)
    runs = [finished_run, other]
    reference, policy = (GPT2WithValueHead.from_pretrained(str(gpt2_dir)) for _ in range(2))
    Line(reference, policy, [str(run) for run in runs]).move_to(alpha)
    base, ends = weights(gpt2_dir), [weights(run / "policy_lm") for run in runs]
    found = policy.lm.state_dict()
    for name, start in base.items():
        average = (ends[0][name] + ends[1][name]) / 2
        assert torch.allclose(found[name], (1 - alpha) * start + alpha * average, atol=1e-6), name
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr(), "still one matrix"


@pytest.mark.parametrize(
    "kl",
    [
        lambda a: 3 * a**2,
        lambda a: 0.01 * a,
        lambda a: a**6,
        lambda a: 5 * np.tanh(a) ** 4,
        lambda a: 9e9 * a**2,
        lambda a: 0.1 * a**2 if a < 2 else np.inf,
    ],
)
@pytest.mark.parametrize("target", [0.05, 0.3])
def test_the_kl_asked_for_is_found_on_any_rising_curve(kl: Callable[[float], float], target: float) -> None:
    if kl(FARTHEST) < target:
        with pytest.raises(UserError, match=r"kl=0\.3 cannot be reached: alpha 8 is 0\.08"):
            find_alpha(kl, target)
    else:
        asked: list[float] = []
        alpha = find_alpha(lambda a: asked.append(a) or kl(a), target)  # type: ignore[func-returns-value]
        assert kl(alpha) == pytest.approx(target, rel=CLOSE)
        assert len(asked) < 30
        assert len(set(asked)) == len(asked)


def test_a_policy_at_the_kl_asked_for_is_one_that_eval_takes(
    finished_run: Path, gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = run_eval(finished_run, tmp_path / "full", "--seed", "7")[1]["kl_seq_exact"]
    out = tmp_path / "half"
    main([str(finished_run), "--kl", f"{full / 2}", "--out", str(out), *SAME])
    *_, line, next_line = capsys.readouterr().out.splitlines()
    summary = run_eval(out, tmp_path / "evaluated", "--seed", "7")[1]
    assert "is not part of a run" not in capsys.readouterr().out
    found = json.loads((out / "config.json").read_text())["interpolated"]
    low, high = found["kl_ci"]
    assert summary["kl_seq_exact"] == pytest.approx(full / 2, rel=CLOSE + 0.001)
    assert summary["kl_seq_exact"] == pytest.approx(found["kl_seq_exact"], rel=1e-5)
    assert f"{found['kl_seq_exact']:.2f} [{low:.2f}, {high:.2f}] nats from base on 20" in line
    assert next_line == f"next: python eval.py --policy_path {out / 'policy_lm'}"
    base, end = weights(gpt2_dir), weights(finished_run / "policy_lm")
    for name, weight in weights(out / "policy_lm").items():
        assert torch.allclose(weight, base[name] + found["alpha"] * (end[name] - base[name]), atol=1e-6)


def test_the_curve_is_what_eval_measures(finished_run: Path, classifier_dir: Path, tmp_path: Path) -> None:
    csv, judged = tmp_path / "curve.csv", ("--frontier", "4", "--judge", str(classifier_dir))
    main([str(finished_run), "--curve", "--alphas", "0,1", "--csv", str(csv), *judged, *SAME])
    results, summary = run_eval(finished_run, tmp_path / "eval", "--seed", "7", *judged)
    table = pd.read_csv(csv).set_index("alpha")
    expected = {
        "kl": summary["kl_seq_exact"],
        "score": summary["policy"]["score_mean"],
        "win_rate": summary["win_rate"],
        "base_score": summary["base"]["score_mean"],
        "optimal_share": summary["optimal_share_rate"],
        "judge_gain": summary["judge_gain"],
        "length_ratio": results.policy_len.mean() / results.base_len.mean(),
    }
    for name, value in expected.items():
        assert table.loc[1, name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert [table.loc[1, f"score_{end}"] for end in ("low", "high")] == pytest.approx(
        summary["policy"]["score_ci"], rel=1e-3, abs=1e-4
    )
    assert table.loc[0, "kl"] == pytest.approx(0, abs=1e-4)
    assert table.loc[0, "score"] == table.loc[0, "base_score"]
    assert csv.with_suffix(".png").stat().st_size > 5000


def test_each_run_can_have_its_own_curve(
    finished_run: Path, gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice, csv = another_run(finished_run, tmp_path / "twice", 1.0), tmp_path / "curves.csv"
    base, end = weights(gpt2_dir), weights(finished_run / "policy_lm")
    farther = {name: 2 * weight - base[name] for name, weight in end.items()}
    save_file(farther, twice / "policy_lm" / "model.safetensors", metadata={"format": "pt"})
    same = ("--curve", "--judge", "none", "--frontier", "4", *SAME)
    main(
        [str(finished_run), str(twice), "--each", "--alphas", "0.5,1,2", "--at_kl", "0.01,99", "--csv", str(csv), *same]
    )
    out = capsys.readouterr().out
    table = pd.read_csv(csv)
    assert table.run.tolist() == [str(finished_run)] * 3 + [str(twice)] * 3
    assert table.kl[2] == pytest.approx(table.kl[4], rel=1e-3), "half the way on a line twice as long"
    line = next(line for line in out.splitlines() if line.startswith(str(twice)) and "alpha" not in line)
    own = table[table.run == str(twice)].sort_values("kl")
    expected = 100 * np.interp(0.01, own.kl, own.optimal_share, np.nan)
    assert line.split()[1:] == ["-" if np.isnan(expected) else f"{expected:.1f}", "-"]
    assert out.splitlines()[-2].startswith("mean")
    assert csv.with_suffix(".png").stat().st_size > 5000


def test_shares_are_read_off_between_the_points_of_each_curve() -> None:
    table = pd.DataFrame(
        {"run": ["a", "a", "b", "b"], "kl": [1.0, 3.0, 1.0, 5.0], "optimal_share": [0.6, 0.8, 0.7, 0.9]}
    )
    _, first, second, mean = [line for line in shares_at(table, [2, 4]).splitlines() if line[0] != "%"]
    assert first.split() == ["a", "70.0", "-"]
    assert second.split() == ["b", "75.0", "85.0"]
    assert mean.split() == ["mean", "72.5", "85.0"]


def test_tables_are_drawn_again_as_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = pd.DataFrame(
        {"run": ["a", "a", "b"], "alpha": [1.5, 1, 1], "kl": [2.0, 1.0, 3.0], "optimal_share": [0.5, 0.4, 0.6]}
    )
    for name in ("small", "large"):
        points.to_csv(tmp_path / f"{name}.csv", index=False)
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: object, **named: object) -> None:
        drawn.append(figure)
        save(figure, *args, **named)

    monkeypatch.setattr(Figure, "savefig", saved)
    main(["--draw", f"{tmp_path / 'small.csv'}, {tmp_path / 'large.csv'}", "--csv", str(tmp_path / "both")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in drawn[0].axes] == ["small", "large"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"a": [[1, 40], [2, 50]], "b": [[3, 60]]}, "in the order of alpha"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to do"),
        (["--each", "--kl", "1", "--out", "x"], "each draws one curve"),
        (["--kl", "1"], "out is missing"),
        (["--kl", "0", "--out", "x"], "kl=0.0 must"),
        (["--kl", "1", "--out", "."], "out=. exists"),
        (["nowhere", "--curve"], "runs: nowhere is not"),
        (["--curve", "--alphas", "0,x"], "alphas='0,x'"),
        (["--curve", "--alphas", "0,nan"], "alphas='0,nan'"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], message: str, finished_run: Path) -> None:
    words = words if words[:1] == ["nowhere"] else [str(finished_run), *words]
    with pytest.raises(UserError, match=message):
        main(words)


def test_runs_of_another_base_are_refused(finished_run: Path, tmp_path: Path) -> None:
    other = another_run(finished_run, tmp_path / "other", 1.0)
    config = json.loads((other / "policy_lm" / "config.json").read_text())
    (other / "policy_lm" / "config.json").write_text(json.dumps({**config, "n_layer": config["n_layer"] - 1}))
    with pytest.raises(UserError, match="name runs of one base"):
        main([str(finished_run), str(other), "--curve", "--csv", str(tmp_path / "x.csv"), *SAME])


def test_runs_with_other_tokens_are_refused(finished_run: Path, tmp_path: Path) -> None:
    """Of the same number, so that nothing else would tell."""
    other = shutil.copytree(finished_run, tmp_path / "other")
    file = other / "policy_lm" / "tokenizer.json"
    rules = json.loads(file.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(rules))
    with pytest.raises(UserError, match="has another tokenizer than"):
        main(
            [
                str(finished_run),
                str(other),
                "--kl",
                "0.1",
                "--out",
                str(tmp_path / "out"),
                "--n_samples",
                "4",
                "--device",
                "cpu",
            ]
        )
