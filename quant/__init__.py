"""FP8 and INT8 weights: a checkpoint is quantized tensor by tensor into the format that ComfyUI reads. Knows no host program."""
