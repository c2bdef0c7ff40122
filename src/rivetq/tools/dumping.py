"""The log as plain values, record by record."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from ..machine.events import Copied, Enqueued, Event
from ..storage.codec import decode_record
from ..storage.disk import SystemDisk
from ..storage.recovery import records
from .directory import Path, directory_of, readable


def dump(path: Path, *, payloads: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a log in order, each as values that JSON knows. A broker may have it open.

    Args:
        payloads: with the payloads, in base64.

    Raises:
        CorruptLogError: behind the last record that can be read.
    """
    directory = directory_of(path)
    with readable(directory):
        for file, record in records(SystemDisk(), directory):
            now_ms, events = decode_record(record.body)
            yield {
                "lsn": record.frame.lsn,
                "file": os.path.basename(file.path),
                "offset": record.at,
                "at_ms": now_ms,
                "events": [_event(event, record.body if payloads else None) for event in events],
            }


def _event(event: Event, body: bytes | None) -> dict[str, Any]:
    value: dict[str, Any] = {"event": type(event).__name__}
    for name, item in attrs.asdict(event, recurse=False).items():
        if name not in ("payload", "payloads", "payload_at"):
            value[name] = _plain(item)
    if body is not None and isinstance(event, Enqueued | Copied):
        at, found = event.payload_at, []
        for length in event.lengths if isinstance(event, Enqueued) else (event.length,):
            found.append(base64.b64encode(body[at : at + length]).decode())
            at += length
        value["payloads"] = found
    return value


def _plain(item: Any) -> Any:
    if attrs.has(type(item)):
        return attrs.asdict(item)
    if isinstance(item, Mapping):
        return dict(item)
    return [_plain(each) for each in item] if isinstance(item, list | tuple) else item
