"""A bad line between two network interfaces: every packet takes DELAY seconds, and one of LOSS is lost.

    python forward.py INTERFACE INTERFACE

It stands in for `tc netem`, which many kernels lack.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque

DELAY, LOSS = 0.01, 50
ALL_PROTOCOLS = 3  # ETH_P_ALL
PACKET_OUTGOING = 4  # what this program has sent itself
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # packets keep what is left to the network card: checksums, cutting into pieces

chance = random.Random(0)
ends = []
for name in sys.argv[1:]:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.bind((name, ALL_PROTOCOLS))
    ends.append(end)
waiting: deque[tuple[float, socket.socket, bytes]] = deque()
while True:
    ready = select.select(ends, [], [], max(waiting[0][0] - time.monotonic(), 0) if waiting else None)[0]
    for end in ready:
        packet, (_, _, kind, *_) = end.recvfrom(1 << 17)
        if kind != PACKET_OUTGOING and chance.randrange(LOSS):
            waiting.append((time.monotonic() + DELAY, ends[1 - ends.index(end)], packet))
    while waiting and waiting[0][0] <= time.monotonic():
        _, other, packet = waiting.popleft()
        other.send(packet)
