from dataclasses import dataclass


@dataclass(frozen=True)
class Prepared:
    command: list
    port: int
    # Outrigger's, which has metrics.
    admin: int = 0


def hosts(hop):
    return [f"svc-{number}" for number in range(hop.hosts)]
