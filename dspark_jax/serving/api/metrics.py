"""GET /metrics: what the server counts, in Prometheus' text format."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dspark_jax.serving.api.driver import EngineDriver
from dspark_jax.serving.api.pulse import Pulse

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE_REQUEST = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram(Collector):
    """Observations by upper bounds. Of one thread, the event loop's: without the library's lock, and the tokens of a
    dispatch are one observation."""

    def __init__(self, name: str, about: str, bounds: Sequence[float], registry: CollectorRegistry):
        self._name, self._about, self._bounds = name, about, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        # A bound belongs to the values below it.
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """The one metric."""
        family = HistogramMetricFamily(self._name, self._about)
        bounds = [*map(str, self._bounds), "+Inf"]
        family.add_metric([], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class Metrics:
    """One registry a server, so that several can live in one process.

    Attributes:
        requests: by endpoint and status of the response.
        ended: answers by finish reason.
        first_token: seconds from a request's arrival to its first token.
        between_tokens: seconds between tokens of one answer: the gap before each dispatch's tokens, divided by them.
        whole: seconds from a request's arrival to its end.
    """

    def __init__(self, driver: EngineDriver, pulse: Pulse):
        # Not the library's global registry, in which a second server of the same process would find its names taken.
        self._registry = CollectorRegistry()
        registry = self._registry

        self.requests = Counter(
            "dspark_requests", "HTTP requests by endpoint and status.", ("endpoint", "status"), registry=registry
        )
        self.ended = Counter("dspark_answers", "Answers by finish reason.", ("finish_reason",), registry=registry)

        self.first_token = Histogram(
            "dspark_time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN, registry
        )
        self.between_tokens = Histogram(
            "dspark_inter_token_seconds", "Between tokens of one answer.", BETWEEN_TOKENS, registry
        )
        self.whole = Histogram(
            "dspark_request_seconds", "From a request's arrival to its end.", WHOLE_REQUEST, registry
        )
        # The metrics above are counted as requests pass; these are read when asked for, at no cost to the engine.
        registry.register(EngineFigures(driver, pulse))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)


class EngineFigures(Collector):
    """The engine's own figures, read when they are asked for: it counts anyway, and pays nothing for being watched."""

    def __init__(self, driver: EngineDriver, pulse: Pulse):
        self._driver, self._pulse = driver, pulse

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        totals, pulse = self._pulse.totals, self._pulse
        # Read once: a restart on the engine's thread may take it away between two lines.
        engine = self._driver.engine
        reused = 0 if engine is None or engine.prefixes is None else engine.prefixes.reused
        left = 0 if engine is None else engine.memory.preempted
        for name, about, count in (
            ("dspark_prompt_tokens", "Prompt tokens of answers that have ended.", totals.prompt_tokens),
            ("dspark_generated_tokens", "New tokens.", totals.tokens),
            ("dspark_rounds", "Rounds, counted for each request.", totals.rounds),
            ("dspark_committed_tokens", "Tokens that rounds committed.", totals.committed),
            ("dspark_verified_drafts", "Drafts verified.", totals.verified),
            ("dspark_accepted_drafts", "Drafts accepted.", totals.accepted),
            ("dspark_drafting_rounds", "Rounds with drafts, counted for each request.", totals.drafted),
            # The counters that a restart sets back, which scrapers read as a reset.
            ("dspark_preemptions", "Requests that left their slots for want of memory, of the present engine.", left),
            ("dspark_prefix_tokens", "Prompt tokens that kept prefixes spared, by the present engine.", reused),
            ("dspark_engine_failures", "Dispatches that failed.", pulse.failures),
            ("dspark_engine_restarts", "Engines made anew after a failure.", pulse.restarts),
        ):
            yield CounterMetricFamily(name, about, value=count)

        recent = pulse.recent()
        gauges = {
            "dspark_accepted_length": ("Tokens a round and request, recently.", recent["accepted_length"]),
            "dspark_verified_per_round": ("Tokens verified a round and request.", recent["verified_per_round"]),
            "dspark_drafting_share": ("Share of recent rounds with drafts.", recent["drafting_share"]),
            "dspark_ready": ("Whether requests are taken.", float(self._driver.status == "ready")),
        }
        if engine is not None:
            # Only with an engine: a gauge that is absent says more than one that is 0.
            slots, load = engine.config.slots, engine.metering
            held = engine.positions
            gauges |= {
                "dspark_queue_requests": ("Requests that wait for a slot.", engine.waiting),
                "dspark_running_requests": ("Requests in slots.", engine.running),
                "dspark_slots": ("Requests decoded at once, at most.", slots),
                "dspark_cache_positions": ("Positions of the caches that requests hold.", held),
                "dspark_cache_share": ("Share of the caches' memory in use.", engine.memory.share(held)),
                "dspark_load_factor": (
                    "Seconds that rounds take, by those that the cost table predicts.",
                    load.signal * (1.0 if load.meter is None else load.meter.load),
                ),
                **engine.memory.figures(),
            }

        for name, (about, value) in gauges.items():
            # A figure of no rounds is no figure.
            if value is not None:
                yield GaugeMetricFamily(name, about, value=float(value))
