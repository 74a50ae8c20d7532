"""The page of the study says what the committed results say."""

import json

import pytest

from bench.studies import PAGE, RESULTS, filled, markdown


def test_the_pages_tables_are_those_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
    for path in RESULTS.glob("*.json"):
        assert f"<!-- {path.stem} -->" in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_means_and_differences_are_those_of_the_runs(path):
    """Worked out anew from the single runs."""
    results = json.loads(path.read_text(encoding="utf-8"))
    for task, found in results["tasks"].items():
        runs = {
            (run["variant"], run["seed"]): run["figures"][found["measure"]]
            for run in results["runs"]
            if run["task"] == task
        }
        first = found["rows"][0]["variant"]
        for row in found["rows"]:
            own = {seed: value for (variant, seed), value in runs.items() if variant == row["variant"]}
            assert row["mean"] == pytest.approx(sum(own.values()) / len(own))
            if row["variant"] != first:
                differences = [value - runs[first, seed] for seed, value in own.items()]
                mean = sum(differences) / len(differences)
                deviation = (sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)) ** 0.5
                assert row["difference"]["mean"] == pytest.approx(mean)
                assert row["difference"]["error"] == pytest.approx(deviation / len(differences) ** 0.5)
    assert markdown(results).count("\n|") >= len(results["tasks"])
