"""The header: every field survives, and no bytes whatever raise anything but WireError."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.wire.header import (
    CREDITS_OFFSET,
    HEADER_NBYTES,
    Header,
    Kind,
    Wire,
)

LIMIT = 1 << 30
BITS = {
    "layer": 16, "epoch": 32, "width": 32, "block": 64, "trace": 64, "num_rows": 32,
    "num_pairs": 32, "target": 16, "attempt": 16, "microbatch": 16, "payload_nbytes": 30,
    "landed": 8, "credits": 32, "queue_us": 32, "compute_us": 32, "combine_us": 32, "answer": 32,
}  # fmt: skip

fields = st.fixed_dictionaries(
    {name: st.integers(0, (1 << bits) - 1) for name, bits in BITS.items()}
    | {"kind": st.sampled_from(Kind), "wire": st.sampled_from(Wire)}
).flatmap(
    lambda values: st.integers(0, values["payload_nbytes"]).map(
        lambda rows: values | {"rows_nbytes": rows}
    )
)

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


def packed(header):
    buffer = bytearray(b"\xff" * HEADER_NBYTES)
    header.pack_into(buffer)
    return buffer


@given(fields)
def test_round_trip_of_every_field(values):
    header = Header(**values)
    assert Header.unpack_from(packed(header), max_payload_nbytes=LIMIT) == header


def test_the_test_knows_every_field():
    assert set(BITS) | {"kind", "wire", "rows_nbytes"} == set(Header.__slots__)


@pytest.mark.parametrize("name", sorted(BITS))
@pytest.mark.parametrize("value", [-1, 1 << 64, 1.5, None])
def test_a_value_out_of_range_is_an_error(name, value):
    header = Header(Kind.DISPATCH)
    setattr(header, name, value)
    with pytest.raises(WireError, match="out of range"):
        header.pack_into(bytearray(HEADER_NBYTES))


@given(st.binary(max_size=HEADER_NBYTES * 2), st.integers(0, LIMIT))
def test_any_bytes_decode_or_raise_wire_error(data, limit):
    try:
        header = Header.unpack_from(data, max_payload_nbytes=limit)
    except WireError:
        return
    assert header.payload_nbytes <= limit


@given(
    fields, st.lists(st.tuples(st.integers(0, HEADER_NBYTES - 1), st.integers(0, 255)), max_size=4)
)
def test_a_damaged_header_decodes_or_raises_wire_error(values, damage):
    data = packed(Header(**values))
    for offset, value in damage:
        data[offset] = value
    try:
        header = Header.unpack_from(bytes(data), max_payload_nbytes=LIMIT)
    except WireError:
        return
    assert isinstance(header.kind, Kind)
    assert isinstance(header.wire, Wire)
    header.pack_into(bytearray(HEADER_NBYTES))


@pytest.mark.parametrize(
    ("offset", "value", "sentence"),
    [
        (0, 0, "magic 0xa700, expected 0xa701"),
        (2, 9, "wire version 9, this process speaks 5"),
        (3, 99, "kind 99"),
        (4, 99, "wire 99"),
    ],
)
def test_errors_name_the_field(offset, value, sentence):
    data = packed(Header(Kind.RELAY))
    data[offset] = value
    with pytest.raises(WireError, match=sentence):
        Header.unpack_from(data, max_payload_nbytes=LIMIT)


def test_the_limit_is_checked_before_anything_is_allocated():
    data = packed(Header(Kind.RELAY, payload_nbytes=LIMIT))
    with pytest.raises(WireError, match="the limit is 1000"):
        Header.unpack_from(data, max_payload_nbytes=1000)


@pytest.mark.parametrize("nbytes", [0, 1, HEADER_NBYTES - 1])
def test_a_short_message_is_an_error(nbytes):
    with pytest.raises(WireError, match=f"message of {nbytes} bytes"):
        Header.unpack_from(bytes(nbytes), max_payload_nbytes=LIMIT)


def test_padding_is_zero_and_credits_are_where_links_write_them():
    plain, granted = packed(Header(Kind.CREDIT)), packed(Header(Kind.CREDIT, credits=0x01020304))
    assert plain[CREDITS_OFFSET : CREDITS_OFFSET + 4] == bytes(4)
    assert granted[CREDITS_OFFSET : CREDITS_OFFSET + 4] == bytes([4, 3, 2, 1])
    assert plain[-20:] == bytes(20)


def test_pack_at_an_offset_leaves_the_rest_alone():
    buffer = bytearray(b"\xee" * (HEADER_NBYTES + 20))
    Header(Kind.PARTIAL, layer=7).pack_into(buffer, 10)
    assert buffer[:10] == buffer[-10:] == b"\xee" * 10
    assert Header.unpack_from(buffer, 10, max_payload_nbytes=0).layer == 7


def test_wire_names():
    assert [Wire.parse(name) for name in ("fp8", "BF16", "fp32")] == list(Wire)
    with pytest.raises(ValueError, match="not 'fp16'"):
        Wire.parse("fp16")


def test_rows_are_part_of_the_payload():
    header = Header(Kind.DISPATCH, payload_nbytes=100, rows_nbytes=101)
    with pytest.raises(WireError, match="101 bytes of rows in a payload of 100"):
        Header.unpack_from(packed(header), max_payload_nbytes=LIMIT)
