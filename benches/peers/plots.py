"""Plots as small SVGs with selectable text."""

import statistics

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "outrigger", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"nginx": "#8fb996", "HAProxy": "#7d9fc0", "Envoy": "#c9a3c4", "Outrigger": "#d1603d"}


def save(figure, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return folder / f"{name}.svg"


def bars(found, metric, title, folder, name):
    """A group of bars for each scenario that has the metric, to HAProxy's as 1."""
    scenarios = [key for key, kinds in found.items() if all(metric in kinds.get(kind, {}) for kind in COLOURS)]
    if not scenarios:
        return None
    figure, axes = plt.subplots(figsize=(2.6 + 0.6 * len(scenarios), 2.6))
    for offset, (kind, colour) in enumerate(COLOURS.items()):
        median = lambda key, kind: statistics.median(found[key][kind][metric])
        heights = [median(key, kind) / median(key, "HAProxy") for key in scenarios]
        axes.bar([place + offset * 0.2 for place in range(len(scenarios))], heights, 0.18, color=colour, label=kind)
    axes.axhline(1, color="#888", linewidth=0.6)
    axes.set_xticks([place + 0.3 for place in range(len(scenarios))], [name.replace("-", "\n") for name in scenarios])
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return save(figure, folder, name)


def peers(found, folder):
    """The written files."""
    drawn = (
        bars(found, "cpu_us", "CPU a request, HAProxy = 1 (less is better)", folder, "cpu"),
        bars(found, "mb_per_cpu_second", "MB a CPU second, HAProxy = 1 (more is better)", folder, "bytes"),
        bars(found, "p99_us", "p99 at 2,000 requests a second, HAProxy = 1 (less is better)", folder, "p99"),
    )
    return [file for file in drawn if file]


def curve(sizes, up, across, folder, name, log):
    """All rounds by size: the line is the median, the band their range."""
    rounds = list(sizes.values())
    # Zero must fit onto the logarithmic axis, too.
    places = [max(int(size), 1) for size in sizes]
    figure, axes = plt.subplots(figsize=(4.2, 2.4))
    axes.fill_between(places, [min(of) for of in rounds], [max(of) for of in rounds], color=COLOURS["Outrigger"], alpha=0.2)
    axes.plot(places, [statistics.median(of) for of in rounds], "o-", color=COLOURS["Outrigger"], markersize=3)
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_title(up, loc="left")
    axes.set_xlabel(across)
    save(figure, folder, name)
