"""One-size quantisers to compare with: rtn, gptq (both plain code close to the papers) and spqr (the codec's encoder).

`model` quantises a whole model with one of them, counts its bytes and measures it. No file is written.
"""
