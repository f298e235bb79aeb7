"""What crosses a boundary between processes: payloads, frames, and models as rows. Stands on `types`."""
