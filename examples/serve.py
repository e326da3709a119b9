"""Serve a detector: images by HTTP, detections as json, and a page to try it in a browser or on a phone.

    pip install --no-build-isolation '.[train,serve]'
    python examples/serve.py runs/mine

    curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?score_threshold=0.5'
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

``POST /predict`` takes an image as a form's file or as the body itself, and answers

    {"width": 640, "height": 480, "detections": [
        {"class_name": "cat", "label": 3, "score": 0.93, "box": [12.5, 40.1, 300.8, 420.0]}]}

with boxes ``x1, y1, x2, y2`` in pixels of the upright image, the surest first; or a status from 400 on and
``{"detail": "one sentence"}``.
``GET /about`` names the classes, and ``/docs`` describes all of it. Images are detected in one after another. Whoever
reaches the address may use it: for more than a test, put a server with passwords before it.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor, nn

import groupdetr_fast as gd
from groupdetr_fast.data.images import as_rgb, open_image
from groupdetr_fast.prediction import settings_of

try:
    import python_multipart  # noqa: F401  # which forms need
    import uvicorn
    from anyio import CapacityLimiter, to_thread
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.datastructures import UploadFile
except ImportError as error:
    sys.exit(f"error: {error}: serving needs pip install 'groupdetr_fast[serve]'")

PAGE = Path(__file__).with_suffix(".html")

# For the page that describes the addresses: FastAPI cannot see it, since both kinds of body are read by hand.
BODY = {
    "multipart/form-data": {
        "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
    },
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
}


@dataclass(frozen=True)
class Arguments:
    """What to serve, and where."""

    checkpoint: tyro.conf.Positional[Path]
    """File or folder, such as that of a run."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's, so that a phone in the same network finds it."""
    port: int = 8000
    """Port to listen on."""
    device: str | None = None
    """Where to compute; by default a GPU if there is one."""
    score_threshold: float = 0.3
    """Detections with lower scores are left out, unless the request or the page asks for others."""
    top_k: int = 100
    """Detections per image, at most."""
    max_megabytes: float = 20
    """Larger files are refused."""
    max_megapixels: float = 50
    """Larger images are refused, before they are decoded."""


def main(arguments: Arguments) -> None:
    try:
        model = gd.load_model(arguments.checkpoint, device=arguments.device)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    uvicorn.run(make_app(model, arguments), host=arguments.host, port=arguments.port)


def make_app(model: nn.Module, arguments: Arguments) -> FastAPI:
    """The application, around a model that is loaded."""
    app = FastAPI(title="groupdetr_fast", description=f"Detections of {arguments.checkpoint}.")
    one_at_a_time = CapacityLimiter(1)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/about")
    def about() -> dict[str, Any]:
        """The classes, the threshold that is used where a request names none, and how large files may be."""
        return {
            "checkpoint": arguments.checkpoint.name,
            "class_names": settings_of(model).class_names,
            "score_threshold": arguments.score_threshold,
            "max_megabytes": arguments.max_megabytes,
        }

    @app.post("/predict", openapi_extra={"requestBody": {"required": True, "content": BODY}})
    async def predict(request: Request, score_threshold: Annotated[float | None, Query(ge=0, le=1)] = None) -> Any:
        """Detections in an image."""
        content = await read_image(request, arguments.max_megabytes)
        threshold = arguments.score_threshold if score_threshold is None else score_threshold

        def detect() -> dict[str, Any]:
            pixels = decode(content, arguments.max_megapixels)
            found = gd.predict(model, pixels, score_threshold=threshold, top_k=arguments.top_k)
            return as_json(found, pixels)

        return await to_thread.run_sync(detect, limiter=one_at_a_time)

    @app.exception_handler(RequestValidationError)
    def in_one_sentence(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)

    return app


async def read_image(request: Request, max_megabytes: float) -> bytes:
    """The file in a request: the first one of a form, or the body.

    Raises:
        HTTPException: if there is none, or it is too large to be kept.
    """
    try:
        length = int(request.headers["content-length"])
    except (KeyError, ValueError):
        raise HTTPException(411, "the request does not say how long it is (Content-Length)") from None
    if length > max_megabytes * 1e6:
        if length < 10 * max_megabytes * 1e6:  # clients hear no answer while they send
            async for _ in request.stream():
                pass
        raise HTTPException(413, f"the file is too large: {length / 1e6:.1f} MB, and {max_megabytes:g} MB are allowed")
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form() as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            content = await files[0].read() if files else b""
    else:
        content = await request.body()
    if not content:
        raise HTTPException(400, "there is no image in the request: send one as a form's file, or as the body")
    return content


def decode(content: bytes, max_megapixels: float) -> Tensor:
    """Pixels of an image file, the right way up: uint8 RGB ``[3, H, W]``.

    Raises:
        HTTPException: if it is none, is damaged, or has too many pixels.
    """
    try:
        image = open_image(io.BytesIO(content))
    except Exception as error:  # decoders raise anything on damaged files
        raise HTTPException(415, f"this is no image that can be read: {error}") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise HTTPException(
            413, f"the image is too large: {megapixels:.1f} megapixels, and {max_megapixels:g} are allowed"
        )
    try:
        return as_rgb(image)
    except Exception as error:
        raise HTTPException(415, f"the image is damaged: {error}") from None


def as_json(found: dict[str, Any], pixels: Tensor) -> dict[str, Any]:
    """What ``gd.predict`` found in an image of these pixels, in numbers that json knows."""
    columns = (found["class_names"], found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist())
    names = ("class_name", "label", "score", "box")
    detections = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"width": pixels.shape[2], "height": pixels.shape[1], "detections": detections}


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
