"""Server-sent events, cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.bench.answers import Answer, EventReader, parse_object
from edge_phi3.bench.errors import ExchangeError

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@given(
    events=st.lists(st.tuples(st.sampled_from(["", "result", "error"]), st.lists(LINE, min_size=1, max_size=3))),
    end=st.sampled_from([b"\n", b"\r\n"]),
    comment=st.booleans(),
    cuts=st.lists(st.integers(0, 400)),
)
def test_events_are_read_whole_wherever_the_network_cuts(
    events: list[tuple[str, list[str]]], end: bytes, comment: bool, cuts: list[int]
) -> None:
    body = b""
    for name, lines in events:
        if comment:
            body += b": keep-alive" + end + end
        if name:
            body += b"event: " + name.encode() + end
        body += b"".join(b"data: " + line.encode() + end for line in lines) + end
    seen: list[tuple[str, bytes]] = []
    answer = Answer()
    reader = EventReader(answer, lambda _, name, data: seen.append((name, data)))
    bounds = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    for start, stop in itertools.pairwise(bounds):
        reader.feed(body[start:stop])
    assert seen == [(name, "\n".join(lines).encode()) for name, lines in events]


def test_data_without_a_space_after_the_colon() -> None:
    seen: list[bytes] = []
    EventReader(Answer(), lambda _a, _n, data: seen.append(data)).feed(b'data:{"a":1}\n\ndata: [DONE]\n\n')
    assert seen == [b'{"a":1}', b"[DONE]"]


def test_an_answer_times_each_piece_and_ignores_empty_ones() -> None:
    answer = Answer()
    for text in ("Hel", "", "lo"):
        answer.add(text)
    assert answer.text == "Hello"
    assert len(answer.times) == 2
    assert answer.times[0] <= answer.times[1]


@pytest.mark.parametrize("data", [b"{", b"[1]", b"", b'"text"'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ExchangeError, match="The server sent"):
        parse_object(data)
