"""examples/serve.py: a real server, asked by HTTP, and its page in a real browser."""

import base64
import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.training.checkpoint import write_weights

SERVE = Path(__file__).parents[1] / "examples" / "serve.py"
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "<b>dog</b>"}]
SIZES = {"num_queries": 5, "d_model": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small detector whose two classes have scores that are far apart."""
    torch.manual_seed(0)
    detector = "conditional_detr_r50"
    model = gd.build_model(detector, num_classes=2, num_groups=1, dim_feedforward=16, backbone="conv:8-16", **SIZES)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "backbone" not in name:
            torch.nn.init.normal_(parameter, std=0.1 if "bbox" in name else 0.5)
    torch.nn.init.zeros_(model.class_embed.bias)
    header = CheckpointHeader(
        model=detector,
        model_config=asdict(model.config),
        categories=CATEGORIES,
        labels="contiguous",
        evaluation={"eval_short_side": 32},
    )
    path = tmp_path_factory.mktemp("served") / "small.safetensors"
    write_weights(path, model.state_dict(), header.to_json())
    return path


@pytest.fixture(scope="module")
def server(checkpoint):
    """The address of a running server, which is ended afterwards."""
    for package in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = ["--max-megabytes", "0.5", "--max-megapixels", "0.1"]
    command = [sys.executable, str(SERVE), str(checkpoint), "--port", str(port), "--device", "cpu", *limits]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(process.stdout.read())
            try:
                urllib.request.urlopen(f"{address}/about").close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def picture(width=60, height=40, orientation=None):
    """A file of a picture of noise, so that no compression makes it small."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return file.getvalue()


def form(content, name="image"):
    """Body and headers of a form with one file."""
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode()
    return head + content + b"\r\n--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def ask(address, body, headers=None, query=""):
    """Status and answer of a POST."""
    headers = {"Content-Type": "application/octet-stream", **(headers or {})}
    request = urllib.request.Request(f"{address}/predict{query}", data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_detections_are_those_of_predict(server, checkpoint):
    content = picture(orientation=6)
    status, answer = ask(server, *form(content), "?score_threshold=0")
    assert status == 200
    assert (answer["width"], answer["height"]) == (40, 60)  # upright
    found = gd.predict(gd.load_model(checkpoint, device="cpu"), Image.open(io.BytesIO(content)), score_threshold=0)
    assert len(answer["detections"]) == 10
    assert [each["class_name"] for each in answer["detections"]] == found["class_names"]
    assert [each["label"] for each in answer["detections"]] == found["labels"].tolist()
    for key, name in (("score", "scores"), ("box", "boxes")):
        torch.testing.assert_close(torch.tensor([each[key] for each in answer["detections"]]), found[name])
    assert ask(server, content, query="?score_threshold=0") == (200, answer)  # the body itself
    surest = [each for each in answer["detections"] if each["score"] > 0.3]
    assert 0 < len(surest) < 10
    assert ask(server, content)[1]["detections"] == surest  # by the server's own threshold


@pytest.mark.parametrize(
    ("body", "query", "status", "message"),
    [
        (b"", "", 400, "there is no image in the request: send one as a form's file, or as the body"),
        (b"hello", "", 415, "this is no image that can be read: it is none of BMP, GIF"),
        (picture()[:2000], "", 415, "the image is damaged: "),
        (picture(400, 300), "", 413, "the image is too large: 0.1 megapixels, and 0.1 are allowed"),
        (b"0" * 600_000, "", 413, "the file is too large: 0.6 MB, and 0.5 MB are allowed"),
        (picture(), "?score_threshold=2", 422, "score_threshold: Input should be less than or equal to 1"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_one_sentence(body, query, status, message, server):
    got, answer = ask(server, body, query=query)
    assert got == status
    assert answer["detail"].startswith(message)
    assert "\n" not in answer["detail"]


def test_a_form_without_a_file_has_no_image(server):
    body = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\ntext\r\n--edge--\r\n'
    status, answer = ask(server, body, {"Content-Type": "multipart/form-data; boundary=edge"})
    assert (status, answer["detail"].partition(":")[0]) == (400, "there is no image in the request")


def test_a_missing_checkpoint_ends_in_one_sentence(tmp_path):
    pytest.importorskip("fastapi")
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    with pytest.raises(SystemExit, match=f"^error: checkpoint: there is nothing at {tmp_path}/none$"):
        serve.main(serve.Arguments(tmp_path / "none"))


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window, of the size of a phone's."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page needs chromium and chromedriver to be looked at")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": 390, "height": 780, "pixelRatio": 2}}
    )
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield running
    running.quit()


def wait_for(browser, text):
    """The page's status, once it has this text in it."""
    from selenium.webdriver.support.ui import WebDriverWait

    status = browser.find_element("id", "status")
    WebDriverWait(browser, 60).until(lambda _: text in status.text)
    return status


def colours(browser):
    """How many pixels of the canvas are of a colour that the grey image has not."""
    return browser.execute_script(
        """const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += Math.abs(data[i] - data[i + 1]) > 50;
        return count;"""
    )


def test_the_page_shows_detections_and_errors(server, browser, tmp_path):
    image = tmp_path / "grey.png"
    Image.new("L", (300, 200), 128).save(image)
    (large := tmp_path / "large.png").write_bytes(b"0" * 600_000)
    browser.get(server)
    chooser = browser.find_element("id", "file")
    chooser.send_keys(str(image))
    wait_for(browser, "of 10 detections")
    assert browser.execute_script("return [canvas.width, canvas.height]") == [1000, 667]

    def move(value):
        """The slider, and what is then left: boxes and lines of the list."""
        browser.execute_script("threshold.value = arguments[0]; threshold.dispatchEvent(new Event('input'))", value)
        return colours(browser), [each.text for each in browser.find_elements("css selector", "#list li")]

    all_boxes = move(0)
    scores = [float(line.split()[-1]) for line in all_boxes[1]]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    some_boxes, none = move(0.5), move(1)
    assert some_boxes[1] == [line for line in all_boxes[1] if float(line.split()[-1]) > 0.5]
    assert 0 < len(some_boxes[1]) < 10
    assert any(line.startswith("<b>dog</b> ") for line in all_boxes[1])  # as text
    assert all_boxes[0] > 100
    assert some_boxes[0] > 100
    assert none[0] == 0
    assert none[1] == []
    assert browser.find_element("id", "status").text == "0 of 10 detections"
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    (tmp_path / "text.png").write_text("no image")
    chooser.send_keys(str(tmp_path / "text.png"))
    status = wait_for(browser, "this is no image that can be read")
    assert status.get_attribute("class") == "error"
    assert browser.execute_script("return canvas.width") == 0

    chooser.send_keys(str(large))
    assert wait_for(browser, "The file is too large: 0.6 MB, and 0.5 MB are allowed")

    browser.execute_script(  # a file that is dropped on the page
        """const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));""",
        base64.b64encode(image.read_bytes()).decode(),
    )
    wait_for(browser, "0 of 10 detections")  # the slider stays where it is
