"""A sweep that logs to an MLflow server, looked at in the server's own pages, and compared from there."""

import csv
import urllib.request
from urllib.parse import quote

import pytest
import yaml
from mlflow.tracking import MlflowClient

from distributed import compare, sweep
from distributed.mlflow_store import PARENT_TAG
from tests.browser import find_browser
from tests.conftest import TOY
from tests.mlflow_server import free_port, mlflow_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def logged(ray_session, tmp_path_factory):
    """(address, folder) of a server and a finished sweep of two trials."""
    folder = tmp_path_factory.mktemp("served")
    section = {"space": {"reward.exponent": {"grid": [1, 2]}}, "num_samples": 1}
    with mlflow_server(folder, free_port()) as address, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = TOY | {"sweep": section, "tracking": {"mlflow_uri": address, "experiment": "served"}}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
        assert sweep.main(["sweep.yaml", "--run.name", "s"]) == 0
        yield address, folder


def test_parent_children_and_artifacts_are_on_the_server(logged):
    assert b"MLflow" in urllib.request.urlopen(logged[0], timeout=30).read()
    client = MlflowClient(logged[0])
    experiment = client.get_experiment_by_name("served").experiment_id
    (parent,) = client.search_runs([experiment], "attributes.run_name = 's'")
    children = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    assert len(children) == 2
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {"results.csv", "best.yaml", "sweep.png"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert all("final_excess_kl" in child.data.metrics for child in children)
    assert "grid" in parent.data.params["sweep.reward.exponent"]


def test_a_sweep_folder_is_compared_from_the_server(logged, tmp_path, capsys):
    assert compare.main([str(logged[1] / "runs/s"), "--out", str(tmp_path)]) == 0
    with open(tmp_path / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["reward.exponent"] for row in rows) == ["1.0", "2.0"]
    assert [float(row["excess_kl"]) for row in rows] == sorted(float(row["excess_kl"]) for row in rows)
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert "reward.exponent" in capsys.readouterr().out


def test_the_pages_show_the_trials_of_the_sweep(logged, tmp_path):
    browser = find_browser(tmp_path, "--window-size=1900,900", "--virtual-time-budget=40000")
    address, _ = logged
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("served").experiment_id
    (parent,) = client.search_runs([experiment], "attributes.run_name = 's'")
    names = [r.info.run_name for r in client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")]
    condition = quote(f"tags.`{PARENT_TAG}`='{parent.info.run_id}'")
    page = f"{address}/#/experiments/{experiment}/runs?searchFilter={condition}&compareRunsMode=CHART"
    page += f"&orderByKey={quote('metrics.`final_excess_kl`')}&orderByAsc=true"  # otherwise children are folded away
    for _ in range(5):  # a browser's first visit may end before everything has come
        shown = browser.content(page)
        if all(word in shown for word in (*names, "balance_loss")):
            break
    assert all(name in shown for name in names)
    assert "balance_loss" in shown
    picture = browser.screenshot(page, "mlflow_sweep.png")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
