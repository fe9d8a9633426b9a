"""One scenario: its processes, rounds and results. Every result is a list with one value for each round."""

import collections
import time

import ends
import load
import machine
from proxies import PROXIES
from stage import Stage

RATE = 2000


class Proxy:
    """The hops of one scenario, all of one kind."""

    def __init__(self, bench, kind, hops, name, started=True):
        scenario, stage = bench.scenario, bench.stage
        to = bench.server(hops[-1])
        self.stage, self.pids, self.admin = stage, [], 0
        for number, hop in reversed(list(enumerate(hops))):
            self.prepared = PROXIES[kind].prepare(stage, f"{name.lower().replace(' ', '-')}-{number}", hop, to, bench.collector)
            to = self.prepared.port
            if started:
                self.pids.append(stage.start(*self.prepared.command).pid)
                stage.wait_for(to)
        self.admin = self.prepared.admin
        # The TLS server for handshake scenarios, and the port that wrk uses.
        self.port = self.entry_port = to
        if started and hops[0].tls_in and scenario.load != "idle":
            self.entry_port = ends.mtls_client(stage, f"{kind.lower()}-caller", to, scenario.calling)


class Bench:
    def __init__(self, scenario, options, stage):
        self.scenario, self.options, self.stage = scenario, options, stage
        self.certs = stage.certs if scenario.hops[0].tls_in else None
        self.servers = ends.Servers(stage).ports
        self.call, self.collector = [], 0
        if any(hop.protocol == "grpc" for hop in scenario.hops):
            self.grpc, self.call = ends.grpc_server(stage)
        if any(hop.everything for hop in scenario.hops):
            self.collector = ends.collector(stage)

    def server(self, hop):
        return self.grpc if hop.protocol == "grpc" else self.servers[hop.tls_out, self.scenario.serving]

    def proxies(self, started=True):
        made = {kind: Proxy(self, kind, self.scenario.hops, kind, started) for kind in self.options.proxies}
        if self.scenario.beside and "Outrigger" in made:
            made["Outrigger, S1"] = Proxy(self, "Outrigger", self.scenario.beside, "Outrigger S1", started)
        return made

    def turn(self, proxy, seconds):
        """At full load: requests and bytes."""
        requests = self.scenario.requests * seconds // self.options.seconds if self.options.counted else 0
        if self.scenario.load == "h2load":
            turned = load.h2load(self.stage, proxy.entry_port, self.scenario, self.call, seconds, requests=requests)
            return turned[0], 0
        return load.wrk(self.stage, proxy.entry_port, self.scenario, seconds, requests)

    def saturated(self, proxy, found):
        before, began = machine.cpu_seconds(proxy.pids), time.monotonic()
        requests, moved = self.turn(proxy, self.options.seconds)
        cpu = machine.cpu_seconds(proxy.pids) - before
        seconds = time.monotonic() - began if self.options.counted else self.options.seconds
        if self.scenario.load == "bytes":
            found["mb_per_cpu_second"].append(moved / 1e6 / cpu)
            found["mb_per_second"].append(moved / 1e6 / seconds)
        else:
            found["cpu_us"].append(cpu / requests * 1e6)
            found["per_second"].append(requests / seconds)

    def at_rate(self, proxy, found):
        before, seconds = machine.cpu_seconds(proxy.pids), self.options.seconds
        counted = RATE * seconds if self.options.counted else 0
        requests, micros = load.h2load(self.stage, proxy.entry_port, self.scenario, self.call, seconds, RATE, counted)
        found["rate_cpu_us"].append((machine.cpu_seconds(proxy.pids) - before) / requests * 1e6)
        found["p50_us"].append(micros[len(micros) // 2])
        found["p99_us"].append(micros[len(micros) * 99 // 100])

    def rounds(self):
        proxies = self.proxies()
        found = {kind: collections.defaultdict(list) for kind in proxies}
        for proxy in proxies.values():
            self.turn(proxy, 1)  # warm
        for measured in [self.saturated] + [self.at_rate] * self.scenario.rate:
            for _ in range(self.options.rounds):
                for kind, proxy in proxies.items():
                    measured(proxy, found[kind])
        for kind, proxy in proxies.items():
            found[kind]["resident_mib"] = [machine.resident_kib(proxy.pids) / 1024]
            if proxy.admin and (counts := load.handshakes(proxy.admin)):
                found[kind]["handshakes"] = counts
        return found

    def idle(self):
        """Resident memory: after the start and one call, and of each idle connection."""
        found = {}
        for kind, proxy in self.proxies().items():
            first = load.idle(proxy.port, 1, self.certs)
            fresh = machine.resident_kib(proxy.pids)
            first += load.idle(proxy.port, 50, self.certs)
            before = machine.resident_kib(proxy.pids)
            held = load.idle(proxy.port, self.scenario.connections, self.certs)
            each = (machine.resident_kib(proxy.pids) - before) / len(held)
            found[kind] = {"idle_mib": [fresh / 1024], "kib_a_connection": [each]}
            for connection in first + held:
                connection.close()
        return found

    def start(self):
        proxies = self.proxies(started=False)
        found = {kind: {"start_ms": []} for kind in proxies}
        for _ in range(max(self.options.rounds, 3)):
            for kind, proxy in proxies.items():
                began = []
                begin = lambda: began.append(self.stage.start(*proxy.prepared.command))
                found[kind]["start_ms"].append(load.first_answer(begin, proxy.port, self.certs, self.scenario.host))
                self.stage.end(began[0])
        return found


def measure(scenario, options):
    with Stage(options.binary) as stage:
        bench = Bench(scenario, options, stage)
        return {"idle": bench.idle, "start": bench.start}.get(scenario.load, bench.rounds)()
