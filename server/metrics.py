"""GET /metrics: what the server has done, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from server.reading import resident_bytes
from transformers_patches.generation.generate import GenerationResult
from transformers_patches.load.loaded_model import LoadedModel

SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # tokens/s
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """Counters of one server."""

    def __init__(self, loaded: LoadedModel, waiting: Callable[[], int], busy: Callable[[], bool]) -> None:
        """waiting: jobs in the queue; busy: whether one is being answered."""
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        self._loaded = loaded

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"partinfer_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, value: Callable[[], float] | None = None) -> Gauge:
            made = Gauge(f"partinfer_{name}", text, registry=registry)
            if value is not None:
                made.set_function(value)
            return made

        self.requests = counter("requests", "requests by endpoint and status", ("endpoint", "status"))
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.reused_tokens = counter("reused_prompt_tokens", "tokens of prompts that were in the cache already")
        self.generated_tokens = counter("generated_tokens", "tokens generated")
        self.cancelled = counter("cancelled", "answers that were ended because the client had gone")
        self.neurons = counter("computed_neurons", "FFN neurons computed in decoding, whole ones")
        self.bytes = counter("decoded_bytes", "bytes of weights read in decoding")
        self.speed = gauge("tokens_per_second", "of the last answer's decoding")
        self.share = gauge("ffn_bytes_share", "share of the FFN bytes that the last answer's tokens read")
        self.speeds = Histogram("partinfer_decode_tokens_per_second", "of answers", buckets=SPEEDS, registry=registry)
        self.first = Histogram(
            "partinfer_time_to_first_token_seconds", "from the prompt's turn on", buckets=SECONDS, registry=registry
        )
        self._seen = {"prompt": 0, "reused": 0}
        gauge("prefix_hit_rate", "share of the prompts' tokens that were in the cache already", self._hit_rate)
        gauge("queue_length", "requests that wait", waiting)
        gauge("running", "requests that are being answered", lambda: float(busy()))
        gauge("weight_bytes_resident", "bytes of weights in memory", lambda: loaded.report.bytes_resident)
        gauge("resident_bytes", "memory of the process", lambda: resident_bytes() or 0)

    def answered(self, result: GenerationResult, reused: int) -> None:
        """Count an answer, before the model's counters are reset for the next one."""
        loaded, state = self._loaded, self._loaded.state
        self._seen["prompt"] += result.prompt_tokens
        self._seen["reused"] += reused
        self.prompt_tokens.inc(result.prompt_tokens)
        self.reused_tokens.inc(reused)
        self.generated_tokens.inc(result.generated_tokens)
        self.neurons.inc(sum(layer.counters.neurons for layer in (*state.layers, *state.experts)))
        self.bytes.inc(max(0, result.generated_tokens - 1) * loaded.token_bytes())
        self.share.set(loaded.bytes_fraction())
        if result.decode_tokens_per_second is not None:
            self.speed.set(result.decode_tokens_per_second)
            self.speeds.observe(result.decode_tokens_per_second)
        if result.time_to_first_token_s is not None:
            self.first.observe(result.time_to_first_token_s)
        if result.finish_reason == "interrupted":
            self.cancelled.inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _hit_rate(self) -> float:
        return self._seen["reused"] / self._seen["prompt"] if self._seen["prompt"] else 0.0


class Counted:
    """ASGI middleware that counts requests by endpoint and status."""

    def __init__(self, app, metrics: Metrics, endpoints: frozenset[str]) -> None:
        """endpoints: paths that have a name of their own; all else is `other`."""
        self.app, self.metrics, self.endpoints = app, metrics, endpoints

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"

        async def counting(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)
