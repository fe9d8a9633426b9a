"""How each proxy is set up for a hop: one thread, connections kept where the next one keeps them, no access log.

`prepare(stage, name, hop, to, collector)` writes the files and returns a `Prepared`; `to` is the port that the hop leads to.
"""

from . import envoy, haproxy, nginx, outrigger

PROXIES = {"nginx": nginx, "HAProxy": haproxy, "Envoy": envoy, "Outrigger": outrigger}
