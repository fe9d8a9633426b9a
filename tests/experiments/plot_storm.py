#!/usr/bin/env python3
"""Plots target/storm.csv (made by `just storm`) to docs/storm.svg. Needs matplotlib."""

import csv
import pathlib

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"
from matplotlib import pyplot  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parents[2]
rows = list(csv.DictReader((HERE / "target/storm.csv").open()))
figure, axes = pyplot.subplots(figsize=(8, 4))
for name in dict.fromkeys(row["set"] for row in rows):
    mine = [row for row in rows if row["set"] == name]
    load = [max(int(row["reached"]) / int(row["demand"]), 0.01) for row in mine]
    axes.plot([int(row["second"]) + 0.5 for row in mine], load, label=name)
for at, what in ((0, "well"), (3, "all calls fail"), (11, "half fail"), (19, "well again")):
    axes.axvline(at, color="lightgrey", zorder=0)
    axes.text(at + 0.1, 40, what, fontsize=8, va="top")
axes.set(yscale="log", ylim=(0.009, 45), xlim=(0, 25), xlabel="seconds", ylabel="load at the last service, × demand")
axes.axhline(1.3, color="grey", linestyle=":", linewidth=1)
axes.set_yticks([0.01, 0.1, 1, 1.3, 10, 27], ["≤ 0.01", "0.1", "1", "1.3", "10", "27"])
axes.minorticks_off()
axes.legend(fontsize=8, loc="lower left")
figure.tight_layout()
figure.savefig(HERE / "docs/storm.svg", metadata={"Date": None})
