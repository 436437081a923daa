"""What ``/metrics`` reports, for Prometheus."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pdrop_jax.compilation_cache import CompilationStats
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.requests import Completion

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counters of a server, and the state of its engines when it is asked."""

    def __init__(self, engines: Mapping[str, Engine], stats: CompilationStats) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_State(engines, stats))
        labels = ["budget"]
        self._answers = Counter("pdrop_answers", "Answers that ended.", [*labels, "reason"], registry=registry)
        self._responses = Counter("pdrop_responses", "HTTP responses.", ["path", "status"], registry=registry)
        self._prompt = Counter("pdrop_prompt_tokens", "Tokens of prompts, images included.", labels, registry=registry)
        self._new = Counter("pdrop_new_tokens", "Tokens of answers.", labels, registry=registry)
        self._first = Histogram(
            "pdrop_first_token_seconds", "From request to first token.", labels, buckets=SECONDS, registry=registry
        )
        self._rate = Histogram(
            "pdrop_tokens_per_second",
            "Tokens a second of an answer after its first.",
            labels,
            buckets=RATES,
            registry=registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def responded(self, path: str, status: int) -> None:
        self._responses.labels(path, status).inc()

    def answered(self, budget: str, answer: Completion) -> None:
        self._answers.labels(budget, answer.finish_reason).inc()
        self._new.labels(budget).inc(len(answer.token_ids))
        if answer.stage_lengths:
            self._prompt.labels(budget).inc(answer.stage_lengths[0])
        if answer.first_token_seconds is not None:
            self._first.labels(budget).observe(answer.first_token_seconds)
            decoding = answer.seconds - answer.first_token_seconds
            if len(answer.token_ids) > 1 and decoding > 0:
                self._rate.labels(budget).observe((len(answer.token_ids) - 1) / decoding)


class _State(Collector):
    def __init__(self, engines: Mapping[str, Engine], stats: CompilationStats) -> None:
        self._engines, self._stats = engines, stats

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        gauges = {
            "pdrop_queue": ("Requests that wait for a slot.", lambda engine: engine.waiting),
            "pdrop_running": ("Requests that have a slot.", lambda engine: engine.running),
            "pdrop_slots": ("Slots.", lambda engine: engine.slots),
            "pdrop_cache_bytes": ("Device memory of the slots, mostly KV caches.", lambda engine: engine.memory),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(name, text, labels=["budget"])
            for budget, engine in self._engines.items():
                family.add_metric([budget], value(engine))
            yield family
        yield from self._caches()
        yield CounterMetricFamily("pdrop_compilations", "Programs that were compiled.", value=self._stats.compiled)

    def _caches(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        labels = ["budget", "cache"]
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            "hits": CounterMetricFamily("pdrop_reuse_hits", "Images and prefixes that were in a cache.", labels=labels),
            "misses": CounterMetricFamily("pdrop_reuse_misses", "Images and prefixes that were not.", labels=labels),
            "bytes": GaugeMetricFamily("pdrop_reuse_bytes", "Device memory of these caches.", labels=labels),
        }
        for field, family in families.items():
            for budget, engine in self._engines.items():
                for name, counts in engine.caches.items():
                    family.add_metric([budget, name], getattr(counts, field))
            yield family
