#!/usr/bin/env python3
"""A TCP proxy on loopback that makes a local S3 server feel like a distant one.

usage: link.py TO_PORT DELAY_MS MB_PER_SECOND

The delay is one way, in each direction; the speed is that of one connection and direction, as S3 gives one. Prints the
port on which it listens.
"""
import asyncio
import socket
import sys
from collections import deque

TO, DELAY, SPEED = int(sys.argv[1]), float(sys.argv[2]) / 1000, float(sys.argv[3]) * 1e6
# Bytes under way in one direction before the sender has to wait: what the link carries meanwhile, and as much again.
WINDOW = int(2 * SPEED * DELAY) + 262144
# A timer that was late may be made up for, by so many seconds' worth of bytes.
CREDIT = 0.03


class End(asyncio.Protocol):
    """One end of a connection: what it receives leaves through the other end, later."""

    def __init__(self):
        self.other, self.transport = None, None
        # (due, bytes) in order, and when the link is free for the next bytes.
        self.queue, self.queued, self.free_at, self.timer = deque(), 0, 0.0, None
        # The receiver's own buffers are full.
        self.stopped = False
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport):
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data):
        now = self.loop.time()
        self.free_at = max(self.free_at, now - CREDIT) + len(data) / SPEED
        self.queue.append((max(now + DELAY, self.free_at), data))
        self.queued += len(data)
        if self.queued > WINDOW:
            self.transport.pause_reading()
        if self.timer is None:
            self.deliver()

    def deliver(self):
        self.timer = None
        while self.queue and not self.other.stopped:
            due, data = self.queue[0]
            if due > self.loop.time() + 0.0005:
                self.timer = self.loop.call_at(due, self.deliver)
                return
            self.queue.popleft()
            self.queued -= len(data)
            if data:
                self.other.transport.write(data)
                if self.queued <= WINDOW:
                    self.transport.resume_reading()
            else:
                self.other.transport.close()

    def pause_writing(self):
        self.stopped = True

    def resume_writing(self):
        self.stopped = False
        if self.other.timer is None:
            self.other.deliver()

    def eof_received(self):
        # Neither S3 servers nor their clients half-close.
        return False

    def connection_lost(self, error):
        self.queue.append((self.loop.time() + DELAY, b""))
        if self.other is not None and self.timer is None:
            self.deliver()


class Near(End):
    """The gateway's end."""

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.pause_reading()
        self.connecting = self.loop.create_task(self.connect())

    async def connect(self):
        try:
            _, self.other = await self.loop.create_connection(End, "127.0.0.1", TO)
        except OSError:
            self.transport.abort()
            return
        self.other.other = self
        self.transport.resume_reading()


async def main():
    server = await asyncio.get_running_loop().create_server(Near, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
