"""The demonstration: a small story model, compressed twice and measured, all from data in the package."""

import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedModel

from eckart.atomic import check_output
from eckart.errors import EckartError
from eckart.files.inspect import show
from eckart.files.text import encode_document, load_tokenizer
from eckart.methods.compress.pipeline import compress
from eckart.methods.evaluate import evaluate, load
from eckart.methods.evaluation import Evaluation
from eckart.progress import Progress

METHODS = ("svd-llm", "eckart")
PROMPT = "Once upon a time, there was a little girl named Lily. She"
TOKENS = 48


@dataclass(frozen=True, slots=True)
class Sample:
    """A model of the demonstration.

    Attributes:
        name: "original", or the method.
        folder: where it is.
        parameters: floating numbers stored.
        nbytes: bytes of its tensors.
        evaluation: its measurement on the validation stories.
        continuation: what it makes of `PROMPT`.
    """

    name: str
    folder: Path
    parameters: int
    nbytes: int
    evaluation: Evaluation
    continuation: str


def demonstrate(out: Path | None, keep: float, progress: Progress) -> list[Sample]:
    """Measure the model of the package, compress it with two methods, and measure the results.

    Args:
        out: folder for the compressed models; a new temporary one if None.
        keep: share of the parameters that remains.
        progress: told of all stages.

    Raises:
        EckartError: if the data is not installed or `out` holds something.
    """
    data = Path(str(files("eckart"))) / "demo"
    model, train, valid = data / "stories260k", data / "train.txt", data / "valid.txt"
    if not model.is_dir():
        raise EckartError(
            "this installation lacks the data of the demonstration; install eckart from a complete package"
        )
    if out is not None:
        check_output(out)
    target = out or Path(tempfile.mkdtemp(prefix="eckart-demo-"))
    samples = [_sample("original", model, valid, progress)]
    for method in METHODS:
        compress(model, target / method, method=method, keep=keep, calibration=train, cache=False, progress=progress)
        samples.append(_sample(method, target / method, valid, progress))
    return samples


def _sample(name: str, folder: Path, valid: Path, progress: Progress) -> Sample:
    contents = show(folder)
    found = evaluate(folder, text=valid, progress=progress)
    return Sample(name, folder, contents.parameters, contents.nbytes, found, _continuation(load(folder), folder))


def _continuation(model: PreTrainedModel, folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([encode_document(tokenizer, PROMPT)], device=model.device)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True)).replace("\n", " ").strip()
