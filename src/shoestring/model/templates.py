"""Chat templates: messages as the tokens that a model was trained on, and what stands around a user's words."""

from collections.abc import Mapping, Sequence
from typing import Any

from shoestring.errors import RequestError

__all__ = ["around_words", "encode_messages", "has_template"]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer (or None) can be given messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_messages(tokenizer: Any, messages: Sequence[Any], name: str = "the model") -> list[int]:
    """Token ids of messages, and of what opens the answer.

    Args:
        name: the model's, for errors.

    Raises:
        RequestError: no template, a malformed message, or messages that the template refuses.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RequestError(f"a message needs a role and content, and this is {message!r}")
    if not has_template(tokenizer):
        raise RequestError(f"{name} has no chat template; give the prompt as text")
    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception as error:  # templates raise jinja errors of their own wording
        raise RequestError(f"the chat template refuses these messages: {error}") from error


def around_words(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The tokens in front of a user's words and those behind them, up to the answer.

    None where there is no template, where it wants more than a user's words, or where nothing stands on one side.
    """
    if not has_template(tokenizer):
        return None
    try:
        one, other = (encode_messages(tokenizer, [{"role": "user", "content": text}]) for text in ("0", "x"))
    except RequestError:
        return None
    same = [left == right for left, right in zip(one, other, strict=False)]
    behind = [left == right for left, right in zip(one[::-1], other[::-1], strict=False)]
    before = same.index(False) if False in same else 0
    after = behind.index(False) if False in behind else 0
    return (one[:before], one[len(one) - after :]) if before and after else None
