"""From encoded images to batches on the device."""
