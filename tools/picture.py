"""Draw the picture of README.md and of the site's first page, nbs/assets/trajbook.png, from the published run."""

from pathlib import Path

import numpy as np

from trajbook.core import atomic_write
from trajbook.mae.data import DT_S, FEATURES
from trajbook.run import load_results, result_arrays
from trajbook.viz import HOLE, INK, LINE, MUTED, ROLES, Picture, head, legend, spans, style

TARGET = Path(__file__).resolve().parents[1] / "nbs" / "assets" / "trajbook.png"
CASE = "evaluate.case.block.0.75"
FILLS = {"hermite": "a cubic curve", "model": "a masked autoencoder"}


def main() -> None:
    arrays = {k: v[0] for k, v in result_arrays(load_results("mae")).items()}
    truth, hidden = arrays["evaluate.truth"], arrays[f"{CASE}.mask"].astype(bool)
    time_s = np.arange(len(truth)) * DT_S
    sine, rate = (FEATURES.index(n) for n in ("sin", "angular_velocity"))
    seen = np.where(hidden[:, None], np.nan, truth)

    fig = Picture(figsize=(10.5, 3.7))
    phase, panel = fig.subplots(1, 2, width_ratios=[1, 2.1])
    phase.plot(truth[:, sine], truth[:, rate], ":", color=MUTED, linewidth=1.2)
    phase.plot(seen[:, sine], seen[:, rate], color=INK, linewidth=2.6)
    style(
        phase,
        "A motion, seen in part",
        "sine of the angle (standardized)",
        "rate of the pole (standardized)",
    )
    head(phase, phase.get_title(loc="left"), LINE)  # level with the other panel's

    for first, last in spans(hidden):
        panel.axvspan(time_s[first], time_s[last], color=HOLE, linewidth=0)
        inside = slice(max(first - 1, 0), last + 2)
        for name, words in FILLS.items():
            label = words if first == spans(hidden)[0][0] else None
            fill = np.where(hidden, arrays[f"{CASE}.{name}"][:, rate], truth[:, rate])
            line = {"color": ROLES[name], "linewidth": 2, "label": label}
            panel.plot(time_s[inside], fill[inside], **line)
    panel.plot(time_s, truth[:, rate], ":", color=MUTED, linewidth=1.3, label="hidden truth")
    panel.plot(time_s, seen[:, rate], color=INK, linewidth=2.6, label="visible")
    style(panel, "What can be known about the rest?", "time / s", "rate of the pole (standardized)")
    panel.grid(axis="x", visible=False)
    legend(panel)
    atomic_write(TARGET, fig.png(dpi=150))


if __name__ == "__main__":
    main()
