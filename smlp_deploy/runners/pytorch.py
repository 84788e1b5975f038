"""The network in PyTorch: as trained, the reference of all artifacts; and lowered, for inspection.

It runs on the CPU, or on the GPU that is given. There products and convolutions are computed in true fp32, as on the
CPU, not in TF32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from traceback import clear_frames
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.errors import GpuError, GpuMemoryError, MissingDependencyError
from smlp_deploy.images.batches import FloatArray, available_cores
from smlp_deploy.metadata import ModelMetadata, trace_points
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.lowering import DenseMixing, LoweredBlock, PairedMixing, Product, lower
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.runners.base import Closing, images_at_once
from smlp_deploy.runners.placement import on_gpu

_FROM_CUDA = ("CUDA error", "CUDA driver", "cuDNN", "CUDNN_", "CUBLAS_", "NVRTC_")
"""What is in the message of a `RuntimeError` that the GPU or one of its libraries caused."""


class PyTorchRunner(Closing):
    """Runs a checkpoint's network as trained.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them; may be that of an artifact, but the input is float32.
        gpu: where to run; None for the CPU, on which a large batch runs in pieces. TF32 is then switched off for the
            whole process.

    Attributes:
        on_gpu: whether it runs on a GPU.

    Raises:
        GpuMemoryError: the GPU's memory is full.
        GpuError: the GPU fails.
        MissingDependencyError: this PyTorch cannot use the GPU.
    """

    _label = "pytorch"
    _images_per_core: int | None = 2  # that run at once on the CPU; None for whole batches

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata, *, gpu: GpuDevice | None = None) -> None:
        self.name = f"{on_gpu(self._label, gpu)} {checkpoint.path.name}"
        self.metadata = replace(metadata, input="float32")
        self._gpu, self._device = gpu, device_of(gpu)
        self.on_gpu = gpu is not None
        self._at_once: int | None = None  # whole batches
        if self._images_per_core is not None and not self.on_gpu:
            size, cores = metadata.config.image_size, available_cores()
            self._at_once = images_at_once(size, per_core=self._images_per_core, cores=cores)
        with _errors():
            network = self._prepared(checkpoint.network(shared=True))
            self._network: nn.Module | None = network.to(self._device)

    def infer(self, batch: FloatArray) -> FloatArray:
        with self._running():
            images, size = self._input(batch), self._at_once or len(batch)
            pieces = [self._run(images[at : at + size]).float() for at in range(0, len(images), size)]
            logits: FloatArray = torch.cat(pieces).cpu().numpy()
        return logits

    def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
        """See `GpuTimer`; empty on the CPU. What PyTorch takes to launch a kernel counts where the GPU waits for it."""
        if self._gpu is None:
            return []
        with self._running():
            images = self._input(batch)
            self._run(images)
            return [self._gpu_second(images) for _ in range(runs)]

    def _gpu_second(self, images: Tensor) -> float:
        start, end = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
        start.record()
        self._run(images)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Its GPU is the current one, on whose stream events are recorded."""
        on_device = torch.cuda.device(self._device) if self._gpu is not None else nullcontext()
        with _errors(), on_device, torch.inference_mode():
            yield

    def _run(self, images: Tensor) -> Tensor:
        assert self._network is not None, "the runner is closed"
        return cast(Tensor, self._network(images))

    def _prepared(self, network: SMLPNet) -> nn.Module:
        """The module to run, made from the trained network."""
        return network

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch).to(self._device)

    def close(self) -> None:
        self._network = None


def device_of(gpu: GpuDevice | None) -> torch.device:
    """PyTorch's device, with TF32 switched off, in the whole process, if it is a GPU.

    Raises:
        MissingDependencyError: this PyTorch cannot use the GPU.
    """
    if gpu is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise MissingDependencyError(
            f"the installed PyTorch {torch.__version__} {'does not see the GPU' if built else 'is for the CPU only'}",
            fix="update the NVIDIA driver, or install PyTorch for its CUDA version"
            if built
            else "install PyTorch for CUDA, or leave out --device",
        )
    # By default convolutions are computed in TF32: of 10 binary digits, far outside the gates of fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", gpu.index)


@contextmanager
def _errors() -> Iterator[None]:
    """PyTorch's errors from the GPU as ours.

    Raises:
        GpuMemoryError: the GPU's memory is full; it can go on.
        GpuError: any other error of CUDA or one of its libraries.
    """
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in reason:
            clear_frames(error.__traceback__)  # which hold the activations, until the error is handled
            raise GpuMemoryError(
                "the GPU's memory is full", fix="choose a smaller batch, or end what else runs on the GPU"
            ) from error
        if not isinstance(error, torch.AcceleratorError) and not any(word in reason for word in _FROM_CUDA):
            raise
        raise GpuError(f"the GPU failed: {reason}", fix="nvidia-smi shows the GPU's state") from error


class CompiledRunner(PyTorchRunner):
    """Runs a checkpoint's network as trained through `torch.compile`, which compiles it again for each batch size."""

    _label = "torch.compile"
    _images_per_core = None

    def _prepared(self, network: SMLPNet) -> nn.Module:
        # TF32 is off because the network was trained, and is compared, in fp32.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        return cast(nn.Module, torch.compile(network, dynamic=False))


class HalfRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in true fp16 arithmetic, in float32 only where an fp16 graph is."""

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata, *, gpu: GpuDevice | None = None) -> None:
        super().__init__(checkpoint, metadata, gpu=gpu)
        self.name = self.name.replace(")", ", lowered, fp16)", 1)

    def _prepared(self, network: SMLPNet) -> nn.Module:
        return lower(network, self.metadata.form).narrow(torch.float16)

    def _input(self, batch: FloatArray) -> Tensor:
        return super()._input(batch).half()

    def _run(self, images: Tensor) -> Tensor:
        with _Float32Sums() if self._gpu is None else nullcontext():
            return super()._run(images)


class _Float32Sums(TorchFunctionMode):
    """Computes products and convolutions of fp16 numbers in float32, and rounds what they add up to, once.

    So do Tensor Cores, and PyTorch's own fp16 kernels for CPUs, but number by number: two images took smlpnet_tiny
    7.6 s with them, and 0.5 s like this.
    """

    _SUMS = frozenset({functional.conv2d, functional.linear, Tensor.matmul})

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in self._SUMS:
            return function(*args, **(kwargs or {}))
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        return function(*wide, **(kwargs or {})).half()


_WATCHED = (nn.Conv2d, Product, DenseMixing, PairedMixing, LoweredBlock)


class RecordingRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in float32 and records its largest activation.

    It watches the values that are fp16 in an fp16 graph: the inputs and outputs of every convolution and, in the form
    for GPUs, of every product and of token mixing; and the output of every block.
    """

    def _prepared(self, network: SMLPNet) -> nn.Module:
        self._largest: dict[str, float] = {}
        self.name = self.name.replace(")", ", lowered)", 1)
        lowered = lower(network, self.metadata.form)
        for name, module in lowered.named_modules():
            if isinstance(module, _WATCHED):
                module.register_forward_hook(self._recorder(name))
        return lowered

    def _recorder(self, name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = max(float(torch.stack(tensor.aminmax()).abs().max()) for tensor in (*inputs, output))
            self._largest[name] = max(found, self._largest.get(name, 0.0))

        return record

    def largest(self) -> tuple[str, float]:
        """The layer with the largest absolute activation so far, and its value."""
        return max(self._largest.items(), key=lambda item: item[1])


class TracingPyTorchRunner(PyTorchRunner):
    """Runs a checkpoint's network, as trained or lowered, and returns the values inside.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them.
        lowered: run the lowered network, as deployed.
        gpu: see `PyTorchRunner`.
    """

    _images_per_core = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        metadata: ModelMetadata,
        *,
        lowered: bool = False,
        gpu: GpuDevice | None = None,
    ) -> None:
        self._lowered = lowered
        self._seen: dict[tuple[str, int], Tensor] = {}
        super().__init__(checkpoint, metadata, gpu=gpu)
        if lowered:
            self.name = self.name.replace(")", ", lowered)", 1)

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        self._seen.clear()
        self.infer(batch)
        return {
            point.name: self._seen[point.kind, point.index].contiguous().cpu().numpy()
            for point in trace_points(self.metadata.config)
        }

    def _prepared(self, network: SMLPNet) -> nn.Module:
        if not self._lowered:
            self._watch(network.to_patch_embedding, "embedding", lambda _, output: output)
            self._watch(network.channel_mix, "tokens", lambda x, _: x.permute(0, 3, 1, 2))
            self._watch(network.channel_mix, "block", lambda x, output: (x + output).permute(0, 3, 1, 2))
            return network
        deployed = lower(network, self.metadata.form)
        self._watch(deployed.embeddings, "embedding", lambda _, output: output)
        self._watch(deployed.blocks, "block", lambda _, output: output)
        for index, block in enumerate(deployed.blocks):
            self._watch_token_mixing(cast(LoweredBlock, block), index)
        return deployed

    def _watch(self, modules: nn.ModuleList, kind: str, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        for index, module in enumerate(modules):

            def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, index: int = index) -> None:
                self._seen[kind, index] = look(inputs[0], output)

            module.register_forward_hook(see)

    def _watch_token_mixing(self, block: LoweredBlock, index: int) -> None:
        """A lowered block adds the output of its `mixing` to its input."""

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen["tokens", index] = inputs[0]

        def leave(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            mixed = output.permute(0, 3, 1, 2) if self.metadata.form == "gpu" else output
            self._seen["tokens", index] = self._seen["tokens", index] + mixed

        block.register_forward_pre_hook(enter)
        block.mixing.register_forward_hook(leave)
