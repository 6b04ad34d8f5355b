"""What is sealed opens in its own place only, and not after any change."""

import json
import os
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from cloister.settings import Settings
from cloister.vault import seal
from cloister.vault.seal import InvalidTag

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def vectors(name: str) -> list[tuple[dict, dict]]:
    """Groups and tests of a file of Wycheproof's."""
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    held = json.loads((folder / "wycheproof" / name).read_text())
    return [(group, test) for group in held["testGroups"] for test in group["tests"]]


def raw(test: dict, *names: str) -> list[bytes]:
    return [bytes.fromhex(test[name]) for name in names]


@pytest.mark.parametrize("size", [0, 1, 251, 252, 253, 300, 16384, 70_001])
def test_a_record_comes_back_as_it_was(size: int) -> None:
    content = os.urandom(size)
    sealed = seal.seal_record(KEY, b"here", content)
    assert seal.open_record(KEY, b"here", sealed) == content
    for key, place in ((OTHER, b"here"), (KEY, b"there")):
        with pytest.raises(InvalidTag):
            seal.open_record(key, place, sealed)


def test_every_flipped_bit_cut_and_addition_is_found() -> None:
    sealed = seal.seal_record(KEY, b"here", b"an ordinary sentence")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidTag):
            seal.open_record(KEY, b"here", bytes(changed))
    cut = [sealed[:size] for size in range(len(sealed))]
    for changed in (*cut, sealed + b"\0", b"\0" + sealed):
        with pytest.raises(InvalidTag):
            seal.open_record(KEY, b"here", changed)


@given(st.integers(0, 1 << 40))
def test_padding_adds_at_most_an_eighth_and_never_shrinks(size: int) -> None:
    padded = seal.padded_bytes(size)
    assert padded >= size + 4
    assert padded == 256 or padded <= (size + 4) * 1.125
    assert seal.padded_bytes(padded - 4) == padded


def test_a_length_tells_little() -> None:
    assert len({seal.padded_bytes(size) for size in range(100_000)}) < 150


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_no_two_lists_of_fields_share_a_context(one: list[bytes], other: list[bytes]) -> None:
    assert (seal.context("x", *one) == seal.context("x", *other)) == (one == other)


@pytest.mark.parametrize("size", [
    0, 1, 16383, 16384, 16385, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 * (1 << 20) + 3 * 16384,
])
def test_a_large_message_comes_back_however_it_is_cut(size: int) -> None:
    rng = random.Random(size)
    content = rng.randbytes(size)
    cut = sorted(rng.randint(0, size) for _ in range(3))
    parts = [content[a:b] for a, b in zip([0, *cut], [*cut, size], strict=True)]
    sealed = b"".join(bytes(piece) for piece in seal.seal_parts(KEY, b"here", parts))
    assert len(sealed) == seal.sealed_bytes(size)
    target = bytearray(size)
    seal.open_into(KEY, b"here", pieces(sealed), memoryview(target))
    assert target == content


def pieces(sealed: bytes) -> list[bytes]:
    return [sealed[at:at + seal.PIECE_BYTES] for at in range(0, len(sealed), seal.PIECE_BYTES)]


def test_where_a_large_message_was_changed_none_of_it_is_given_out() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng, size = random.Random(seed), 100_000
    content = b"\xff" * size
    sealed = b"".join(bytes(piece) for piece in seal.seal_parts(KEY, b"here", [content]))
    chunk = 16384 + 16
    changes = []
    for _ in range(200):
        changed = bytearray(sealed)
        changed[rng.randrange(len(sealed))] ^= 1 << rng.randrange(8)
        changes.append(bytes(changed))
    changes += [sealed[:-1], sealed + b"\0", sealed[:56 + chunk], b"",
                # Two chunks in each other's place.
                sealed[:56] + sealed[56 + chunk:56 + 2 * chunk] + sealed[56:56 + chunk]
                + sealed[56 + 2 * chunk:]]
    for changed in changes:
        target = bytearray(b"\1" * size)
        with pytest.raises(InvalidTag):
            seal.open_into(KEY, b"here", pieces(changed), memoryview(target))
        assert not any(target)
    for wrong in (size - 1, size + 1):
        with pytest.raises(InvalidTag):
            seal.open_into(KEY, b"here", pieces(sealed), memoryview(bytearray(wrong)))


def test_no_two_sealings_are_alike() -> None:
    heads = {seal.seal_record(KEY, b"here", b"same")[:24] for _ in range(2000)}
    assert len(heads) == 2000


@pytest.mark.parametrize("wrapped", [b"", bytes(40), bytes(24)])
def test_what_was_not_wrapped_does_not_unwrap(wrapped: bytes) -> None:
    with pytest.raises(InvalidTag):
        seal.unwrap(KEY, wrapped)
    with pytest.raises(InvalidTag):
        seal.unwrap(OTHER, seal.wrap(KEY, KEY))
    with pytest.raises(InvalidTag):  # 16 bytes are no key of ours
        seal.unwrap(KEY, seal.wrap(KEY, bytes(16)))
    assert seal.unwrap(KEY, seal.wrap(KEY, OTHER)) == OTHER


def test_key_wrapping_agrees_with_wycheproof() -> None:
    """AES-KWP. Keys of other sizes than ours are wrapped, and refused by `unwrap`."""
    tried = 0
    for _, test in vectors("aes_kwp_test.json"):
        key, message, wrapped = raw(test, "key", "msg", "ct")
        if test["result"] == "valid" and len(message) == seal.KEY_BYTES:
            assert seal.wrap(key, message) == wrapped
            assert seal.unwrap(key, wrapped) == message
        else:
            with pytest.raises(InvalidTag):
                seal.unwrap(key, wrapped)
        tried += 1
    assert tried == 254


def test_derivation_agrees_with_wycheproof() -> None:
    """HKDF-SHA256; the vault takes 32 bytes, which longer outputs of the vectors begin with."""
    tried = 0
    for _, test in vectors("hkdf_sha256_test.json"):
        key, salt, info, made = raw(test, "ikm", "salt", "info", "okm")
        if test["result"] == "valid":
            size = min(seal.KEY_BYTES, test["size"])
            assert seal.derive(key, salt, info)[:size] == made[:size]
            tried += 1
    assert tried > 75


def test_the_cipher_below_agrees_with_wycheproof() -> None:
    """AES-256-GCM with nonces of 12 bytes, as Cobblestone-256 uses it. Left out: other key and
    nonce sizes, and ChaCha20-Poly1305 and HKDF-SHA512, which the vault never calls."""
    tried = 0
    for group, test in vectors("aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        key, nonce, aad, message, sealed, tag = raw(test, "key", "iv", "aad", "msg", "ct", "tag")
        if test["result"] == "valid":
            assert AESGCM(key).encrypt(nonce, message, aad) == sealed + tag
            assert AESGCM(key).decrypt(nonce, sealed + tag, aad) == message
        else:
            with pytest.raises(InvalidTag):
                AESGCM(key).decrypt(nonce, sealed + tag, aad)
        tried += 1
    assert tried > 60


def test_every_derivation_is_that_of_the_published_examples() -> None:
    held = json.loads((Path(__file__).parents[2] / "vectors" / "vault.json").read_text())
    for row in held["contexts"]:
        fields = [bytes.fromhex(f["hex"]) if isinstance(f, dict) else f for f in row["fields"]]
        assert seal.context(row["label"], *fields).hex() == row["bytes"]
    for row in held["derive"]:
        assert seal.derive(*raw(row, "key", "salt", "info")).hex() == row["out"]
    for row in held["mac"]:
        assert seal.mac(*raw(row, "key", "message")).hex() == row["out"]
    for row in held["wrap"]:
        assert seal.wrap(*raw(row, "wrapping", "key")).hex() == row["out"]
    for row in held["padded"]:
        assert seal.padded_bytes(row["size"]) == row["bytes"]
    for row in held["records"]:
        key, place, sealed, content = raw(row, "key", "place", "sealed", "content")
        assert seal.open_record(key, place, sealed) == content
