"""A model's answers to samples, as rows of predictions.jsonl. The metrics of such rows are in tasks.py."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from answers import parse_response
from config import RolloutConfig
from data import PromptReader
from metrics.rows import truth_of
from policy import Policy
from prompts import Prompt
from records.record import Sample
from rollout import generate
from video.readers import VideoError


def predict(
    policy: Policy,
    batches: Sequence[Sequence[Sample]],
    reader: PromptReader,
    cfg,
    num_answers: int = 1,
    seed: int | None = None,
    stand_in: Prompt | None = None,
) -> Iterator[list[dict]]:
    """The prediction rows of each batch, in the order of its samples: greedy, or `num_answers` each from `seed`.

    A row has `video_tokens`, `frames_cut`, `num_tokens` and `num_truncated`, or no answer and an `error` where the
    video cannot be read. `policy` is the unwrapped model; `cfg` has `batch_size`, `max_new_tokens` and `answer`.
    `stand_in` is run for a batch without a readable video, where all processes must make the same calls.
    """
    samples = [sample for batch in batches for sample in batch]
    loaded = reader.ahead(samples, cfg.batch_size + 2 * reader.workers.num)
    for batch in batches:
        yield _predict_batch(policy, batch, islice(loaded, len(batch)), cfg, num_answers, seed, stand_in)


def _predict_batch(
    policy: Policy,
    batch: Sequence[Sample],
    loaded: Iterator[Prompt | VideoError],
    cfg,
    num: int,
    seed: int | None,
    stand_in: Prompt | None,
) -> list[dict]:
    """The rows of one batch. Its prompts are made here and end here: their patches take memory on the device."""
    results = list(loaded)
    prompts = [result for result in results if isinstance(result, Prompt)] or ([stand_in] if stand_in else [])
    answers = iter(_answers(policy, prompts, cfg, num, seed, stand_in is not None) if prompts else ())
    rows = []
    for sample, result in zip(batch, results, strict=True):
        if isinstance(result, VideoError):
            rows.append(prediction(sample, [""] * num, cfg.answer) | {"error": str(result)})
            continue
        texts, used = next(answers)
        used |= {"video_tokens": result.video.num_tokens, "frames_cut": result.video.frames_cut}
        rows.append(prediction(sample, texts, cfg.answer) | used)
    return rows


def _answers(
    policy: Policy, prompts: list[Prompt], cfg, num: int, seed: int | None, synced: bool
) -> list[tuple[list[str], dict]]:
    """`num` responses to each prompt, and what they took."""
    embeds = policy.embed_each(prompts)
    sizes = RolloutConfig(group_size=num, max_new_tokens=cfg.max_new_tokens, micro_batch_size=cfg.batch_size)
    rollout = generate(policy, prompts, embeds, sizes, seed, synced=synced)
    found = []
    for i in range(0, len(rollout.texts), num):
        mine = slice(i, i + num)
        used = {"num_tokens": int(rollout.mask_BT[mine].sum()), "num_truncated": int(rollout.truncated_B[mine].sum())}
        found.append((rollout.texts[mine], used))
    return found


def prediction(sample: Sample, responses: Sequence[str], answer: str) -> dict[str, Any]:
    """One line of predictions.jsonl: raw responses, what is parsed from a single one, and the record's truth."""
    row: dict[str, Any] = {"id": sample.id, "task": sample.task}
    if len(responses) == 1:
        choice, segments = parse_response(responses[0], sample.options, answer)
        row |= {"response": responses[0], "pred_choice": choice if sample.options else None}
        row |= {"pred_segments": segments if sample.segments else []}
    else:
        row |= {"responses": list(responses)}
    return row | head_of(sample)


def head_of(sample: Sample) -> dict[str, Any]:
    """What a prediction row says of its record."""
    return {"id": sample.id} | truth_of(sample)


def blind_head_of(sample: Sample, own: Mapping[str, Sample]) -> dict[str, Any]:
    """The same where the sample has the clip of another one: the truth of its own clip, and which video was shown."""
    return head_of(own[sample.id]) | {"shown": os.path.basename(sample.video)}
