"""Incremental text: pieces join to the whole, characters stay whole, stop strings do not depend on the cuts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.gateway.text import Detokenizer, StopMatcher, special_ids
from tests.gateway_fakes import byte_tokenizer


def metaspace_tokenizer():
    """Leading-space words and byte fallback, as SentencePiece models have them."""
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "▁the": 3, "▁a": 4, "b": 5, "é": 6}
    vocab |= {f"<0x{byte:02X}>": 7 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def wordpiece_tokenizer():
    words = ["[UNK]", "do", "n", "'", "t", "##ing", "##s", ".", "it", "is", "'s", ","]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def plain_tokenizer():
    return Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["one", "two", "three", "four"])})
    )


TOKENIZERS = {
    "byte-level": byte_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "wordpiece": wordpiece_tokenizer(),
    "no decoder": plain_tokenizer(),
}


def assert_exact(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer))
    pieces = [detokenizer.add(id_) for id_ in ids]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    assert_exact(tokenizer, data.draw(st.lists(st.integers(0, size - 1), max_size=150)))


def test_a_special_token_does_not_end_a_run_of_bytes():
    assert_exact(TOKENIZERS["metaspace"], [7, 1, 135])
    assert_exact(TOKENIZERS["metaspace"], [7, 100_000, 135])


@pytest.mark.parametrize("name", ["byte-level", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_long_runs_of_few_kinds_of_tokens(name, data):
    """Windows are cut inside runs of bytes, of spaces and of special tokens, or not at all."""
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    runs = data.draw(
        st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, 70)), min_size=1, max_size=5)
    )
    assert_exact(tokenizer, [id_ for id_, count in runs for _ in range(count)])


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80))
def test_no_piece_ends_inside_a_character(text):
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer))
    shown = ""
    for id_ in tokenizer.encode(text).ids:
        shown += detokenizer.add(id_)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_an_incomplete_character_is_held_until_it_is_whole():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer))
    assert [detokenizer.add(i) for i in tokenizer.encode("a😀").ids] == ["a", "", "", "", "😀"]
    detokenizer.add(tokenizer.encode("😀").ids[0])
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None, frozenset())
    assert (detokenizer.add(3), detokenizer.flush()) == ("", "")


def reference(text, stops):
    """Character by character: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_cuts(pieces, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        assert reference("".join(pieces), stops)[0].startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.found) == reference("".join(pieces), stops)
