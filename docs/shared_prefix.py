"""The figure of the README: a video's part of a row, and who sees whom in it.

Writes shared_prefix.svg beside this file.

    python docs/shared_prefix.py

Readable in light and in dark: the picture takes the reader's colour scheme. `sees` is the mask in one expression;
tests/test_readme.py compares it with what the policy's own attention lets through.
"""

from pathlib import Path

NUM_VIDEO, NUM_TEXT, LENGTHS = 5, 3, (3, 2, 4)  # tokens of the picture's row
CELL, LEFT, TOP = 22, 150, 96
NAMES = ("video", "question", *(f"completion {g + 1}" for g in range(len(LENGTHS))))
STYLE = """
  text { font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .head { font-weight: 600 }
  .grid { fill: none; stroke: #d1d9e0 }
  .cell { stroke: #ffffff }
  .c0 { fill: #7aa5d8 } .c1 { fill: #a9b1ba } .c2 { fill: #e39b45 } .c3 { fill: #58ab86 } .c4 { fill: #b58ac9 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 } .grid { stroke: #3d444d } .cell { stroke: #0d1117 }
    .c0 { fill: #4d83c4 } .c1 { fill: #7d8590 } .c2 { fill: #d0802a } .c3 { fill: #3f9470 } .c4 { fill: #9d6bb5 }
  }"""
NOTES = (
    ("head", "A video's part of a row"),
    ("", "The prompt stands in it once, its G"),
    ("", "completions behind it, without padding."),
    ("", "P + G·C tokens in place of G·(P + C)."),
    ("head", "Filled: the query sees the key"),
    ("", "A completion's token sees the prompt and"),
    ("", "its own past, no other completion: as if"),
    ("", "it stood alone behind the prompt."),
    ("head", "No mask is ever made"),
    ("", "Prompt, and own past, are two attentions,"),
    ("", "merged by the log-sum-exp of their scores."),
)


def owners() -> list[int]:
    """Index into NAMES of each token of the row."""
    return [0] * NUM_VIDEO + [1] * NUM_TEXT + [2 + g for g, num in enumerate(LENGTHS) for _ in range(num)]


def positions() -> list[int]:
    """The place of each token in its own sequence: every completion goes on where the prompt ends."""
    num_prompt = NUM_VIDEO + NUM_TEXT
    return [*range(num_prompt), *(num_prompt + t for num in LENGTHS for t in range(num))]


def sees(query: int, key: int) -> bool:
    """Whether token `query` of the row attends to token `key`."""
    owner = owners()
    return key <= query and (owner[key] < 2 or owner[key] == owner[query])


def svg() -> str:
    owner, position = owners(), positions()
    size = len(owner)
    width, height = LEFT + size * CELL + 330, TOP + size * CELL + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="One row holds the prompt once and its completions; each completion sees the prompt '
        'and its own past.">',
        f"<style>{STYLE}\n</style>",
    ]

    def rect(x: int, y: int, kind: str) -> str:
        return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" class="{kind}"/>'

    def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
        return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{content}</text>'

    parts += [text(LEFT - 8, 52, "the row (keys)", "head", "end"), text(LEFT - 8, 75, "position", "small", "end")]
    for token in range(size):
        x, y = LEFT + token * CELL, TOP + token * CELL
        parts += [rect(x, 36, f"cell c{owner[token]}"), rect(LEFT - CELL - 4, y, f"cell c{owner[token]}")]
        parts.append(text(x + CELL / 2, 75, str(position[token]), "small", "middle"))
    for kind, name in enumerate(NAMES):
        first, num = owner.index(kind), owner.count(kind)
        label = name if kind < 2 else f"c. {kind - 1}"
        parts.append(text(LEFT + (first + num / 2) * CELL, 26, label, "", "middle"))
        parts.append(text(LEFT - CELL - 12, TOP + (first + num / 2) * CELL + 4, name, "", "end"))
    for query in range(size):
        for key in range(size):
            kind = f"cell c{owner[key]}" if sees(query, key) else "grid"
            parts.append(rect(LEFT + key * CELL, TOP + query * CELL, kind))
    y = TOP + 14
    for kind, line in NOTES:
        y += 16 if kind and y > TOP + 14 else 0
        parts.append(text(LEFT + size * CELL + 24, y, line, kind))
        y += 21
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_name("shared_prefix.svg").write_text(svg(), encoding="utf-8")
