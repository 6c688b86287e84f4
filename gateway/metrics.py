"""What this gateway counts, in a registry of its own; names end in their units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

ACCEPT_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The counters of the front door. ``accepted``, ``duplicate`` and ``refused`` are parts of one, ready to use."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        triggers = Counter(
            "headrace_triggers",
            "Runs asked for at the door, by what became of it",
            ["result"],
            registry=self.registry,
        )
        self.accepted = triggers.labels("accepted")
        self.duplicate = triggers.labels("duplicate")
        self.refused = triggers.labels("refused")
        self.events = Counter("headrace_events", "CloudEvents received", registry=self.registry)
        self.accept_s = Histogram(
            "headrace_accept_seconds",
            "Time from the first byte of a trigger's body to its 202, synced to disk",
            buckets=ACCEPT_BUCKETS_S,
            registry=self.registry,
        )
        self.streams = Gauge("headrace_streams", "Clients of server-sent events", registry=self.registry)
        self.streams_dropped = Counter(
            "headrace_streams_dropped",
            "Clients of server-sent events that did not read in time",
            registry=self.registry,
        )
        self.in_flight = Gauge("headrace_in_flight", "Triggers being read or appended", registry=self.registry)
        self.in_flight_bytes = Gauge(
            "headrace_in_flight_bytes", "Bytes of triggers being read or appended", registry=self.registry
        )
        self.waiting = Gauge("headrace_waiting", "Callers that wait for an answer", registry=self.registry)
        self.log_connected = Gauge("headrace_log_connected", "1 while the log can be reached", registry=self.registry)
        build = Gauge("headrace_build_info", "The version, in a label", ["version"], registry=self.registry)
        build.labels(version).set(1)
