"""Captions in the form that WorldStereo was trained on: cleaned plain text of at most 512 tokens."""

import html
import re
import unicodedata
from typing import Any

from .comfy_model import TEXT_TOKENS

ENCODER = "umt5xxl"  # core's name for the text encoder of Wan
STRAIGHT = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")


def clean_caption(text: str) -> str:
    """A caption without HTML entities, wrongly decoded letters, curly quotes and runs of white space.

    Diffusers' `prompt_clean` does this with ftfy and html. Of ftfy this does the part that captions need: UTF-8 that
    was read as Windows-1252, quotes, and NFC.
    """
    text = _decoded(html.unescape(html.unescape(text)))
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text.translate(STRAIGHT))).strip()


def _decoded(text: str) -> str:
    """The text decoded again, if it is UTF-8 that was read as Windows-1252 ("cafÃ©"); any other text as it is."""
    try:
        return b"".join(_byte(letter) for letter in text).decode("utf-8")
    except UnicodeError:
        return text


def _byte(letter: str) -> bytes:
    """The byte that Windows-1252 decodes to this letter. The five bytes it leaves undefined become control
    characters."""
    return letter.encode("latin-1" if "\x80" <= letter <= "\x9f" else "cp1252")


def encode_caption(clip: Any, text: str) -> tuple[list, int, list[str]]:
    """A caption through UMT5-XXL: the CONDITIONING, the number of its tokens, including the end token, and remarks.

    Core reads parentheses as weights, unless they are escaped. A caption of more than 512 tokens is cut and keeps its
    end token, as with the original's tokenizer. Raises ValueError for another text encoder.
    """
    caption = clean_caption(text)
    tokens = clip.tokenize(caption.replace("(", r"\(").replace(")", r"\)"))
    if ENCODER not in tokens:
        raise ValueError(
            f"clip is {', '.join(tokens)}; WorldStereo needs UMT5-XXL. Choose umt5_xxl in Load CLIP, with the type wan."
        )
    batch = tokens[ENCODER][0]
    count = sum(1 for token in batch if token[0] != 0)  # 0 pads
    remarks = []
    if len(batch) > TEXT_TOKENS:
        tokens = {ENCODER: [batch[: TEXT_TOKENS - 1] + batch[-1:]]}
        remarks.append(f"the caption has {count} tokens; the last {count - TEXT_TOKENS} are left out")
    return clip.encode_from_tokens_scheduled(tokens), count, remarks
