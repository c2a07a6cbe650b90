"""What Prometheus reads at /metrics. Collected when it is asked for, from what the streams count anyway."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..stats import Timing
from .registry import Registry


class Collector:
    """The registry's streams as metrics. Labels have bounded values: ids of streams are secrets and are no labels."""

    def __init__(self, sessions: Registry) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        live = list(self._sessions)
        kinds: dict[str, int] = {}
        for session in live:
            for viewer in session.broadcast.viewers:
                kinds[viewer.kind] = kinds.get(viewer.kind, 0) + 1
        viewers = GaugeMetricFamily("cfrt_viewers", "Viewers at the moment.", labels=["kind"])
        for kind in ("websocket", "webrtc", "mjpeg", "mp4", "recording"):
            viewers.add_metric([kind], kinds.get(kind, 0))
        yield viewers
        yield GaugeMetricFamily("cfrt_streams", "Streams at the moment.", value=len(live))
        yield CounterMetricFamily("cfrt_streams_made", "Streams made.", value=self._sessions.made)
        sent = self._sessions.past_sent + sum(session.broadcast.sent for session in live)
        dropped = self._sessions.past_dropped + sum(session.broadcast.dropped for session in live)
        yield CounterMetricFamily("cfrt_frames_sent", "Frames sent to viewers.", value=sent)
        yield CounterMetricFamily("cfrt_frames_dropped", "Frames that slow viewers have missed.", value=dropped)
        names = {
            "unit": "Work of a unit",
            "latency": "First pass to pixels",
            "change_to_pixel": "Prompt to its first frame",
        }
        for name, what in names.items():
            yield _worst(f"cfrt_{name}_seconds", what, (getattr(session.timings, name) for session in live))


def _worst(name: str, what: str, timings: Iterable[Timing]) -> GaugeMetricFamily:
    """Percentiles over the last values of each stream; of several streams the worst."""
    family = GaugeMetricFamily(name, f"{what}, in seconds; percentile of the slowest stream.", labels=["quantile"])
    known = [timing for timing in timings if timing.count]
    for quantile in ("p50", "p95", "p99"):
        if known:
            family.add_metric([f"0.{quantile[1:]}"], max(getattr(timing, quantile) for timing in known))
    return family


def exposition(sessions: Registry) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Collector(sessions))
    return generate_latest(registry)
