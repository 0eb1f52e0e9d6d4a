"""Rotary positions of a row of text and videos. They are ours: transformers' own have changed between versions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_positions(
    segments: Sequence[int | tuple[int, int, int, float]], merge_size: int, tokens_per_second: float | None
) -> tuple[Tensor, int]:
    """Rotary positions (3, L) of a row of text and videos, and the position of the token after it.

    `segments`: an int is so many text tokens; (t, h, w, second_per_grid) is a video's grid before merging and the
    seconds between its time steps. `tokens_per_second` None (Qwen2-VL): one position per time step; otherwise
    (Qwen2.5-VL, arXiv 2502.13923, 2.1.2) floor(index * second_per_grid * tokens_per_second). Text goes on at the
    largest position used so far + 1, as the released checkpoints were trained (transformers up to 5.2).

    >>> positions, after = rope_positions([1, (2, 2, 4, 1.0), 2], merge_size=2, tokens_per_second=2)
    >>> positions.tolist(), after
    ([[0, 1, 1, 3, 3, 4, 5], [0, 1, 1, 1, 1, 4, 5], [0, 1, 2, 1, 2, 4, 5]], 6)
    """
    parts, position = [], 0
    for segment in segments:
        if isinstance(segment, int):
            part = torch.arange(segment).expand(3, -1)
        else:
            t, h, w, second_per_grid = segment
            step = 1.0 if tokens_per_second is None else torch.tensor(second_per_grid) * tokens_per_second
            time = (torch.arange(t) * step).long()
            axes = (time, torch.arange(h // merge_size), torch.arange(w // merge_size))
            part = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        if part.numel():
            parts.append(part + position)
            position = int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1), position
