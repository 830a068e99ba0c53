"""The certificate authority of one local cloud, and the certificate by which its front is all of Azure's hosts."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.files import write_atomic

LIFE = datetime.timedelta(days=3650)  # of a local cloud's folder, generously


def context(folder: Path, names: Sequence[str]) -> ssl.SSLContext:
    """For a TLS server that is `names` (a `*` may be a first label), and 127.0.0.1.

    `folder` gets, once, the authority (`ca.key`, `ca.crt`) and the server's certificate (`tls.key`, `tls.crt`), and
    each time `ca-bundle.crt`: whom this machine trusts, and the authority.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "tls.crt").exists():  # written last
        _make(folder, names)
    # The machine's own authorities, by SSL_CERT_FILE or where its OpenSSL looks; else Mozilla's.
    machine = Path(ssl.get_default_verify_paths().cafile or certifi.where())
    write_atomic(folder / "ca-bundle.crt", machine.read_text().rstrip() + "\n" + (folder / "ca.crt").read_text())
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return made


def private_key(path: Path) -> rsa.RSAPrivateKey:
    """The RSA key in the PEM file `path`, for this user's eyes only; made where there is none."""
    if path.exists():
        found = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(found, rsa.RSAPrivateKey)
        return found
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    written = path.with_name(f".{path.name}.new")
    written.unlink(missing_ok=True)
    with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
    written.replace(path)
    return key


def _make(folder: Path, names: Sequence[str]) -> None:
    authority, server = private_key(folder / "ca.key"), private_key(folder / "tls.key")
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Drydock local cloud")])
    who = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    root = (
        _builder(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(who, critical=False)
        .sign(authority, hashes.SHA256())
    )
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    leaf = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), issuer, server.public_key())
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(who), critical=False)
        .sign(authority, hashes.SHA256())
    )
    for name, certificate in (("ca.crt", root), ("tls.crt", leaf)):
        write_atomic(folder / name, certificate.public_bytes(serialization.Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a clock may have been put back
        .not_valid_after(now + LIFE)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
