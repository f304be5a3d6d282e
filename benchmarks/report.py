"""What was measured as JSON, Markdown tables and a picture."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, HEADLINE_LAYER, OVERHEAD_CASE, Setting
from benchmarks.libraries import ARMS
from benchmarks.picture import draw

Row = Mapping[str, Any]
COLUMNS = tuple(arm for arms in ARMS.values() for arm in arms)
MIB = 2**20


def hardware(device: str) -> dict[str, Any]:
    """What the numbers were measured on, named as its maker names it."""
    cpu = next(iter(re.findall(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)), platform.processor())
    found = {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def slug(hardware: Mapping[str, Any]) -> str:
    """A folder name for the hardware."""
    name = hardware.get("gpu") or f"{hardware['cpu']} {hardware['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def line(row: Row) -> str:
    """One case for the terminal."""
    ratios = "  ".join(f"{arm} {_ratio(row['arms'][arm]):>6}" for arm in COLUMNS if arm in row["arms"])
    return f"{row['layer']:24} {Setting(**row['setting'])!s:20} {CASES[row['case']].label:24} {ratios}"


def write(folder: Path, rows: Sequence[Row], hardware: Mapping[str, Any], command: str) -> None:
    """layers.json and layers.md with everything; headline.md and headline.png when the headline layer was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "hardware": hardware,
        "torch": torch.__version__,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": command,
    }
    _replace(folder / "layers.json", json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    groups = grouped(rows)
    _replace(folder / "layers.md", "\n".join([_head(about), *(section(group) for group in groups)]))
    headline = next((group for group in groups if group[0]["layer"] == HEADLINE_LAYER), None)
    if headline is not None:
        _replace(folder / "headline.md", "\n".join([_head(about), section(headline)]))
        draw(headline, folder / "headline.png", f"{_where(headline)} on {hardware.get('gpu') or hardware['cpu']}")


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same layer and setting together, in the order they came."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['layer']} {Setting(**row['setting'])}", []).append(row)
    return list(groups.values())


def section(rows: Sequence[Row]) -> str:
    """The tables of one layer in one setting, and below them why there is no number where there is none."""
    parts = [f"## {_where(rows)}", "Time of forward and backward, 1 = the frozen layer alone:"]
    parts.append(table(rows, ("target",), _ratio, lambda row: (_target(row),)))
    if any(row["case"] == OVERHEAD_CASE for row in rows):
        parts += ["Microseconds beyond the frozen layer:", table(rows, (), _overhead, lambda row: ())]
    parts += ["Peak memory, 1 = the frozen layer alone:", table(rows, (), _peak, lambda row: ())]
    parts += [
        "Kept for backward beyond what the frozen layer keeps, MiB (W: a tensor as large as the weight is among it):",
        table(rows, (), _saved, lambda row: ()),
    ]
    return "\n\n".join([*parts, *_remarks(rows)]) + "\n"


def table(
    rows: Sequence[Row],
    extra: tuple[str, ...],
    cell: Callable[[Mapping[str, Any]], str],
    more: Callable[[Row], tuple[str, ...]],
) -> str:
    """A Markdown table of cases by arms, with `extra` columns before the arms."""
    arms = [arm for arm in COLUMNS if any(arm in row["arms"] for row in rows)]
    lines = [["algorithm", *extra, *arms], ["---", *("---:" for _ in (*extra, *arms))]]
    lines += [[CASES[row["case"]].label, *more(row), *(cell(row["arms"].get(arm, {})) for arm in arms)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _remarks(rows: Sequence[Row]) -> list[str]:
    told: dict[str, list[str]] = {}
    for row in rows:
        for arm, found in row["arms"].items():
            text = found.get("error") or found.get("note")
            if text:
                told.setdefault(f"{arm}: {' '.join(text.split())}", []).append(CASES[row["case"]].label)
    return ["\n".join(f"- {', '.join(labels)}, {text}" for text, labels in told.items())] if told else []


def _target(row: Row) -> str:
    target = CASES[row["case"]].target
    return "" if target is None else f"{target:.2f}"


def _ratio(found: Mapping[str, Any]) -> str:
    return f"{found['ratio']:.2f}" if "ratio" in found else "-"


def _overhead(found: Mapping[str, Any]) -> str:
    return f"{found['overhead_seconds'] * 1e6:.0f}" if "ratio" in found else "-"


def _peak(found: Mapping[str, Any]) -> str:
    return f"{found['memory']['ratio']:.2f}" if "memory" in found else "-"


def _saved(found: Mapping[str, Any]) -> str:
    if "memory" not in found:
        return "-"
    return f"{found['memory']['saved'] / MIB:.2f}{' W' if found['memory']['saves_weight'] else ''}"


def _head(about: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about["hardware"].items())
    return f"{machine}; torch {about['torch']}; {about['date']}\n\n    {about['command']}\n"


def _where(rows: Sequence[Row]) -> str:
    return f"{rows[0]['layer']}, {Setting(**rows[0]['setting'])}"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(f"{path.suffix}.new")
    fresh.write_text(text)
    fresh.replace(path)
