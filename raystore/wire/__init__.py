"""What crosses between processes: checked arguments, models as rows, values as payloads, frames."""
