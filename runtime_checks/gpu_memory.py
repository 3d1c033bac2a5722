"""Memory of a process on CUDA devices, as NVIDIA's own library counts it (the package nvidia-ml-py)."""


def gpu_memory(pid: int) -> int | None:
    """Bytes on all devices; None without the package or a driver, or where the driver tells nothing (some containers)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        devices = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        running = [one for device in devices for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
        told = [one.usedGpuMemory for one in running if one.pid == pid]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return sum(told) if told and None not in told else None
