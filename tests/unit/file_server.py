"""A web server on loopback with one file, as the wide net has them: by HTTPS, with ETag and ranges, and with faults."""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from localcloud.loopback import LoopbackServer


class FileServer(LoopbackServer):
    """Answers every path with `data`. `seen` holds the `Range` of every request, or "all".

    `fault(number of the request from 0)` may change the answer: a status, headers, how many bytes of the body come before
    the connection ends, how many seconds pass before anything does.
    """

    def __init__(self, data: bytes, *, certificate: Path | None = None) -> None:
        self.data, self.etag = data, '"1"'
        self.seen: list[str] = []
        self.fault: Callable[[int], dict[str, object]] = lambda number: {}
        super().__init__(_File)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.url = self.url.replace("http://", "https://")

    def handle_error(self, *_: object) -> None:
        """Clients hang up: that is what some tests want."""


class _File(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        fault = server.fault(len(server.seen))
        server.seen.append(asked or "all")
        threading.Event().wait(float(str(fault.get("seconds", 0))))
        found = re.fullmatch(r"bytes=(\d+)-", asked)
        going_on = found is not None and server.etag != "" and self.headers.get("If-Range") == server.etag
        start = int(found[1]) if found and going_on else 0
        body = bytes(fault.get("body", server.data))[start:]  # type: ignore[call-overload]
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/jsonl"}
        headers |= {"ETag": server.etag} if server.etag else {}
        headers |= {"Content-Range": f"bytes {start}-{len(server.data) - 1}/{len(server.data)}"} if going_on else {}
        self.send_response(int(str(fault.get("status", 206 if going_on else 200))))
        for name, value in (headers | dict(fault.get("headers", {}))).items():  # type: ignore[call-overload]
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: int(str(fault.get("bytes", len(body))))])


def authority(folder: Path) -> tuple[Path, Path]:
    """`(certificate of an own authority, key and certificate of a server on 127.0.0.1 that it signed)`, as PEM files."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("drydock test", "127.0.0.1")]

    def signed(which: int, *extensions: x509.ExtensionType) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[which])
            .issuer_name(names[0])
            .public_key(keys[which].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    known, server = folder / "authority.pem", folder / "server.pem"
    known.write_bytes(
        signed(
            0,
            x509.BasicConstraints(ca=True, path_length=None),
            x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key()),
        )
    )
    key = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server.write_bytes(key + signed(1, host, x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())))
    return known, server
