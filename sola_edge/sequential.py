"""Layer after layer, fitted to the inputs that the compressed layers before it really give.

Two streams of hidden states walk through the decoder side by side, the original's and the compressed model's. Within a
layer the stages are rewritten in order (q, k, v; then o; then gate, up; then down), each on inputs that already passed
the stages before it. Hidden states and the inputs of the stages are on disk; in memory are one layer, its statistics and
one window.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sola_edge.activations import Activations
from sola_edge.calibration import PROBE, STAGES
from sola_edge.config import MatrixLayout
from sola_edge.errors import NotFinite
from sola_edge.gram import Gram
from sola_edge.journal import Journal
from sola_edge.layers import empty_linear
from sola_edge.runner import LayerRunner
from sola_edge.view import Correction, LayerView, Moments, Rewriter

HEAVIEST = 4.0  # of a token's weight before it is mixed with 1
TOKEN_WEIGHT = 0.5  # share of a token's weight that goes by its gradient; without it, attention sinks rule the fit


class Sequential:
    """The two streams of one compression, resumable: `original-N.bin` and `compressed-N.bin` enter layer N."""

    def __init__(self, runner: LayerRunner, windows: torch.Tensor, journal: Journal) -> None:
        self._runner = runner
        self._windows = windows
        self._journal = journal
        self._hidden_shape = (windows.shape[1], runner.checkpoint.config.hidden_size)

    def start(self) -> None:
        """Write the embeddings, where both streams begin, unless a later layer was reached before."""
        if self.reached(0):
            return
        with self._writing(_state("original", 0)) as original, self._writing(_state("compressed", 0)) as compressed:
            for i, ids in enumerate(self._windows):
                embedded = self._runner.embed(ids[None])[0]
                original.put(i, embedded)
                compressed.put(i, embedded)
        self._runner.release_vocabulary()

    def reached(self, layer: int) -> bool:
        """Whether both streams wait before that layer."""
        return all(self._journal.has(_state(stream, layer)) for stream in ("original", "compressed"))

    def forget(self, layer: int) -> None:
        """Delete the states before a layer."""
        for stream in ("original", "compressed"):
            self._journal.remove(_state(stream, layer))

    def rewrite(
        self, view: LayerView, rewriter: Rewriter, layouts: Mapping[str, MatrixLayout], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """One layer's new tensors in `dtype`; both streams then wait before the next layer."""
        folder = self._journal.path("stages")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            return _LayerPass(self, view, rewriter, layouts, dtype, folder).run()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Activations]:
        with self._journal.writing(name) as partial:
            yield Activations(partial, self._hidden_shape)


def _state(stream: str, layer: int) -> str:
    return f"{stream}-{layer:03d}.bin"


class _Sums:
    """Sums up one half's Moments, window by window; products in float32, sums in float64."""

    def __init__(self) -> None:
        self._gram = Gram()
        self._cross: torch.Tensor | None = None
        self._drift: torch.Tensor | None = None

    def add(self, x_hat: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, missing: torch.Tensor | None) -> None:
        """x_hat (tokens, n̂), x (tokens, n), weights (tokens,), missing (tokens, hidden)."""
        self._gram.add(x_hat * weights.sqrt()[:, None])
        weighted = x_hat * weights[:, None]
        self._cross = _plus(self._cross, x.to(x_hat.device).T @ weighted)
        if missing is not None:
            self._drift = _plus(self._drift, missing.to(x_hat.device).T @ weighted)

    def moments(self, tokens: int) -> Moments:
        """Raises ValueError where no window was added."""
        if self._cross is None:
            raise ValueError("a correction needs at least two windows")
        drift = None if self._drift is None else self._drift / tokens
        return Moments(self._gram.total() / tokens, self._cross / tokens, drift)


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part.double() if total is None else total.add_(part)


def winsorized(squares: torch.Tensor) -> torch.Tensor:
    """Token weights of mean 1 out of ‖g‖², (tokens,), none above `HEAVIEST` (so the mean is less where few are not zero).

    A few tokens have gradients a thousand times the others'; uncapped, a fit would be to those few alone.
    """
    weights = squares.double()
    for _ in range(100):
        weights = (weights / weights.mean().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(HEAVIEST)
    return weights.float()


class _LayerPass:
    """One layer: the original's inputs, then the compressed layer's stages."""

    def __init__(
        self,
        streams: Sequential,
        view: LayerView,
        rewriter: Rewriter,
        layouts: Mapping[str, MatrixLayout],
        dtype: torch.dtype,
        folder: Any,
    ) -> None:
        self._streams, self._view, self._rewriter, self._dtype, self._folder = streams, view, rewriter, dtype, folder
        self._layouts = layouts
        self._widths: dict[str, int] = {}
        self._runner = streams._runner
        self._row = self._runner.checkpoint.architecture
        self._count = len(streams._windows)
        self._inputs = {
            stream: Activations(streams._journal.path(_state(stream, view.number)), streams._hidden_shape)
            for stream in ("original", "compressed")
        }

    def run(self) -> dict[str, torch.Tensor]:
        self._runner.load(self._view.number)
        with torch.no_grad():
            self._original()
            return self._compressed()

    def _original(self) -> None:
        """The original layer's stage inputs and its residual stream between attention and FFN, to disk."""
        layer = self._runner.layer
        modules = {name: layer.get_submodule(getattr(self._row, part)) for name, part in PROBE.items()}
        modules["middle"] = layer.get_submodule(self._row.ffn_norm)
        with self._streams._writing(_state("original", self._view.number + 1)) as after:
            for i in range(self._count):
                with contextlib.ExitStack() as stack:
                    caught = {name: stack.enter_context(_input_of(module)) for name, module in modules.items()}
                    after.put(i, self._runner.run(self._inputs["original"].get(i)[None])[0].cpu())
                for name, values in caught.items():
                    self._kept("original", name, values[0].shape[-1]).put(i, values[0][0].cpu())

    def _compressed(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        producers = {"attention": self._attention, "o": self._o, "ffn": self._ffn, "down": self._down}
        for stage in STAGES:
            correction = self._correction(stage, producers[stage])
            found |= self._rewritten(stage, correction)
        with self._streams._writing(_state("compressed", self._view.number + 1)) as after:
            for i in range(self._count):
                after.put(i, self._finish(i).cpu())
        return found

    def _correction(self, stage: str, produce: Any) -> Correction:
        """Run a stage's input x̂ over all windows, keep it, and sum up what Correction holds, the two halves apart."""
        weights = self._token_weights(stage)
        original = self._kept("original", stage)
        sums = (_Sums(), _Sums())
        for i in range(self._count):
            x_hat = produce(i)
            self._kept("compressed", stage, x_hat.shape[-1]).put(i, x_hat.cpu())
            sums[2 * i // self._count].add(x_hat, original.get(i), weights[i], self._missing(stage, i))
        tokens = self._streams._windows.numel()
        return Correction((sums[0].moments(tokens), sums[1].moments(tokens)))

    def _token_weights(self, stage: str) -> torch.Tensor:
        """(windows, tokens) float32, mean 1."""
        windows = self._streams._windows
        found = []
        for component in STAGES[stage]:
            squares = self._view.token_weights(component)
            if squares is not None:
                found.append(winsorized(squares[: windows.numel()]))
        if not found:
            return torch.ones(windows.shape, device=self._runner.device)
        mean = torch.stack(found).mean(0).view(windows.shape).to(self._runner.device)
        return TOKEN_WEIGHT * mean + (1 - TOKEN_WEIGHT)

    def _missing(self, stage: str, window: int) -> torch.Tensor | None:
        """What the compressed residual stream lacks where the stage's outputs join it, (tokens, hidden)."""
        if self._row.post_norms or stage not in ("o", "down"):
            return None
        if stage == "o":
            return self._inputs["original"].get(window) - self._inputs["compressed"].get(window)
        return self._kept("original", "middle").get(window) - self._kept("compressed", "middle").get(window)

    def _rewritten(self, stage: str, correction: Correction) -> dict[str, torch.Tensor]:
        """The stage's tensors, put into the running layer as well."""
        found = stored(self._rewriter.stage(stage, correction), self._dtype)
        for component in STAGES[stage]:
            module = self._view.module(component)
            parts = {k.removeprefix(f"{module}."): v for k, v in found.items() if k.startswith(f"{module}.")}
            self._place(component, module, parts)
        return found

    def _place(self, component: str, module: str, parts: dict[str, torch.Tensor]) -> None:
        layout = self._layouts.get(module)
        if layout is None:
            rows, columns = parts["weight"].shape
            layout = MatrixLayout(rows, columns, 0, 0)
        linear = empty_linear(layout, "bias" in parts).to(self._runner.device)
        placed = {name: part.to(self._runner.device) for name, part in stored(parts, torch.float32).items()}
        linear.load_state_dict(placed, assign=True)
        self._runner.layer.set_submodule(getattr(self._row, component), linear.requires_grad_(False))

    def _attention(self, window: int) -> torch.Tensor:
        norm = self._runner.layer.get_submodule(self._row.attention_norm)
        return norm(self._inputs["compressed"].get(window).to(self._runner.device))

    def _o(self, window: int) -> torch.Tensor:
        hidden = self._inputs["compressed"].get(window)[None]
        return self._until("o", hidden)

    def _ffn(self, window: int) -> torch.Tensor:
        hidden = self._inputs["compressed"].get(window)[None]
        with self._attention_done(window), _input_of(self._module("ffn_norm")) as middle:
            x = self._until("gate", hidden)
        self._kept("compressed", "middle", middle[0].shape[-1]).put(window, middle[0][0].cpu())
        return x

    def _down(self, window: int) -> torch.Tensor:
        x = self._kept("compressed", "ffn").get(window)[None].to(self._runner.device)
        with _input_of(self._module("down"), stop=True) as caught, contextlib.suppress(_Stop):
            self._runner.layer.get_submodule(_root(self._row.gate))(x)
        return caught[0][0]

    def _finish(self, window: int) -> torch.Tensor:
        hidden = self._inputs["compressed"].get(window)[None]
        h = self._kept("compressed", "down").get(window)[None].to(self._runner.device)
        done = self._module("down")(h)
        with self._attention_done(window), _answering(self._runner.layer, _root(self._row.gate), done):
            return self._runner.run(hidden)[0]

    def _attention_done(self, window: int) -> Any:
        """The attention module answers with the output that is already known up to its last matrix."""
        x = self._kept("compressed", "o").get(window)[None].to(self._runner.device)
        return _answering(self._runner.layer, _root(self._row.o), (self._module("o")(x), None))

    def _until(self, component: str, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer up to a component and return that component's input, (tokens, n)."""
        with _input_of(self._module(component), stop=True) as caught, contextlib.suppress(_Stop):
            self._runner.run(hidden)
        return caught[0][0]

    def _module(self, component: str) -> nn.Module:
        return self._runner.layer.get_submodule(getattr(self._row, component))

    def _kept(self, stream: str, name: str, width: int | None = None) -> Activations:
        """A stage's inputs on disk; the width is known from the first one written on."""
        key = f"{stream}-{name}"
        if width is not None:
            self._widths[key] = width
        return Activations(self._folder / key, (self._streams._windows.shape[1], self._widths[key]))


def stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint's type; indices stay what they are. Raises NotFinite for one that overflows in it."""
    found = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise NotFinite(
                f"{name} is not finite in {str(dtype).removeprefix('torch.')}; store the model in float32 first"
            )
    return found


def _root(module: str) -> str:
    """`mlp` of `mlp.gate_proj`: the child of the layer that a matrix belongs to."""
    return module.partition(".")[0]


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextlib.contextmanager
def _input_of(module: nn.Module, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """A list that the module's first positional input is put into when it is called."""
    caught: list[torch.Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0])
        if stop:
            raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


class _Answer(nn.Module):
    """Stands for a module whose output is known; what a layer asks of the module besides, the module answers."""

    def __init__(self, output: Any, module: nn.Module) -> None:
        super().__init__()
        self._output = output
        self._module = (module,)  # in a tuple, so that it is no part of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextlib.contextmanager
def _answering(layer: nn.Module, name: str, output: Any) -> Iterator[None]:
    """While the block runs, the layer's module of that name gives `output`."""
    own = layer.get_submodule(name)
    layer.set_submodule(name, _Answer(output, own))
    try:
        yield
    finally:
        layer.set_submodule(name, own)
