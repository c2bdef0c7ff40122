"""The systems that RivetQ is measured beside, one module each, under the names that `--peers` takes."""

from __future__ import annotations

from contestants import Contestant

from peers.beanstalk import Beanstalkd
from peers.disk_cache import DiskCache
from peers.honker_queue import Honker
from peers.huey_sqlite import Huey
from peers.lite_queue import LiteQueue
from peers.persist_queue import PersistQueue
from peers.postgres import Postgres
from peers.redis_streams import RedisStreams
from peers.sqlite_by_hand import SqliteByHand

PEERS: dict[str, type[Contestant]] = {
    peer.name: peer
    for peer in (
        SqliteByHand,
        PersistQueue,
        Huey,
        LiteQueue,
        Honker,
        DiskCache,
        RedisStreams,
        Beanstalkd,
        Postgres,
    )
}
