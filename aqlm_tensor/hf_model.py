"""Transformers models on disk, for the command line: dense folders, GGUF files and AQLM folders, all offline.

Transformers loads them, with `aqlm_tensor.integrations.hf` for AQLM. Code that a checkpoint brings along is never run.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["MissingTokenizerError", "ModelSource", "find_model", "load_model", "quiet", "save_model", "tokenize"]

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


class MissingTokenizerError(ValueError):
    """A folder holds a model without a tokenizer."""


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
        MissingTokenizerError: before the model is loaded.
        ValueError: if files are missing or damaged, or do not fit the model.
        OSError: if a file cannot be read.
    """
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        import aqlm_tensor.integrations.hf  # noqa: F401 - registers

        options: dict[str, Any] = {"local_files_only": True}
        if source.gguf_file is not None:
            options["gguf_file"] = source.gguf_file
            dtype = torch.float32 if dtype == "auto" else dtype
        tokenizer = _load_tokenizer(source, options)
        if tokenizer is None and needs_tokenizer:
            raise MissingTokenizerError(
                f"{source.folder} holds no tokenizer, and text needs one: add its files (tokenizer.json, ...), or use "
                "token ids (.npy, .pt)"
            )
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **options)
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


def save_model(model: Any, tokenizer: Any | None, folder: Path, *, force: bool = False) -> None:
    """Write a quantized model with its tokenizer, if it has one, and generation config, all of it or nothing.

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
        # save_pretrained would refuse settings that it finds doubtful, after all the work
        model.generation_config.to_json_file(temporary / "generation_config.json")


def tokenize(tokenizer: Any, text: str) -> Any:
    """The tokens of a text, [n] int64, with the special tokens that the tokenizer adds by default."""
    import torch

    with quiet():  # Transformers would warn that the text is longer than the model's context: it is cut later
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
