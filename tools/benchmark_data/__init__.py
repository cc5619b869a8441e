"""Images per second of the input pipeline, beside the one of DeiT."""
