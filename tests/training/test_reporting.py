"""Trackers: each step arrives once, whatever happened in between; a missing package or a dead server is one line."""

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from config import TrainConfig, UserError

import pandas as pd
import pytest
from conftest import run

from training.reporting import Trackers

pytestmark = pytest.mark.usefixtures("no_pictures")


class Refused(Exception):
    pass


class FakeServer:
    """Stands for the package wandb and its server, which keeps what was sent from one start to the next."""

    def __init__(self) -> None:
        self.Error, self.Settings, self.Image = Refused, lambda **settings: settings, lambda path: ("image", path)
        self.Table = lambda columns, data: pd.DataFrame(data, columns=columns)
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.configs: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, *, id: str, config: dict[str, Any], dir: str, **_: object) -> SimpleNamespace:
        history = self.runs.setdefault(id, {})
        self.configs.append(config)

        def log(values: dict[str, Any], step: int) -> None:
            assert step >= max(history, default=0), "W&B drops earlier steps"
            row = history.setdefault(step, {})
            assert not row.keys() & values.keys() - {"curves"}, "sent twice"
            row.update(values)

        return SimpleNamespace(
            id=id, step=max(history, default=-1) + 1, offline=False, url="https://there", log=log, finish=self.finish
        )

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    found = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def forget_last_checkpoint(folder: Path) -> None:
    """As after a kill between step 3 and its checkpoint: the step is taken again."""
    shutil.rmtree(folder / "state" / "step_000003")


def test_wandb_gets_each_step_once_however_often_the_run_was_killed(
    server: FakeServer, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags, "--report_to", "wandb")
    assert "https://there" in capsys.readouterr().out
    (name, history), *others = server.runs.items()
    assert not others
    metrics = pd.read_csv(folder / "metrics.csv")
    assert list(history) == [1, 2, 3]
    for row in metrics.to_dict("records"):
        assert {key: history[row["step"]][key] for key in row} == pytest.approx(row, nan_ok=True)
    assert history[2]["samples"].prompt.tolist() == pd.read_csv(folder / "samples.csv").prompt.tolist()[:4]
    assert server.configs[0]["lr"] == 1e-3
    for lost_in_flight in ([], [3], [2, 3]):
        for step in lost_in_flight:
            del history[step]
        forget_last_checkpoint(folder)
        run({"ckpt_dir": str(folder)}, "--resume")
        assert list(server.runs) == [name]
        assert list(history) == [1, 2, 3]
        assert all("samples" in history[step] for step in (2, 3))
    assert server.finished == 4


def test_changed_settings_get_a_run_of_their_own_with_all_steps(server: FakeServer, flags: dict[str, str]) -> None:
    folder = run(flags)
    run({"ckpt_dir": str(folder)}, "--resume", "--report_to=wandb", "--total_steps=4")
    forget_last_checkpoint(folder)
    run({"ckpt_dir": str(folder)}, "--resume", "--lr=1e-4", "--allow_changes", "--total_steps=5")
    assert [list(history) for history in server.runs.values()] == [[1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_the_picture_is_sent_with_its_step(
    server: FakeServer, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.run_folder.plot_curves", lambda table, picture, label: picture.touch())
    folder = run(flags, "--report_to=wandb")
    (history,) = server.runs.values()
    assert [step for step in history if "curves" in history[step]] == [2, 3], "with the samples, and at the end"
    assert history[3]["curves"] == ("image", str(folder / "curves.png"))


def test_a_tracker_that_fails_does_not_stop_the_run(
    server: FakeServer, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(columns: list[str], data: list[Any]) -> None:
        raise BrokenPipeError("the server\nhas gone")

    monkeypatch.setattr(server, "Table", gone)
    folder = run(flags, "--report_to", "wandb")
    assert len(pd.read_csv(folder / "metrics.csv")) == 3
    assert "report_to=wandb failed (BrokenPipeError: the server has gone)" in capsys.readouterr().out


def test_a_refusal_by_wandb_is_one_line(
    server: FakeServer, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise Refused("No API key configured.")

    with monkeypatch.context() as patch:
        patch.setattr(server, "init", refuse)
        with pytest.raises(SystemExit) as stop:
            run(flags, "--report_to=wandb")
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "No API key configured." in line
    assert "wandb login" in line
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert [list(history) for history in server.runs.values()] == [[1, 2, 3]]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_anything_is_written(
    name: str, module: str, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        run(flags, "--report_to", name)
    assert stop.value.code == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not Path(flags["ckpt_dir"]).exists()


def test_tensorboard_gets_each_step_once(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, float, int]] = []
    closed: list[bool] = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            assert folder == Path(flags["ckpt_dir"]) / "tensorboard"
            rows[:] = [row for row in rows if row[2] < purge_step]

        def close(self) -> None:
            closed.append(True)

        def add_scalar(self, *row: Any) -> None:
            rows.append(row)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    folder = run(flags, "--report_to", "tensorboard")
    metrics = pd.read_csv(folder / "metrics.csv")
    assert {name for name, _, _ in rows} == set(metrics.columns)
    found = [value for name, value, _ in rows if name == "score_mean"]
    assert found == pytest.approx(metrics.score_mean.tolist())
    forget_last_checkpoint(folder)
    del rows[: len(metrics.columns)]  # as of a writer that was killed before it wrote them
    run({"ckpt_dir": str(folder)}, "--resume")
    assert [step for name, _, step in rows if name == "score_mean"] == [1, 2, 3]
    assert closed == [True, True]


def tables(folder: Path, steps: int) -> TrainConfig:
    """A run folder with as many steps, for trackers alone."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": step, "score_mean": step / 8} for step in range(1, steps + 1)]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    sample = {"step": 2, "prompt": "NA", "policy": "fine", "policy_score": 0.5}
    pd.DataFrame([sample]).to_csv(folder / "samples.csv", index=False)
    (folder / "config.json").write_text(json.dumps({"lr": 0.5}))
    return TrainConfig(ckpt_dir=str(folder), report_to="tensorboard, wandb")


def test_the_real_tensorboard_drops_what_is_sent_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = tables(tmp_path, 3)
    for _ in range(2):
        trackers = Trackers(TrainConfig(report_to="tensorboard"), tmp_path)
        trackers.add(4, {"step": 4, "score_mean": 0.5})
        trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("score_mean")] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
        (4, 0.5),
    ]
    assert cfg.trackers == ["tensorboard", "wandb"]


def test_the_real_wandb_keeps_every_step_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start leaves a file that is complete by itself, under the same id."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tables(tmp_path, 3)
    for _ in range(2):
        trackers = Trackers(TrainConfig(report_to="wandb"), tmp_path)
        trackers.add(4, {"step": 4, "score_mean": 0.5})
        trackers.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{(tmp_path / 'wandb' / 'run_id').read_text()}"}
    history = []
    for data in leveldb_records(files[-1].read_bytes()):
        record = proto.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.nested_key[0]: json.loads(item.value_json) for item in items})
    assert [(row["step"], row["score_mean"]) for row in history] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert [row["step"] for row in history if "samples" in row] == [2]


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format, with blocks of 32 KiB, after a header of seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", log[place + 4 : place + 7])
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.parametrize("names", ["both", "none,wandb", "wandb,", "TensorBoard"])
def test_an_unknown_tracker_is_named(names: str) -> None:
    with pytest.raises(UserError, match=r"report_to=.*choose none, or tensorboard or wandb"):
        TrainConfig(report_to=names)
