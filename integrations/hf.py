"""Support for AQLM in Transformers and PEFT: importing this module is all it takes.

    import aqlm_tensor.integrations.hf
    model = AutoModelForCausalLM.from_pretrained(folder)

It replaces Transformers' own AQLM quantizer, which cannot load AQLM checkpoints since version 5.
"""

from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion

for _package, _oldest in (("transformers", "5.23"), ("accelerate", "1.10")):
    try:
        _found = version(_package)
    except PackageNotFoundError:
        _found = "none"
    if _found == "none" or TorchVersion(_found) < _oldest:
        raise ImportError(
            f"aqlm_tensor.integrations.hf needs {_package} >= {_oldest}, found {_found}: "
            "pip install -U 'aqlm-tensor[transformers]'"
        )

from aqlm_tensor.integrations.hf_config import AqlmConfig  # noqa: E402 - an old version lacks what is imported here
from aqlm_tensor.integrations.hf_quantizer import AqlmQuantizer, attach  # noqa: E402
from aqlm_tensor.integrations.hf_registration import register  # noqa: E402

__all__ = ["AqlmConfig", "AqlmQuantizer", "attach", "register"]

register()
