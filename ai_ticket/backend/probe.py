"""What a model server is, learnt by GET requests alone: nothing here generates or takes a slot.

KoboldCPP tells its version at `/api/extra/version` and the rest at paths of its own; llama.cpp tells all at `/props`.
"""

from msgspec import Struct

from ai_ticket.backend.server import ModelServer, NoSuchEndpoint
from ai_ticket.errors import ApiResponseFormatError, ApiResponseStructureError, ApiServerError, DomainError

KOBOLDCPP = "koboldcpp"
LLAMACPP = "llama.cpp"
OPENAI = "openai"
KOBOLD_API = "kobold"


class ServerInfo(Struct, frozen=True):
    """What a server says of itself. None: it does not say."""

    kind: str
    version: str | None = None
    model: str | None = None
    context_length: int | None = None
    slots: int | None = None
    tools: bool | None = None


class _Version(Struct):
    result: str
    version: str | None = None
    llm: bool = True


class _Text(Struct):
    result: str


class _Number(Struct):
    value: int


class _Settings(Struct):
    n_ctx: int | None = None


class _Abilities(Struct):
    supports_tools: bool | None = None


class _Props(Struct):
    total_slots: int
    chat_template_caps: _Abilities | None = None
    model_path: str | None = None
    model_alias: str | None = None
    default_generation_settings: _Settings | None = None


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


_ABSENT = (NoSuchEndpoint, ApiResponseFormatError, ApiResponseStructureError)
"""How a server shows that it does not have a path, or means something else by it."""


async def learn(server: ModelServer, timeout: float) -> ServerInfo:
    """Ask a server what it is.

    @param timeout: for each question, in seconds.
    @raise DomainError: it can't be reached, is still loading, has no model, or is nothing that we know.
    """
    try:
        version = await server.get("/api/extra/version", _Version, timeout)
    except _ABSENT:
        return await _learn_other(server, timeout)
    if not version.llm:
        raise ApiServerError("the server has no language model loaded")
    return ServerInfo(
        KOBOLDCPP, version.version, await _model(server, timeout), await _kobold_context(server, timeout), None
    )


async def _kobold_context(server: ModelServer, timeout: float) -> int | None:
    try:
        return (await server.get("/api/extra/true_max_context_length", _Number, timeout)).value
    except _ABSENT:
        return None


async def _learn_other(server: ModelServer, timeout: float) -> ServerInfo:
    try:
        props = await server.get("/props", _Props, timeout)
    except _ABSENT:
        return await _learn_least(server, timeout)
    context = props.default_generation_settings.n_ctx if props.default_generation_settings is not None else None
    model = short_model_name(props.model_alias or props.model_path)
    # It does not refuse tools that the model's template has no words for, but leaves them out.
    tools = props.chat_template_caps.supports_tools if props.chat_template_caps is not None else None
    return ServerInfo(LLAMACPP, None, model, context, props.total_slots, tools)


async def _learn_least(server: ModelServer, timeout: float) -> ServerInfo:
    """A server that has only the OpenAI surface, or only KoboldAI's first one."""
    model = await _model(server, timeout)
    if model is not None:
        return ServerInfo(OPENAI, None, model)
    try:
        return ServerInfo(KOBOLD_API, None, (await server.get("/api/v1/model", _Text, timeout)).result)
    except _ABSENT as error:
        raise _unknown(error)


def _unknown(error: DomainError) -> DomainError:
    return ApiServerError(f"not a KoboldCPP-compatible server, as far as it tells ({error.details})")


async def _model(server: ModelServer, timeout: float) -> str | None:
    try:
        models = await server.get("/v1/models", _Models, timeout)
    except _ABSENT:
        return None
    return short_model_name(models.data[0].id) if models.data else None


def short_model_name(name: str | None) -> str | None:
    """A model's name for callers: llama.cpp calls a model by its file's path, which is nobody's business."""
    if name is None or not name.startswith(("/", "./", "~")):
        return name
    return name.rpartition("/")[2].removesuffix(".gguf")
