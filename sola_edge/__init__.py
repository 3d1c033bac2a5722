"""sola-edge: compress a decoder-only LLM with SoLA into a checkpoint that transformers and the exporters read.

After `import sola_edge`, transformers' `AutoModelForCausalLM.from_pretrained` loads a compressed checkpoint.
"""

from sola_edge._register import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
