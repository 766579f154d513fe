"""The load test: what clients see is counted, whatever happens to the server."""

import json
import os
import signal
import threading
import time

import pytest

from trajbook.apps.load import (
    Answered,
    Load,
    fresh_checkpoint,
    load_table,
    load_test,
    press,
    questions,
    ratios,
    serving,
    summary,
)
from trajbook.core import TrajbookError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return fresh_checkpoint(tmp_path_factory.mktemp("load"), "tiny")


def test_every_answer_is_counted(checkpoint):
    with serving(checkpoint) as (server, port):
        load = press(server, port, questions("one_shot", 5), clients=3, seconds=0.5)
    found = summary([load])
    assert found["answers"] == len(load.answers) > 0 and found["errors"] == {}
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert 0 < load.server_cpu_s < 2 * load.wall_s


def test_overload_is_seen(checkpoint):
    with serving(checkpoint, "--max-queue", "1") as (server, port):
        load = press(server, port, questions("autoregressive", 5), clients=8, seconds=0.5)
    assert summary([load])["errors"].keys() == {"429"}


def test_a_server_that_dies_is_an_error_and_not_a_crash(checkpoint):
    with serving(checkpoint) as (server, port):
        stop = lambda: (time.sleep(0.3), os.kill(server.pid, signal.SIGKILL))  # noqa: E731
        threading.Thread(target=stop).start()
        load = press(server, port, questions("one_shot", 2), clients=2, seconds=0.8)
    assert summary([load])["errors"]["0"] > 0


def test_no_answers_no_times():
    assert summary([Load([Answered(503, 0.1)], 1.0, 0.1)])["p99_ms"] is None


def test_ratios_are_off_over_on():
    fast, slow = (Load([Answered(200, 0.1)] * n, 1.0, 0.5) for n in (400, 100))
    loads = {f"{m}.{h}": [fast if h == "on" else slow] * 3
             for m in ("one_shot", "autoregressive") for h in ("on", "off")}  # fmt: skip
    found = ratios(loads)
    assert all(r["value"] == pytest.approx(4) for r in found["ratios"].values())
    about = {"sides": {k: summary(v) for k, v in loads.items()}, "hardware": {"cpu": "x"}}
    table = load_table(json.loads(json.dumps(about | found)) | {"clients": 1})
    assert len(table.rows) == 8 and "400" in repr(table)


@pytest.mark.parametrize("name", ["clients", "seconds", "rounds"])
def test_nothing_cannot_be_measured(name):
    with pytest.raises(TrajbookError, match=f"{name} is 0; it must be positive"):
        load_test(**{name: 0})
