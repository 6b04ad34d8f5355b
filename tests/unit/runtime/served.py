"""A worker without a process, and pictures and recordings to ask it about."""

from __future__ import annotations

import array
import io
import itertools
import queue
from typing import Any

from tests.unit.runtime.conftest import FakeEngine

from cloister.parts import Picture, Recording
from cloister.runtime import protocol
from cloister.runtime.client import Worker, WorkerSession
from cloister.runtime.worker import Service


def picture(shade: int = 1) -> Picture:
    return Picture(data=bytes([shade]) * 72, height=4, width=6)


def recording(samples: int = 35) -> Recording:
    return Recording(data=array.array("f", [0.5] * samples).tobytes(), rate=100)


def png(pixels: Any, **text: str) -> bytes:
    from PIL import Image as Pillow
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_text(name, value)
    Pillow.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


class Served:
    """A worker whose other end is in this process, on a fake engine; `lines` are what it was sent.
    """

    unlocked = ended = None
    guard_tier, running = 1, True
    welcome = protocol.Welcome(version=4, guard_tier=1, guard="seccomp", evidence={}, memory={})

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.lines = engine, list[bytes]()
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.service = Service(lambda event: self._waiting.put(
            protocol.decode_event(protocol.encode(event))))
        self.service._engine = engine
        self._ids = itertools.count(1)
        self.loaded = protocol.Loaded(
            id=0, model_id=engine.model_id, backend="xnnpack", context=engine.context,
            media=engine.bundle.manifest.media, load_s=0, peak_rss_bytes=0)

    def ready(self, *, vault: bool = False) -> Served:
        return self

    def next_id(self) -> int:
        return next(self._ids)

    def send(self, request: protocol.Request) -> None:
        self.lines.append(protocol.check(request))
        self.service.handle(protocol.decode_request(self.lines[-1]))

    def ask(self, request: protocol.Request, events: queue.SimpleQueue[Any]) -> None:
        self._waiting = events
        self.send(request)

    def call(self, request: protocol.Request, kind: type) -> Any:
        self.ask(request, queue.SimpleQueue())
        event = self._waiting.get_nowait()
        assert isinstance(event, kind), event
        return event

    def forget(self, id_: int) -> None:
        pass

    def cancel(self, id_: int, events: queue.SimpleQueue[Any]) -> Any:
        while isinstance(event := events.get_nowait(), protocol.Produced):
            pass
        return event

    def start(self) -> Served:
        return self

    def close(self) -> None:
        pass

    def session(self, **options: Any) -> WorkerSession:
        return Worker.session(self, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        pass
