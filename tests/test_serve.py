"""The server: the library's numbers, alone and in company; limits that hold; an end that loses nothing."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trajbook.apps.load import exchange, request_bytes
from trajbook.apps.serve import (
    ForecastRequest,
    InferenceServer,
    Settings,
    ask,
    example_motions,
    make_app,
    open_service,
)
from trajbook.checkpoint import save_checkpoint
from trajbook.core import TrajbookError
from trajbook.mae.model import TrajectoryMAE
from trajbook.mae.model import describe as describe_mae
from trajbook.moe.data import FAMILIES, ModelConfig
from trajbook.moe.model import MoEForecaster, describe, forecast, generate

EXTRA = {"families": list(FAMILIES), "sampling_rate_hz": 100.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    "A forecaster whose experts are far apart in score, so that rounding never swaps them."
    torch.manual_seed(0)
    model = MoEForecaster(ModelConfig(d_model=32, n_heads=2, d_ff=32, head_width=32)).eval()
    path = tmp_path_factory.mktemp("serve") / "model"
    return save_checkpoint(path, model, method="moe", extra=EXTRA, **describe(model.config))


@pytest.fixture(scope="module")
def client(checkpoint):
    with TestClient(
        make_app(InferenceServer(checkpoint, "cpu")), raise_server_exceptions=False
    ) as found:
        yield found


def histories(n: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(size=(int(draw.integers(3, 150)), 3)).cumsum(0) for _ in range(n)]


def test_server_and_library_give_the_same_numbers(client, checkpoint):
    model = open_service(checkpoint, "cpu").model
    for h in histories(6):
        answer = client.post("/v1/forecast", json={"history": h.tolist(), "horizon": 40}).json()
        found = forecast(model, torch.from_numpy(h[None]), 40)
        np.testing.assert_allclose(answer["mean"], found.mean[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(answer["scale"], found.scale[0], rtol=1e-4, atol=1e-5)


def test_a_batch_gives_the_numbers_of_single_requests(client):
    asked = [
        {
            "history": h.tolist(),
            "horizon": 5 + 9 * i,
            "samples": i % 3,
            "seed": i,
            "quantiles": [0.1],
            "temperature": 0.5,
        }
        for i, h in enumerate(histories(8))
    ]
    alone = [client.post("/v1/forecast", json=a).json() for a in asked]
    together = client.post("/v1/forecast/batch", json={"requests": asked}).json()["answers"]
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        for key in ("mean", "samples"):
            if key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-5)


def test_many_at_once_give_the_numbers_of_one(checkpoint):
    async def crowd() -> tuple[list, list]:
        server = InferenceServer(checkpoint, "cpu")
        asked = [
            {"history": h.tolist(), "horizon": 4 + 5 * i, "samples": 2, "seed": i, "mode": m}
            for i, h in enumerate(histories(12))
            for m in ("one_shot", "autoregressive")
        ]
        alone = [await server.handle_request(a) for a in asked]
        together = await asyncio.gather(*(server.handle_request(a) for a in asked))
        await server.stop()
        return alone, together

    for a, b in zip(*asyncio.run(crowd()), strict=True):
        np.testing.assert_allclose(a["samples"], b["samples"], rtol=1e-5, atol=1e-5)


def test_a_seed_means_the_same_in_the_server_and_in_the_library(client, checkpoint):
    "Also beyond one block of the horizon, and in company of longer requests."
    model = open_service(checkpoint, "cpu").model
    for k, h in enumerate(histories(3)):
        asked = {"history": h.tolist(), "samples": 3, "seed": k, "horizon": 40}
        x, draw = torch.from_numpy(h[None]), lambda k=k: torch.Generator().manual_seed(k)
        once = forecast(model, x, 40, samples=3, generator=draw()).samples[0]
        answer = client.post("/v1/forecast", json=asked).json()
        np.testing.assert_allclose(answer["samples"], once, rtol=1e-5, atol=1e-4)
        stepwise = generate(model, x, 40, samples=3, generator=draw())[0]
        asked["mode"] = "autoregressive"
        company = [asked, {**asked, "horizon": 64, "seed": 9}, {**asked, "horizon": 8}]
        batch = client.post("/v1/forecast/batch", json={"requests": company}).json()["answers"]
        np.testing.assert_allclose(batch[0]["samples"], stepwise, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(
            batch[2]["samples"], generate(model, x, 8, samples=3, generator=draw())[0], atol=1e-3
        )


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "gru"}, {"patch": 1}, {"architecture": "dlinear", "candidates": ()}],
)
def test_every_architecture_is_served_as_the_library_answers(changes, tmp_path):
    "The server pads every history; the library does not."
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "d_ff": 32, "head_width": 32}
    model = MoEForecaster(ModelConfig(**sizes, **changes)).eval()
    save_checkpoint(tmp_path / "m", model, method="moe", extra=EXTRA, **describe(model.config))
    service = open_service(tmp_path / "m", "cpu")
    for h in [np.array([[1.0, 2.0, 3.0], [1.5, 2.0, 2.0]]), *histories(3)]:
        (answer,) = service.answer([ForecastRequest(history=h.tolist())])
        found = forecast(model, torch.from_numpy(h[None]))
        np.testing.assert_allclose(answer["mean"], found.mean[0], rtol=1e-5, atol=1e-4)


def test_python_callers_may_come_from_several_loops(checkpoint):
    server, request = InferenceServer(checkpoint, "cpu"), {"history": [[0, 0, 0], [1, 1, 1]]}
    found = [asyncio.run(asyncio.wait_for(server.handle_request(request), 30)) for _ in range(2)]
    assert found[0] == found[1]
    with pytest.raises(TrajbookError, match="cannot embed"):
        asyncio.run(server.handle_request({"states": [[0.0] * 4] * 30}))


def test_quantiles_that_are_close_keep_their_names(client):
    close = [0.1234567, 0.1234568, 0.5]
    asked = {"history": [[0, 0, 0], [1, 1, 1]], "quantiles": close}
    found = client.post("/v1/forecast", json=asked).json()["quantiles"]
    assert [float(k) for k in found] == close
    assert client.post("/v1/forecast", json=asked | {"quantiles": [5e-324]}).status_code == 422


def test_the_documents_form_over_http_and_in_python(client, checkpoint):
    request = {
        "tokens": [[1.0, 2.0, 3.0], [1.1, 2.1, 2.9], [1.2, 2.3, 2.7]],
        "max_new_tokens": 16,
        "temperature": 1.0,
    }
    over_http = client.post("/v1/generate", json=request).json()["generated_tokens"]

    async def in_python() -> dict:
        server = InferenceServer(model_path=checkpoint, device="auto")
        answer = await server.handle_request(request)
        await server.stop()
        return answer

    assert asyncio.run(in_python())["generated_tokens"] == over_http
    assert np.shape(over_http) == (16, 3)
    again = client.post("/v1/generate", json=request | {"seed": 1}).json()["generated_tokens"]
    assert again != over_http
    moved = [[a + 5 for a in p] for p in request["tokens"]]
    shifted = client.post("/v1/generate", json=request | {"tokens": moved}).json()[
        "generated_tokens"
    ]
    np.testing.assert_allclose(np.array(shifted) - 5, over_http, atol=1e-3)  # the input matters


def test_cold_futures_are_the_mean_path(client, checkpoint):
    h = histories(1)[0]
    cold = client.post(
        "/v1/forecast",
        json={"history": h.tolist(), "mode": "autoregressive", "temperature": 0, "samples": 2},
    ).json()
    wanted = generate(
        open_service(checkpoint, "cpu").model, torch.from_numpy(h[None]), temperature=0.0
    )
    np.testing.assert_allclose(cold["samples"], wanted.repeat(1, 2, 1, 1)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/forecast", "{", 422, ""),
        ("/v1/forecast", '{"history": [[NaN, 0, 0]]}', 422, "finite"),
        ("/v1/forecast", '{"history": [[1e999, 0, 0]]}', 422, "finite"),
        ("/v1/forecast", '{"history": [[1e300, 0, 0]]}', 422, "1000000000"),
        ("/v1/forecast", '{"history": []}', 422, "history"),
        ("/v1/forecast", '{"history": [[0, 0], [0, 0, 0]]}', 422, "coordinates"),
        ("/v1/forecast", '{"history": [[0, 0, 0]], "horizn": 3}', 422, "horizn"),
        ("/v1/forecast", '{"history": [[0, 0, 0]], "horizon": 0}', 422, "horizon"),
        ("/v1/forecast", '{"history": [[0, 0, 0]], "horizon": 512, "samples": 64}', 422, "8192"),
        ("/v1/forecast", '{"history": [[0, 0, 0]], "quantiles": [1]}', 422, "quantiles"),
        ("/v1/forecast", "[" * 20000, 400, ""),
        ("/v1/forecast", b"\xff\xfe", 400, ""),
        ("/v1/embed", '{"states": [[0, 0, 0, 0]]}', 422, "cannot embed"),
        ("/v1/nothing", "{}", 404, ""),
    ],
)
def test_every_mistake_is_said_in_a_sentence(client, path, body, status, words):
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status or (status == 400 and reply.status_code == 422)
    assert words in reply.json()["detail"] and "Traceback" not in reply.text
    assert client.get("/ready").status_code == 200


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        "history",
        "horizon",
        "samples",
        "quantiles",
        "temperature",
        "mode",
        "seed",
        "tokens",
        "requests",
        "states",
        "dt_s",
    ]
)


@given(
    st.dictionaries(
        FIELDS, ANY | st.lists(st.lists(st.floats(), max_size=4), max_size=5), max_size=5
    ),
    st.sampled_from(["forecast", "generate", "forecast/batch", "embed"]),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nonsense_gets_only_refusals(client, body, route):
    reply = client.post(
        f"/v1/{route}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert reply.status_code in (200, 400, 404, 413, 422)


def test_the_schema_holds_against_schemathesis(checkpoint):
    schemathesis = pytest.importorskip("schemathesis")
    app = make_app(InferenceServer(checkpoint, "cpu"))
    with TestClient(app, raise_server_exceptions=False) as inside:
        schema = schemathesis.openapi.from_dict(inside.get("/openapi.json").json())
        routes = [o.ok() for o in schema.get_all_operations()]
        assert {r.path for r in routes} >= {"/v1/forecast", "/v1/generate", "/health"}

        @given(data=st.data())
        @settings(max_examples=60, deadline=None)
        def hammer(data):
            for route in routes:
                case = data.draw(route.as_strategy())
                options = {"params": case.query, "headers": dict(case.headers or {})}
                if route.method.upper() == "POST":
                    options["json"] = case.body
                try:
                    message = inside.build_request(route.method.upper(), route.path, **options)
                except (ValueError, TypeError):  # the client cannot even write it down
                    continue
                reply = inside.send(message)
                assert reply.status_code < 500, (route.path, case.body)

        hammer()


def test_a_body_that_is_too_large_or_without_length_is_refused(client):
    large = client.post(
        "/v1/forecast", content=b" " * 1_000_001, headers={"content-type": "application/json"}
    )
    assert large.status_code == 413
    chunked = client.post(
        "/v1/forecast", content=iter([b"{}"]), headers={"content-type": "application/json"}
    )
    assert chunked.status_code == 413


def test_a_key_is_asked_for(checkpoint):
    app = make_app(InferenceServer(checkpoint, "cpu"), Settings(api_key="secret"))
    asked = {"history": [[0.0, 0.0, 0.0]]}
    with TestClient(app) as client:
        assert client.post("/v1/forecast", json=asked).status_code == 401
        assert (
            client.post("/v1/forecast", json=asked, headers={"x-api-key": "Secret"}).status_code
            == 401
        )
        assert (
            client.post("/v1/forecast", json=asked, headers={"x-api-key": "secret"}).status_code
            == 200
        )
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_overload_is_refused_at_once(checkpoint):
    server = InferenceServer(checkpoint, "cpu", max_queue=3)
    busy, go = threading.Event(), threading.Event()
    answer = server.service.answer

    def slow(requests):
        busy.set()
        go.wait(10)
        return answer(requests)

    asked = {"history": [[0.0, 0.0, 0.0]]}
    with TestClient(make_app(server)) as client, ThreadPoolExecutor(8) as pool:
        server.service.answer = slow
        first = pool.submit(client.post, "/v1/forecast", json=asked)
        busy.wait(10)
        rest = [pool.submit(client.post, "/v1/forecast", json=asked) for _ in range(6)]
        for _ in range(200):
            if sum(r.done() for r in rest) >= 3:
                break
            time.sleep(0.02)
        go.set()
        statuses = sorted(r.result().status_code for r in rest)
        assert first.result().status_code == 200 and statuses == [200] * 3 + [429] * 3
        refused = next(r.result() for r in rest if r.result().status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert client.post("/v1/forecast", json=asked).status_code == 200


def test_one_bad_pass_is_one_error(checkpoint):
    server = InferenceServer(checkpoint, "cpu")
    with TestClient(make_app(server), raise_server_exceptions=False) as client:
        answer, server.service.answer = server.service.answer, lambda requests: 1 / 0
        assert client.post("/v1/forecast", json={"history": [[0.0, 0.0, 0.0]]}).status_code == 500
        server.service.answer = answer
        assert client.post("/v1/forecast", json={"history": [[0.0, 0.0, 0.0]]}).status_code == 200


def test_what_a_monitor_reads(client):
    client.post("/v1/forecast", json={"history": [[0.0, 0.0, 0.0]]})
    text = client.get("/metrics").text
    assert 'trajbook_requests_total{path="/v1/forecast",status="200"}' in text
    assert "trajbook_batch_size_count" in text and "trajbook_waiting 0.0" in text
    assert client.get("/v1/model").json()["inputs"]["position"]["unit"] == "m"


def test_an_encoder_is_served_too(tmp_path):
    from trajbook.config import resolve

    torch.manual_seed(0)
    model = TrajectoryMAE(resolve("mae", "tiny").model).eval()
    path = save_checkpoint(tmp_path / "mae", model, method="mae", **describe_mae(model.config))
    with TestClient(make_app(InferenceServer(path, "cpu"))) as client:
        states = np.random.default_rng(0).normal(size=(60, 4)).tolist()
        assert (
            len(client.post("/v1/embed", json={"states": states}).json()["embedding"])
            == model.config.d_model
        )
        assert (
            "cannot forecast"
            in client.post("/v1/forecast", json={"history": [[0, 0, 0]]}).json()["detail"]
        )
        assert client.get("/v1/examples").json() == {"examples": []}


def test_examples_have_a_truth(checkpoint):
    found = example_motions(open_service(checkpoint, "cpu"))
    assert [m["name"] for m in found] == list(FAMILIES)
    gap = np.linalg.norm(np.subtract(found[0]["future"][0], found[0]["history"][-1]))
    assert 0 < gap < 1


@pytest.fixture
def process(checkpoint):
    "A server in a process of its own, and its address."
    port = 18000 + os.getpid() % 2000
    words = [
        sys.executable,
        "-m",
        "trajbook.apps.cli",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
    ]
    code = "import sys; from trajbook.apps.cli import main; sys.exit(main())"
    words[1:3] = ["-c", code]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            ask(url, {"history": [[0.0, 0.0, 0.0]]}, timeout_s=2)
            break
        except TrajbookError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    yield server, url
    server.kill()
    server.communicate()


def test_a_stop_loses_no_accepted_request(process):
    server, url = process
    request = {
        "history": histories(1)[0].tolist(),
        "mode": "autoregressive",
        "samples": 16,
        "horizon": 256,
    }
    begun = threading.Barrier(9)

    def one(i: int) -> dict:
        begun.wait()
        return ask(url, request | {"seed": i})

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(one, i) for i in range(8)]
        begun.wait()
        time.sleep(0.15)  # they are on their way
        server.send_signal(signal.SIGTERM)
        answers = [j.result() for j in jobs]
    assert all(np.shape(a["samples"]) == (16, 256, 3) for a in answers)
    assert server.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends by the signal, after its work
    with pytest.raises(TrajbookError, match="does not answer"):
        ask(url, request, timeout_s=1)


def test_the_client_repeats_what_the_server_says(process):
    with pytest.raises(TrajbookError, match=r"refused \(422\).*coordinates"):
        ask(process[1], {"history": [[0.0]]})


GOOD = {"history": [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]], "horizon": 4}
WRONG = [
    (
        "history",
        [None, "x", {}, [], [[]], [[1, 2]], [[1, 2, "a"]], [[1, 2, None]], [[True, [], 1]]],
    ),
    ("history", [[[1e10, 0, 0]], [[0, 0, 0]] * 4097, [[0] * 17], [[0, 0, 0], [0, 0]], 7]),
    ("horizon", [0, -1, 513, 1.5, "ten", [], None, 2**70]),
    ("samples", [-1, 65, "many", 0.5]),
    ("temperature", [-1, 11, "hot", None, [1]]),
    ("quantiles", [[0], [1], [2], [-0.1], ["a"], 0.5, [0.5] * 17]),
    ("seed", [-1, 2**60, "x", 0.1]),
    ("mode", ["", "sideways", 1, None]),
    ("explain", ["perhaps", [], 7]),
    ("horizn", [3]),
]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400]


def malformed(i: int) -> bytes:
    "The i-th of endlessly many requests that nobody can answer."
    draw = random.Random(i)
    body = json.dumps(GOOD).encode()
    kind = i % 7
    if kind == 0:
        body = draw.randbytes(draw.randrange(200))
    elif kind == 1:
        body = body[: draw.randrange(len(body))]
    elif kind in (2, 3):
        name, values = draw.choice(WRONG)
        body = json.dumps(GOOD | {name: draw.choice(values)}).encode()
    elif kind == 4:
        body = f'{{"history": [[{draw.choice(LITERALS)}, 0, 0]]}}'.encode()
    elif kind == 5:
        depth = draw.choice((10, 1_000, 100_000))
        body = b"[" * depth + b"]" * draw.choice((0, depth))
    path = draw.choice(("/v1/forecast", "/v1/forecast", "/v1/generate", "/v1/forecast/batch"))
    path = f"/v1/{draw.randrange(10**6)}" if kind == 6 else path
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_ten_thousand_malformed_requests(process):
    server, url = process
    port = int(url.rpartition(":")[2])

    async def send(numbers: range) -> list[int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        found = [await exchange(reader, writer, malformed(i)) for i in numbers]
        assert await exchange(reader, writer, request_bytes("/v1/forecast", GOOD)) == 200
        writer.close()
        return found

    async def all_of(n: int) -> list[int]:
        parts = await asyncio.gather(*(send(range(k, n, 8)) for k in range(8)))
        return [status for part in parts for status in part]

    memory = psutil.Process(server.pid).memory_info
    asyncio.run(all_of(2_000))
    before = memory().rss
    statuses = asyncio.run(all_of(10_000))
    assert len(statuses) == 10_000 and {s // 100 for s in statuses} == {4}, set(statuses)
    assert memory().rss - before < 20e6
    assert np.shape(ask(url, GOOD)["mean"]) == (4, 3)


@pytest.mark.parametrize(
    "words", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 99, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"]
)  # fmt: skip
def test_what_is_no_http_is_refused(process, words):
    port = int(process[1].rpartition(":")[2])

    async def send() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(words)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    answer = asyncio.run(send())
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert ask(process[1], GOOD)


def test_token_by_token_without_samples_is_the_cold_path(client):
    asked = {"history": histories(1)[0].tolist(), "mode": "autoregressive"}
    cold = client.post("/v1/forecast", json=asked | {"samples": 1, "temperature": 0}).json()
    for seed in (0, 1):
        answer = client.post("/v1/forecast", json=asked | {"seed": seed}).json()
        assert answer.keys() == {"mean"}
        np.testing.assert_allclose(answer["mean"], cold["mean"], rtol=1e-5, atol=1e-6)
    refused = client.post("/v1/forecast", json=asked | {"quantiles": [0.5]})
    assert refused.status_code == 422 and "at least 8" in refused.json()["detail"]


def test_times_stand_in_every_answer_that_has_a_step(client):
    timed = GOOD | {"dt_s": 0.5}
    batch = client.post("/v1/forecast/batch", json={"requests": [GOOD, timed]}).json()["answers"]
    assert "times_s" not in batch[0] and batch[1]["times_s"] == [0.5, 1.0, 1.5, 2.0]


def test_a_batch_that_can_never_fit_is_not_told_to_come_back(checkpoint):
    with TestClient(make_app(InferenceServer(checkpoint, "cpu", max_queue=2))) as small:
        answer = small.post("/v1/forecast/batch", json={"requests": [GOOD] * 3})
    assert answer.status_code == 422 and "queue of 2" in answer.json()["detail"]


def test_a_pass_that_fails_is_said_in_a_sentence(checkpoint, monkeypatch):
    server = InferenceServer(checkpoint, "cpu")
    with TestClient(make_app(server), raise_server_exceptions=False) as broken:
        monkeypatch.setattr(server.service, "answer", lambda requests: 1 / 0)
        answer = broken.post("/v1/forecast", json=GOOD)
        assert answer.status_code == 500 and "log has the reason" in answer.json()["detail"]
        counted = broken.get("/metrics").text
    assert 'trajbook_requests_total{path="/v1/forecast",status="500"} 1.0' in counted
