"""Text → token windows → the model, one decoder layer at a time → statistics, kept on disk.

Forward through the layers, then backward through them in reverse with recomputation. One layer's weights and statistics are in
memory; the hidden states between layers are on disk (tokens × hidden × 4 bytes for each layer while gradients are wanted).
Nothing is trained: gradients are those of the loss at the outputs of the linear layers.

Statistics live in the cache folder under a hash of weights, token ids and what was asked, and are reused over rates,
methods and structures. Each finished layer is a piece of a journal, so a killed run goes on where it was.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import filelock
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sola_edge.activations import Activations
from sola_edge.architecture import COMPONENTS
from sola_edge.cache import cache_folder
from sola_edge.checkpoint import Checkpoint, save_tensors
from sola_edge.errors import UserError
from sola_edge.journal import Journal
from sola_edge.progress import track
from sola_edge.runner import LayerRunner
from sola_edge.texts import SEPARATOR, Text

FORMAT = 2  # of the statistics on disk: other numbers are other files
GRAM_BLOCK = 512  # channels: only blocks on and above the diagonal are multiplied

# The input that each component's matrix multiplies: q, k, v share one, gate and up share one.
INPUT_OF = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "ffn", "up": "ffn", "down": "down"}
STAGES = {name: tuple(c for c in INPUT_OF if INPUT_OF[c] == name) for name in INPUT_OF.values()}  # input → components
PROBE = {"attention": "q", "o": "o", "ffn": "gate", "down": "down"}  # the component whose input is listened to


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one decoder layer; sums are divided by the number of tokens.

    inputs: by input name (`INPUT_OF`) S = E[x xᵀ], (n_in, n_in). norms, means: (ffn,) mean |h_j| and mean h_j.
    outputs: by component G = E[g gᵀ] of the gradients g of the summed loss at its outputs (see LayerRunner.loss_gradient),
    (n_out, n_out); {} without gradients.
    weights: by component ‖g‖² of each token that has a gradient, (tokens,); {} without gradients. All float32.
    """

    inputs: Mapping[str, torch.Tensor]
    norms: torch.Tensor
    means: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """Token windows (windows, window) and where they came from."""

    windows: torch.Tensor
    text: str
    sha256: str

    @property
    def tokens(self) -> int:
        return self.windows.numel()

    def describe(self) -> dict[str, Any]:
        """Plain values for `sola.json`."""
        count, window = self.windows.shape
        return {"text": self.text, "sha256": self.sha256, "windows": count, "window": window, "tokens": self.tokens}


def token_windows(text: Text, tokenizer: Any, window: int, max_windows: int | None) -> torch.Tensor:
    """The text's tokens, without a BOS, cut into (windows, window) int64; a last incomplete window is left out.

    A text shorter than one window is one shorter window. Raises UserError when it has fewer than two tokens.
    """
    needed = None if max_windows is None else window * max_windows
    ids: list[int] = []
    for i, document in enumerate(text.documents):
        ids += tokenizer(document if i == 0 else SEPARATOR + document, add_special_tokens=False)["input_ids"]
        if needed is not None and len(ids) >= needed:
            break
    if len(ids) < 2:
        raise UserError(f"{text.name} gives {len(ids)} tokens; calibration needs at least 2, better 30,000")
    if len(ids) < window:
        return torch.tensor([ids])
    count = len(ids) // window
    count = count if max_windows is None else min(count, max_windows)
    return torch.tensor(ids[: count * window]).view(count, window)


def read_calibration(text: Text, tokenizer: Any, window: int, max_windows: int | None) -> Calibration:
    """The windows of a text and where they came from. Raises UserError when it is too short."""
    return Calibration(token_windows(text, tokenizer, window, max_windows), text.name, text.sha256)


class Statistics:
    """The statistics of a checkpoint on one calibration, complete on disk; read a layer at a time."""

    def __init__(self, journal: Journal, gradient_windows: int, losses: dict[str, Any]) -> None:
        self._journal = journal
        self.gradient_windows = gradient_windows
        self.losses = losses  # {"nll": mean loss of the calibration text in nats} where gradients were taken
        self.folder = journal.folder

    def norms(self, layer: int) -> torch.Tensor:
        """One layer's mean |h_j|, (ffn,), and nothing else of its file."""
        with safe_open(self._journal.path(_forward_name(layer)), framework="pt") as file:
            return file.get_tensor("norms")

    def layer(self, layer: int) -> LayerStatistics:
        """One layer's statistics from disk."""
        found = load_file(self._journal.path(_forward_name(layer)))
        if self.gradient_windows:
            found |= load_file(self._journal.path(_backward_name(layer)))
        return LayerStatistics(
            inputs=_under("S.", found),
            norms=found["norms"],
            means=found["means"],
            outputs=_under("G.", found),
            weights=_under("g2.", found),
        )


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _forward_name(layer: int) -> str:
    return f"forward-{layer:03d}.safetensors"


def _backward_name(layer: int) -> str:
    return f"backward-{layer:03d}.safetensors"


def statistics_key(checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int) -> str:
    """Hash of all that the statistics depend on."""
    content = {
        "format": FORMAT,
        "weights": checkpoint.weights_sha256,
        "config": hashlib.sha256(checkpoint.config.to_json_string().encode()).hexdigest(),
        "ids": hashlib.sha256(calibration.windows.numpy().tobytes()).hexdigest(),
        "shape": list(calibration.windows.shape),
        "gradient_windows": gradient_windows,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def collect(checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int, device: str = "cpu") -> Statistics:
    """The statistics, from the cache or by running the text; gradients of its first `gradient_windows` (0: none).

    Raises UserError when an activation or a gradient is not finite.
    """
    gradient_windows = min(gradient_windows, len(calibration.windows))
    folder = cache_folder("statistics") / statistics_key(checkpoint, calibration, gradient_windows)
    journal = Journal(folder)
    with filelock.FileLock(folder / ".lock"):
        if not journal.has("summary.json"):
            _Collector(checkpoint, calibration, gradient_windows, journal, device).run()
    return Statistics(journal, gradient_windows, json.loads(journal.path("summary.json").read_text()))


class _Collector:
    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int, journal: Journal, device: str
    ) -> None:
        self.checkpoint = checkpoint
        self.windows = calibration.windows
        self.with_gradient = calibration.windows[:gradient_windows]
        self.journal = journal
        self.runner = LayerRunner(checkpoint, device)
        self.layers = checkpoint.layers

    def run(self) -> None:
        """Every piece that is missing, and the summary that says that all are there."""
        gradients = len(self.with_gradient) > 0
        tokens = f"{self.windows.numel():,} tokens"
        self._embed()
        for layer in track(range(self.layers), f"calibrating on {tokens}, forward, layer by layer"):
            if not self.journal.has(_forward_name(layer)):
                self._forward(layer)
            if not gradients:
                self.journal.remove(_hidden_name(layer))
        summary: dict[str, Any] = {"tokens": self.windows.numel()}
        if gradients:
            self._loss()
            tokens = f"{self.with_gradient.numel():,} tokens"
            for layer in track(range(self.layers)[::-1], f"gradients on {tokens}, backward, layer by layer"):
                if not self.journal.has(_backward_name(layer)):
                    self._backward(layer)
                self.journal.remove(_hidden_name(layer + 1))
                self.journal.remove(_gradient_name(layer + 1))
            self.journal.remove(_gradient_name(0))
            summary |= json.loads(self.journal.path("loss.json").read_text())
        for layer in (0, self.layers):
            self.journal.remove(_hidden_name(layer))
        with self.journal.writing("summary.json") as path:
            path.write_text(json.dumps(summary))

    def _embed(self) -> None:
        if self.journal.has(_forward_name(0)):
            return
        with Activations.writing(self.journal, _hidden_name(0), self._shape) as hidden:
            for i, ids in enumerate(self.windows):
                hidden.put(i, self.runner.embed(ids[None])[0])

    @property
    def _shape(self) -> tuple[int, int]:
        return self.windows.shape[1], self.checkpoint.config.hidden_size

    def _forward(self, layer: int) -> None:
        self.runner.load(layer)
        recorder = _Inputs(self.runner)
        before = Activations(self.journal.path(_hidden_name(layer)), self._shape)
        with (
            torch.no_grad(),
            recorder.listening(),
            Activations.writing(self.journal, _hidden_name(layer + 1), self._shape) as after,
        ):
            for i in range(len(self.windows)):
                after.put(i, self.runner.run(before.get(i)[None])[0].cpu())
        self._save(layer, recorder.sums(self.windows.numel()), _forward_name(layer))

    def _loss(self) -> None:
        if self.journal.has("loss.json"):
            return
        hidden = Activations(self.journal.path(_hidden_name(self.layers)), self._shape)
        total = 0.0
        with Activations.writing(self.journal, _gradient_name(self.layers), self._shape) as gradients:
            for i in track(range(len(self.with_gradient)), "gradient of the loss, window by window"):
                labels = torch.Generator().manual_seed(i)  # of its own, so that a resumed run draws the same
                gradient, loss = self.runner.loss_gradient(hidden.get(i), self.with_gradient[i], labels)
                gradients.put(i, gradient.cpu())
                total += loss
        self.runner.release_head()
        count = self.with_gradient.shape[0] * (self.with_gradient.shape[1] - 1)
        with self.journal.writing("loss.json") as path:
            path.write_text(json.dumps({"nll": total / count}))

    def _backward(self, layer: int) -> None:
        self.runner.load(layer)
        recorder = _OutputGradients(self.runner)
        hidden = Activations(self.journal.path(_hidden_name(layer)), self._shape)
        after = Activations(self.journal.path(_gradient_name(layer + 1)), self._shape)
        with (
            recorder.listening(),
            Activations.writing(self.journal, _gradient_name(layer), self._shape) as before,
        ):
            for i in range(len(self.with_gradient)):
                x = hidden.get(i)[None].to(self.runner.device).requires_grad_()
                y = self.runner.run(x)
                (gradient,) = torch.autograd.grad(y, x, after.get(i)[None].to(self.runner.device))
                before.put(i, gradient[0].cpu())
        self._save(layer, recorder.sums(self.with_gradient.numel()), _backward_name(layer))

    def _save(self, layer: int, tensors: dict[str, torch.Tensor], name: str) -> None:
        for part, tensor in tensors.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise UserError(
                    f"layer {layer}: {bad} entries of the statistic {part} are not finite; the checkpoint is damaged or "
                    f"overflows in float32"
                )
        with self.journal.writing(name) as path:
            save_tensors({k: v.contiguous() for k, v in tensors.items()}, path)


def _hidden_name(layer: int) -> str:
    return f"hidden-{layer:03d}.bin"


def _gradient_name(layer: int) -> str:
    return f"gradient-{layer:03d}.bin"


class Gram:
    """Σ x xᵀ over tokens, the products in float32, the sum in float64, only the upper half multiplied."""

    def __init__(self) -> None:
        self._total = torch.empty(0)

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n)."""
        n = x.shape[1]
        if not len(self._total):
            self._total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        for row in range(0, n, GRAM_BLOCK):
            rows = slice(row, row + GRAM_BLOCK)
            self._total[rows, row:] += x[:, rows].T @ x[:, row:]

    def total(self) -> torch.Tensor:
        """Σ x xᵀ, (n, n) float64, symmetric."""
        return self._total.triu() + self._total.triu(1).T

    def mean(self, tokens: int) -> torch.Tensor:
        """(n, n) float32 on the CPU, symmetric."""
        return (self.total() / tokens).float().cpu()


@contextlib.contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are removed when the block ends."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


class _Inputs:
    """Forward hooks that sum up S and the mean activation norms."""

    def __init__(self, runner: LayerRunner) -> None:
        self._runner = runner
        self._grams = {name: Gram() for name in PROBE}
        self._norms: Any = 0
        self._means: Any = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        layer, row = self._runner.layer, self._runner.checkpoint.architecture
        modules = {name: layer.get_submodule(getattr(row, part)) for name, part in PROBE.items()}
        with _hooked(module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()):
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            self._grams[name].add(x)
            if name == "down":
                self._norms = self._norms + x.abs().sum(0, dtype=torch.float64)
                self._means = self._means + x.sum(0, dtype=torch.float64)

        return record

    def sums(self, tokens: int) -> dict[str, torch.Tensor]:
        found = {f"S.{name}": gram.mean(tokens) for name, gram in self._grams.items()}
        return found | {k: (v / tokens).float().cpu() for k, v in {"norms": self._norms, "means": self._means}.items()}


class _OutputGradients:
    """Hooks that sum up G and keep each token's ‖g‖²."""

    def __init__(self, runner: LayerRunner) -> None:
        self._runner = runner
        self._grams = {component: Gram() for component in COMPONENTS}
        self._squares: dict[str, list[torch.Tensor]] = {component: [] for component in COMPONENTS}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        layer, row = self._runner.layer, self._runner.checkpoint.architecture
        modules = {component: layer.get_submodule(getattr(row, component)) for component in COMPONENTS}
        with _hooked(module.register_forward_hook(self._hook(name)) for name, module in modules.items()):
            yield

    def _hook(self, component: str) -> Callable[..., None]:
        def record(gradient: torch.Tensor) -> None:
            g = gradient.flatten(0, -2)
            self._grams[component].add(g)
            self._squares[component].append(g.square().sum(1).cpu())

        return lambda _module, _inputs, output: output.register_hook(record) and None

    def sums(self, tokens: int) -> dict[str, torch.Tensor]:
        found = {f"G.{component}": gram.mean(tokens) for component, gram in self._grams.items()}
        return found | {f"g2.{component}": torch.cat(parts) for component, parts in self._squares.items()}
