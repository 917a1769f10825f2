"""README's figures are the committed results', word for word."""

from tests.bench.report import ROOT, render


def test_the_figures_in_readme_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert render(text) == text, "run: python -m tests.bench.report"
