"""The number types that tensors have here: one table. Data only."""

# The networks compute in one of these, and the converter writes them.
FLOATS = ("float32", "bfloat16", "float16")
# What a model folder may hold: floats, and the words that quantized weights are packed in. Each has safetensors'
# spelling, the name, and the bytes of one number.
TABLE = (
    ("F32", "float32", 4),
    ("F16", "float16", 2),
    ("BF16", "bfloat16", 2),
    ("U32", "uint32", 4),
    ("U8", "uint8", 1),
)
STORED = {spelling: name for spelling, name, _ in TABLE}
SPELLED = {name: spelling for spelling, name, _ in TABLE}
ITEM_BYTES = {spelling: nbytes for spelling, _, nbytes in TABLE}
