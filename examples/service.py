"""A classification service: POST an image, get its classes.

    pip install "smlp-deploy[cpu]" fastapi uvicorn
    SMLP_MODEL=artifacts/my-fp32.onnx uvicorn service:app --app-dir examples
    curl --data-binary @photo.jpg http://127.0.0.1:8000/classify

The model is loaded once. Requests wait until one of `SMLP_UPLOADS` (16) places is free before their body is read, so
memory does not grow with their number; a body may have `SMLP_LARGEST` (20,000,000) bytes. Images are decoded in
parallel, of very large ones only as many at once as fit into the pixels that smlp-deploy allows, and the network runs
one after the other on all cores, or on the GPU if the model is an engine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from smlp_deploy import Classifier, Prediction

LARGEST = int(os.environ.get("SMLP_LARGEST", "20000000"))
UPLOADS = int(os.environ.get("SMLP_UPLOADS", "16"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Classifier.open(os.environ["SMLP_MODEL"]) as classifier:
        app.state.classifier = classifier
        app.state.places = asyncio.Semaphore(UPLOADS)
        yield


app = FastAPI(title="smlp-deploy", lifespan=lifespan)


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """What is loaded."""
    classifier: Classifier = request.app.state.classifier
    return {"model": classifier.runner.name, "labels": len(classifier.labels)}


@app.post("/classify")
async def classify(request: Request, topk: int = 1) -> dict[str, Any]:
    """The best classes of the image in the body: 413 if it is too large, 422 with the reason if it is no image."""
    classifier: Classifier = request.app.state.classifier
    if not 1 <= topk <= len(classifier.labels):
        raise HTTPException(422, f"topk is not between 1 and {len(classifier.labels)}")
    async with request.app.state.places:
        content = await body_of(request)
        prediction = await run_in_threadpool(lambda: next(iter(classifier.classify(content, topk=topk))))
    return answer_of(prediction)


async def body_of(request: Request) -> bytes:
    """The body, read no further than it may be long."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST:
            raise HTTPException(413, f"larger than {LARGEST} bytes")
    return bytes(content)


def answer_of(prediction: Prediction) -> dict[str, Any]:
    if prediction.error:
        raise HTTPException(422, prediction.error)
    return {
        "classes": [
            {"label": score.label, "index": score.index, "probability": round(score.probability, 6)}
            for score in prediction.scores
        ]
    }
