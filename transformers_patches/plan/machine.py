"""What `auto` means for settings that the machine and the checkpoint decide: one function for each."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from transformers_patches import kernels
from transformers_patches.config import HEAD_DTYPE, PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.kernels import FORMATS, WeightFormat, triton
from transformers_patches.plan.decision import GIVEN, Decision


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda if there is one; PartInferError if a named device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise PartInferError(f"unknown device {device!r}: expected cpu, cuda or cuda:NUMBER") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise PartInferError(f"device {device} is not there ({torch.cuda.device_count()} found): use --device cpu")
    return resolved


def decide_device(settings: PartInferConfig) -> Decision:
    """Raises PartInferError for a device that is not there, and for --memory_limit without a GPU."""
    device = resolve_device(settings.device)
    if settings.memory_limit and device.type == "cpu":
        raise PartInferError("memory_limit moves active neurons to a GPU, but there is none: leave it out")
    there = "there is a GPU" if device.type == "cuda" else "there is no GPU"
    return Decision(str(device), there if settings.device == "auto" else GIVEN)


def decide_dtype(settings: PartInferConfig, config: PretrainedConfig) -> Decision:
    """The type of the weights: the checkpoint's own, or float32 if it names none."""
    if settings.dtype != "auto":
        return Decision(settings.dtype, GIVEN)
    if config.dtype is None:
        return Decision("float32", "the checkpoint names no type")
    return Decision(str(config.dtype).removeprefix("torch."), "the checkpoint's type")


def types_of(dtype: str) -> tuple[torch.dtype, WeightFormat | None]:
    """The type of arithmetic and of what is not quantised, and the format of what is (None: nothing)."""
    return (torch.bfloat16, FORMATS[dtype]) if dtype in FORMATS else (getattr(torch, dtype), None)


def decide_head_dtype(settings: PartInferConfig, dtype: str) -> Decision:
    """The type of output projection and embeddings. dtype: that of the other weights, decided.

    Raises PartInferError for a quantised head under weights that are not.
    """
    quantized = dtype in FORMATS
    if not quantized and settings.head_dtype not in ("auto", dtype):
        raise PartInferError(
            f"head_dtype {settings.head_dtype} belongs to quantised weights: give --dtype int4 with it"
        )
    if settings.head_dtype != "auto":
        return Decision(settings.head_dtype, GIVEN)
    if quantized:
        return Decision(HEAD_DTYPE, "every token passes the output projection, where fewer bits cost most")
    return Decision(dtype, "the type of all weights")


def decide_kernels(settings: PartInferConfig, device: torch.device, dtype: str) -> Decision:
    """What decodes: on GPUs Triton's kernels, on CPUs the native ones, for types in which PyTorch is slow.

    On CPUs float32 stays PyTorch's own.

    dtype: that of the weights, decided.
    """
    arithmetic, weight_format = types_of(dtype)
    if settings.kernels == "torch":
        return Decision("torch", GIVEN)
    if device.type == "cuda":
        return _gpu_kernels(settings)
    if device.type != "cpu":
        return Decision("torch", f"there are no kernels for {device.type}")
    if settings.kernels == "triton":
        return Decision("torch", "the Triton kernels are for GPUs")
    if settings.kernels == "auto" and arithmetic not in (torch.bfloat16, torch.float16):
        return Decision("torch", f"in {dtype} PyTorch is fast")
    if weight_format is not None and weight_format.native is None:
        return Decision("torch", f"the native kernels can't read {dtype}")
    if not kernels.available():
        return Decision("torch", f"no native kernels: {kernels.why_not()}")
    return Decision("native", GIVEN if settings.kernels == "native" else f"on CPUs PyTorch is slow in {dtype}")


def _gpu_kernels(settings: PartInferConfig) -> Decision:
    if settings.kernels == "native":
        return Decision("torch", "the native kernels are for CPUs")
    if not triton.available():
        return Decision("torch", f"no Triton kernels: {triton.why_not()}")
    return Decision("triton", GIVEN if settings.kernels == "triton" else "they read only what a token needs")


def decide_screening(settings: PartInferConfig, *, native: bool, head_dtype: str) -> Decision:
    """Whether the output projection is screened: `on` or `off`. native, head_dtype: decided."""
    if settings.screen_head == "off":
        return Decision("off", GIVEN)
    if not native:
        return Decision("off", "only the native kernels screen")
    if head_dtype in FORMATS:
        if FORMATS[head_dtype].splits:
            return Decision("on", f"costs a head in {head_dtype} no memory")
        return Decision("off", f"a head in {head_dtype} can't be screened")
    if settings.screen_head == "on":
        return Decision("on", GIVEN)
    return Decision("off", f"would cost memory beside a head in {head_dtype}")
