#!/usr/bin/env python3
"""CPU, latency, memory and start of Outrigger beside nginx, HAProxy and Envoy, in one run.

    benches/release && python3 benches/peers/run.py [--only S1,S5] [--rounds 3] [--seconds 2] [--json FILE]

All proxies of a scenario run together, each on one thread, in front of the same server. Rounds are short and
alternate, so that a slow spell of the machine hits all of them; what counts is the CPU time of the process tree per
completed request, as the median of the rounds and as a ratio, not as an absolute number. The scenarios: scenarios.py;
the targets: report.py. The JSON has every round; `run.py --from FILE` makes table and plots of it again. Loopback only;
all of it takes some ten minutes. `.ci/tools` installs the others, `pip install matplotlib` the plots.
"""

import argparse
import json
import os
import pathlib
import shutil
import time

import report
from measure import measure
from proxies import PROXIES
from scenarios import SCENARIOS

HERE = pathlib.Path(__file__).resolve().parents[2]


def names(known):
    def parse(text):
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)} among {', '.join(known)}")
        return text.split(",")

    return parse


def arguments():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", type=names(SCENARIOS), default=list(SCENARIOS), metavar="SCENARIO,…")
    options.add_argument("--proxies", type=names(PROXIES), default=list(PROXIES), metavar="PROXY,…")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=int, default=2, help="of each round")
    options.add_argument("--counted", action="store_true", help="rounds of as many requests, however long they take, for a profile")
    options.add_argument("--binary", default=os.environ.get("OUTRIGGER_BIN", HERE / "target/measured/outrigger"))
    options.add_argument("--json", type=pathlib.Path, help="every round of every number")
    options.add_argument("--plots", type=pathlib.Path, help="a folder for an SVG of the ratios")
    options.add_argument("--page", type=pathlib.Path, help="a page whose table between the markers of `peers` is replaced")
    options.add_argument("--from", dest="earlier", type=pathlib.Path, help="measure nothing, take this JSON")
    return options.parse_args()


def main():
    options = arguments()
    tools = os.environ.get("OUTRIGGER_TOOLS", os.path.expanduser("~/.cache/outrigger"))
    os.environ["PATH"] = f"{tools}/bin:{os.environ['PATH']}:/usr/sbin"
    if options.earlier:
        found = json.loads(options.earlier.read_text())
    else:
        needed = ["nginx", "wrk", "h2load", "nghttpd", "rotel-agent", str(options.binary)]
        needed += [proxy.lower() for proxy in options.proxies if proxy != "Outrigger"]
        if missing := [tool for tool in needed if not shutil.which(tool)]:
            raise SystemExit(f"not there: {', '.join(missing)}; `bash .ci/tools` installs what is not ours")
        found, began = {}, time.monotonic()
        for name in options.only:
            found[name] = measure(SCENARIOS[name], options)
            print(f"{name} is measured, at {time.monotonic() - began:.0f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table := report.table(found, SCENARIOS))
    if options.plots:
        import plots

        drawn = plots.peers(found, options.plots)
        if options.page:
            shown = (f"![{file.stem}]({os.path.relpath(file, options.page.parent)})" for file in drawn)
            table += "\n\n" + "\n".join(shown)
    if options.page:
        report.paste(options.page, "peers", table)


if __name__ == "__main__":
    main()
