"""Rivers from the 4-bit weights of other quantisers: AWQ, GPTQ, compressed-tensors and GGUF."""
