"""Models of the hub: what is said without network, and what is left to the hub's client."""

import http.server
import re
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_detectors import model_of, processor_of

from groupdetr_fast.runs.config import ModelConfig
from groupdetr_fast.transformers_detector import hub
from groupdetr_fast.transformers_detector.build import load_pretrained
from groupdetr_fast.transformers_detector.source import read_source

REVISION = "0" * 40


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub whose port nobody listens at, and a cache that is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


@pytest.fixture
def slept(monkeypatch):
    """Pauses, which take no time."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_a_hub_that_cannot_be_reached_is_named_at_once(no_hub, slept):
    """Its client would try again for 23 seconds."""
    with pytest.raises(ValueError, match=r"cannot load 'a/b' \(the hub cannot be reached: Connection refused\)"):
        read_source("transformers:a/b")
    assert slept == [hub.SECOND_LOOK]


def test_a_hub_behind_a_firewall_that_drops_everything_is_named(slept, monkeypatch):
    """As a port whose queue of connections is full; the hub's client would try for minutes."""
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with socket.socket() as full, ExitStack() as queue:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/config.json"
        monkeypatch.setattr(hub, "hf_hub_url", lambda *_: url)
        with pytest.raises(ConnectionError, match=r"^the hub cannot be reached: Connection timed out$"):
            hub.without_hub("a/nothing-of-that-name")
    assert slept == [hub.SECOND_LOOK]


def test_names_that_no_hub_has_need_no_network(no_hub):
    with pytest.raises(ValueError, match=r"cannot load 'a/b/c' \((?!the hub)"):
        read_source("transformers:a/b/c")


def cache(folder, processor):
    """Put a model into a cache; ``processor`` is what is known of its preprocessor_config.json."""
    folder = folder / "models--a--b"
    snapshot = folder / "snapshots" / REVISION
    model_of("RTDetr").save_pretrained(snapshot)
    if processor == "cached":
        processor_of("RTDetr").save_pretrained(snapshot)
    if processor == "missing":
        for name in ("preprocessor_config.json", "processor_config.json"):
            marker = folder / ".no_exist" / REVISION / name
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


@pytest.mark.parametrize(("processor", "side"), [("cached", 64), ("missing", 640)])
def test_what_is_in_the_cache_needs_no_hub(processor, side, no_hub, slept, tmp_path):
    cache(tmp_path, processor)
    assert read_source("transformers:a/b").augmentation().eval_short_side == side
    assert load_pretrained("transformers:a/b").config.num_groups == 1
    config = ModelConfig(model="transformers:a/b", load=Path("transformers:a/b"), num_groups=1, new_class_head=True)
    assert config.build(7).config.num_classes == 7
    assert set(slept) == {hub.SECOND_LOOK}


def test_how_a_model_wants_its_images_is_not_guessed(no_hub, tmp_path):
    cache(tmp_path, "unknown")
    with pytest.raises(ValueError, match=r"cannot load 'a/b' \(the hub does not say whether it has a pre"):
        read_source("transformers:a/b")


def test_a_download_of_all_files_is_used_by_its_folder(no_hub, tmp_path):
    """``snapshot_download`` leaves links and no mark of files that the hub lacks, so that the sentence names a way."""
    cache(tmp_path, "unknown")
    folder = tmp_path / "models--a--b"
    snapshot = folder / "snapshots" / REVISION
    (folder / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = file.rename(folder / "blobs" / f"{number:040}")
        file.symlink_to(Path("../../blobs") / blob.name)
    with pytest.raises(ValueError, match="the hub does not say") as refusal:
        read_source("transformers:a/b")
    named = re.search(r"if all of its files are in the cache, give (transformers:\S+)\):", str(refusal.value)).group(1)
    assert named == f"transformers:{snapshot}"
    assert read_source(named).augmentation().eval_short_side == 640
    assert load_pretrained(named).config.num_groups == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every question with the status that its path begins with, ``slow`` after a second."""

    def do_HEAD(self):
        status = self.path.split("/")[1]
        if status == "slow":
            time.sleep(1)
        self.send_response(200 if status == "slow" else int(status))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status", ["200", "404", "503", "slow"])
def test_a_hub_that_answers_or_is_slow_is_left_to_its_client(status, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            assert hub._obstacle(f"http://127.0.0.1:{server.server_port}/{status}/config.json") is None
        finally:
            server.shutdown()


def test_a_network_that_fails_once_is_asked_again(monkeypatch):
    failures = [OSError(101, "Network is unreachable")]

    def ask(url, timeout):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub, "SECOND_LOOK", 0.0)
    assert not hub.without_hub("a/b")
    assert not failures
