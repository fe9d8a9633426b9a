#!/usr/bin/env python3
"""Draws a trace of the demo from Jaeger as docs/trace.svg: a failed attempt and the retry after it.

    jaeger & target/release/outrigger demo --once --otlp http://127.0.0.1:4317; python3 tests/experiments/plot_trace.py

Reads Jaeger's query API, http://127.0.0.1:16686 or the first argument.
"""

import html
import json
import pathlib
import sys
import urllib.request

QUERY = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:16686"
OUT = pathlib.Path(__file__).resolve().parents[2] / "docs/trace.svg"
WIDTH, LEFT, ROW, TOP = 960, 350, 30, 58
COLOURS = {"shop": "#3b7dd8", "payments": "#2a8a5a"}


def tag(span, key):
    return next((tag["value"] for tag in span["tags"] if tag["key"] == key), None)


def fetch():
    url = f"{QUERY}/api/traces?service=shop&limit=1000&lookback=1h"
    traces = json.load(urllib.request.urlopen(url, timeout=10))["data"]
    retried = [t for t in traces if [tag(s, "outrigger.attempts") for s in t["spans"]].count(2) and len(t["spans"]) == 6]
    if not retried:
        sys.exit(f"no trace with a retried call among {len(traces)}")
    return retried[0]


def labels(span, service):
    kind = tag(span, "span.kind")
    status = tag(span, "http.response.status_code")
    what = {
        "server": f"{span['operationName']} {tag(span, 'url.path')}",
        "internal": f"calls {tag(span, 'outrigger.upstream')}",
        "client": f"try {(tag(span, 'http.request.resend_count') or 0) + 1}",
    }[kind]
    wait = tag(span, "outrigger.attempt.backoff_ms")
    behind = f", after {wait:.0f} ms" if wait else ""
    return f"{service}: {what}", f"{kind} · {status or tag(span, 'error.type')}{behind}"


def draw(trace):
    spans = {span["spanID"]: span for span in trace["spans"]}
    parent = {id: next((r["spanID"] for r in s["references"] if r["spanID"] in spans), None) for id, s in spans.items()}
    begin = min(s["startTime"] for s in spans.values())
    whole = max(s["startTime"] + s["duration"] for s in spans.values()) - begin
    rows = []

    def add(id, depth):
        rows.append((spans[id], depth))
        children = [c for c in spans if parent[c] == id]
        for child in sorted(children, key=lambda c: spans[c]["startTime"]):
            add(child, depth + 1)

    for root in [id for id in spans if parent[id] is None]:
        add(root, 0)
    height = TOP + ROW * len(rows) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff" stroke="#ccc"/>',
        f'<text x="14" y="22" font-weight="bold">Trace {trace["traceID"]}</text>',
    ]
    scale = (WIDTH - LEFT - 20) / whole
    for part in range(5):
        x = LEFT + part * (WIDTH - LEFT - 20) / 4
        anchor = "end" if part == 4 else "middle"
        out.append(f'<path d="M{x:.0f} {TOP - 12}V{height - 8}" stroke="#eee"/>')
        out.append(f'<text x="{x:.0f}" y="{TOP - 18}" fill="#777" text-anchor="{anchor}">{whole * part / 4000:.1f} ms</text>')
    for number, (span, depth) in enumerate(rows):
        y = TOP + ROW * number
        service = trace["processes"][span["processID"]]["serviceName"]
        what, detail = labels(span, service)
        failed = tag(span, "error") is True
        x, width = LEFT + (span["startTime"] - begin) * scale, max(span["duration"] * scale, 3)
        fill = "#c33" if failed else COLOURS.get(service, "#777")
        out.append(f'<text x="{14 + 16 * depth}" y="{y + 15}">{html.escape(what)}</text>')
        out.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="17" rx="3" fill="{fill}"/>')
        inside = x + width < WIDTH - 190
        at, anchor, ink = (x + width + 6, "start", "#444") if inside else (x + width - 6, "end", "#fff")
        if not inside and width < 190:
            at, anchor, ink = x - 6, "end", "#444"
        out.append(f'<text x="{at:.0f}" y="{y + 16}" fill="{ink}" text-anchor="{anchor}" font-size="12">{html.escape(detail)}</text>')
    out.append("</svg>")
    OUT.write_text("\n".join(out) + "\n")
    print(f"{OUT}: {len(rows)} spans")


draw(fetch())
