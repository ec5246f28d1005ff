"""Counts and times for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "offtower_requests", "Answered requests.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "offtower_request_seconds",
            "Time of a request, from its head to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.retriever_seconds = Histogram(
            "offtower_retriever_seconds",
            "Time of a call of the retriever, which answers a batch.",
            ["verb"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_contexts = Histogram(
            "offtower_batch_contexts",
            "Contexts of a batch.",
            ["verb"],
            buckets=_CONTEXTS,
            registry=registry,
        )
        self.waiting = Gauge(
            "offtower_waiting_contexts", "Contexts that wait for a batch.", registry=registry
        )
        self.empty = Counter(
            "offtower_empty_contexts", "Contexts that may be shown no item.", registry=registry
        )
        self.late_events = Counter(
            "offtower_late_events",
            "Events of histories at the time of their request or later, which were dropped.",
            registry=registry,
        )
        self.decisions = Counter(
            "offtower_decisions", "Rows of the log of decisions.", registry=registry
        )
        self.decision_files = Counter(
            "offtower_decision_files", "Finished files of the log.", registry=registry
        )
        self.decision_errors = Counter(
            "offtower_decision_errors",
            "Rows that could not be logged, and files that could not be finished yet.",
            registry=registry,
        )
        self.unfinished = Gauge(
            "offtower_unfinished_files",
            "Files of the log that wait to be finished or sent.",
            registry=registry,
        )
        self.reloads = Counter(
            "offtower_reloads", "Attempts to serve a newer export.", ["result"], registry=registry
        )
        self.export = Gauge(
            "offtower_export", "1 for the export that is served.", ["version"], registry=registry
        )

    def serve(self, version: str) -> None:
        """Name the export that is served."""
        self.export.clear()
        self.export.labels(version).set(1)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
