"""Images per second of the input pipeline, next to DeiT's."""
