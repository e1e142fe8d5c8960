"""report.html of a run: what is in it, and how a browser shows it."""

import csv
import re

import pytest
from mlflow.tracking import MlflowClient

from distributed.api import Run, train
from distributed.mlflow_store import tracking_uri
from distributed.run import train as run_command
from distributed.run_folder import RunFolder
from tests.browser import find_browser
from tests.conftest import TOY

PICTURES = ("probability_scatter", "score_histogram", "mode_logo", "distances", "learning_curves")
MEASURE = """<script>window.onload = () => { document.body.dataset.widths =
    [...document.images].map(image => image.naturalWidth).join(" "); }</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        run = train(
            TOY, run={"name": "a-b"}, evaluation={"mode_cutoff": 0.5, "mode_distance": 0}, tracking={"mlflow": True}
        )
        run.folder = run.folder.absolute()
        run.client = MlflowClient(tracking_uri(run.config))
    return run


def test_the_report_holds_summary_pictures_modes_and_config(run):
    page = RunFolder(run.folder).report_file.read_text()
    assert f"{run.summary['excess_kl']:.4f}" in page
    assert f"{run.summary['unique_fraction']:.4f}" in page
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "function: tests.oracles:count_b" in page
    with open(RunFolder(run.folder).modes_file) as file:
        modes = list(csv.DictReader(file))
    assert len(modes) == run.summary["num_modes"] > 0
    scores = [float(mode["score"]) for mode in modes]
    assert scores == sorted(scores, reverse=True)
    for mode in modes:
        assert float(mode["score"]) == pytest.approx((1 + mode["sequence"].count("B")) / 5)
        assert f"<td>{mode['sequence']}</td>" in page
    assert sum(int(mode["num_samples"]) for mode in modes) <= 64


def test_the_report_needs_nothing_but_itself(run):
    page = RunFolder(run.folder).report_file.read_text()
    assert set(re.findall(r"\b(?:src|href|action)\s*=\s*\"(.{5})", page)) == {"data:"}
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)


def test_the_report_is_an_artifact_in_mlflow(run):
    (logged,) = run.client.search_runs(["1"])
    assert {"report.html", "modes.csv"} <= {artifact.path for artifact in run.client.list_artifacts(logged.info.run_id)}


def test_a_browser_shows_the_report_with_all_its_pictures(run, tmp_path):
    browser = find_browser(tmp_path / "profile", "--window-size=1100,2600")
    copy = tmp_path / "report.html"
    page = RunFolder(run.folder).report_file.read_text()
    copy.write_text(page.replace("</body>", MEASURE + "</body>"))
    shown = browser.content(copy.as_uri())
    widths = re.search(r'data-widths="([\d ]*)"', shown)
    assert widths is not None
    assert len(widths[1].split()) == len(PICTURES)
    assert all(int(width) > 200 for width in widths[1].split())
    assert "<h2>How did training go?</h2>" in shown
    picture = browser.screenshot(copy.as_uri(), "report.png")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_a_run_that_failed_has_a_report_with_its_cause(in_tmp_path, toy):
    config = toy(**{"oracle.function": "tests.oracles:always_nan", "evaluation.exact": "never"})
    assert run_command(config, None, None, None) == 1
    page = RunFolder(in_tmp_path / "runs/toy").report_file.read_text()
    assert 'class="failed"' in page
    assert "no valid score" in page


def test_names_from_outside_are_text_in_the_report(in_tmp_path, toy):
    run_command(toy(**{"environment.alphabet": "<&B", "run.max_seconds": 1e-6}), None, None, None)
    page = RunFolder(in_tmp_path / "runs/toy").report_file.read_text()
    assert "alphabet: &lt;&amp;B" in page
    assert "<&B" not in page
