"""Results beside their targets, as a Markdown table."""

import statistics
from dataclasses import dataclass

US, MB, MIB = "CPU µs a request", "MB a CPU second", "MiB resident"


@dataclass(frozen=True)
class Row:
    scenario: str
    metric: str
    unit: str
    # Outrigger's number over another's, at most this much (at least, where more is better); None: no other, the number.
    targets: tuple = ()
    more_is_better: bool = False


def latency(scenario):
    return [Row(scenario, f"p{p}_us", f"p{p} µs at 2,000 a second", (("HAProxy", 1.0),)) for p in (50, 99)]


def at_rate(scenario, *targets):
    return Row(scenario, "rate_cpu_us", f"{US} at 2,000 a second", targets)


# A handshake for 1/0.9 of HAProxy's CPU is 0.9 of its handshakes a CPU second.
SHAKEN = (("HAProxy", 1 / 0.9),)
S1 = (("nginx", 1.25), ("Envoy", 0.35))
ROWS = [
    Row("S1", "cpu_us", US, S1),
    at_rate("S1", *S1),
    *latency("S1"),
    Row("S2", "cpu_us", US, (("HAProxy", 1.0),)),
    at_rate("S2"),
    *latency("S2"),
    Row("S3", "cpu_us", US, (("HAProxy", 1.0),)),
    Row("S4", "cpu_us", US, (("HAProxy", 1.0),)),
    Row("S5", "cpu_us", US, (("HAProxy", 1.2),)),
    at_rate("S5"),
    *latency("S5"),
    Row("S6", "mb_per_cpu_second", MB, (("nginx", 1.1),), True),
    Row("TCP", "mb_per_cpu_second", MB, (("nginx", 2.0),), True),
    Row("S7", "cpu_us", US, (("HAProxy", 1.0),)),
    at_rate("S7"),
    *latency("S7"),
    Row("S8", "cpu_us", US, (("Outrigger, S1", 1.05),)),
    *(Row(name, "cpu_us", US, SHAKEN) for name in ("in-full", "in-resumed", "out-full", "out-resumed")),
    Row("idle", "idle_mib", f"{MIB} after one request", ((None, 12),)),
    Row("idle", "kib_a_connection", "KiB a connection", ((None, 6),)),
    Row("idle-mtls", "idle_mib", f"{MIB} after one request"),
    Row("idle-mtls", "kib_a_connection", "KiB a connection", ((None, 24),)),
    Row("start", "start_ms", "ms", ((None, 15),)),
    Row("start-mtls", "start_ms", "ms", ((None, 30),)),
    Row("start-hosts", "start_ms", "ms", ((None, 40),)),
]


def number(value):
    return "–" if value is None else f"{value:,.0f}" if value >= 200 else f"{value:.1f}"


def median(found, row, kind):
    rounds = found.get(row.scenario, {}).get(kind, {}).get(row.metric)
    return statistics.median(rounds) if rounds else None


def verdict(found, row):
    """The targets in words, the results, and whether they are met."""
    ours, wanted, reached, met = median(found, row, "Outrigger"), [], [], []
    for kind, bound in row.targets:
        sign = "≥" if row.more_is_better else "≤"
        wanted.append(f"{sign} {bound:.2f} × {kind}" if kind else f"{sign} {bound}")
        other = median(found, row, kind) if kind else 1
        if ours is None or not other:
            continue
        ratio = ours / other
        reached.append(f"{ratio:.2f}" if kind else number(ratio))
        met.append("yes" if (ratio >= bound if row.more_is_better else ratio <= bound) else "**no**")
    return ", ".join(wanted), ", ".join(reached), ", ".join(met)


def table(found, scenarios):
    """Rows of the measured scenarios; medians of the rounds."""
    lines = ["| | | nginx | HAProxy | Envoy | Outrigger | target | is | met |", "|" + " --- |" * 9]
    for row in ROWS:
        if row.scenario in found:
            numbers = [number(median(found, row, kind)) for kind in ("nginx", "HAProxy", "Envoy", "Outrigger")]
            lines.append(f"| {' | '.join([row.scenario, row.unit, *numbers, *verdict(found, row)])} |")
    lines.append("")
    for name, kinds in found.items():
        notes = f"{name}: {scenarios[name].title}."
        if beside := kinds.get("Outrigger, S1", {}).get("cpu_us"):
            notes += f" Outrigger's S1 in the same turns: {statistics.median(beside):.1f}."
        if counts := kinds.get("Outrigger", {}).get("handshakes"):
            notes += f" Outrigger's handshakes: {', '.join(f'{count:,} {outcome}' for outcome, count in counts.items())}."
        lines.append(f"- {notes}")
    return "\n".join(lines)


def paste(page, name, text):
    """Replaces the text of the page between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = page.read_text().split(begin, 1)
    page.write_text(before + begin + text + end + rest.split(end, 1)[1])
