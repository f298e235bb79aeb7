"""Writes what is known of metrics from the tables in the source: parts of docs/metrics.md, and deploy/grafana.json.

Run `python docs/draw_metrics.py`; `--check` says whether both are up to date, and a test asks. Another test looks for
each metric of the dashboard in a scrape of Ray.
"""

import json
import sys
from pathlib import Path

from raystore.remote.exporter import FIGURES
from raystore.service.sampling import CAUSES

PAGE = Path(__file__).with_name("metrics.md")
DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana.json"


# -- the page ----------------------------------------------------------------------------------------------------------


def figures() -> list[str]:
    """A table of what Prometheus gets."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for figure in FIGURES:
        labels = ", ".join(f"`{label}`" for label in figure.labels)
        lines.append(f"| `ray_{figure.name}` | {figure.kind} | {labels} | {figure.meaning} |")
    return lines


def causes() -> list[str]:
    """A table of what may hold a run back."""
    return ["| cause | when |", "|---|---|", *(f"| `{cause}` | {when} |" for cause, when in CAUSES.items())]


def page() -> str:
    """docs/metrics.md with the tables at their places."""
    text = PAGE.read_text()
    for name, lines in (("figures", figures()), ("causes", causes())):
        start, end = f"<!-- {name}: drawn by docs/draw_metrics.py -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        table = "\n".join(lines)
        text = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


# -- the dashboard -----------------------------------------------------------------------------------------------------

#: Title, unit, query; `{S}` selects the store.
PANELS = [
    (
        "Rollouts per second, by outcome", "ops",
        "sum by (outcome) (rate(ray_raystore_rollouts_finished_total{S}[1m]))",
    ),
    ("Rollouts, as agent-lightning counts them", "ops", "sum by (status, mode) (rate(ray_agl_rollouts_total{S}[1m]))"),
    ("Reward of finished rollouts", "short", "ray_raystore_reward{S}"),
    ("Who limits the run", "percentunit", "ray_raystore_limited_ratio{S}"),
    ("Trainer waits for a batch", "s", "ray_raystore_consumer_waited_seconds{S}"),
    ("Duration of rollouts", "s", "ray_raystore_rollout_seconds{S}"),
    ("Time in the queue", "s", "ray_raystore_queue_seconds{S}"),
    ("Rollouts by status", "short", "ray_raystore_rollouts{S}"),
    ("Groups by status", "short", "ray_raystore_groups{S}"),
    ("Waiting, by queue", "short", "ray_raystore_queue_length{S}"),
    ("Tried again per second", "ops", "sum by (outcome) (rate(ray_raystore_attempts_retried_total{S}[1m]))"),
    ("Tokens per second", "ops", "sum by (kind) (rate(ray_raystore_tokens_total{S}[1m]))"),
    ("Spans per second", "ops", "rate(ray_raystore_spans_total{S}[1m])"),
    ("Memory by kind, and thresholds", "bytes", "ray_raystore_memory_bytes{S}"),
    ("Journal: age of what waits for the disk", "s", "ray_raystore_journal_lag_seconds{S}"),
    ("Loop of the store: late by", "s", "ray_raystore_loop_lag_seconds{S}"),
    (
        "Operations per call of the actor", "short",
        "deriv(ray_raystore_operations{S}[1m]) / deriv(ray_raystore_actor_calls{S}[1m])",
    ),
    ("CPU of the store", "percentunit", "deriv(ray_raystore_cpu_seconds{S}[1m])"),
]  # fmt: skip
COLUMNS, WIDTH, HEIGHT = 3, 8, 7  # in units of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${source}"}


def panel(number: int, title: str, unit: str, query: str) -> dict[str, object]:
    """One panel, as Grafana imports it."""
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [{"refId": "A", "datasource": SOURCE, "expr": query.replace("{S}", '{store=~"$store"}')}],
    }


def dashboard() -> str:
    """The dashboard as JSON."""
    stores = {
        "name": "store", "type": "query", "label": "Store", "datasource": SOURCE, "includeAll": True, "multi": True,
        "refresh": 2, "query": "label_values(ray_raystore_sessions, store)",
    }  # fmt: skip
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    whole = {
        "title": "raystore",
        "uid": "raystore",
        "schemaVersion": 39,
        "tags": ["ray", "raystore"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": [source, stores]},
        "panels": [panel(number, *given) for number, given in enumerate(PANELS)],
    }
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    drawn = {PAGE: page(), DASHBOARD: dashboard()}
    if "--check" in sys.argv:
        sys.exit(any(path.read_text() != text for path, text in drawn.items()))
    for path, text in drawn.items():
        path.write_text(text)
