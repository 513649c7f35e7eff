"""Captions through core's own tokenizer of Wan, with a small vocabulary."""

import io

import pytest
import sentencepiece
import torch
from comfy.text_encoders.wan import WanT5Tokenizer
from worldstereo_fp8.worldstereo.prompt import clean_caption, encode_caption

CAPTION = "A kitchen (seen from the door) with a ((red)) table:1.3 and (a bowl:1.5) \\(left\\)."


class Encoder:
    """A CLIP whose tokenizer is core's, and whose conditioning is the tokens themselves."""

    def __init__(self):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([CAPTION] * 50),
            model_writer=model,
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="identity",
            minloglevel=2,
        )
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        data = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
        self.tokenizer = WanT5Tokenizer(tokenizer_data={"spiece_model": data})

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, tokens):
        return tokens["umt5xxl"][0]


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


def test_parentheses_are_text(encoder):
    tokens, count, remarks = encode_caption(encoder, CAPTION)
    assert len(tokens) == 512 and {weight for _, weight in tokens} == {1.0}
    ids = [token for token, _ in tokens[:count]]
    assert ids[-1] == 1 and encoder.model.decode(ids[:-1]) == CAPTION and not remarks
    assert {weight for _, weight in encoder.tokenize(CAPTION)["umt5xxl"][0]} > {1.0}  # what core alone makes of it


def test_a_long_caption_is_cut_at_512_tokens_and_reported(encoder):
    text = CAPTION * 50
    tokens, count, remarks = encode_caption(encoder, text)
    whole = encoder.model.encode(text)
    assert [token for token, _ in tokens] == [*whole[:511], 1]
    assert count == len(whole) + 1
    assert remarks == [f"the caption has {count} tokens; the last {count - 512} are left out"]


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  A\n\ttable   &amp;amp; two\u00a0chairs ", "A table & two chairs"),
        ("\u201cIt\u2019s\u201d &lsquo;old&rsquo;", "\"It's\" 'old'"),
        ("a caf\u00c3\u00a9 \u00e2\u20ac\u201c \u00e2\u20ac\u0153x\u00e2\u20ac\u009d", 'a caf\u00e9 \u2013 "x"'),
        ("a caf\u00e9, \u6c34 and 50 \u20ac", "a caf\u00e9, \u6c34 and 50 \u20ac"),
        ("e\u0301", "\u00e9"),
    ],
)
def test_captions_are_cleaned(text, cleaned):
    assert clean_caption(text) == cleaned


def test_another_text_encoder_is_refused():
    class Other:
        def tokenize(self, text):
            return {"l": [[]], "g": [[]]}

    with pytest.raises(ValueError, match="clip is l, g; WorldStereo needs UMT5-XXL"):
        encode_caption(Other(), "text")
