"""Prints what one step at the default shapes asks of a GPU: `python -m experiments.count_waits`. Needs none.

Models have GPT-2's and DistilBERT's numbers of layers and heads but narrow ones, and logits come in as many chunks as
with 50,257 tokens. Replaying the recorded step counts as one operation.
"""

import tempfile
from pathlib import Path
from typing import Any

from config import TrainConfig

import torch

import model
import utils
from experiments import pretend
from experiments.pretend import Watch, moved
from experiments.random_models import Workload, make_random_models
from ppo import build_optimizer, collect_rollout, ppo_update
from reward import Classifier
from runtime.hub import quiet_libraries
from training.parts import load_parts
from utils import uniforms

VOCABULARY = 503
WORK = Workload((12, 48, 12), (6, 48, 12), batch=64, prompt=128, response=64, epochs=2, minibatch=16)


def main() -> None:
    """Count operations and waits of two steps, and print them by phase."""
    quiet_libraries()
    pretend.register()
    utils.GPU_CHUNK_FLOATS = utils.GPU_CHUNK_FLOATS * VOCABULARY // 50257
    model._Sampler.next_token = next_token  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        names = make_random_models(WORK, Path(folder), VOCABULARY)
        settings: dict[str, Any] = dict(names)
        cfg = TrainConfig(**settings, device="cpu", dtype="float32", max_prompt_len=WORK.prompt)
        parts = load_parts(cfg)
    assert isinstance(parts.models.reward, Classifier)
    for network in (parts.models.policy, parts.models.reference, parts.models.reward.model):
        moved(network)
    with pretend.attention_by_formula():
        optimizer = build_optimizer(parts.models.policy, cfg)
        for step in (1, 2):  # the first one records
            print(f"step {step}" + " " * 17 + "operations  waits")
            noise, prompts = uniforms(0, step, WORK.batch, WORK.response), parts.prompts.batch(step)
            with Watch() as watch, torch.no_grad():
                parts.models.respond(parts.models.policy, prompts, noise, cfg)
            sampling = show("sampling", watch)
            with Watch() as watch:
                rollout = collect_rollout(parts.models, prompts, noise, cfg, cfg.kl_coef)
            whole = show("rollout", watch)
            print(f"  {'scoring':20}{whole[0] - sampling[0]:12,}{whole[1] - sampling[1]:7,}")
            with Watch() as watch:
                ppo_update(parts.models.policy, optimizer, rollout, cfg, step)
            show("update", watch)


def next_token(self: "model._Sampler") -> None:
    """The first step counts in full, a replay as one operation."""
    watch = Watch.active
    assert watch is not None
    before = watch.operations
    self.step()
    if self.replay is not None:
        watch.operations = before + 1
    self.replay = self.step


def show(phase: str, watch: Watch) -> tuple[int, int]:
    """Print what a phase asked of the device, and return operations and waits."""
    print(f"  {phase:20}{watch.operations:12,}{watch.count:7,}   {dict(watch.waits)}")
    return watch.operations, watch.count


if __name__ == "__main__":
    main()
