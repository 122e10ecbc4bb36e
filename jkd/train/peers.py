"""The processes of a run watch each other: when one is gone, the others end with a line that says so.

JAX by itself ends the others late (a process that leaves waits 100 s for the lost one) or with an abort, and says
nothing that helps. Here every process holds a TCP connection to process 0. The kernel closes it at once when a
process is killed, and its keep-alive probes notice a host that vanished; since the kernel answers them, a process
that is busy, suspended or holds the interpreter is never taken for a lost one.
"""

import contextlib
import ctypes
import hmac
import json
import secrets
import selectors
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import jax

from jkd.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_USER_ERROR, UserError, end_now
from jkd.train.log import console
from jkd.train.processes import from_chief
from jkd.train.signals import Preempted
from jkd.train.watchdog import Progress

CONNECT = 5.0  # seconds for an address to answer
DOUBT = 5.0  # seconds after an error of JAX's in which it may turn out that a lost process was its cause
CRASHED = 15.0  # seconds in which the others may end by themselves after one crashed
MESSAGE = 1500  # characters of an error that are passed on

_left_alone = threading.Event()


def left_alone() -> bool:
    """Whether this process ended its run while others did not: JAX would wait for them for minutes at exit."""
    return _left_alone.is_set()


class _Link:
    def __init__(self, connection: socket.socket, process: int | None = None, host: str = ""):
        self.connection, self.process, self.host = connection, process, host
        self.buffer, self.bye = b"", False

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # who is gone needs no message
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Peers:
    """Watches the other processes while the run lasts; for a single process, or `timeout` 0, it does nothing."""

    def __init__(self, progress: Progress, timeout: float):
        self._progress, self._timeout = progress, timeout
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._left = False  # whether this process has ended its run
        self._stop = threading.Event()
        self._deadline: tuple[float, str, int] | None = None
        self._process, self._host = jax.process_index(), socket.gethostname()
        self._active = bool(timeout) and jax.process_count() > 1

    # --- begin and end ---

    def __enter__(self) -> "Peers":
        if self._active:
            _delay_aborts()
            self._selector = selectors.DefaultSelector()
            listener = _listen() if self._process == 0 else None
            offer = json.loads(from_chief("" if listener is None else json.dumps(_offer(listener))))
            self._token = offer["token"]
            if listener is not None:
                self._selector.register(listener, selectors.EVENT_READ, None)
            else:
                self._connect(offer)
            self._thread = threading.Thread(target=self._watch, name="jkd-peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._thread.join(DOUBT)  # ends the process if another one is lost
        with self._lock:
            self._left = True
        failed = error is not None and not isinstance(error, Preempted)
        try:
            if failed:
                message = _goodbye(error, self._timeout)
                self._tell_all(**message)
                self._wait_for_others(message["grace"] + DOUBT)
            else:
                self._tell_all(bye="")
        finally:
            self._stop.set()
            self._thread.join()
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _wait_for_others(self, seconds: float) -> None:
        # Whoever met the same error says so too, and all leave together; the others end when their time is over.
        until = time.monotonic() + seconds
        while any(not link.bye for link in self._links) and time.monotonic() < until and not _left_alone.is_set():
            time.sleep(0.05)
        if any(not link.bye for link in self._links):
            _left_alone.set()

    def tell(self, line: str, code: int) -> None:
        """Says to the others, from any thread, why this process ends at once."""
        if self._active:
            self._tell_all(bye=line, code=code, grace=0)

    def _tell_all(self, **message: Any) -> None:
        for link in self._links:
            link.send(process=self._process, host=self._host, **message)

    def _connect(self, offer: dict[str, Any]) -> None:
        for address in offer["addresses"]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, offer["port"]), CONNECT)
                link = _Link(connection, 0, offer["host"])
                hello = json.dumps([self._process, self._host])
                connection.sendall(f"{self._token} {hello}\n".encode())
                if connection.recv(1) == b"\n":  # process 0 knows the token
                    self._add(link)
                    return
                connection.close()
        console.print(
            f"jkd: process {self._process} cannot reach process 0 ({offer['host']}, port {offer['port']}): "
            "a lost process is noticed late, by JAX only.",
            soft_wrap=True,
        )

    def _add(self, link: _Link) -> None:
        _keep_alive(link.connection, self._timeout)
        link.connection.settimeout(self._timeout)
        self._links.append(link)
        with contextlib.suppress(KeyError):  # process 0 registered it when it was accepted
            self._selector.unregister(link.connection)
        self._selector.register(link.connection, selectors.EVENT_READ, link)

    # --- the thread ---

    def _watch(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.2):
                if key.data is None:
                    self._accept(key.fileobj)
                else:
                    self._read(key.data)
            if self._deadline is not None and time.monotonic() > self._deadline[0]:
                self._fail(*self._deadline[1:])

    def _accept(self, listener: Any) -> None:
        connection, _ = listener.accept()
        self._selector.register(connection, selectors.EVENT_READ, _Link(connection))

    def _read(self, link: _Link) -> None:
        try:
            data = link.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(link.connection)
            link.connection.close()
            if link.process is not None and not link.bye:
                self._lost(link.process, link.host)
            return
        *lines, link.buffer = (link.buffer + data).split(b"\n")
        for line in filter(None, lines):
            if link.process is None:
                self._greet(link, line)
            else:
                self._hear(link, json.loads(line))

    def _greet(self, link: _Link, line: bytes) -> None:
        token, _, rest = line.partition(b" ")
        if hmac.compare_digest(token, self._token.encode()):  # others are ignored
            link.process, link.host = json.loads(rest)
            self._add(link)
            link.connection.sendall(b"\n")

    def _hear(self, link: _Link, message: dict[str, Any]) -> None:
        if "lost" in message:
            self._lost(message["lost"], message["at"])
        elif "bye" in message:
            link.bye = link.bye or message["process"] == link.process
            if message["bye"]:
                self._ended(message)

    def _lost(self, process: int, host: str) -> None:
        for link in self._links if self._process == 0 else []:
            link.send(lost=process, at=host)
        way_on = f"run the same command again on all hosts {self._progress.way_on}"
        self._fail(f"process {process} ({host}) is gone (killed, or its host is lost); {way_on}.", EXIT_LOST)

    def _ended(self, message: dict[str, Any]) -> None:
        for link in self._links if self._process == 0 else []:
            if link.process != message["process"]:
                link.send(**message)
        line = f"process {message['process']} ({message['host']}) ended: {message['bye']}"
        if self._deadline is None:
            self._deadline = time.monotonic() + message["grace"], line, message["code"]

    def _fail(self, line: str, code: int) -> None:
        with self._lock:
            if not self._left:
                end_now(line, code)
        _left_alone.set()


def _goodbye(error: BaseException | None, timeout: float) -> dict[str, Any]:
    text = " ".join(str(error).split())[:MESSAGE]
    if isinstance(error, UserError):  # the others, too, may be about to raise it: they have time
        return {"bye": text, "code": EXIT_USER_ERROR, "grace": timeout}
    if isinstance(error, KeyboardInterrupt):
        return {"bye": "it was interrupted", "code": EXIT_INTERRUPTED, "grace": 0}
    return {"bye": f"{type(error).__name__}: {text}", "code": 1, "grace": CRASHED}


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _offer(listener: socket.socket) -> dict[str, Any]:
    """Where process 0 listens: by the address it would use to reach others, by name, and, last, on this host."""
    host = socket.gethostname()
    addresses = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
        addresses.append(probe.getsockname()[0])
    offer = {"port": listener.getsockname()[1], "token": secrets.token_hex(16), "host": host}
    return offer | {"addresses": [*addresses, host, "127.0.0.1"]}


def _delay_aborts() -> None:
    # JAX aborts a process as soon as it misses process 0, often just before this module has said what happened. The
    # handler is C's sleep, given the signal's number (6) as seconds: the abort goes on when they are over.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _keep_alive(connection: socket.socket, timeout: float) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe = max(int(timeout / 6), 1)  # seconds: after three without an answer, and four more probes, it is lost
    for name, value in {"TCP_KEEPIDLE": 2 * probe, "TCP_KEEPINTVL": probe, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
