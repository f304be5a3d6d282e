"""The headline as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import CASES
from benchmarks.libraries import ARMS

COLOURS: Mapping[str, str] = {"ours": "#1f5fbf", "4.1.3": "#d9822b", "4.1.3 bypass": "#f0c48a", "peft": "#8a8f98"}
LONGEST = 4.0
"""Where bars are cut off; their numbers say how long they are."""
HEIGHT = 0.2


def draw(rows: Sequence[Mapping[str, Any]], path: Path, where: str) -> None:
    """Bars of the ratio to the frozen layer by algorithm and library, with the targets of ours."""
    arms = [arm for told in ARMS.values() for arm in told if any(arm in row["arms"] for row in rows)]
    figure = Figure(figsize=(9, 0.9 + 0.165 * len(rows) * (len(arms) + 0.8)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        for place, arm in enumerate(arms):
            y = at + (place - (len(arms) - 1) / 2) * HEIGHT
            target = CASES[row["case"]].target if arm == "ours" else None
            _bar(axes, y, arm, row["arms"].get(arm, {}), target or 0)
            if target is not None:
                axes.plot([target, target], [y - 0.6 * HEIGHT, y + 0.6 * HEIGHT], color="#c0182b", lw=2, zorder=4)
    axes.axvline(1, color="black", lw=1, zorder=3)
    axes.set_yticks(range(len(rows)), [CASES[row["case"]].label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, LONGEST * 1.06)
    axes.set_xlabel("time of forward and backward; 1 is the frozen layer alone")
    axes.set_title(where, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(-9, 1, HEIGHT, color=COLOURS[arm], label=arm) for arm in arms]
    handles += axes.plot([], [], color="#c0182b", lw=2, label="target for ours")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def _bar(axes: Axes, y: float, arm: str, found: Mapping[str, Any], target: float) -> None:
    if "ratio" not in found:
        axes.text(0.03, y, "–", va="center", fontsize=8)
        return
    length = min(found["ratio"], LONGEST)
    axes.barh(y, length, HEIGHT * 0.9, color=COLOURS[arm], zorder=2)
    cut = "  →" if found["ratio"] > LONGEST else ""
    end = target if 0 < target - length < 0.25 else length
    axes.text(end + 0.03, y, f"{found['ratio']:.2f}{cut}", va="center", fontsize=7, zorder=5)
