"""Reads OpenMetrics text from stdin with Prometheus' own parser; one `name{labels} value` a line. Strict: anything
that the standard does not allow is an error."""
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families

seen = set()
for family in text_string_to_metric_families(sys.stdin.read()):
    for sample in family.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        assert key not in seen, f"twice: {key}"
        seen.add(key)
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
        print(f"{sample.name}{{{labels}}} {sample.value:g}")
