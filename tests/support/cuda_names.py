"""Enums and constants of `cuda.bindings.runtime` 13.5, as far as a program that runs engines needs them."""

# ruff: noqa: N801, N815 - the names are NVIDIA's
from __future__ import annotations

from enum import IntEnum
from typing import Self


class cudaError_t(IntEnum):
    text: str

    def __new__(cls, value: int, text: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member

    cudaSuccess = 0, "no error"
    cudaErrorInvalidValue = 1, "invalid argument"
    cudaErrorMemoryAllocation = 2, "out of memory"
    cudaErrorInitializationError = 3, "initialization error"
    cudaErrorInsufficientDriver = 35, "CUDA driver version is insufficient for CUDA runtime version"
    cudaErrorDevicesUnavailable = 46, "CUDA-capable device(s) is/are busy or unavailable"
    cudaErrorNoDevice = 100, "no CUDA-capable device is detected"
    cudaErrorInvalidDevice = 101, "invalid device ordinal"
    cudaErrorECCUncorrectable = 214, "uncorrectable ECC error encountered"
    cudaErrorInvalidResourceHandle = 400, "invalid resource handle"
    cudaErrorIllegalState = 401, "the operation cannot be performed in the present state"
    cudaErrorNotReady = 600, "device not ready"
    cudaErrorIllegalAddress = 700, "an illegal memory access was encountered"
    cudaErrorLaunchTimeout = 702, "the launch timed out and was terminated"
    cudaErrorAssert = 710, "device-side assert triggered"
    cudaErrorHardwareStackError = 714, "hardware stack error"
    cudaErrorIllegalInstruction = 715, "an illegal instruction was encountered"
    cudaErrorMisalignedAddress = 716, "misaligned address"
    cudaErrorInvalidAddressSpace = 717, "operation not supported on global/shared address space"
    cudaErrorInvalidPc = 718, "invalid program counter"
    cudaErrorLaunchFailure = 719, "unspecified launch failure"
    cudaErrorNotSupported = 801, "operation not supported"
    cudaErrorSystemDriverMismatch = 803, "system has unsupported display driver / cuda driver combination"
    cudaErrorStreamCaptureUnsupported = 900, "operation not permitted when stream is capturing"
    cudaErrorStreamCaptureInvalidated = 901, "operation failed due to a previous error during capture"
    cudaErrorStreamCaptureIsolation = 905, "dependency created on uncaptured work in another stream"
    cudaErrorStreamCaptureImplicit = (
        906,
        "operation would make the legacy stream depend on a capturing blocking stream",
    )
    cudaErrorCapturedEvent = 907, "operation not permitted on an event last recorded in a capturing stream"
    cudaErrorStreamCaptureWrongThread = (
        908,
        "attempt to terminate a thread-local capture sequence from another thread",
    )
    cudaErrorUnknown = 999, "unknown error"


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaStreamCaptureStatus(IntEnum):
    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


ENUMS = (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamCaptureStatus)
CONSTANTS = {
    "cudaEventBlockingSync": 1,
    "cudaEventDefault": 0,
    "cudaEventDisableTiming": 2,
    "cudaEventRecordDefault": 0,
    "cudaEventWaitDefault": 0,
    "cudaHostAllocDefault": 0,
    "cudaHostAllocMapped": 2,
    "cudaHostAllocPortable": 1,
    "cudaHostAllocWriteCombined": 4,
    "cudaStreamDefault": 0,
    "cudaStreamNonBlocking": 1,
}
STICKY = {error for error in cudaError_t if error in (35, 100, 214, 719) or 700 <= error < 719}
"""After one of these, every call of the process returns it."""
