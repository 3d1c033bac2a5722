"""A compressed SmolLM2 answers a chat in llama.cpp's own tools: the server's OpenAI-style API, and the command line."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from exporters.gguf import export
from exporters.llama_cpp import Build
from sola_edge.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 16
EXACT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1", "-ngl", "0", "-c", "512", "--no-warmup"]


@pytest.fixture(scope="module")
def expected(smollm2_compressed: Path) -> dict[str, Any]:
    """PyTorch's greedy answer, and how many tokens the chat template makes of the question."""
    tokenizer = open_checkpoint(smollm2_compressed).tokenizer()
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(smollm2_compressed, dtype=torch.float32).eval()
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, pad_token_id=2
    )
    answer = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
    return {"answer": answer, "prompt_tokens": prompt.shape[1]}


@pytest.fixture(scope="module")
def model(smollm2_compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In F32, so that the greedy answer is PyTorch's."""
    return export(smollm2_compressed, tmp_path_factory.mktemp("chat") / "model.gguf", "f32").path


@pytest.fixture
def server(model: Path, llama_cpp_build: Build, tmp_path: Path) -> Iterator[str]:
    """Address of a llama-server that has loaded the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [llama_cpp_build.tool("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", str(port)]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    with log.open("w") as stream, subprocess.Popen([*command, *EXACT], stdout=stream, stderr=stream) as process:
        try:
            deadline = time.monotonic() + 300
            while not healthy(address):
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield address
        finally:
            process.kill()


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_llama_server_answers_an_openai_style_chat_request(server: str, expected: dict[str, Any]) -> None:
    question = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = json.load(reply)
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip() == expected["answer"].strip() != ""
    assert answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]  # the file's own chat template was applied


def test_a_chat_on_the_command_line(model: Path, llama_cpp_build: Build, expected: dict[str, Any]) -> None:
    chat = ["-cnv", "-st", "--jinja", "--no-display-prompt", "--simple-io", "--temp", "0", "-n", str(TOKENS)]
    command = [llama_cpp_build.tool("llama-completion"), "-m", model, "-p", MESSAGES[0]["content"], *chat, *EXACT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected["answer"].strip() in done.stdout and expected["answer"].strip()
