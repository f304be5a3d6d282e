"""Draw the picture and print the table of docs/tlora.md: `python docs/plot_schedule.py`."""

from pathlib import Path

import matplotlib.pyplot as plt

from lycoris import RankSchedule

ALPHAS = (0.5, 1.0, 2.0)
SHOWN = (0, 250, 500, 750, 999)

if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for alpha in ALPHAS:
        schedule = RankSchedule(max_rank=64, alpha=alpha)
        axes.step(range(1001), [schedule.rank(t) for t in range(1001)], label=f"alpha {alpha:g}")
    axes.set(xlabel="timestep (0 clean, 1000 noise)", ylabel="active ranks of 64", xlim=(0, 1000), ylim=(0, 65))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "images" / "tlora_schedule.png", dpi=120)
    for t in SHOWN:
        ranks = [RankSchedule(max_rank=64, alpha=alpha).rank(t) for alpha in ALPHAS]
        print(f"| {t} | " + " | ".join(map(str, ranks)) + " |")
