"""``GET /v1/models``: the one model that is served."""

from __future__ import annotations

import time

from litestar import get
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from edge_phi3.api.openai.schemas import Model, ModelList
from edge_phi3.api.service import Service

_STARTED = int(time.time())


@get("/v1/models", sync_to_thread=False)
def list_models(service: NamedDependency[Service]) -> ModelList:
    """List the models: one."""
    return ModelList([Model(service.pipeline.model.name, _STARTED)])


@get("/v1/models/{name:path}", sync_to_thread=False)
def show_model(name: FromPath[str], service: NamedDependency[Service]) -> Model:
    """Describe the model by its name.

    Raises:
        NotFoundException: the name is another.
    """
    known = service.pipeline.model.name
    if name.removeprefix("/") != known:
        raise NotFoundException(f"The model {name[1:61]!r} is not served here; {known!r} is.")
    return Model(known, _STARTED)
