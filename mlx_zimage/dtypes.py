"""The dtypes of tensors, in one table. Data only."""

# The dtypes in a model folder: floats, and the integers that quantized weights are packed in. Each row has
# safetensors' spelling, the name, and the bytes per number.
TABLE = (
    ("F32", "float32", 4),
    ("BF16", "bfloat16", 2),
    ("F16", "float16", 2),
    ("U32", "uint32", 4),
    ("U8", "uint8", 1),
)
STORED = {spelling: name for spelling, name, _ in TABLE}
SPELLED = {name: spelling for spelling, name, _ in TABLE}
ITEM_BYTES = {spelling: nbytes for spelling, _, nbytes in TABLE}
# The networks compute in one of these, and the converter writes them.
FLOATS = tuple(name for _, name, _ in TABLE if "float" in name)
FLOAT_SPELLINGS = tuple(SPELLED[name] for name in FLOATS)
