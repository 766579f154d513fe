"""Draw the picture of README.md and of the site's first page: nbs/assets/trajbook.png."""

from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from trajbook.core import atomic_write
from trajbook.viz import GRID, INK, MUTED, ROLES, Picture, spans, style

TARGET = Path(__file__).resolve().parents[1] / "nbs" / "assets" / "trajbook.png"
DT_S, STEPS, HOLE = 0.02, 330, 30


def pendulum(angle_rad: float, rate_rad_s: float) -> np.ndarray:  # (STEPS, 2) angle, rate
    "A damped pendulum of one meter, from its equation by the midpoint rule."
    law = lambda s: np.array([s[1], -9.81 * np.sin(s[0]) - 0.35 * s[1]])  # noqa: E731
    states = [np.array([angle_rad, rate_rad_s])]
    for _ in range(STEPS - 1):
        states.append(states[-1] + DT_S * law(states[-1] + 0.5 * DT_S * law(states[-1])))
    return np.stack(states)


def main() -> None:
    time_s = np.arange(STEPS) * DT_S
    truth = pendulum(2.9, 0.0)
    hidden = (np.arange(STEPS) // HOLE) % 2 == 1
    angle, rate = truth.T
    ruler = np.interp(time_s, time_s[~hidden], angle[~hidden])
    curve = CubicHermiteSpline(time_s[~hidden], angle[~hidden], rate[~hidden])(time_s)

    fig = Picture(figsize=(10.5, 3.7))
    phase, panel = fig.subplots(1, 2, width_ratios=[1, 2.1])
    for start in (0.6, 1.2, 1.8, 2.4):
        phase.plot(*pendulum(start, 0.0).T, color=GRID, linewidth=1)
    phase.plot(angle, rate, ":", color=MUTED, linewidth=1.2)
    phase.plot(np.where(hidden, np.nan, angle), rate, color=INK, linewidth=2.4)
    style(phase, "A motion, seen in part", "angle / rad", "rate / rad/s")

    for first, last in spans(hidden):
        panel.axvspan(time_s[first], time_s[last], color="#eceff2", linewidth=0)
        inside = slice(first - 1, min(last + 2, STEPS))
        names = ("linear", "hermite") if first == HOLE else ("_linear", "_hermite")
        for name, fill in zip(names, (ruler, curve), strict=True):
            color = ROLES[name.strip("_")]
            panel.plot(time_s[inside], fill[inside], color=color, linewidth=2, label=name)
    panel.plot(time_s, angle, ":", color=MUTED, linewidth=1.3, label="hidden truth")
    seen = np.where(hidden, np.nan, angle)
    panel.plot(time_s, seen, color=INK, linewidth=2.6, label="visible")
    style(panel, "What fills the holes? First the numbers to beat", "time / s", "angle / rad")
    panel.grid(axis="x", visible=False)
    handles, labels = panel.get_legend_handles_labels()
    known = {"linear": "a ruler", "hermite": "a cubic curve that knows the rate"}
    labels = [known.get(label, label) for label in labels]
    options = {"frameon": False, "fontsize": 9, "ncols": 4, "loc": "upper right"}
    panel.legend(handles, labels, **options)
    panel.set_ylim(-3.6, 4.4)
    atomic_write(TARGET, fig.png(dpi=150))


if __name__ == "__main__":
    main()
