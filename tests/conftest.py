"""Registers helpers.py; not in the controller of xdist, which runs no test and need not import PyTorch."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    is_controller = config.getoption("numprocesses", 0) and not hasattr(config, "workerinput")
    if not is_controller:
        config.pluginmanager.import_plugin("helpers")
