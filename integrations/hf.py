"""Support for AQLM in Transformers and PEFT: importing this module is all it takes.

    import aqlm_tensor.integrations.hf
    model = AutoModelForCausalLM.from_pretrained(folder)

It replaces Transformers' own AQLM quantizer, which cannot load AQLM checkpoints since version 5.
"""

from importlib.metadata import version

from packaging.version import Version

_OLDEST = "5.23"
if Version(version("transformers")) < Version(_OLDEST):
    raise ImportError(
        f"aqlm_tensor.integrations.hf needs transformers >= {_OLDEST}, found {version('transformers')}: "
        "pip install -U transformers"
    )

from aqlm_tensor.integrations.hf_config import AqlmConfig  # noqa: E402 - an old version lacks what is imported here
from aqlm_tensor.integrations.hf_quantizer import AqlmQuantizer, attach  # noqa: E402
from aqlm_tensor.integrations.hf_registration import register  # noqa: E402

__all__ = ["AqlmConfig", "AqlmQuantizer", "attach", "register"]

register()
