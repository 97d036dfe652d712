from __future__ import annotations

import logging
from pathlib import Path

import pytest

from modhifi.progress import LOG, Clock, live_log


def test_the_log_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    logger, out = logging.getLogger("modhifi"), tmp_path / "small"
    before = (logger.level, list(logger.handlers))
    with live_log(out):
        clock = Clock(command="modhifi prune net")
        with clock.stage("load"):
            lines = (tmp_path / "small.log").read_text().splitlines()
        assert "modhifi prune net" in lines[1] and "torch" in lines[0]
        assert "load: " in (tmp_path / "small.log").read_text()
    assert not list(tmp_path.iterdir()) and (logger.level, logger.handlers) == before


def test_a_run_that_ends_early_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), live_log(tmp_path / "small"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with live_log(tmp_path / "missing" / "small"):
        Clock()
    with live_log(None):
        Clock()
    assert not list(tmp_path.iterdir())


def test_a_file_of_that_name_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "small.log").write_text("mine")
    with live_log(tmp_path / "small"):
        Clock()
    assert (tmp_path / "small.log").read_text() == "mine"


def test_an_artefact_holds_the_log_to_the_end(tmp_path: Path) -> None:
    clock = Clock(command="modhifi prune net")
    (tmp_path / LOG).write_text(clock.log())
    with clock.stage("reload"):
        pass
    clock.write_log(tmp_path)
    assert (tmp_path / LOG).read_text().splitlines()[-1].endswith("reload: 0.0 s")
