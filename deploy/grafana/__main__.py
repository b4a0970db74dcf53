"""Writes the dashboards: `python -m deploy.grafana`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.grafana.cluster import CLUSTER
from deploy.grafana.panels import Dashboard, dashboard_json
from deploy.grafana.pools import DECODE, PREFILL
from deploy.grafana.router import ROUTER
from deploy.grafana.tenants import TENANTS
from deploy.grafana.transfer import TRANSFER

DASHBOARDS: tuple[Dashboard, ...] = (CLUSTER, PREFILL, DECODE, ROUTER, TRANSFER, TENANTS)


def file_text(dashboard: Dashboard) -> str:
    """What the dashboard's file holds."""
    return json.dumps(dashboard_json(dashboard), indent=2, sort_keys=True) + "\n"


def main() -> int:
    """Writes every dashboard beside this module."""
    for dashboard in DASHBOARDS:
        path = Path(__file__).with_name(f"{dashboard.uid}.json")
        path.write_text(file_text(dashboard))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
