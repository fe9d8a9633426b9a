"""How each proxy is set up for a hop: one thread, keep-alive where the next one keeps connections, no access log.

`prepare(stage, name, hop, to, collector)` writes the files and returns a `Prepared`; `to` is the port that the hop forwards to.
"""

from . import envoy, haproxy, nginx, outrigger

PROXIES = {"nginx": nginx, "HAProxy": haproxy, "Envoy": envoy, "Outrigger": outrigger}
