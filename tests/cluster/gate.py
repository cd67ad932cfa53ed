"""A way to a server that can be shut: connections through it are refused, and those that are open are cut."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class Gate:
    """Forwards connections from a port of its own.

    Args:
        port: The server's, on this machine.
        host: Address to listen on.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._server, self.host = port, host
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()

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
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


@contextlib.contextmanager
def gate_to(address: str, host: str = "127.0.0.1") -> Iterator[Gate]:
    """An open gate to a server, by its address, which ends in the port."""
    gate = Gate(int(address.rpartition(":")[2]), host)
    gate.open()
    try:
        yield gate
    finally:
        gate.shut()
