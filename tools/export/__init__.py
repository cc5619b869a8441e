"""Export of models for deployment: ONNX, ``torch.export``, AOTInductor."""
