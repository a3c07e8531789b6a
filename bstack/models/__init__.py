"""Reading an original model: a transformers folder or hub id, a GGUF file; weights one layer at a time."""
