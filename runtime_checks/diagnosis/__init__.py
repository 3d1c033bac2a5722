"""What is wrong with an artefact: beside its logits, its parts are compared with what the reference says they should be.

difference.py   two matrices, and in words what one did to the other
weights.py      a stored tensor beside the checkpoint's, in the encoding of the file
gguf_weights.py, onnx_weights.py   the tensors of a file; of ONNX the nodes too
facts.py        rope theta, epsilon, heads, … as a config, a GGUF file and an ONNX folder tell them
declared.py, model.py   the precision that a file calls itself, and which compression it is of
ids.py, cache.py   a runtime's own tokenizer, and its logits by way of its cache
examine.py      all of these for one artefact in one runtime
"""
