"""The demo: the trainer on a base model and images that come with the package."""

from __future__ import annotations

from pathlib import Path

from lycoris.training import checkpoint
from lycoris.training.preflight import is_bfloat16_fast
from lycoris.training.settings import LATEST, Settings, load_settings

DEMO_ASSETS = Path(__file__).parent / "assets"


def load_demo_settings(output_dir: Path, *, steps: int | None = None, resume: str | None = None) -> Settings:
    """Return the demo's settings: `assets/config.json` with the user's choices applied.

    Uses float32 where the machine is slow in bfloat16. If `output_dir` has a checkpoint, training resumes from the
    latest, so that the same command finishes what it began; `resume` names another.
    """
    if resume is None and checkpoint.list_checkpoints(output_dir):
        resume = LATEST
    precision = None if is_bfloat16_fast() else "no"
    chosen = {
        "output_dir": output_dir,
        "max_train_steps": steps,
        "resume_from_checkpoint": resume,
        "mixed_precision": precision,
    }
    return load_settings(
        DEMO_ASSETS / "config.json", {key: value for key, value in chosen.items() if value is not None}
    )
