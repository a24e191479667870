"""What measuring a model gives."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured; the fields of the other kind of model are None.

    Attributes:
        tokens: tokens scored (decoder) or read (encoder).
        seconds: wall time of the forward passes.
        documents: texts scored, or None.
        nats_per_token: mean negative log-likelihood, natural logarithm.
        perplexity: its exponential (infinity where that overflows).
        bits_per_byte: bits per byte of UTF-8 text; comparable across tokenizers.
        pairs: sentence pairs scored, or None.
        spearman: Spearman's rank correlation of cosine similarities with the scores.
        examples: labelled sentences, or None.
        nats_per_example: mean negative log-likelihood of their labels, natural logarithm.
        accuracy: share of them whose most likely class is theirs.
        calibration_error: expected calibration error, 0 to 1.
    """

    tokens: int
    seconds: float
    documents: int | None = None
    nats_per_token: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    pairs: int | None = None
    spearman: float | None = None
    examples: int | None = None
    nats_per_example: float | None = None
    accuracy: float | None = None
    calibration_error: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored or read per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, float | int]:
        """Return plain values for JSON, without what does not apply to this kind of model."""
        values = {name: getattr(self, name) for name in self.__slots__} | {"tokens_per_second": self.tokens_per_second}
        return {name: value for name, value in values.items() if value is not None}
