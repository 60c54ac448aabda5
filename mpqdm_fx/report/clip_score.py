"""The CLIP score of pictures and texts, by torchmetrics, with a model that is there already."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.report.sample_metrics import from_torchmetrics

__all__ = ["ClipScore"]

logger = logging.getLogger(__name__)

_BATCH = 32


class ClipScore:
    """Likeness of pictures and texts: `max(100 cos(E_picture, E_text), 0)`, the mean over pairs.

    Args:
        model: A `CLIPModel` of transformers in evaluation mode.
        processor: Its `CLIPProcessor`.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self._model, self._processor = _Model(model), _Processor(processor, _longest(model))

    def __call__(self, pixels: Tensor, texts: Sequence[str]) -> float:
        """The score, 0..100; torchmetrics clips the mean, not each pair.

        Args:
            pixels: uint8 [N, 3, H, W].
            texts: N texts; of those that are longer than the model takes, the beginning counts.

        Raises:
            ConfigError: torchmetrics is missing.
        """
        kind = from_torchmetrics("multimodal.clip_score", "CLIPScore")
        metric = kind(model_name_or_path=lambda: (self._model, self._processor))
        self._processor.say_long(texts)
        with torch.no_grad():
            for start in range(0, len(pixels), _BATCH):
                rows = slice(start, start + _BATCH)
                metric.update(list(pixels[rows]), list(texts[rows]))
        return float(metric.compute())


class _Model(nn.Module):
    """What torchmetrics calls: features are tensors, as before transformers 5."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _features(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return _features(output)


def _features(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _longest(model: Any) -> int:
    return int(model.config.text_config.max_position_embeddings)


class _Processor:
    """A processor that ends long texts with their last token, where torchmetrics cuts it off.

    The feature of a text is read at that token; without it, it would be read at the first one.
    """

    def __init__(self, processor: Any, longest: int) -> None:
        self._tokenize: Any = processor.tokenizer
        self._scale: Any = processor.image_processor
        self._longest = longest
        self._said: set[str] = set()

    def say_long(self, texts: Sequence[str]) -> None:
        """Warn of texts that are too long, of each once."""
        texts = [text for text in dict.fromkeys(texts) if text not in self._said]
        if not texts:
            return
        self._said.update(texts)
        lengths = [len(ids) for ids in self._tokenize(texts, verbose=False)["input_ids"]]
        long = sum(length > self._longest for length in lengths)
        if long:
            logger.warning(
                "%d of %d prompts have more than the %d tokens that CLIP takes: their ends do not "
                "count", long, len(lengths), self._longest,
            )  # fmt: skip

    def __call__(
        self, *, text: Any = None, images: Any = None, padding: bool, return_tensors: str
    ) -> Any:
        if text is None:
            return self._scale(
                images, return_tensors=return_tensors, input_data_format="channels_first"
            )
        return self._tokenize(
            text,
            padding=padding,
            truncation=True,
            max_length=self._longest,
            return_tensors=return_tensors,
        )
