"""Statistics of a checkpoint on a calibration text: from the cache, or by running the text through the model.

Forward through the layers, then backward through them in reverse with recomputation. One layer's weights and statistics are in
memory. Hidden states between layers are on disk: of the windows that gradients are taken on for every layer until the backward
pass has been there, of other windows for one layer. Nothing is trained: gradients are those of the loss at the outputs of the
linear layers.

Statistics live in the cache folder under a hash of weights, config and token ids, and are reused over rates, methods and
structures; gradients of another number of windows are other pieces beside the same forward ones. Each finished layer is a piece
of a journal, so a killed run goes on where it was, and a piece that went bad is made again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import filelock
import torch
from torch import nn

from sola_edge.activations import Activations
from sola_edge.architecture import COMPONENTS, matrix_shape
from sola_edge.cache import cache_folder
from sola_edge.calibration import (
    FORWARD,
    PROBE,
    Calibration,
    Statistics,
    backward_name,
    forward_name,
    gradients_name,
)
from sola_edge.checkpoint import Checkpoint, save_tensors
from sola_edge.errors import NotFinite
from sola_edge.files import check_room, size_of
from sola_edge.gram import Gram
from sola_edge.journal import Journal
from sola_edge.progress import track
from sola_edge.runner import LayerRunner

STATES = "*-{count}-*.bin"  # files between layers, of a run with gradients on so many windows
ROOM = (
    "{folder} needs {{needed:.3g}} GB and its disk has {{free:.3g}} GB left; use fewer windows, or set SOLA_EDGE_CACHE to a "
    "folder on a larger disk"
)
FORMAT = 2  # of what statistics say: another number is another key, and another protocol of a comparison


def statistics_key(checkpoint: Checkpoint, calibration: Calibration) -> str:
    """Hash of all that the statistics depend on, but for the number of windows that gradients are taken on."""
    content = {
        "format": FORMAT,
        "weights": checkpoint.weights_sha256,
        "config": hashlib.sha256(checkpoint.config.to_json_string().encode()).hexdigest(),
        "ids": hashlib.sha256(calibration.windows.numpy().tobytes()).hexdigest(),
        "shape": list(calibration.windows.shape),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def collect(
    checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int | None, device: str = "cpu"
) -> Statistics:
    """The statistics, from the cache or by running the text; gradients of its first `gradient_windows` (0: none; None: all).

    Raises NotFinite for an activation or a gradient, UserError where the disk has no room for what is in between.
    """
    count = len(calibration.windows)
    gradient_windows = count if gradient_windows is None else min(gradient_windows, count)
    journal = Journal(cache_folder("statistics") / statistics_key(checkpoint, calibration))
    with filelock.FileLock(journal.folder / ".lock"):
        journal.tidy()
        for state in journal.folder.glob(STATES.format(count="*")):
            if not state.match(STATES.format(count=gradient_windows)):  # of a killed run that asked for other gradients
                journal.remove(state.name)
        if not (journal.has(FORWARD) and (not gradient_windows or journal.has(gradients_name(gradient_windows)))):
            needed = _room(checkpoint, calibration, gradient_windows) - _present(
                journal, checkpoint.layers, gradient_windows
            )
            check_room(journal.folder, needed, ROOM.format(folder=journal.folder))
            _Collector(checkpoint, calibration, gradient_windows, journal, device).run()
    return Statistics(journal, gradient_windows)


def _room(checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int) -> int:
    """Bytes on disk at most: statistics of all layers, and hidden states and gradients between them."""
    layers, shapes = checkpoint.layers, {c: matrix_shape(checkpoint.config, c) for c in COMPONENTS}
    state = 4 * calibration.windows.shape[1] * checkpoint.config.hidden_size  # of one window
    between = state * (gradient_windows * (layers + 3) + 2 * (len(calibration.windows) - gradient_windows))
    grams = sum(shapes[component][1] ** 2 for component in PROBE.values())
    if gradient_windows:
        grams += sum(n_out**2 + gradient_windows * calibration.windows.shape[1] for n_out, _ in shapes.values())
    return 4 * layers * grams + between


def _present(journal: Journal, layers: int, gradient_windows: int) -> int:
    """Bytes that are on disk already of what `_room` counts."""
    names = [name for i in range(layers) for name in (forward_name(i), backward_name(i, gradient_windows))]
    files = [path for name in names if (path := journal.path(name)).exists()]
    return sum(map(size_of, [*files, *journal.folder.glob(STATES.format(count=gradient_windows))]))


class _Collector:
    """One pass over what is missing.

    The windows are in two parts, those that gradients are taken on ("kept") and the others ("rest"); a part's hidden states
    before a layer are one file. Gradients need those of "kept" before every layer.
    """

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, gradient_windows: int, journal: Journal, device: str
    ) -> None:
        self.checkpoint = checkpoint
        self.count = gradient_windows
        self.tokens = calibration.windows.numel()
        parts = {"kept": calibration.windows[:gradient_windows], "rest": calibration.windows[gradient_windows:]}
        self.parts = {name: windows for name, windows in parts.items() if len(windows)}
        self.shape = (calibration.windows.shape[1], checkpoint.config.hidden_size)
        self.journal = journal
        self.runner = LayerRunner(checkpoint, device)
        self.layers = checkpoint.layers

    def run(self) -> None:
        """Every piece that is missing, and the files that say that all are there."""
        missing = [layer for layer in range(self.layers) if not self.journal.has(forward_name(layer))]
        if missing:
            self._forward(missing[0], missing[-1], list(self.parts))
        if not self.journal.has(FORWARD):
            self._finish(FORWARD, {"tokens": self.tokens})
        if self.count:
            self._gradients()
        for layer in range(self.layers + 1):
            self._forget(layer)

    def _finish(self, name: str, content: dict[str, Any]) -> None:
        with self.journal.writing(name) as path:
            path.write_text(json.dumps(content))

    def _state(self, part: str, layer: int) -> str:
        return f"{part}-{self.count}-{layer:03d}.bin"

    def _gradient(self, layer: int) -> str:
        return f"gradient-{self.count}-{layer:03d}.bin"

    def _forget(self, layer: int) -> None:
        for name in (self._state("kept", layer), self._state("rest", layer), self._gradient(layer)):
            self.journal.remove(name)

    def _activations(self, name: str) -> Activations:
        return Activations(self.journal.path(name), self.shape)

    def _forward(self, first: int, last: int, parts: list[str]) -> None:
        """Run parts through layers first … last, from where their hidden states are; sum up statistics that are missing.

        parts: all, or "kept" alone where only hidden states are wanted.
        """
        at = first
        while at >= 0 and not all(self.journal.has(self._state(part, at)) for part in parts):
            at -= 1
        if at < 0:
            at = 0
            self._embed(parts)
        title = f"calibrating on {self.tokens:,} tokens, forward, layer by layer"
        for layer in track(range(at, last + 1), title):
            self._forward_layer(layer, parts)
            self.journal.remove(self._state("rest", layer))

    def _embed(self, parts: list[str]) -> None:
        for part in parts:
            with Activations.writing(self.journal, self._state(part, 0), self.shape) as hidden:
                for i, ids in enumerate(self.parts[part]):
                    hidden.put(i, self.runner.embed(ids[None])[0])
        self.runner.release_vocabulary()

    def _forward_layer(self, layer: int, parts: list[str]) -> None:
        wanted = not self.journal.has(forward_name(layer))
        self.runner.load(layer)
        recorder = _Inputs(self.runner)
        with torch.no_grad(), recorder.listening() if wanted else contextlib.nullcontext():
            for part in parts:
                before = self._activations(self._state(part, layer))
                with Activations.writing(self.journal, self._state(part, layer + 1), self.shape) as after:
                    for i in range(len(self.parts[part])):
                        after.put(i, self.runner.run(before.get(i)[None])[0].cpu())
        if wanted:
            self._save(layer, recorder.sums(self.tokens), forward_name(layer))

    def _gradients(self) -> None:
        """Backward from the last layer whose gradients are missing, or from the loss where what came from above is gone."""
        missing = [layer for layer in range(self.layers) if not self.journal.has(backward_name(layer, self.count))]
        loss = f"loss-{self.count}.json"
        top = missing[-1] if missing else -1
        if not self.journal.has(loss) or (missing and not self.journal.has(self._gradient(top + 1))):
            top = self.layers - 1
            self._hidden_up_to(self.layers)
            self._loss(loss)
        elif missing:
            self._hidden_up_to(top)
        lowest = missing[0] if missing else self.layers
        tokens = f"{self.count * self.shape[0]:,} tokens"
        for layer in track(range(lowest, top + 1)[::-1], f"gradients on {tokens}, backward, layer by layer"):
            self._backward(layer)
            self._forget(layer + 1)
        self._finish(gradients_name(self.count), json.loads(self.journal.path(loss).read_text()))

    def _hidden_up_to(self, last: int) -> None:
        """The kept windows' hidden states before layers 0 … last (`layers`: after the last one)."""
        missing = [layer for layer in range(last + 1) if not self.journal.has(self._state("kept", layer))]
        if missing:
            self._forward(max(missing[0] - 1, 0), max(missing[-1] - 1, 0), ["kept"])

    def _loss(self, name: str) -> None:
        hidden = self._activations(self._state("kept", self.layers))
        windows, total = self.parts["kept"], 0.0
        with Activations.writing(self.journal, self._gradient(self.layers), self.shape) as gradients:
            for i in track(range(len(windows)), "gradient of the loss, window by window"):
                labels = torch.Generator().manual_seed(i)  # of its own, so that a resumed run draws the same
                gradient, loss = self.runner.loss_gradient(hidden.get(i), windows[i], labels)
                gradients.put(i, gradient.cpu())
                total += loss
        self.runner.release_vocabulary()
        self._finish(name, {"nll": total / (len(windows) * (self.shape[0] - 1))})

    def _backward(self, layer: int) -> None:
        self.runner.load(layer)
        recorder = _OutputGradients(self.runner)
        hidden = self._activations(self._state("kept", layer))
        after = self._activations(self._gradient(layer + 1))
        with (
            recorder.listening(),
            Activations.writing(self.journal, self._gradient(layer), self.shape) as before,
        ):
            for i in range(self.count):
                x = hidden.get(i)[None].to(self.runner.device).requires_grad_()
                y = self.runner.run(x)
                (gradient,) = torch.autograd.grad(y, x, after.get(i)[None].to(self.runner.device))
                before.put(i, gradient[0].cpu())
        self._save(layer, recorder.sums(self.count * self.shape[0]), backward_name(layer, self.count))

    def _save(self, layer: int, tensors: dict[str, torch.Tensor], name: str) -> None:
        for part, tensor in tensors.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise NotFinite(
                    f"layer {layer}: {bad} entries of the statistic {part} are not finite; the checkpoint is damaged or "
                    f"overflows in float32"
                )
        with self.journal.writing(name) as path:
            save_tensors({k: v.contiguous() for k, v in tensors.items()}, path)


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
