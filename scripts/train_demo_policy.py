r"""Train the demo policy by behaviour cloning and write it as an OpenVLA directory with held-out demonstrations.

    python scripts/train_demo_policy.py --work DIR --output examples/demo_policy \
        --episodes-output examples/demo_episodes

Collects demonstrations into ``DIR`` (once), trains, and records the held-out episodes. Closed-loop success is measured
on the written directory by ``vlaquant eval --rollouts`` and ``scripts/evaluate_demo_policy.py``.
"""

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from demo_model import ACTION_DIMENSION, CHUNK, DATASET, IMAGE_SIZE, make_model, make_processor
from demonstrations import Demonstrations, record_all, write_held_out
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.models.openvla import OpenVLAForActionPrediction, normalize, prompt
from vlaquant.models.openvla.actions import action_statistics

_TRAIN_SEED = 1000
_HELD_OUT_SEED = 50_000
_SHIFT_PIXELS = 4
_LABEL_BLUR_BINS = 1.5
_EMA_DECAY = 0.998


class Frames:
    """All training frames in memory, drawn in seeded random batches."""

    def __init__(self, demos: list[Demonstrations], model: OpenVLAForActionPrediction) -> None:
        self.image = np.concatenate([demo.image for demo in demos])
        self.state = torch.from_numpy(np.concatenate([demo.state[:, [0, 1, 2, 4, 5, 6]] for demo in demos]))
        stats = action_statistics(model.config.norm_stats, DATASET)
        self.bins: list[Tensor] = []
        starts: list[Tensor] = []
        offset = 0
        for demo in demos:
            tokens = model.action_tokens.encode(normalize(demo.action.astype(np.float64), stats))
            self.bins.append(torch.from_numpy(model.action_tokens.bins(tokens)))
            usable = np.flatnonzero(demo.episode[: -CHUNK + 1] == demo.episode[CHUNK - 1 :])
            starts.append(torch.from_numpy(usable) + offset)
            offset += len(demo.action)
        self.bins_all = torch.cat(self.bins)  # [t, 4]
        self.starts = torch.cat(starts)
        self.task = torch.cat([torch.full((len(demo.action),), index) for index, demo in enumerate(demos)])
        self.state_mean, self.state_std = self.state.mean(0), self.state.std(0) + 1e-3

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Endless start indices [size]."""
        while True:
            order = self.starts[torch.randperm(len(self.starts), generator=generator)]
            yield from order.split(size)[:-1]

    def labels(self, index: Tensor) -> Tensor:
        """Bins of the chunk that begins at each index: [b, chunk · 4]."""
        return torch.stack([self.bins_all[index + step] for step in range(CHUNK)], dim=1).flatten(1)

    def poses(self, index: Tensor) -> Tensor:
        """Standardised hand and object positions [b, 6], an auxiliary target that only training sees."""
        return (self.state[index] - self.state_mean) / self.state_std


def pixels(frames: Frames, index: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Augmented images for both towers [b, 6, h, w]: shifted by up to 4 pixels, brightness and contrast jittered."""
    image = torch.from_numpy(frames.image[index.numpy()]).permute(0, 3, 1, 2).float() / 255.0
    padded = F.pad(image, [_SHIFT_PIXELS] * 4, mode="replicate")
    shift = torch.randint(0, 2 * _SHIFT_PIXELS + 1, (len(index), 2), generator=generator).tolist()
    image = torch.stack([p[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for p, (y, x) in zip(padded, shift, strict=True)])
    jitter = 1.0 + 0.2 * (torch.rand((2, len(index), 3, 1, 1), generator=generator) - 0.5)
    image = (image * jitter[0] + (jitter[1] - 1.0)).clamp(0.0, 1.0)
    return torch.cat([(image - mean[0]) / std[0], (image - mean[1]) / std[1]], dim=1)


def soft_labels(bins: Tensor, count: int) -> Tensor:
    """Bins [b, a] -> distributions [b, a, count]: a Gaussian of 1.5 bins, so that a near miss costs little."""
    distance = torch.arange(count) - bins.unsqueeze(-1)
    return torch.softmax(-0.5 * (distance / _LABEL_BLUR_BINS) ** 2, dim=-1)


def train(
    model: OpenVLAForActionPrediction, frames: Frames, *, steps: int, batch: int, rate: float
) -> OpenVLAForActionPrediction:
    """Behaviour cloning with AdamW and a cosine schedule; returns the exponential moving average of the weights."""
    assert model.processor is not None
    generator = torch.Generator().manual_seed(0)
    pose_head = nn.Linear(model.config.text_config.hidden_size, 6)
    parameters = [*model.parameters(), *pose_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    average = copy.deepcopy(model).requires_grad_(requires_grad=False)
    hidden: list[Tensor] = []
    model.language_model.model.norm.register_forward_hook(lambda _m, _i, output: hidden.append(output))
    images = model.processor.image_processor
    mean = torch.tensor(images.means).reshape(2, 1, 3, 1, 1)
    std = torch.tensor(images.stds).reshape(2, 1, 3, 1, 1)
    prompts = prompt_tokens(model)
    started = time.time()
    for step, index in zip(range(steps), frames.batches(batch, generator), strict=False):
        hidden.clear()
        loss, pose_loss = losses(
            model, pose_head, frames, prompts, hidden, index, pixels(frames, index, mean, std, generator)
        )
        optimizer.zero_grad()
        (loss + 0.3 * pose_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(_EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)
        if step % 50 == 0:
            rate_now = (step + 1) * batch / (time.time() - started)
            print(f"step {step} loss {loss:.3f} pose {pose_loss:.3f} {rate_now:.0f} samples/s", flush=True)
    return average


def prompt_tokens(model: OpenVLAForActionPrediction) -> list[Tensor]:
    """Per task: the prompt, the empty token and the queries."""
    assert model.processor is not None
    tail = [model.config.empty_token_id, *model.config.action_query_token_ids]
    texts = [prompt(instruction) for instruction in INSTRUCTIONS.values()]
    return [torch.tensor([*model.processor.tokenizer(text)["input_ids"], *tail]) for text in texts]


def losses(
    model: OpenVLAForActionPrediction,
    pose_head: nn.Module,
    frames: Frames,
    prompts: list[Tensor],
    hidden: list[Tensor],
    index: Tensor,
    pixel_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy over the action bins, and the squared error of the poses read at the last prompt token."""
    chosen = [prompts[int(task)] for task in frames.task[index]]
    lengths = torch.tensor([len(tokens) for tokens in chosen])
    input_ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=model.config.text_config.pad_token_id)
    logits = model(input_ids, pixel_values=pixel_values, use_cache=False).logits
    queries = CHUNK * ACTION_DIMENSION
    where = lengths[:, None] + model.image_tokens - queries + torch.arange(queries)  # [b, queries]
    at_queries = logits.gather(1, where.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    top = model.action_tokens.vocab_size
    action_logits = at_queries[..., top - len(model.action_tokens.centers) : top].flip(-1)  # bin 0 is the last token
    target = soft_labels(frames.labels(index), len(model.action_tokens.centers))
    loss = -(target * action_logits.log_softmax(-1)).sum(-1).mean()
    loss = loss + 0.01 * at_queries.logsumexp(-1).sub(action_logits.logsumexp(-1)).mean()
    pose = pose_head(hidden[-1][torch.arange(len(index)), where[:, 0] - 1])
    return loss, F.mse_loss(pose, frames.poses(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where demonstrations are kept")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--episodes-output", type=Path, required=True, help="where held-out episodes go")
    parser.add_argument("--episodes", type=int, default=120, help="demonstrations per task")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if not all((args.work / f"{task}.npz").exists() for task in INSTRUCTIONS):
        record_all(args.work, args.episodes, seed=_TRAIN_SEED, image_size=IMAGE_SIZE, tail=CHUNK, workers=args.threads)
    demos = [Demonstrations.load(args.work, task) for task in INSTRUCTIONS]
    processor = make_processor()
    model = make_model(processor, np.concatenate([demo.action for demo in demos]))
    average = train(model, Frames(demos, model), steps=args.steps, batch=args.batch, rate=args.rate)
    average.bfloat16().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    write_held_out(args.episodes_output, episodes=4, seed=_HELD_OUT_SEED, image_size=IMAGE_SIZE, chunk=CHUNK)


if __name__ == "__main__":
    main()
