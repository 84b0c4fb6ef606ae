"""Tests use no network, share no process-wide state, and say what they skipped."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

# What tests skip themselves for (the word in their reason) -> the Debian package that brings it.
SYSTEM_PACKAGES = {"Chromium": "chromium", "Noto Color Emoji": "fonts-noto-color-emoji"}


@pytest.fixture(autouse=True)
def _reset_accelerate():
    """Forget accelerate's process-wide state, such as the precision that a test has chosen."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no process waits for a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were skipped for want of a system package, and how to install it."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for name, package in SYSTEM_PACKAGES.items():
        skipped = sum(name in reason for reason in reasons)
        if skipped:
            terminalreporter.write_line(
                f"{skipped} tests skipped without {name}: apt-get install {package}"
            )
