"""Programs for deployment, made of models: ONNX, ``torch.export``, AOTInductor."""
