"""Transformers models on disk, for the command line: dense folders, GGUF files and AQLM folders, all offline.

Transformers loads them, with `aqlm_tensor.integrations.hf` for AQLM. Code that a checkpoint brings along is never run.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "ModelSource",
    "UnsuitableModelError",
    "find_model",
    "language_model",
    "load_model",
    "quiet",
    "save_model",
    "tokenize",
]

_PROCESSOR_FILES = ("*processor_config.json", "chat_template.*")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


class UnsuitableModelError(ValueError):
    """A folder holds another kind of model than is asked for, or one without a tokenizer."""


@dataclass(frozen=True)
class ModelSource:
    """A model that was found on disk.

    Attributes:
        folder: where.
        kind: "dense" (Transformers), "gguf" or "aqlm".
        gguf_file: name of the file in the folder, for "gguf".
    """

    folder: Path
    kind: Literal["dense", "gguf", "aqlm"]
    gguf_file: str | None = None

    def __str__(self) -> str:
        return str(self.folder / self.gguf_file) if self.gguf_file else str(self.folder)


def find_model(path: str | Path, gguf_file: str | None = None) -> ModelSource:
    """Tell what kind of model lies at a path, without loading it.

    Args:
        path: a folder with config.json and weights, a folder with a GGUF file, or a GGUF file.
        gguf_file: which GGUF file of the folder.

    Raises:
        ValueError: if there is no model, several GGUF files, or a quantization that cannot be read.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        raise ValueError(f"model {str(path)!r} is not a folder: pass a local folder with config.json or a .gguf file")
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ValueError(f"{path} has no file {gguf_file!r}; its GGUF files: {_gguf_files(path) or 'none'}")
        return ModelSource(path, "gguf", gguf_file)
    if (path / "config.json").is_file():
        return ModelSource(path, _kind(path / "config.json"))
    files = _gguf_files(path)
    if len(files) != 1:
        raise ValueError(
            f"{path} has several GGUF files ({', '.join(files)}): choose one with --gguf-file"
            if files
            else f"{path} holds no model: it has neither config.json nor a .gguf file"
        )
    return ModelSource(path, "gguf", files[0])


def _gguf_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.gguf"))


def _kind(config: Path) -> Literal["dense", "aqlm"]:
    try:
        section = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{config} is not a JSON object: {error}") from None
    if section is None:
        return "dense"
    method = section.get("quant_method") if isinstance(section, dict) else section
    if method != "aqlm":
        raise ValueError(f"{config.parent} is quantized with {method!r}: only dense, GGUF and AQLM models can be read")
    return "aqlm"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Import torchao and run Transformers without their notes and bars; warnings of the program itself remain."""
    noisy = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as transformers_logging

        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def language_model(source: ModelSource) -> tuple[Any, Any]:
    """Transformers' config of a language model, and the auto class that makes the model that the config names.

    Text alone has to suffice as input: causal language models do, also those that take images or sound.

    Raises:
        UnsuitableModelError: for other kinds of models.
    """
    import transformers

    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True, **options)
    classes: dict[str, Any] = {}
    for table, auto in (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING, transformers.AutoModelForMultimodalLM),
    ):
        if type(config) in table:
            made: Any = table[type(config)]
            classes.setdefault(made.__name__, auto)
    named = next(iter(config.architectures or classes), config.model_type)
    if classes and named.lower().endswith(("forcausallm", "lmheadmodel")):
        named = named if named in classes else next(iter(classes))  # an older spelling
    # the others would be loaded without some weights (an encoder) or with random ones (an output embedding)
    if named not in classes or getattr(config, "is_encoder_decoder", False):
        raise UnsuitableModelError(
            f"{source} is a {named}, and only causal language models are handled here: quantize it in Python, with "
            "aqlm_tensor.calibrate, and store it with aqlm_tensor.save"
        )
    return config, classes[named]


def load_model(
    source: ModelSource, *, dtype: Any = "auto", device: str = "cpu", needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        source: from `find_model`.
        dtype: a torch dtype, or "auto": as stored, and float32 for GGUF.
        device: where to.
        needs_tokenizer: whether a model without a tokenizer is refused.

    Returns:
        (model in evaluation mode, tokenizer or None).

    Raises:
        UnsuitableModelError: before the model is loaded, for another kind of model or for want of a tokenizer.
        ValueError: if files are missing or damaged, or do not fit the model.
        OSError: if a file cannot be read.
    """
    with quiet():
        import torch

        import aqlm_tensor.integrations.hf  # noqa: F401 - registers

        _, auto = language_model(source)
        options: dict[str, Any] = {"local_files_only": True}
        if source.gguf_file is not None:
            options["gguf_file"] = source.gguf_file
            dtype = torch.float32 if dtype == "auto" else dtype
        tokenizer = _load_tokenizer(source, options)
        if tokenizer is None and needs_tokenizer:
            raise UnsuitableModelError(
                f"{source.folder} holds no tokenizer, and text needs one: add its files (tokenizer.json, ...), or use "
                "token ids (.npy, .pt)"
            )
        model: Any = auto.from_pretrained(source.folder, dtype=dtype, **options)
        if source.kind == "gguf":  # it was dequantized: the model is dense from here on
            del model.config.quantization_config
            model.hf_quantizer = None
        return model.to(device).eval(), tokenizer


def _load_tokenizer(source: ModelSource, options: dict[str, Any]) -> Any | None:
    """A tokenizer, if there is one: for want of files Transformers makes some that know no words."""
    from transformers import AutoTokenizer

    if source.gguf_file is None and not any(list(source.folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    return tokenizer if len(words) > 1 else None  # T5's knows the space


def save_model(
    model: Any, tokenizer: Any | None, folder: Path, *, source: ModelSource | None = None, force: bool = False
) -> None:
    """Write a quantized model with its tokenizer, if it has one, and generation config, all of it or nothing.

    Args:
        model: from `load_model`.
        tokenizer: from there, too.
        folder: where to.
        source: of the model; how it prepares images and sound is copied from there.
        force: replace a checkpoint.

    Raises:
        FileExistsError: if the folder exists and may not be replaced.
        OSError: if the disk is full or cannot be written.
    """
    from aqlm_tensor import AQLMTensor, save
    from aqlm_tensor.checkpoint_io import new_folder

    with new_folder(folder, force=force, needed_bytes=0) as temporary:  # `save` knows its size and checks it
        if any(isinstance(parameter, AQLMTensor) and parameter.dim() == 3 for parameter in model.parameters()):
            import aqlm_tensor.integrations.hf  # noqa: F401 - teaches save_pretrained

            with quiet():
                model.save_pretrained(temporary)  # which knows how checkpoints name the experts of a stack
        else:
            save(model, temporary, force=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if source is not None:
            for file in [file for pattern in _PROCESSOR_FILES for file in source.folder.glob(pattern)]:
                shutil.copy(file, temporary)
        # save_pretrained would refuse settings that it finds doubtful, after all the work
        model.generation_config.to_json_file(temporary / "generation_config.json")


def tokenize(tokenizer: Any, text: str) -> Any:
    """The tokens of a text, [n] int64, with the special tokens that the tokenizer adds by default."""
    import torch

    with quiet():  # Transformers would warn that the text is longer than the model's context: it is cut later
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
