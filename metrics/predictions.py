"""A model's answers to samples, as rows of predictions.jsonl. The metrics of such rows are in tasks.py."""

from collections.abc import Callable, Iterator, Sequence
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

    A row has `num_tokens`, `num_truncated`, `video_tokens` and `frames_cut`, or no answer and an `error` where the
    video cannot be read. `policy` is the unwrapped model; `cfg` has `batch_size`, `max_new_tokens` and `answer`.
    `stand_in` is run for a batch without a readable video, where all processes must make the same calls.
    """
    sizes = RolloutConfig(group_size=num_answers, max_new_tokens=cfg.max_new_tokens, micro_batch_size=cfg.batch_size)

    def answer(prompts: list[Prompt]) -> list[dict]:
        rollout = generate(policy, prompts, policy.embed_each(prompts), sizes, seed, synced=stand_in is not None)
        rows = []
        for i, prompt in enumerate(prompts):
            mine = slice(i * num_answers, (i + 1) * num_answers)
            used = {"num_tokens": rollout.mask_BT[mine].sum(), "num_truncated": rollout.truncated_B[mine].sum()}
            used |= {"video_tokens": prompt.video.num_tokens, "frames_cut": prompt.video.frames_cut}
            row = prediction(prompt.sample, rollout.texts[mine], cfg.answer)
            rows.append(row | {name: int(num) for name, num in used.items()})
        return rows

    for batch, rows in zip(batches, answer_batches(answer, batches, reader, cfg.batch_size, stand_in)):
        yield [
            prediction(sample, [""] * num_answers, cfg.answer) | row if "error" in row else row
            for sample, row in zip(batch, rows, strict=True)
        ]


def answer_batches(
    answer: Callable[[list[Prompt]], list[dict]],
    batches: Sequence[Sequence[Sample]],
    reader: PromptReader,
    batch_size: int,
    stand_in: Prompt | None = None,
) -> Iterator[list[dict]]:
    """A row for each sample of each batch: its own of `answer(prompts)`, or {"error"} where the video cannot be read.

    Videos are decoded ahead. `stand_in` is answered, without a row, for a batch that has no readable video.
    """
    loaded = reader.ahead([sample for batch in batches for sample in batch], batch_size + 2 * reader.workers.num)
    for batch in batches:
        yield _answer_batch(answer, islice(loaded, len(batch)), stand_in)


def _answer_batch(answer: Callable, loaded: Iterator[Prompt | VideoError], stand_in: Prompt | None) -> list[dict]:
    """The batch's prompts are made here and end here, because their patches take memory on the device."""
    results = list(loaded)
    prompts = [result for result in results if isinstance(result, Prompt)] or ([stand_in] if stand_in else [])
    rows = iter(answer(prompts) if prompts else ())
    return [{"error": str(result)} if isinstance(result, VideoError) else next(rows) for result in results]


def prediction(sample: Sample, responses: Sequence[str], answer: str) -> dict[str, Any]:
    """One line of predictions.jsonl: raw responses, what is parsed from a single one, and the record's truth."""
    row: dict[str, Any] = {"id": sample.id, "task": sample.task}
    if len(responses) == 1:
        choice, segments = parse_response(responses[0], sample.options, answer)
        row |= {"response": responses[0], "pred_choice": choice if sample.options else None}
        row |= {"pred_segments": segments if sample.segments else []}
    else:
        row |= {"responses": list(responses)}
    return row | truth_of(sample)
