"""API keys and tiers: nobody without a known key, everybody out when there is none, changes at once, no key in any log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import time
from pathlib import Path

import pytest

from serving import keys
from serving.keys import NONE_CONFIGURED, NONE_GIVEN, UNKNOWN, Keys, without_key
from serving.spec import Tier


def entry(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(path: Path, **clients: str) -> Keys:
    path.write_text(json.dumps({"clients": {name: {"sha256": entry(key)} for name, key in clients.items()}}))
    return Keys(path)


def refusal(known: Keys, headers: list[tuple[bytes, bytes]]) -> str | None:
    caller = known.caller(headers)
    return caller if isinstance(caller, str) else None


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("authorization", "Bearer key-a", None),
        ("authorization", "bearer   key-a ", None),
        ("authorization", "Bearer key-b", None),
        ("api-key", "key-a", None),
        ("api-key", " key-b", None),
        ("authorization", "Bearer key-c", UNKNOWN),
        ("authorization", "Bearer key-", UNKNOWN),
        ("authorization", "Bearer key-ab", UNKNOWN),
        ("authorization", f"Bearer {entry('key-a')}", UNKNOWN),
        ("api-key", "Bearer key-a", UNKNOWN),
        ("authorization", "key-a", NONE_GIVEN),
        ("authorization", "Basic key-a", NONE_GIVEN),
        ("authorization", "Bearer", NONE_GIVEN),
        ("authorization", "Bearer ", NONE_GIVEN),
        ("authorization", "", NONE_GIVEN),
        ("api-key", "", NONE_GIVEN),
        ("x-api-key", "key-a", NONE_GIVEN),
    ],
)
def test_a_known_key_and_nothing_else_lets_a_client_in(tmp_path: Path, name: str, value: str, told: str | None) -> None:
    known = write(tmp_path / "keys", team_a="key-a", team_b="key-b")
    assert refusal(known, [(b"host", b"x"), (name.encode(), value.encode())]) == told


def test_no_header_is_no_key_and_one_good_key_of_two_is_enough(tmp_path: Path) -> None:
    known = write(tmp_path / "keys", team_a="key-a")
    assert refusal(known, []) == NONE_GIVEN
    assert refusal(known, [(b"authorization", b"Bearer of-another-system"), (b"api-key", b"key-a")]) is None
    assert refusal(known, [(b"authorization", b"Bearer \xff\x00")]) == UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " \n",
        "{}",
        "[]",
        "not json",
        "null",
        '{"a": "key-a"}',
        '{"clients": []}',
        '{"tiers": 1}',
        '{"clients": {"a": 1}}',
    ],
)
def test_without_any_key_nobody_is_let_in_and_is_told_how_one_is_added(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    told = refusal(Keys(path), bearer("key-a"))
    assert told == NONE_CONFIGURED
    assert "pulumi config set --secret --path 'drydock:api_keys.CLIENT' VALUE" in told


def test_a_folder_or_bytes_in_place_of_the_file_let_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert refusal(Keys(tmp_path), bearer("a")) == refusal(Keys(tmp_path / "bytes"), bearer("a")) == NONE_CONFIGURED


def test_a_change_holds_with_the_next_request_also_through_the_kubelets_links(tmp_path: Path) -> None:
    """A mounted Secret: FILE -> ..data/FILE, and `..data` is a link that the kubelet replaces by a rename."""
    for number, key in enumerate(("key-a", "key-b")):
        (tmp_path / f"..{number}").mkdir()
        write(tmp_path / f"..{number}" / "keys", client=key)
        os.utime(tmp_path / f"..{number}" / "keys", (1, 1))  # the same second, the same size
    os.symlink("..0", tmp_path / "..data")
    os.symlink("..data/keys", tmp_path / "keys")
    known = Keys(tmp_path / "keys")
    assert (refusal(known, bearer("key-a")), refusal(known, bearer("key-b"))) == (None, UNKNOWN)
    os.symlink("..1", tmp_path / "..new")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert (refusal(known, bearer("key-a")), refusal(known, bearer("key-b"))) == (UNKNOWN, None)
    os.unlink(tmp_path / "keys")
    assert refusal(known, bearer("key-b")) == NONE_CONFIGURED
    write(tmp_path / "keys", client="key-c")
    assert refusal(known, bearer("key-c")) is None


def test_hashes_are_compared_in_constant_time_and_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    plain = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return plain(a, b)

    known = write(tmp_path / "keys", a="key-a", b="key-b", c="key-c")
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert refusal(known, bearer("key-a")) is None
    assert compared == [(entry("key-a"), entry(key)) for key in ("key-a", "key-b", "key-c")]


def test_no_key_and_no_hash_is_ever_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "keys"
    hashes = {"good": entry("key-a"), "plain": "SECRET-plain", "upper": entry("x").upper()}
    clients: dict[str, object] = {name: {"sha256": given} for name, given in hashes.items()}
    path.write_text(json.dumps({"clients": clients | {"bare": "SECRET-bare"}}))
    known = Keys(path)
    for key in ("key-a", "SECRET-guess"):
        refusal(known, bearer(key))
    told = caplog.text
    assert (
        "client 'plain': expected sha256: that of its key" in told
        and "'upper'" in told
        and "'bare'" in told
        and "1 clients" in told
    )
    assert "SECRET" not in told and "key-a" not in told
    assert not any(entry(key)[:16] in told.lower() for key in ("key-a", "x"))
    caplog.clear()
    refusal(known, bearer("key-a"))
    assert not caplog.text, "once a change, not once a request"


def test_a_missing_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = Keys(tmp_path / "keys")
    for _ in range(3):
        refusal(known, bearer("a"))
    assert caplog.text.count("nobody is let in") == 1


def test_a_request_costs_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = write(tmp_path / "keys", **{f"client{n}": f"key-{n}" for n in range(20)})
    assert refusal(known, bearer("key-7")) is None
    monkeypatch.setattr(keys, "_parse", lambda *_: pytest.fail("read again without a change"))
    started = time.process_time()
    for _ in range(1000):
        refusal(known, bearer("key-7"))
    assert time.process_time() - started < 0.3, "far below a millisecond each"


def test_a_client_has_the_limits_of_its_tier_and_without_one_the_standard(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(
        json.dumps(
            {
                "tiers": {"batch": {"output_tokens": 512}, "standard": {"n": 2}},
                "clients": {
                    "web": {"sha256": entry("key-w")},
                    "nightly": {"sha256": entry("key-n"), "tier": "batch"},
                },
            }
        )
    )
    known = Keys(tmp_path / "keys")
    assert known.caller(bearer("key-w")) == ("web", "standard", Tier(n=2))
    assert known.caller(bearer("key-n")) == ("nightly", "batch", Tier(output_tokens=512))


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ({}, "client 'nightly': its tier is none of: standard"),
        ({"batch": {"output_token": 1}}, "tier 'batch': output_token: Extra inputs are not permitted"),
        ({"batch": {"n": 0, "waiting": 0}}, "tier 'batch': waiting: Input should be greater than or equal to 1"),
        ({"batch": None}, "tier 'batch'"),
    ],
)
def test_a_wrong_tier_shuts_out_its_clients_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tiers: dict[str, object], told: str
) -> None:
    clients = {"web": {"sha256": entry("key-w")}, "nightly": {"sha256": entry("key-n"), "tier": "batch"}}
    (tmp_path / "keys").write_text(json.dumps({"tiers": tiers, "clients": clients}))
    known = Keys(tmp_path / "keys")
    assert refusal(known, bearer("key-n")) == UNKNOWN
    assert refusal(known, bearer("key-w")) is None
    assert told in caplog.text


def test_a_wrong_standard_tier_is_not_replaced_by_one_without_limits(tmp_path: Path) -> None:
    clients = {"web": {"sha256": entry("key-w")}}
    (tmp_path / "keys").write_text(json.dumps({"tiers": {"standard": {"n": -1}}, "clients": clients}))
    assert refusal(Keys(tmp_path / "keys"), bearer("key-w")) == NONE_CONFIGURED


def test_vllm_has_no_use_for_the_key() -> None:
    headers = [(b"host", b"x"), (b"authorization", b"Bearer k"), (b"api-key", b"k"), (b"content-length", b"2")]
    assert without_key(headers) == [(b"host", b"x"), (b"content-length", b"2")]
