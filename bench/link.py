#!/usr/bin/env python3
"""A TCP proxy on loopback that makes what is behind it feel distant: a pipe of constant delay.

usage: link.py TO_PORT DELAY_MS [MB_PER_SECOND]
       link.py --turns TO_PORT DELAY_MS
       link.py --check

The delay is one way, in each direction; the speed is that of one connection and direction, as S3 gives one, and has no
limit if it isn't given. Prints the port on which it listens.

64 MiB fit into each direction of a connection. Up to then the link reads whatever the sender has, so that no buffer of
the kernel limits what is under way; beyond it the sender waits. No byte is early. A byte is 1 ms late at most, as
epoll counts in milliseconds, unless the machine is busy.

The server sees a connection one delay after the client made it. The client's own connect() returns at once, though:
a real one would wait for a round trip.

--turns prints for each connection, at its end, how often the client has sent something after it had received
something: with a delay that is longer than what either side works, the round trips.

--check compares the link with a plain copy over loopback: MiB/s of one connection whose sender never waits for an
answer, and round trips of one byte.
"""
import contextlib
import heapq
import itertools
import multiprocessing
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

MIB = 1024 * 1024
# Bytes under way in one direction before the sender has to wait.
WINDOW = 64 * MIB
# Bytes of one read: few system calls, and what was read is still in the processor's cache.
CHUNK = MIB // 4
# Seconds that a connection with a limited speed may have been silent, or the link late, and make up for it.
CREDIT = 0.03
# In a queue: the sender has ended its direction, or the connection broke.
END, BROKEN = b"", None


class Loop:
    """Waits for sockets and for the time."""

    def __init__(self):
        self.epoll, self.ends = select.epoll(), {}
        # (due, number, action); the number keeps the order of what is due at the same time.
        self.timers, self.numbers = [], itertools.count()

    def call_at(self, due, action):
        heapq.heappush(self.timers, (due, next(self.numbers), action))

    def watch(self, file, before, after, end):
        """Changes the events that `end` waits for. Without any it is not in epoll, which would report a hang-up."""
        if before and after:
            self.epoll.modify(file, after)
        elif after:
            self.epoll.register(file, after)
            self.ends[file] = end
        elif before:
            self.epoll.unregister(file)
            del self.ends[file]

    def run(self):
        while True:
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()
            # Rounded up to milliseconds: nothing is early.
            timeout = max(0, self.timers[0][0] - time.monotonic()) if self.timers else None
            for file, events in self.epoll.poll(timeout):
                # An end before it in the list may have closed this one.
                if end := self.ends.get(file):
                    end.handle(events)


class Listener:
    def __init__(self, loop, to_port, delay, speed, counts_turns):
        self.loop, self.to_port, self.delay, self.speed = loop, to_port, delay, speed
        self.counts_turns = counts_turns
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.socket.setblocking(False)
        self.port = self.socket.getsockname()[1]
        loop.watch(self.socket.fileno(), 0, select.EPOLLIN, self)

    def handle(self, _):
        with contextlib.suppress(OSError):
            Connection(self, self.socket.accept()[0])


class Connection:
    """The sockets to the client and to the server, and the pipes between them."""

    def __init__(self, listener, accepted):
        self.loop, self.delay, self.speed = listener.loop, listener.delay, listener.speed
        self.counts_turns, self.turns, self.last_sender = listener.counts_turns, 0, None
        self.client, self.server = End(self.loop, accepted), End(self.loop, socket.socket())
        self.up = Pipe(self, self.client, self.server)
        self.down = Pipe(self, self.server, self.client)
        self.up.back, self.down.back = self.down, self.up
        self.client.want(select.EPOLLIN)
        # Before anything that the client sends.
        self.loop.call_at(time.monotonic() + self.delay, lambda: self.connect(listener.to_port))

    def connect(self, port):
        # If it fails, reading does.
        self.server.socket.connect_ex(("127.0.0.1", port))
        self.server.want(select.EPOLLIN)

    def note_sender(self, pipe):
        if pipe is self.up and self.last_sender is not pipe:
            self.turns += 1
        self.last_sender = pipe

    def close(self):
        if self.counts_turns:
            print(self.turns, flush=True)
        self.up.ended = self.down.ended = True
        self.client.close()
        self.server.close()

    def abort(self):
        """As the other side did, with a reset."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class End:
    """A socket: the source of one pipe, and the target of the other."""

    def __init__(self, loop, one):
        self.loop, self.socket, self.wanted = loop, one, 0
        self.source_of, self.target_of = None, None
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def want(self, event, wanted=True):
        after = self.wanted | event if wanted else self.wanted & ~event
        if after != self.wanted:
            self.loop.watch(self.socket.fileno(), self.wanted, after, self)
            self.wanted = after

    def handle(self, events):
        # Errors and hang-ups show in whatever is tried next.
        if events & ~select.EPOLLIN and self.wanted & select.EPOLLOUT:
            self.want(select.EPOLLOUT, False)
            self.target_of.deliver()
        if events & ~select.EPOLLOUT and self.wanted & select.EPOLLIN:
            self.source_of.read()

    def close(self):
        self.want(self.wanted, False)
        self.socket.close()


class Pipe:
    """One direction: what `source` receives leaves through `target`, later."""

    def __init__(self, connection, source, target):
        self.connection, self.source, self.target = connection, source, target
        source.source_of, target.target_of = self, self
        # (due, bytes) in order, and when the link is free for the next bytes if its speed is limited.
        self.queue, self.queued, self.free_at = deque(), 0, 0.0
        # Nothing more will be sent: the end was passed on, or the target takes nothing any more.
        self.ended = False

    def read(self):
        try:
            data = self.source.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = BROKEN
        if data and self is self.connection.up:
            self.connection.note_sender(self)
        now = time.monotonic()
        due = now + self.connection.delay
        if data and self.connection.speed:
            self.free_at = max(self.free_at, now - CREDIT) + len(data) / self.connection.speed
            due = max(due, self.free_at)
        # The end comes after all bytes.
        due = max(due, self.queue[-1][0]) if self.queue else due
        self.queue.append((due, data))
        self.queued += len(data or END)
        if not data or self.queued >= WINDOW:
            self.source.want(select.EPOLLIN, False)
        if len(self.queue) == 1:
            self.connection.loop.call_at(due, self.deliver)

    def deliver(self):
        """Sends what is due: called when the first bytes are, and when a target whose buffers were full takes more."""
        now = time.monotonic()
        while self.queue and not self.ended:
            due, data = self.queue[0]
            if due > now:
                self.connection.loop.call_at(due, self.deliver)
                return
            if not data:
                self.end(data)
                return
            try:
                sent = self.target.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.lose()
                return
            if self is self.connection.down:
                self.connection.note_sender(self)
            self.queued -= sent
            if self.queued < WINDOW and self.queue[-1][1]:
                self.source.want(select.EPOLLIN)
            if sent < len(data):
                self.queue[0] = (due, memoryview(data)[sent:])
                self.target.want(select.EPOLLOUT)
                return
            self.queue.popleft()

    def lose(self):
        """What is sent to a closed socket is lost. The way back ends too, after what may still be read there."""
        self.ended = True
        if self.back.ended:
            self.connection.abort()

    def end(self, data):
        """Passes on what ended the direction."""
        if data is BROKEN:
            self.connection.abort()
            return
        self.ended = True
        with contextlib.suppress(OSError):
            self.target.socket.shutdown(socket.SHUT_WR)
        if self.back.ended:
            self.connection.close()


# ---- --check


class Sink(multiprocessing.Process):
    """Takes all that one connection sends, and answers with one byte at its end."""

    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.start()

    def run(self):
        buffer = bytearray(MIB)
        connection = self.socket.accept()[0]
        while connection.recv_into(buffer):
            pass
        connection.send(b".")


class Echo(Sink):
    """Sends back what it gets."""

    def run(self):
        connection = self.socket.accept()[0]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(MIB):
            connection.sendall(data)


@contextlib.contextmanager
def connect(target, delay_ms):
    """A connection to a sink, through a link unless the delay is None."""
    port, link = target.port, None
    if delay_ms is not None:
        command = [sys.executable, __file__, str(port), str(delay_ms)]
        link = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        port = int(link.stdout.readline())
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection
    finally:
        if link:
            link.kill()
            link.wait()
        target.kill()


def measure_speed(delay_ms, size=2048):
    """MiB/s, without the round trip in which the first byte leaves and the answer comes."""
    block = bytes(MIB)
    with connect(Sink(), delay_ms) as connection:
        began = time.monotonic()
        for _ in range(size):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b".":
            sys.exit("link.py: the answer after the end of the sender's direction is missing")
        return size / (time.monotonic() - began - 2 * (delay_ms or 0) / 1000)


def measure_round_trips(delay_ms, count=40):
    """Milliseconds of the shortest, the median and the longest."""
    with connect(Echo(), delay_ms) as connection:
        times = []
        for _ in range(count):
            began = time.monotonic()
            connection.sendall(b".")
            connection.recv(1)
            times.append((time.monotonic() - began) * 1000)
    # The first one makes the connection too.
    return min(times), sorted(times[1:])[count // 2], max(times[1:])


def check():
    for name, delay_ms in [("plain copy", None), ("link, 0 ms", 0), ("link, 50 ms each way", 50)]:
        speeds = sorted(measure_speed(delay_ms) for _ in range(3))
        shortest, median, longest = measure_round_trips(delay_ms)
        print(f"{name:22}{speeds[1]:6.0f} MiB/s ({speeds[0]:.0f} to {speeds[2]:.0f}); "
              f"round trip {median:.2f} ms ({shortest:.2f} to {longest:.2f})", flush=True)  # fmt: skip


def main():
    if sys.argv[1:] == ["--check"]:
        check()
        return
    loop = Loop()
    counts_turns = sys.argv[1] == "--turns"
    to_port, delay_ms, *speed = sys.argv[2:] if counts_turns else sys.argv[1:]
    speed = float(speed[0]) * 1e6 if speed else None
    print(Listener(loop, int(to_port), float(delay_ms) / 1000, speed, counts_turns).port, flush=True)
    loop.run()


if __name__ == "__main__":
    main()
