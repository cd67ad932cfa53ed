"""A way to a server that can be shut (connections are refused, and open ones cut), slowed down, or cut in between."""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator


class Gate:
    """Forwards connections from a port of its own.

    Args:
        port: The server's, on this machine.
        host: Address to listen on.

    Attributes:
        rate: Bytes per second of each connection, to the server.
        cuts: Cut the connection after so many bytes to the server, counted over all, for each number in the list.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._server, self.host = port, host
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.rate, self.cuts, self._lock = math.inf, list[int](), threading.Lock()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    def open(self) -> None:
        listener = self._listener = socket.create_server((self.host, self.port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                for source, target in ((client, server), (server, client)):
                    self._open.add(source)
                    arguments = source, target, source is client
                    threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**12 if math.isfinite(self.rate) else 2**16):
                if to_server:
                    time.sleep(len(data) / self.rate)
                    if self._is_cut(len(data)):
                        data = data[: len(data) // 2]
                        source.shutdown(socket.SHUT_RDWR)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()

    def _is_cut(self, size: int) -> bool:
        with self._lock:
            if not self.cuts:
                return False
            self.cuts[0] -= size
            if self.cuts[0] > 0:
                return False
            self.cuts.pop(0)
            return True


@contextlib.contextmanager
def gate_to(address: str, host: str = "127.0.0.1") -> Iterator[Gate]:
    """An open gate to a server, by its address, which ends in the port."""
    gate = Gate(int(address.rpartition(":")[2]), host)
    gate.open()
    try:
        yield gate
    finally:
        gate.shut()
