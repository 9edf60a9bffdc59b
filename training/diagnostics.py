"""What looks wrong in a run, its likely cause and the setting to change; each warning is given once."""

import math
from collections import deque
from typing import Any

from config import TrainConfig

from utils import MIN_ROWS_TO_PREDICT

WINDOW = 10  # steps over which the critic, lengths and ratios are judged
LARGE_RATIO = 10


class Diagnostics:
    """Warnings about a run, from the rows of metrics.csv as they are written."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.paid_at_end = cfg.batch_size < MIN_ROWS_TO_PREDICT or cfg.reward_every not in range(1, cfg.max_new_tokens)
        self.given: set[str] = set()
        self.first_row: dict[str, Any] = {}
        self.value_fits: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[float] = deque(maxlen=WINDOW)
        self.large_ratios: deque[bool] = deque(maxlen=WINDOW)

    def warnings(self, row: dict[str, Any]) -> list[str]:
        """Warnings about a row that were not given before."""
        if math.isnan(self.first_row.get("entropy", math.nan)):
            self.first_row = row
        self.lengths.append(row["response_len"])
        self.large_ratios.append(row["ratio_max"] > LARGE_RATIO)
        # where all returns are alike there is nothing to explain
        if row.get("positive_rate", 0) < 0.9 and math.isfinite(row["explained_var"]):
            self.value_fits.append(row["explained_var"])
        new = {name: text for name, text in self._all_warnings(row).items() if name not in self.given}
        self.given |= new.keys()
        return list(new.values())

    def _all_warnings(self, row: dict[str, Any]) -> dict[str, str]:
        """All that looks wrong now, by name."""
        value_fit = sum(self.value_fits) / WINDOW if len(self.value_fits) == WINDOW else 0.0
        length = sum(self.lengths) / len(self.lengths)
        first_length = self.first_row["response_len"]
        first_entropy = self.first_row["entropy"]
        critic_setting = "--critic_lr" if self.cfg.critic == "own" else "--value_coef"
        price_in_loss = "" if self.cfg.kl_in_loss else "set --kl_in_loss true, "
        is_wrong = {
            "skipped": row["skipped"] > 0,
            "kl_negative": row["kl_seq"] < -2,
            "kl_high": row["kl_seq_exact"] > 20,
            "ratio": sum(self.large_ratios) >= 3,  # once is no sign: Adam's first steps are large
            "clip": row["clip_frac"] > 0.3,
            "entropy": row["entropy"] < 0.3 * first_entropy,
            "same": row["distinct_rate"] < 0.5,
            "length": len(self.lengths) == WINDOW and length < 0.7 * first_length,
            "critic": value_fit < -0.5,
            "credit": self.paid_at_end and self.cfg.gae_lambda < 0.99 and self.cfg.critic == "shared",
        }
        texts = {
            "skipped": f"{row['skipped']} of {row['skipped'] + row['updates']} minibatches were skipped, because their "
            "loss or gradient was not finite; lower --lr, or check the reward for NaN",
            "kl_negative": f"KL is {row['kl_seq']:.1f} nats, far below 0: the sampled distribution is not the scored "
            "one; run with --check",
            "kl_high": f"KL is {row['kl_seq_exact']:.0f} nats: the policy is leaving the language of the base; raise "
            "--kl_coef, or lower --lr",
            "ratio": f"in 3 of {WINDOW} steps a token became more than {LARGE_RATIO} times likelier: the step is too "
            "large; lower --lr or --ppo_epochs",
            "clip": f"{row['clip_frac']:.0%} of ratios were clipped: the step is too large for the batch; lower --lr "
            "or --ppo_epochs",
            "entropy": f"entropy fell from {first_entropy:.2f} to {row['entropy']:.2f} nats per token: the policy "
            "narrows; raise --kl_coef or --ent_coef",
            "same": f"only {row['distinct_rate']:.0%} of the responses differ: the reward is probably being gamed; "
            "raise --kl_coef, and read samples.csv",
            "length": f"responses have {length:.0f} tokens, {first_length:.0f} at the start: the policy "
            f"learns to stop early; {price_in_loss}raise --kl_coef, take fewer steps, or score --reward_on_prompt",
            "critic": f"the critic explains nothing (explained_var {value_fit:.1f} over {WINDOW} steps), which makes "
            f"advantages noisy; raise {critic_setting} or --batch_size",
            "credit": f"the score is paid on the last token, and gae_lambda={self.cfg.gae_lambda} hides it from the "
            f"others; set --gae_lambda 1, or --critic own, or --reward_every 1 and batch_size {MIN_ROWS_TO_PREDICT} or "
            "more",
        }
        return {name: texts[name] for name, wrong in is_wrong.items() if wrong}
