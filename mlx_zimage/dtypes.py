"""The number types that tensors have here, by name: one table. Data only."""

# The networks compute in one of these, and the converter writes them.
FLOATS = ("float32", "bfloat16", "float16")
# As safetensors spells what a model folder may hold: floats, and the words that quantized weights are packed in.
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "U8": "uint8"}
SPELLED = {name: spelling for spelling, name in STORED.items()}
