"""Draws training_log.jsonl as an SVG, without a plotting library.

python -m deploy.demo.curve training_log.jsonl loss.svg
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 360, 48
LOW, HIGH = 2.0, 5.0  # nats per token
SERIES = {
    "loss": ("training batch", "#888888"),
    "held_out_sotu": ("held-out speeches", "#1f77b4"),
    "held_out_moby": ("held-out novel", "#2ca02c"),
    "held_out_docs": ("held-out documentation", "#d62728"),
}


def draw(records: list[dict[str, float]]) -> str:
    """One line per series over training steps, with a grid and a legend."""
    last = records[-1]["step"]

    def x(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * step / last

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - LOW) / (HIGH - LOW)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="24">nats per token over {last} training steps</text>',
    ]
    for tick in range(int(LOW), int(HIGH) + 1):
        line = f'x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(tick)}" y2="{y(tick)}"'
        parts.append(f'<line {line} stroke="#dddddd"/><text x="20" y="{y(tick) + 4}">{tick}</text>')
    for row, (key, (label, colour)) in enumerate(SERIES.items()):
        points = " ".join(f"{x(r['step']):.1f},{y(r[key]):.1f}" for r in records)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="440" y="{64 + 16 * row}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    log, picture = Path(sys.argv[1]), Path(sys.argv[2])
    picture.write_text(draw([json.loads(line) for line in log.read_text().splitlines()]))
