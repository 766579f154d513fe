"""Draw the picture of README.md and of the site's first page: nbs/assets/trajbook.png."""

from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from trajbook.core import atomic_write
from trajbook.viz import GRID, HOLE, INK, LINE, MUTED, ROLES, Picture, head, legend, spans, style

TARGET = Path(__file__).resolve().parents[1] / "nbs" / "assets" / "trajbook.png"
DT_S, STEPS, BLOCK = 0.02, 330, 30


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
    hidden = (np.arange(STEPS) // BLOCK) % 2 == 1
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
    head(phase, phase.get_title(loc="left"), LINE)  # level with the other panel's

    fills = {"linear": (ruler, "a ruler"), "hermite": (curve, "a cubic curve that knows the rate")}
    for first, last in spans(hidden):
        panel.axvspan(time_s[first], time_s[last], color=HOLE, linewidth=0)
        inside = slice(first - 1, min(last + 2, STEPS))
        for name, (fill, words) in fills.items():
            label = words if first == BLOCK else None
            panel.plot(time_s[inside], fill[inside], color=ROLES[name], linewidth=2, label=label)
    panel.plot(time_s, angle, ":", color=MUTED, linewidth=1.3, label="hidden truth")
    seen = np.where(hidden, np.nan, angle)
    panel.plot(time_s, seen, color=INK, linewidth=2.6, label="visible")
    style(panel, "What fills the holes? First the numbers to beat", "time / s", "angle / rad")
    panel.grid(axis="x", visible=False)
    legend(panel)
    atomic_write(TARGET, fig.png(dpi=150))


if __name__ == "__main__":
    main()
