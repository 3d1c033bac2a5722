"""Prefill and decode speed, tokens per second, as llama-bench defines them.

pp512: a prompt of 512 tokens from an empty context. tg128: 128 single-token steps from an empty context. All artefacts
of one comparison are measured in turn within each round (A B A B …), so that a machine that slows down slows them all;
the figures are the median over rounds with minimum and maximum. llama.cpp is measured by llama-bench itself, the others
in their child process after a warm-up. What other programs take of the cores is noted just before the rounds;
where that is much, llama-bench is told to let waiting threads sleep (it would crawl otherwise).
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from runtime_checks.machine import others_busy, waiting_policy
from runtime_checks.process import CheckError, Child
from runtime_checks.runtimes.devices import ALL_LAYERS, CPU, listed_device
from runtime_checks.schema import Speed, Throughput
from sola_edge.progress import track

Key = TypeVar("Key")
Once = Callable[
    [float], tuple[float, float]
]  # share of the cores in others' use → seconds of the prefill and of the decode
SEED = 0


def random_prompt(tokens: int, vocab: int) -> list[int]:
    """Token ids as llama-bench uses them: uniformly random, here with a fixed seed."""
    return [int(i) for i in np.random.default_rng(SEED).integers(0, vocab, tokens)]


def child_once(child: Child, prompt: list[int], generate: int) -> Once:
    """One round of a runtime that is measured in its child process."""

    def once(busy: float) -> tuple[float, float]:
        seconds = child.ask("time", prompt=prompt, generate=generate)
        return seconds["prefill"], seconds["decode"]

    return once


def llama_bench_once(path: Path, prompt: int, generate: int, threads: int, device: str = CPU) -> Once:
    """One round of llama-bench (its own warm-up included, one repetition), on the device whose name begins so.

    It raises CheckError when llama-bench fails.
    """

    def once(busy: float) -> tuple[float, float]:
        from exporters import llama_cpp

        build = llama_cpp.find()
        if build is None:
            raise CheckError("llama-bench: no llama.cpp build")
        sizes = ["-p", str(prompt), "-n", str(generate), "-r", "1", "-t", str(threads)]
        tool = str(build.tool("llama-bench"))
        command = [tool, "-m", str(path), *sizes, *_on(device, tool), "-o", "json"]
        environment = {**os.environ, **waiting_policy(busy)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"code {done.returncode}"]
            raise CheckError(f"llama-bench on {path}: {lines[-1]}")
        tests = {(row["n_prompt"], row["n_gen"]): row["avg_ns"] / 1e9 for row in json.loads(done.stdout)}
        return tests[prompt, 0], tests[0, generate]

    return once


def _on(device: str, tool: str) -> list[str]:
    """llama-bench's options: no GPU at all (it would take prompts to one even with -ngl 0), or all layers on that one."""
    if device == CPU:
        return ["-ngl", "0", "-dev", "none"]
    return ["-ngl", str(ALL_LAYERS), "-dev", listed_device(tool, device) or device]


def interleave(
    members: Mapping[Key, Once], rounds: int, prompt: int, generate: int, threads: int, tool: str, description: str
) -> tuple[dict[Key, Throughput], dict[Key, str]]:
    """Time every member once per round. Returns the throughputs, and the failures' reasons."""
    prefill: dict[Key, list[float]] = {key: [] for key in members}
    decode: dict[Key, list[float]] = {key: [] for key in members}
    failed: dict[Key, str] = {}
    busy = others_busy()
    turns = [key for _ in range(rounds) for key in members]
    for key in track(turns, description):
        if key in failed:
            continue
        try:
            seconds_prefill, seconds_decode = members[key](busy)
        except CheckError as error:
            failed[key] = str(error)
            continue
        prefill[key].append(prompt / seconds_prefill)
        decode[key].append(generate / seconds_decode)
    found = {
        key: Throughput(
            tool=tool,
            threads=threads,
            rounds=rounds,
            others_busy=busy,
            prefill=Speed.of(f"pp{prompt}", prompt, prefill[key]),
            decode=Speed.of(f"tg{generate}", generate, decode[key]),
        )
        for key in members
        if key not in failed
    }
    return found, failed
