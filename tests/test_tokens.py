import pytest
from families import tiny_tokenizer

from workbench.errors import UnknownToken
from workbench.tokens import fold, joined, matching_ids, no_such_token, ordinary_ids, shown, token_id, token_strings


@pytest.fixture(scope="module")
def strings():
    return token_strings(tiny_tokenizer(), 300)


def test_tokens_are_spelled_as_text(strings):
    tokenizer = tiny_tokenizer()
    assert strings[tokenizer.convert_tokens_to_ids("Ġdog")] == " dog"
    assert strings[tokenizer.convert_tokens_to_ids("Ċ")] == "\\n"
    assert strings[tokenizer.convert_tokens_to_ids("Ģ")] == "\\x80"  # half a character
    assert strings[0] == "<s>"


def test_ids_beyond_the_tokenizer_are_named(strings):
    assert len(strings) == 300
    assert strings[299] == "<unused 299>"


def test_every_string_is_printable(strings, smollm):
    for token in [*strings, *smollm.token_strings]:
        assert token.isprintable()
        assert token


def test_strings_of_the_real_tokenizer_are_its_text(smollm):
    ids = smollm.tokenizer("The dog's naïve café").input_ids
    assert "".join(smollm.token_strings[i] for i in ids) == "The dog's naïve café"


def test_sentencepiece_spelling():
    class SentencePiece:
        all_special_ids = (0,)

        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, ids):
            return ["<s>", "▁dog", "<0x0A>", "<0xE2>"]

    assert token_strings(SentencePiece(), 4) == ["<s>", " dog", "\\n", "\\xe2"]  # pyright: ignore[reportArgumentType]


def test_shown_makes_outer_spaces_visible():
    assert [shown(t) for t in [" dog", "a b", "  ", "x "]] == ["·dog", "a b", "··", "x·"]
    assert joined([" a", "b"]) == "·a  b"


def test_matching():
    tokens = list(enumerate(["dog", " dog", " Dog", "dogs", " DOG ", "cat"]))
    assert matching_ids(tokens, "Dog", "folded") == [0, 1, 2, 4]
    assert matching_ids(tokens, " dog", "exact") == [1]
    assert matching_ids(tokens, "^ ?dogs?$", "regex") == [0, 1, 3]
    assert matching_ids(tokens, "bird", "folded") == []
    assert fold(" DOG ") == "dog"


def test_a_bad_expression_is_named():
    with pytest.raises(UnknownToken, match=r"'\(' is not a regular expression"):
        matching_ids([], "(", "regex")


def test_a_word_that_is_no_token_hints_at_others():
    error = no_such_token(["dog", " doge", "cat"], "dogecoin", "folded")
    assert "'dogecoin' (folded) is no single token" in str(error)
    assert "begin like it: 'dog', ' doge'" in str(error)


def test_one_token_by_its_string(strings):
    tokenizer = tiny_tokenizer()
    assert token_id(tokenizer, strings, " dog") == tokenizer.convert_tokens_to_ids("Ġdog")
    assert token_id(tokenizer, strings, "dog") == tokenizer.convert_tokens_to_ids("dog")
    assert token_id(tokenizer, strings, "\n") == token_id(tokenizer, strings, "\\n") == tokenizer.convert_tokens_to_ids("Ċ")
    with pytest.raises(UnknownToken, match=r"'cat' is no single token .* made of 'c', 'a', 't'\. ' cat', with a leading space"):
        token_id(tokenizer, strings, "cat")
    with pytest.raises(UnknownToken, match=r"'a' is the string of 2 tokens, \[1, 2\]\. Give one of these ids"):
        token_id(tokenizer, ["<s>", "a", "a"], "a")  # as SentencePiece's byte 0x61 and letter


def test_ordinary_tokens(smollm):
    assert ordinary_ids(tiny_tokenizer(), 300) == list(range(1, len(tiny_tokenizer())))
    assert ordinary_ids(smollm.tokenizer, smollm.d_vocab) == list(range(17, 49_152))
