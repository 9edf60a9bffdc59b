"""Prints what one step at the default shapes asks of a GPU: `python -m experiments.count_waits`. Needs none.

Models have GPT-2's and DistilBERT's numbers of layers and heads but narrow ones, and logits come in as many chunks as
with 50,257 tokens. Replaying the recorded step counts as one operation.
"""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from config import TrainConfig

import torch

import utils
from experiments import pretend
from experiments.pretend import Watch, moved
from experiments.random_models import Workload, make_random_models
from ppo import build_optimizer, collect_rollout, ppo_update
from reward import Classifier
from runtime.hub import quiet_libraries
from runtime.recording import Recorded
from training.parts import load_parts

VOCABULARY = 503
WORK = Workload((12, 48, 12), (6, 48, 12), batch=64, prompt=128, response=64, epochs=2, minibatch=16)


def main() -> None:
    """Count operations and waits of two steps, and print them by phase."""
    quiet_libraries()
    pretend.register()
    # 1. models on the device
    with tempfile.TemporaryDirectory() as folder:
        names: dict[str, Any] = dict(make_random_models(WORK, Path(folder), VOCABULARY))
        cfg = TrainConfig(**names, device="cpu", dtype="float32", max_prompt_len=WORK.prompt)
        parts = load_parts(cfg)
    models = parts.models
    assert isinstance(models.reward, Classifier)
    for network in (models.policy, models.reference, models.reward.model):
        moved(network)
    # 2. two steps, of which the first records
    utils.GPU_CHUNK_FLOATS = utils.GPU_CHUNK_FLOATS * VOCABULARY // 50257
    with pretend.attention_by_formula(), mock.patch.object(Recorded, "__call__", replay_as_one_operation):
        optimizer = build_optimizer(models.policy, cfg)
        for step in (1, 2):
            print(f"step {step}" + " " * 17 + "operations  waits")
            noise, prompts = utils.uniforms(0, step, WORK.batch, WORK.response), parts.prompts.batch(step)
            with Watch() as sampling, torch.no_grad():
                models.respond(models.policy, prompts, noise, cfg)
            show("sampling", sampling.operations, sampling.count, sampling)
            with Watch() as whole:
                rollout = collect_rollout(models, prompts, noise, cfg, cfg.kl_coef)
            show("rollout", whole.operations, whole.count, whole)
            show("scoring", whole.operations - sampling.operations, whole.count - sampling.count)
            with Watch() as update:
                ppo_update(models.policy, optimizer, rollout, cfg, step)
            show("update", update.operations, update.count, update)


def replay_as_one_operation(self: Recorded) -> None:
    """Run what is recorded; the first call counts in full."""
    watch = Watch.active
    assert watch is not None
    before = watch.operations
    self.function()
    if self.replay is not None:
        watch.operations = before + 1
    self.replay = self.function


def show(phase: str, operations: int, waits: int, watch: Watch | None = None) -> None:
    """Print what a phase asked of the device."""
    causes = f"   {dict(watch.waits)}" if watch is not None else ""
    print(f"  {phase:20}{operations:12,}{waits:7,}{causes}")


if __name__ == "__main__":
    main()
