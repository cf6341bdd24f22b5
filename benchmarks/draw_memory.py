"""Draw docs/memory.png from benchmarks/results/memory.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    results = json.loads((HERE / "results" / "memory.json").read_text())["results"]
    labels = [f"{r['what']}, {r['side']}², {r['option']}" for r in results]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(results) + 1), layout="constrained")
    colours = ["#999999" if r["option"] == "plain" else "#2a6fbb" for r in results]
    bars = axis.barh(labels, [r["grows_mb"] for r in results], color=colours)
    axis.bar_label(bars, [f"{r['grows_mb']:.0f} MB, {r['cpu_seconds']:.0f} CPU s" for r in results], padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("memory above that of the loaded networks, MB")
    axis.margins(x=0.35)
    figure.savefig(HERE.parent / "docs" / "memory.png", dpi=110)


if __name__ == "__main__":
    main()
