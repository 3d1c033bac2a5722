"""Teaches transformers (4.57 and 5.x) to load, save and generate with a compressed checkpoint.

`config.json` says `"quantization_config": {"quant_method": "sola", "matrices": {module: layout}}`; before the weights are
loaded, each named nn.Linear is replaced by an empty HybridLinear, whose parameters then load by their names. Where the
architecture has fused matrices, those of all layers are split into their components first, as compressed checkpoints are.
"""

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sola_edge.architecture import architecture_of
from sola_edge.config import QUANT_METHOD, MatrixLayout
from sola_edge.layers import replace_linears, unfuse_linears


class SolaConfig(QuantizationConfigMixin):
    """The layout of every factored matrix: `matrices` maps a module name to MatrixLayout's fields."""

    def __init__(self, matrices: dict[str, dict[str, Any]] | None = None, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.matrices = matrices or {}


class SolaQuantizer(HfQuantizer):
    """Builds the hybrid layers; there is nothing to quantize, so loading works on any device and in any float type."""

    quantization_config: SolaConfig
    requires_calibration = True  # weights exist only in compressed form: a dense checkpoint is compressed by sola-edge

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        layouts = {name: MatrixLayout(**row) for name, row in self.quantization_config.matrices.items()}
        row = architecture_of(model.config)
        fused = row.fused_rows(model.config)
        for i in range(model.config.num_hidden_layers if fused else 0):
            unfuse_linears(model, {f"{row.layer.format(i)}.{module}": rows for module, rows in fused.items()})
        replace_linears(model, layouts)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Add the method to transformers' tables, once."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SolaConfig)
        register_quantizer(QUANT_METHOD)(SolaQuantizer)
