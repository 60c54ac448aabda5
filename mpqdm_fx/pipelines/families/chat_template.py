"""What a tokenizer's chat template puts around a prompt.

An exported folder holds it as two strings, so that it draws where no templates are rendered.
"""

from typing import Any

from mpqdm_fx.errors import ConfigError, first_line

__all__ = ["around_prompts"]

_PROBES = ("first prompt", "  Another: <b>'One'</b>\n ")


def around_prompts(tokenizer: Any, *, thinking: bool) -> dict[str, str]:
    """The text `before` and `after` the message of a user, up to the answer's beginning.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        thinking: As of the template's `enable_thinking`.

    Raises:
        ConfigError: There is no template, it fails, or it writes prompts otherwise than they are.
    """
    pairs = [_around(tokenizer, prompt, thinking=thinking) for prompt in _PROBES]
    if None in pairs or len(set(pairs)) > 1:
        raise ConfigError(
            "the chat template of the tokenizer changes prompts, or what stands around them; "
            "only templates that put fixed text around a prompt can be exported"
        )
    before, after = pairs[0]
    return {"before": before, "after": after}


def _around(tokenizer: Any, prompt: str, *, thinking: bool) -> Any:
    """Both texts around one prompt; None if the prompt is not there exactly once."""
    messages = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except Exception as error:  # whatever templates raise
        raise ConfigError(
            f"the tokenizer has no chat template that can be rendered: {first_line(error)}; give "
            f"the pipeline the tokenizer of its text encoder"
        ) from error
    parts = text.split(prompt)
    return tuple(parts) if len(parts) == 2 else None
