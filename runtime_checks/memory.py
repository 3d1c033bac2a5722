"""Resident memory of this process, as the operating system counts it. Bytes. Imports nothing heavy.

On Linux the peak is VmHWM of /proc/self/status, which belongs to the program that runs now. (ru_maxrss does not:
it keeps the peak of the process that started it, so a child of a large parent would look large.)
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

STATUS = Path("/proc/self/status")
MAPPINGS = Path("/proc/self/smaps")
COUNTED = {"Rss:": 1, "Anonymous:": -1}  # kB of a mapping
LIBRARY = re.compile(r"/.*\.so(\.\d+)*( \(deleted\))?")


def resident() -> dict[str, int]:
    """`now` and `peak`; on Linux also `anonymous` (own pages) and `file_backed` (mapped files) of `now`."""
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        names = {"now": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "file_backed": "RssFile"}
        return {ours: int(fields[theirs].split()[0]) * 1024 for ours, theirs in names.items() if theirs in fields}
    return _resident_elsewhere()


def library_pages() -> int | None:
    """Bytes of shared libraries' files that are resident, without what a process wrote into them; None where the system does
    not tell (Linux does).

    They are of the system's cache of files, and how many are resident is its choice: of a library that was written a moment
    ago it maps a third more than of one that it read from the disk.
    """
    try:
        with MAPPINGS.open(errors="replace", newline="\n") as mappings:  # line by line: this process is being measured
            return _library_pages(mappings)
    except OSError:
        return None


def _library_pages(mappings: Iterable[str]) -> int:
    pages, library = 0, False
    for line in mappings:
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):  # a mapping's head: addresses, rights, offset, device, inode, and perhaps a file
            parts = line.rstrip("\n").split(maxsplit=5)
            library = len(parts) == 6 and LIBRARY.fullmatch(parts[5]) is not None
        elif library and field in COUNTED:
            pages += COUNTED[field] * int(rest.split()[0]) * 1024
    return pages


def _resident_elsewhere() -> dict[str, int]:
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return {"now": info.rss, "peak": info.peak_wset}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"now": info.rss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
