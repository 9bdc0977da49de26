"""A model behind an API is asked, scored and compared like one whose weights are here; what a server does wrong is
tried again, counted or said in one line, and no reply that came is lost."""
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from answer_server import AnswerServer
from PIL import Image

import sfa_core as sfa
from sfa_core.core.address import KEY, Address, is_address, model_cards, parse_address, served_version
from sfa_core.core.hub import model_version
from sfa_core.models.images import describe_views
from sfa_core.models.load import load_model
from sfa_core.models.parts import memory_table
from sfa_core.models.served import ServerStopped, ask_all, open_served
from sfa_core.runs.commands import main


@pytest.fixture(scope="module")
def asked():
    return sfa.load_benchmark("synthetic", limit=12)


@pytest.fixture
def serve():
    "Serve the embedded model from a thread, and give its address."
    running = []

    def start(**options):
        server = AnswerServer(0, "embedded", **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1#embedded"
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def replies_of(served, asked, at_once=1):
    found = {}
    for place, reply in ask_all(served, asked, range(len(asked)), at_once=at_once, max_new_tokens=20, suffix=""):
        found[place] = reply
    return found


# Addresses

def test_an_address_is_taken_apart():
    assert parse_address("https://h:1/v1/#a/b:7b") == Address("https://h:1/v1", "a/b:7b", "")
    assert parse_address("http://h/v1?revision=may 1".replace(" ", "%20")).revision == "may 1"
    assert is_address("http://h") and not is_address("embedded") and not is_address(Path("models/http"))


@pytest.mark.parametrize("name, words", [
    ("http://user:secret@h/v1#a", f"holds a key; expected it in the environment variable {KEY}"),
    ("http://h/v1?key=secret#a", "is no address of a model"), ("http:///v1", "is no address of a model"),
    ("http://h:99999/v1", "is no address"), ("http://h/a b", "is no address of a model")])
def test_what_is_no_address_is_one_line(name, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_address(name)
    assert "secret@" not in str(error.value) and "\n" not in str(error.value)


def test_address_name_and_revision_make_the_same_model():
    names = ["http://h/v1#a", "http://h/v1#b", "http://i/v1#a", "http://h/v1?revision=1#a", "http://h/v1?revision=2#a"]
    keys = [served_version(parse_address(name), parse_address(name).model) for name in names]
    assert len(set(keys)) == len(names)


# Replies

def test_a_served_model_gives_the_records_of_the_local_one(serve, asked):
    served, local = load_model(serve()), load_model("embedded")
    first, second = (sfa.evaluate(bundle, asked, max_new_tokens=20) for bundle in (served, local))
    assert first.records.drop(columns="seconds").equals(second.records.drop(columns="seconds"))
    assert first.summary["settings"]["suffix"] == second.summary["settings"]["suffix"] == ""
    assert sfa.compare(first, second).changes.lost == 0
    assert sfa.categorise(first, asked)[1]["category"].equals(sfa.categorise(second, asked)[1]["category"])
    assert (served.usage.requests, served.usage.replies) == (len(asked), len(asked)) and served.usage.reply_tokens > 12
    assert "12 requests, 12 replies" in repr(served)


def test_the_limit_of_tokens_is_the_servers_too(serve, asked):
    served, local = load_model(serve()), load_model("embedded")
    first, second = (sfa.answer(bundle, asked[:4], max_new_tokens=1, suffix="") for bundle in (served, local))
    assert [reply.truncated for reply in first] == [reply.truncated for reply in second] and first[0].truncated


def test_no_more_requests_run_at_once_than_the_bound(serve, asked, monkeypatch):
    served, now, most = open_served(serve(), concurrent=3), [0], [0]
    create = served.client.chat.completions.create

    def counted(**options):
        with served.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return create(**options)
        finally:
            with served.lock:
                now[0] -= 1

    monkeypatch.setattr(served.client.chat.completions, "create", counted)
    assert len(replies_of(served, asked, at_once=64)) == len(asked) and 1 < most[0] <= 3


def test_a_picture_that_cannot_be_decoded_costs_only_its_own_answer(serve, asked):
    from dataclasses import replace

    broken = [replace(asked[0], id="broken", document="broken", source=b"no picture"), *asked[:3]]
    found = sfa.evaluate(load_model(serve()), broken, max_new_tokens=20)
    assert found.summary["errors"] == 1 and "cannot be decoded" in found.records["error"][0]


def test_a_question_that_the_server_refuses_is_an_error_of_that_question(serve, asked):
    found = replies_of(open_served(serve(faults=["400", "413"]), tries=1), asked[:4])
    assert [found[n].error is None for n in range(4)] == [False, False, True, True]
    assert "refused the question: 400" in found[0].error and "no 400" in found[0].error


# What goes wrong

@pytest.mark.parametrize("faults", [["429", "500", "html"], ["cut"], ["slow"]])
def test_what_goes_wrong_once_is_tried_again(serve, asked, faults):
    served = open_served(serve(faults=faults), tries=6, timeout=5 if faults == ["slow"] else 600)
    found = replies_of(served, asked[:2])
    assert all(reply.error is None and reply.prediction for reply in found.values())
    assert served.usage.requests >= 2 + len(faults) and served.usage.replies == 2


@pytest.mark.parametrize("faults, words", [
    (["", "500", "500"], "says 500"), (["", "429", "429"], "says 429"), (["", "cut", "cut"], "broke off"),
    (["", "slow", "slow"], "gave no reply in 5 s"), (["", "page"], "sent no chat completion, but '<html>Welcome"),
    (["", "401"], "says 401"), (["", "404"], "says 404"), (["", "html", "html"], "says 502")])
def test_what_stays_wrong_ends_with_one_line_after_the_replies_that_came(serve, asked, faults, words):
    served, found = open_served(serve(faults=faults), tries=2, timeout=5 if "slow" in faults else 600), {}
    with pytest.raises(ServerStopped, match=words) as error:
        for place, reply in ask_all(served, asked, range(4), at_once=1, max_new_tokens=20, suffix=""):
            found[place] = reply
    assert "\n" not in str(error.value) and "1 of 4 questions were answered before" in str(error.value)
    assert list(found) == [0] and found[0].error is None


def test_a_killed_server_loses_no_reply_that_came(asked):
    command = [sys.executable, str(Path(__file__).with_name("answer_server.py")), "--dies", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        served, found = open_served(process.stdout.readline().strip(), tries=2), {}
        with pytest.raises(ServerStopped, match="5 of 12 questions were answered before"):
            for place, reply in ask_all(served, asked, range(len(asked)), at_once=1, max_new_tokens=20, suffix=""):
                found[place] = reply
    assert list(found) == list(range(5))
    local = sfa.answer(load_model("embedded"), asked[:5], max_new_tokens=20)
    assert [found[n].prediction for n in range(5)] == [reply.prediction for reply in local]


def test_an_evaluation_goes_on_where_its_server_was_killed(asked, tmp_path):
    script, kept = str(Path(__file__).with_name("answer_server.py")), tmp_path / "kept"
    options = dict(max_new_tokens=20)
    with subprocess.Popen([sys.executable, script, "--dies", "5"], stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        with pytest.raises(ServerStopped, match="5 of 12 questions were answered before"):
            sfa.evaluate(open_served(address, tries=1, concurrent=1), asked, kept=kept, **options)
    [file] = kept.glob("replies-*.jsonl")
    assert len(file.read_text().splitlines()) == 5
    port = str(parse_address(address).base.rpartition(":")[2].partition("/")[0])
    with subprocess.Popen([sys.executable, script, port], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == address
        served = open_served(address)
        found = sfa.evaluate(served, asked, kept=kept, **options)
        process.kill()
    local = sfa.evaluate(load_model("embedded"), asked, **options)
    assert served.usage.replies == 7
    assert found.records.drop(columns="seconds").equals(local.records.drop(columns="seconds"))


# What cannot be

def test_a_server_that_is_not_there_is_one_line(capsys, asked):
    for call in (load_model, model_version):
        with pytest.raises(FileNotFoundError, match="no server answers at http://127.0.0.1:9/v1 .*refused"):
            call("http://127.0.0.1:9/v1#a")
    assert main(["run", "10_baseline_eval", "-p", "model", "http://127.0.0.1:9/v1#a", "-p", "limit", "4"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sfa: no server answers at http://127.0.0.1:9/v1")


@pytest.mark.parametrize("reply, words", [
    (httpx.Response(200, text="<html>"), "gives no list of models"), (httpx.Response(200, json={}), "gives no list"),
    (httpx.Response(401), f"says 401; {KEY} is not set"), (httpx.Response(502, text="<html>"), "models says 502"),
    (httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]}), "has not one model only; it serves a, b")])
def test_an_address_of_something_else_is_one_line(monkeypatch, reply, words):
    monkeypatch.delenv(KEY, raising=False)
    reply.request = httpx.Request("GET", "http://h/v1/models")
    monkeypatch.setattr(httpx, "get", lambda url, **options: reply)
    with pytest.raises(FileNotFoundError, match=words) as error:
        load_model("http://h/v1")
    assert "\n" not in str(error.value)


def test_an_unknown_model_is_named_beside_those_there_are(serve):
    with pytest.raises(FileNotFoundError, match="has no model other; it serves embedded"):
        load_model(serve().replace("#embedded", "#other"))
    assert load_model(serve().removesuffix("#embedded")).model_id == "embedded"  # the only one


def test_what_needs_weights_is_refused_in_one_line(serve, asked, tmp_path):
    served = load_model(serve())
    config = sfa.FinetuneConfig("control", steps=1, batch_size=1)
    calls = {"inject": lambda: sfa.inject(served), "record": lambda: sfa.record(served, asked[:1]),
             "sinks": lambda: sfa.find_sink_dimensions(served, asked[:1]),
             "intervention": lambda: sfa.evaluate(served, asked, intervention=sfa.VARConfig(dimensions=(1,))),
             "finetune": lambda: sfa.finetune(served, sfa.generate(2, seed=1), config, tmp_path / "arm"),
             "devices": lambda: served.model.device}
    for name, call in calls.items():
        with pytest.raises(ValueError, match="answers through an API") as error:
            call()
        assert "\n" not in str(error.value), name
    with pytest.raises(ValueError, match="expects None, its server decides"):
        sfa.evaluate(served, asked, tiles=1)
    with pytest.raises(ValueError, match="language_bits 4, placement cpu of a served model is its server's affair"):
        load_model(served.name, language_bits=4, placement="cpu")
    assert describe_views(served).startswith("its own size as PNG") and len(memory_table(served)) == 1


def test_the_key_comes_from_the_environment_and_is_written_nowhere(serve, asked, monkeypatch):
    address = serve(key="very-secret")
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(FileNotFoundError, match=f"says 401; {KEY} is not set"):
        load_model(address)
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(FileNotFoundError, match=f"says 401; {KEY} is not accepted") as error:
        load_model(address)
    assert "wrong" not in str(error.value)
    monkeypatch.setenv(KEY, "very-secret")
    assert model_cards(parse_address(address))[0]["id"] == "embedded"
    served = load_model(address)
    found = sfa.evaluate(served, asked[:2], max_new_tokens=20)
    assert "secret" not in f"{served!r} {vars(served)} {found.summary} {found.records.to_json()}"


def test_pages_travel_pixel_by_pixel(serve, asked):
    import base64
    import io

    from sfa_core.documents.samples import Sample
    from sfa_core.models.served import data_url

    page = Image.effect_noise((33, 21), 90).convert("RGB")
    url, note = data_url(Sample("1", "1", "k", "?", ("1",), page))
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert sent.mode == "RGB" and sent.tobytes() == page.tobytes() and note == ""
