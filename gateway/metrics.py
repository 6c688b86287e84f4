"""What this gateway counts, in a registry of its own; names end in their units."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from functions.sites import is_told, status
from headrace.clock import parse_instant
from headrace.joblog import SiteRecord
from headrace.model import Audit

ACCEPT_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Door(Collector):
    """What is counted for every trigger: plain numbers of one thread, which become metrics when somebody looks.

    Locks and labels on the way would cost as much as the digest of a body.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.duplicate = 0
        self.refused = 0
        self.events = 0
        self._seconds = 0.0
        self._buckets = [0] * (len(ACCEPT_BUCKETS_S) + 1)

    def took(self, seconds: float) -> None:
        """Count the time that one request took from its first byte to its promise."""
        self._seconds += seconds
        self._buckets[bisect_left(ACCEPT_BUCKETS_S, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """Return what was counted as metrics."""
        runs = CounterMetricFamily(
            "headrace_triggers", "Runs asked for at the door, by what came of it", labels=["result"]
        )
        for result in ("accepted", "duplicate", "refused"):
            runs.add_metric([result], getattr(self, result))
        yield runs
        yield CounterMetricFamily("headrace_events", "CloudEvents received", value=self.events)
        total, buckets = 0, []
        for bound, number in zip((*map(str, ACCEPT_BUCKETS_S), "+Inf"), self._buckets, strict=True):
            total += number
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(
            "headrace_accept_seconds",
            "Time from a trigger's headers to its promise, synced to disk",
            buckets=buckets,
            sum_value=self._seconds,
        )


class AuditFound(Collector):
    """The last audit, as it was before a look at the metrics; while it is not known there is nothing to see."""

    def __init__(self) -> None:
        self.last: Audit | None = None

    def collect(self) -> Iterator[Metric]:
        """Return the last audit as metrics."""
        last = self.last
        if last is None:
            return
        yield CounterMetricFamily(
            "headrace_runs_accepted", "Runs accepted since the beginning of the log", value=last.accepted
        )
        yield CounterMetricFamily("headrace_runs_ended", "Runs ended since the beginning of the log", value=last.ended)
        for name, text, value in (
            ("headrace_runs_running", "Runs that have not ended and are on their way", last.running),
            ("headrace_audit_difference", "Runs accepted - ended - running; has to be 0", last.difference),
            ("headrace_audit_lost", "Runs of which work was acknowledged without an outcome", last.lost),
            ("headrace_audit_stuck", "Runs of which all work has outcomes, and which have no end", last.stuck),
            ("headrace_audit_missed", "Runs ended in the log and open in the read model", last.missed),
            ("headrace_audit_timestamp_seconds", "When that was found", parse_instant(last.at)),
        ):
            yield GaugeMetricFamily(name, text, value=value)


class SitesSeen(Collector):
    """The sites as they are at a look at the metrics."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.records: Callable[[], list[SiteRecord]] = list

    def collect(self) -> Iterator[Metric]:
        """Return how the sites are as metrics."""
        now = self._clock()
        families = {
            name: GaugeMetricFamily(f"headrace_site_{name}", text, labels=["site"])
            for name, text in (
                ("up", "1 while the site is up, 0 while it is down, degraded or unknown"),
                ("gpus", "GPUs of the site"),
                ("gpus_free", "GPUs of the site that no job has, on nodes that can be used"),
                ("jobs_waiting", "Jobs in the queue of the site"),
                ("silent_seconds", "Time since the site's agent was heard last"),
            )
        }
        for record in self.records():
            families["up"].add_metric([record.name], float(status(record, now)[0] == "up"))
            families["silent_seconds"].add_metric([record.name], max(0.0, now - record.at))
            if record.gpus_total is not None:
                families["gpus"].add_metric([record.name], record.gpus_total)
            if is_told(record, now):
                families["jobs_waiting"].add_metric([record.name], record.jobs_waiting)
                if record.gpus_free is not None:
                    families["gpus_free"].add_metric([record.name], record.gpus_free)
        yield from families.values()


class Metrics:
    """The counters of one gateway; ``door`` holds those of the hot path."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.door = Door()
        self.registry.register(self.door)
        self.audit = AuditFound()
        self.registry.register(self.audit)
        self.sites = SitesSeen()
        self.registry.register(self.sites)
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
        self.log_full = Gauge("headrace_log_full_ratio", "Share of the log's size limit in use", registry=self.registry)
        self.disk_free_bytes = Gauge(
            "headrace_disk_free_bytes", "Bytes free where the blobs lie", registry=self.registry
        )
        build = Gauge("headrace_build_info", "The version, in a label", ["version"], registry=self.registry)
        build.labels(version).set(1)
