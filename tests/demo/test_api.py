"""The API as programs meet it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import zlib
from pathlib import Path

import pytest
from conftest import encoded
from fastapi.testclient import TestClient
from shapes import HOSTILE, draw

import interlace.demo.app as demo
from interlace.demo.app import create_app, free_port, listen, serve
from interlace.errors import UserError

MAX_BYTES, MAX_PIXELS = 100_000, 1_000_000


@pytest.fixture(scope="module")
def client(small) -> TestClient:
    app = create_app(*small, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS, questions=["what colour is it?"])
    return TestClient(app, base_url="http://localhost:7860", raise_server_exceptions=False)


def error(reply, status: int) -> str:
    """The sentence of a reply that failed as it should: JSON, one field, no traceback."""
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    assert "Traceback" not in reply.text and 'File "' not in reply.text
    return reply.json()["error"]


# ---- what is served


def test_info_describes_columns_for_filters(client):
    info = client.get("/api/info").json()
    assert info["count"] == 64 and info["can_match"] and info["can_answer"] and info["exact_counts"]
    columns = {c["name"]: c for c in info["columns"]}
    assert {n: c["type"] for n, c in columns.items()} == {
        "shape": "text", "colour": "text", "size": "number", "warm": "boolean", "price": "number"}  # fmt: skip
    assert columns["shape"]["values"][0]["count"] == 16 and columns["shape"]["distinct"] == 4
    assert (columns["size"]["minimum"], columns["size"]["maximum"]) == (45, 75)
    assert columns["price"]["minimum"] == 4.5  # missing values do not count
    assert sum(v["count"] for v in columns["warm"]["values"]) == 64
    assert info["examples"] and info["questions"] == ["what colour is it?"]


def test_the_runs_own_evaluation_is_shown(small, tmp_path):
    run, index = small
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}
    recall = {f"R@{k}": score for k in (1, 5, 10)}
    metrics = {"retrieval": {"t2i": recall, "i2t": recall}, "split": "val", "rows": 9, "source": "shapes"}
    file = run.folder / "metrics.json"
    file.write_text(json.dumps(metrics))
    try:
        shown = TestClient(create_app(run, index), base_url="http://localhost").get("/api/info").json()["metrics"]
        assert len(shown) == 6 and shown[0]["value"] == 0.5 and shown[0]["chance"] == 0.1
        file.write_text("{ torn")  # a damaged report does not stop the demo
        assert TestClient(create_app(run, index), base_url="http://localhost").get("/api/info").json()["metrics"] == []
    finally:
        file.unlink()


def test_an_empty_index(small, tmp_path):
    from interlace.search import Index

    empty = Index.create(tmp_path / "index", small[0], {"size": "number", "colour": "text"})
    client = TestClient(create_app(small[0], empty), base_url="http://localhost")
    info = client.get("/api/info").json()
    assert info["count"] == 0 and info["examples"] == [] and info["columns"][0]["minimum"] is None
    assert client.get("/api/items").json()["items"] == []
    assert "empty" in client.post("/api/search", data={"text": "red"}).json()["hint"]


# ---- searching


def test_words_find_what_they_name(client):
    found = client.post("/api/search", data={"text": "blue triangle", "k": 2}).json()
    assert [h["name"] for h in found["hits"]] == ["Blue triangle"] * 2
    assert found["reranked"] and all(0 <= h["match"] <= 1 for h in found["hits"])
    assert found["milliseconds"] > 0 and not found["hopeless"]


def test_a_picture_finds_its_like(client):
    files = {"picture": ("mine.png", encoded(draw("square", "green", 65)), "image/png")}
    found = client.post("/api/search", data={"k": 2}, files=files).json()
    assert [h["name"] for h in found["hits"]] == ["Green square"] * 2
    assert not found["reranked"]


def test_weight_moves_from_the_words_to_the_picture(client, red_circle):
    def first(weight: float) -> str:
        data = {"text": "blue square", "weight": weight, "rerank": "false", "k": 2}
        return client.post("/api/search", data=data, files={"picture": red_circle}).json()["hits"][1]["name"]

    assert first(0) == "Blue square" and first(1) == "Red circle"


def test_like_leaves_the_item_itself_out(client):
    me = "shapes/bar#green 45"
    found = client.post("/api/search", data={"like": me, "k": 3}).json()["hits"]
    assert len(found) == 3 and me not in [h["id"] for h in found] and found[0]["name"] == "Green bar"


@pytest.mark.parametrize("where", ["size > 50 and warm = yes", "colour in (red, blue)", "price is missing"])
def test_filters_hold_for_every_hit(client, where):
    found = client.post("/api/search", data={"text": "circle", "where": where, "k": 64}).json()["hits"]
    holds = {"size": lambda a: a["size"] > 50 and a["warm"], "colo": lambda a: a["colour"] in ("red", "blue"),
             "pric": lambda a: a["price"] is None}[where[:4]]  # fmt: skip
    assert found and all(holds(h["attributes"]) for h in found)
    around = client.get("/api/items", params={"where": where, "limit": 64}).json()["items"]
    assert {i["id"] for i in around} == {h["id"] for h in found}


def test_a_wrong_filter_says_what_is_wrong(client):
    reply = client.post("/api/search", data={"text": "circle", "where": "siez > 3"})
    assert "Did you mean 'size'?" in error(reply, 422)
    assert "siez" in error(client.get("/api/items", params={"where": "siez > 3"}), 422)
    assert error(client.post("/api/search", data={"text": "x", "where": "'; drop table items; --"}), 422)


def test_nothing_found_is_said_and_not_an_error(client):
    none = client.post("/api/search", data={"text": "circle", "where": "colour = turquoise"}).json()
    assert none["hits"] == [] and none["hopeless"] and "turquoise" in none["hint"]
    words = client.post("/api/search", data={"text": "zeppelin", "mode": "text"}).json()
    assert words["hits"] == [] and words["hint"]
    unlikely = client.post("/api/search", data={"text": "zeppelin"}).json()
    assert unlikely["hopeless"] and unlikely["hint"] and unlikely["hits"]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({}, "Nothing to search for"),
        ({"text": "   "}, "Nothing to search for"),
        ({"text": "x", "k": 0}, "k"),
        ({"text": "x", "k": 100000}, "k"),
        ({"text": "x", "weight": 2}, "weight"),
        ({"text": "x", "weight": "nan"}, "weight"),
        ({"text": "x", "mode": "magic"}, "mode"),
        ({"text": "x" * 3000}, "text"),
        ({"mode": "text", "like": "shapes/bar#green 45"}, "mode"),
    ],
)
def test_wrong_requests_get_a_sentence(client, data, part):
    assert part in error(client.post("/api/search", data=data), 422)


# ---- uploads


def test_too_many_bytes_are_refused(client):
    picture = {"picture": ("big.png", b"\x89PNG" + bytes(MAX_BYTES), "image/png")}
    assert "MB" in error(client.post("/api/search", files=picture), 413)
    assert "MB" in error(client.post("/api/answer", data={"question": "what?"}, files=picture), 413)


def test_a_body_over_the_limit_is_refused_whatever_it_says_of_its_length(small, serving):
    """Over a socket: the reply arrives, and an endless body is not read to its end."""
    import httpx

    address, sent = serving(create_app(*small, max_bytes=MAX_BYTES)), 0

    def endless():  # chunked, without a Content-Length
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="picture"; filename="big.png"\r\n\r\n'
        while sent < 2_000_000_000:
            sent += 65536
            yield bytes(65536)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.WriteError):  # the server hangs up on a client that goes on and on
        assert "larger" in error(httpx.post(f"{address}/api/search", content=endless(), headers=headers), 413)
    assert sent < 100_000_000
    big = {"picture": ("big.jpg", bytes(1_000_000))}
    assert "larger" in error(httpx.post(f"{address}/api/search", files=big), 413)
    assert httpx.get(f"{address}/api/info").status_code == 200


def png_header(width: int, height: int) -> bytes:
    """A picture that promises width x height pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [1001, 30_000, 2**31 - 1])
def test_too_many_pixels_are_refused(client, side):
    picture = ("bomb.png", png_header(side, side), "image/png")
    assert "pixels" in error(client.post("/api/search", files={"picture": picture}), 413)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("page.jpg", b"<!doctype html><script>alert(1)</script>"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("empty.png", b""),
        ("zeros.png", bytes(1000)),
        ("half.png", encoded(draw("circle", "red"))[:300]),
        ("/etc/passwd", b"root:x:0:0"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(client, name, data):
    reply = client.post("/api/search", files={"picture": (name, data, "image/png")})
    assert re.search(r"cannot be used as a picture: .+\. Send a", error(reply, 415))
    assert "root:x" not in reply.text


def test_an_empty_file_field_is_no_picture(client):
    assert client.post("/api/search", data={"text": "red"}, files={"picture": ("", b"")}).status_code == 200


def test_no_path_or_address_is_opened(client, tmp_path):
    """Text where a file belongs stays text, whether it names a file or an address."""
    picture = tmp_path / "red.png"
    picture.write_bytes(encoded(draw("circle", "red")))
    for where in (str(picture), f"file://{picture}", "http://localhost:1/red.png"):
        error(client.post("/api/search", data={"picture": where}), 422)
        error(client.post("/api/search", data={"like": where}), 404)
        error(client.post("/api/answer", data={"item": where, "question": "what?"}), 404)
        error(client.get(f"/api/items/{where}/picture"), 404)


# ---- items


def test_ids_with_slashes_and_signs(client):
    for path in ("shapes%2Fbar%23green%2045", "shapes/bar%23green%2045"):
        assert client.get(f"/api/items/{path}").json()["id"] == "shapes/bar#green 45"
        for part in ("picture", "thumbnail"):
            reply = client.get(f"/api/items/{path}/{part}")
            assert reply.headers["content-type"] == "image/jpeg" and reply.content[:2] == b"\xff\xd8"


def test_ids_that_end_like_a_path(small, tmp_path):
    from shapes import pairs

    from interlace.search import Index

    index = Index.create(tmp_path / "index", small[0], {})
    row = pairs(tmp_path)[1]
    row.id = "shop/12/picture"
    index.upsert([row])
    client = TestClient(create_app(small[0], index), base_url="http://localhost")
    assert client.get("/api/items/shop/12/picture").json()["id"] == row.id
    assert client.get("/api/items/shop/12/picture/picture").headers["content-type"] == "image/jpeg"
    assert client.get("/api/items/shop/12/picture/thumbnail").headers["content-type"] == "image/jpeg"


def test_unknown_items_and_paths_are_json_404(client):
    for path in ("/api/items/nobody", "/api/items/nobody/picture", "/api/items/x%00y", "/nowhere", "/static/../app.py"):
        error(client.get(path), 404)
    error(client.get("/api/items/' OR 1=1 --"), 404)
    error(client.get("/api/search"), 405)


def test_a_missing_original_falls_back_to_its_thumbnail(client):
    gone = client.get("/api/items/shapes%2Fbar%23black%2075").json()["id"]
    assert client.get(f"/api/items/{gone.replace('#', '%23')}/picture").status_code == 200
    reply = client.post("/api/answer", data={"item": gone, "question": "what colour is it?"})
    assert reply.json()["answers"][0]["answer"] == "black"


def test_hostile_words_travel_as_data(client):
    found = client.post("/api/search", data={"text": "red circle", "k": 5}).json()["hits"]
    assert HOSTILE in [h["name"] for h in found]  # untouched: the page shows it as text, see test_page.py


# ---- answers


def test_answers_are_probabilities_over_the_closed_list(client):
    data = {"item": "shapes/square#purple 45", "question": "what colour is it?"}
    told = client.post("/api/answer", data=data).json()
    assert told["answers"][0]["answer"] == "purple" and told["n_answers"] == 14
    assert sum(a["probability"] for a in told["answers"]) + told["rest"] == pytest.approx(1)
    few = client.post("/api/answer", data={**data, "allowed": ["green", "pink"]}).json()
    assert {a["answer"] for a in few["answers"]} == {"green", "pink"}


def test_an_uploaded_picture_can_be_asked_about(client, red_circle):
    told = client.post("/api/answer", data={"question": "what shape is it?"}, files={"picture": red_circle}).json()
    assert told["answers"][0]["answer"] == "circle"


def test_wrong_questions_get_a_sentence(client, red_circle):
    item = {"item": "shapes/square#purple 45"}
    assert "question" in error(client.post("/api/answer", data={**item, "question": "  "}), 422)
    assert "question" in error(client.post("/api/answer", data=item), 422)
    assert "either" in error(client.post("/api/answer", data={"question": "what?"}), 422)
    both = client.post("/api/answer", data={**item, "question": "what?"}, files={"picture": red_circle})
    assert "either" in error(both, 422)


def test_a_failure_inside_shows_no_trace(small, monkeypatch):
    run, index = small

    class Broken(type(run)):
        def answer(self, *_, **__):
            raise RuntimeError("secret detail of /home/somebody")

    client = TestClient(create_app(Broken(run.folder), index), base_url="http://localhost")
    message = error(client.post("/api/answer", data={"item": "shapes/bar#green 45", "question": "what?"}), 500)
    assert "secret" not in message


def test_model_calls_do_not_overlap(small):
    run, index = small
    inside, most = 0, 0
    turn = threading.Lock()

    class Watched(type(run)):
        def encode_texts(self, texts):
            nonlocal inside, most
            with turn:
                inside += 1
                most = max(most, inside)
            result = super().encode_texts(texts * 200)[: len(texts)]
            with turn:
                inside -= 1
            return result

    client = TestClient(create_app(Watched(run.folder), index), base_url="http://localhost")
    ask = {"target": client.post, "args": ("/api/search",), "kwargs": {"data": {"text": "red"}}}
    asking = [threading.Thread(**ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert most == 1


# ---- who may ask


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:7860", "[::1]:7860"])
def test_this_machines_names_are_welcome(client, host):
    assert client.get("/api/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:7860", ""])
def test_foreign_host_names_are_refused(client, host):
    reply = client.get("/api/info", headers={"Host": host})
    assert reply.status_code == 400 and "run" not in reply.text


def test_another_sites_page_cannot_post(client):
    reply = client.post("/api/search", data={"text": "red"}, headers={"Sec-Fetch-Site": "cross-site"})
    assert "another site" in error(reply, 403)


def test_an_empty_token_is_none(small):
    client = TestClient(create_app(*small, token=""), base_url="http://elsewhere.example")
    assert client.get("/api/info").status_code == 400


TOKEN = "tök en+/=?&"


@pytest.fixture
def locked(small) -> TestClient:
    return TestClient(create_app(*small, token=TOKEN), base_url="http://demo.lan", raise_server_exceptions=False)


def test_without_the_token_nothing_is_told(locked):
    for path in ("/api/info", "/", "/docs", "/openapi.json", "/api/items/shapes%2Fbar%23green%2045/picture"):
        assert "token" in error(locked.get(path), 401)
    assert "token" in error(locked.post("/api/search", data={"text": "red"}), 401)
    for wrong in ("", "x", TOKEN + "x", TOKEN[:-1]):
        header = f"Bearer {wrong}".encode()
        assert locked.get("/api/info", headers={"Authorization": header}).status_code == 401
        assert locked.get("/api/info", params={"token": wrong}).status_code == 401
        assert locked.get("/api/info", headers={"Cookie": "interlace_token=" + "0" * 64}).status_code == 401
    page = locked.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401 and "token" in page.text and page.headers["content-type"].startswith("text/html")


def test_the_header_opens(locked):
    assert locked.get("/api/info", headers={"Authorization": f"Bearer {TOKEN}".encode()}).status_code == 200


def test_the_address_opens_once_and_the_cookie_after_that(locked):
    reply = locked.get("/", params={"token": TOKEN})
    assert reply.status_code == 200
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
    assert locked.get("/api/info").status_code == 200  # the client kept the cookie


def test_every_reply_carries_the_security_headers(client, locked):
    replies = [client.get("/"), client.get("/nowhere"), client.get("/static/app.js"), locked.get("/api/info"),
               client.post("/api/search", content=bytes(2_000_000)), client.post("/api/search")]  # fmt: skip
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


# ---- the API's description


def test_every_path_is_described_with_its_errors(client):
    paths = client.get("/openapi.json").json()["paths"]
    wanted = {
        "info",
        "search",
        "items",
        "answer",
        "items/{item_id}",
        "items/{item_id}/picture",
        "items/{item_id}/thumbnail",
    }
    assert set(paths) == {f"/api/{path}" for path in wanted}
    for path, verbs in paths.items():
        for operation in verbs.values():
            assert operation["description"], path
    assert {"413", "415", "422"} <= set(paths["/api/search"]["post"]["responses"])


def test_no_file_of_the_page_names_another_host():
    for file in demo.STATIC.iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", text), file
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", text), file


# ---- serving


def test_a_port_in_use_names_a_free_one(small):
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"in use.*--port (\d+)") as raised:
            serve(*small, port=port, open_browser=False)
        proposed = int(str(raised.value).rstrip(".").split()[-1])
        assert proposed != port
        listen("127.0.0.1", proposed).close()


def test_other_machines_only_with_a_token(small):
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "demo.lan"):
        with pytest.raises(UserError, match="--token"):
            serve(*small, host=host, open_browser=False)


def test_an_address_of_no_interface(small):
    with pytest.raises(UserError, match=r"192\.0\.2\.1"):
        serve(*small, host="192.0.2.1", token="x", open_browser=False)


def test_ports():
    assert 0 < free_port("127.0.0.1", 65535) < 65536
    for port in (-1, 65536):
        with pytest.raises(UserError, match="from 1 to 65535"):
            listen("127.0.0.1", port)


def test_serve_prints_its_address_and_opens_it(small, monkeypatch, capsys):
    opened: list[str] = []
    seen = threading.Event()
    monkeypatch.setattr(demo.webbrowser, "open", lambda address: (opened.append(address), seen.set()))
    started: list[demo.Server] = []

    class Stopping(demo.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            started.append(self)
            await super().startup(sockets)
            self.should_exit = True

    monkeypatch.setattr(demo, "Server", Stopping)
    serve(*small, port=0, token="a b")
    assert seen.wait(10)
    assert re.fullmatch(r"http://localhost:\d+/\?token=a%20b", opened[0]) and opened[0] in capsys.readouterr().out


def test_static_files_are_few_and_small():
    files = list(Path(demo.STATIC).iterdir())
    assert sum(f.stat().st_size for f in files) < 120_000  # the whole page, unpacked
