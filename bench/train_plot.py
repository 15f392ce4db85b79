"""Plot the loss curves of all cases, and the distance of each from the first."""

from __future__ import annotations

from pathlib import Path

DPI = 80


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Draw the curves above, and their distance from the first on a logarithmic scale below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    first = next(iter(curves.values()))
    for number, (name, curve) in enumerate(curves.items()):
        steps = range(1, len(curve) + 1)
        style = {"color": f"C{number}", "linewidth": 1 + 0.8 * (len(curves) - number)}
        above.plot(steps, curve, label=name, alpha=0.7, **style)
        apart = [max(abs(mine - theirs), 1e-9) for mine, theirs in zip(curve, first, strict=True)]
        below.semilogy(steps, apart, color=style["color"])
    above.set_ylabel("loss")
    above.legend(fontsize=7)
    below.set_ylabel("distance from the first")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
