"""Reads the settings from the environment and the environment file, and says what is wrong with them.

The environment wins over the file. An empty value counts as unset. `KOBOLDCPP_PASSWORD_FILE` and `REDIS_URL_FILE` name
files that hold the values of their twins. All of it can be read again, from where it was at the start.
"""

import difflib
import errno
import io
import os
import stat
from collections.abc import Callable, Collection, Mapping
from typing import Any, TextIO, get_args, get_origin

import msgspec
from dotenv.parser import parse_stream
from msgspec import Struct
from msgspec.structs import replace

from ai_ticket.backend.address import parse_api_urls, parse_passwords, parse_slots
from ai_ticket.settings import MORE_SPECIFIC, Settings, Variable, bare_type, variables
from ai_ticket.telemetry.tracing_values import parse_endpoint, parse_headers, parse_pairs
from ai_ticket.tokens import parse_token_list
from ai_ticket.web.cors import parse_origins

ENV_FILE = "AI_TICKET_ENV_FILE"
FILE_TWINS = {"KOBOLDCPP_PASSWORD_FILE": "KOBOLDCPP_PASSWORD", "REDIS_URL_FILE": "REDIS_URL"}
OWN_PREFIXES = ("AI_TICKET_", "KOBOLDCPP_", "RATE_LIMIT_", "OTEL_")
LARGEST_FILE = 1_048_576

_PARSERS: dict[str, Callable[[str], object]] = {
    "CORS_ALLOW_ORIGINS": parse_origins,
    "OTEL_RESOURCE_ATTRIBUTES": parse_pairs,
    "OTEL_EXPORTER_OTLP_HEADERS": parse_headers,
    "OTEL_EXPORTER_OTLP_ENDPOINT": parse_endpoint,
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": parse_endpoint,
}
"""Texts that have a form."""

_GENERAL = {specific: general for general, specific in MORE_SPECIFIC.items()}

_BOOLEANS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


class ConfigurationError(Exception):
    """The settings can't be used. `problems` has one line each, naming the variable, its value and what is allowed."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


class Origin(Struct, frozen=True):
    """Where settings come from. A later change of the process's environment or folder makes no difference.

    `needed` says that there must be an environment file.
    """

    environ: dict[str, str]
    folder: str
    env_file: str
    needed: bool


class Loaded(Struct, frozen=True):
    """Settings in force, where each came from (by variable name), and what the operator should be told of them.

    `env_file` is what the environment file says, also where the environment overrides it.
    """

    settings: Settings
    sources: dict[str, str]
    warnings: list[str]
    env_file: dict[str, str]
    origin: Origin


def load(environ: Mapping[str, str]) -> Loaded:
    """Read and validate the settings.

    @raise ConfigurationError: one or more values, or a file that they name, can't be used.
    """
    named = environ.get(ENV_FILE, "").strip()
    return _load(Origin(dict(environ), os.getcwd(), os.path.abspath(named or ".env"), bool(named)))


def load_again(loaded: Loaded) -> Loaded:
    """Read and validate the settings as they are now in the same places. An environment file must still be there.

    @raise ConfigurationError: one or more values, or a file that they name, can't be used.
    """
    return _load(loaded.origin)


def _load(origin: Origin) -> Loaded:
    problems: list[str] = []
    from_file = _read_env_file(origin, problems)
    values = {name: (text, origin.env_file) for name, text in (from_file or {}).items()}
    values |= {name: (text, "environment") for name, text in origin.environ.items()}
    values = {name: (text.strip(), source) for name, (text, source) in values.items() if text.strip()}
    _read_file_twins(values, origin.folder, problems)

    chosen: dict[str, Any] = {}
    sources = dict.fromkeys(variables(), "default")
    for variable in variables().values():
        specific = MORE_SPECIFIC.get(variable.name, "")
        name = specific if specific in values else variable.name
        if name in values:
            text, source = values[name]
            sources[variable.name] = source if name == variable.name else f"{name} ({source})"
            try:
                chosen[variable.field] = _convert(variable, text)
            except ValueError as error:
                problems.append(problem(name, text, str(error)))
    settings = Settings(**chosen)
    if not problems:
        problems = _contradictions(settings)
    if problems:
        raise ConfigurationError(problems)
    return Loaded(
        settings=settings,
        sources=sources,
        warnings=_warnings(values, settings),
        env_file=from_file or {},
        origin=replace(origin, needed=origin.needed or from_file is not None),
    )


def overridden(loaded: Loaded, names: Collection[str]) -> list[str]:
    """One line for each of these variables that the environment file would have otherwise than the environment has."""
    found = []
    for name in names:
        ours, theirs = loaded.origin.environ.get(name), loaded.env_file.get(name, "").strip()
        if ours is not None and theirs and ours.strip() != theirs:
            ours, theirs = shown(name, ours.strip() or "nothing"), shown(name, theirs)
            found.append(f"{name}: the environment has {ours}, which overrides {theirs} in {loaded.origin.env_file}")
    return found


def problem(name: str, value: object, reason: str) -> str:
    """One line about a value that can't be used; a secret's value is not shown."""
    return f"{name}={shown(name, value, repr)}: {reason}"


def shown(name: str, value: object, write: Callable[[object], str] = str) -> str:
    """A variable's value for a person to read; not if it is a secret."""
    variable = variables().get(_GENERAL.get(name, name))
    hidden = (variable is not None and variable.secret) or "@" in str(value)  # an address with a password in it
    return "(hidden)" if hidden else write(value)


def _read_env_file(origin: Origin, problems: list[str]) -> dict[str, str] | None:
    """What the file says; None if there is none, or it can't be read."""
    path = origin.env_file
    try:
        text = read_file(path)
    except FileNotFoundError:
        if origin.needed:
            problems.append(problem(ENV_FILE, path, "no such file"))
        return None
    except (OSError, ValueError) as error:
        problems.append(problem(ENV_FILE, path, f"can't be read: {error}"))
        return None
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            problems.append(f"{path}:{binding.original.line}: not a line of the form NAME=value")
        elif binding.key is not None:
            found[binding.key] = binding.value or ""
    found.pop(ENV_FILE, None)
    return found


def read_text(path: str) -> str:
    """A small UTF-8 file's text.

    @raise OSError: it can't be read. @raise ValueError: it is too large or not UTF-8.
    """
    with open(path, encoding="utf-8-sig") as file:
        return _text(file)


def read_file(path: str) -> str:
    """A small UTF-8 file's text; at once, or never: what waits for a writer, as a named pipe does, is not read.

    @raise OSError: it can't be read, or is not a regular file. @raise ValueError: it is too large or not UTF-8.
    """
    with open(path, encoding="utf-8-sig", opener=open_regular) as file:
        return _text(file)


def open_regular(path: str, flags: int) -> int:
    """An opener for `open` that waits for nobody.

    @raise OSError: it can't be opened, or is not a regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    # The null device is how to say that there is to be nothing.
    if not stat.S_ISREG(status.st_mode) and not os.path.samestat(status, os.stat(os.devnull)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _text(file: TextIO) -> str:
    text = file.read(LARGEST_FILE + 1)
    if len(text) > LARGEST_FILE:
        raise ValueError(f"larger than {LARGEST_FILE} bytes")
    return text


def _read_file_twins(values: dict[str, tuple[str, str]], folder: str, problems: list[str]) -> None:
    for twin, name in FILE_TWINS.items():
        if twin not in values:
            continue
        path, source = values[twin]
        if name in values:
            problems.append(problem(twin, path, f"set beside {name}; only one of the two may be"))
            continue
        try:
            values[name] = (read_file(os.path.join(folder, path)).strip(), f"{twin} ({source})")
        except (OSError, ValueError) as error:
            problems.append(problem(twin, path, f"can't be read: {error}"))


def _convert(variable: Variable, text: str) -> Any:
    """@raise ValueError: the text is not a value of the variable's type and bounds."""
    plain = bare_type(variable.type)
    value: Any = text
    if plain is bool:
        value = _BOOLEANS.get(text.lower())
    elif get_origin(plain) is not None:
        value = next((allowed for allowed in get_args(plain) if allowed.lower() == text.lower()), text)
    try:
        value = msgspec.convert(value, variable.type, strict=plain not in (int, float))
    except msgspec.ValidationError:
        raise ValueError(f"must be {variable.allowed}")
    if variable.name in _PARSERS:
        _PARSERS[variable.name](value)
    return value


def _contradictions(settings: Settings) -> list[str]:
    """What is wrong with values that are each well formed."""
    found = []
    if settings.ai_ticket_auth and settings.ai_ticket_auth_token_file is None:
        given = settings.ai_ticket_auth_token
        if given is None:
            found.append(
                "AI_TICKET_AUTH_TOKEN: no token is configured; set it or AI_TICKET_AUTH_TOKEN_FILE, "
                "or AI_TICKET_AUTH=off to let anyone in"
            )
        elif not parse_token_list(given):
            found.append(problem("AI_TICKET_AUTH_TOKEN", given, "no token in it"))
    if settings.rate_limit_backend == "redis" and settings.redis_url is None:
        found.append("REDIS_URL: not set, though RATE_LIMIT_BACKEND=redis needs it (or REDIS_URL_FILE)")
    batch, queue = settings.otel_bsp_max_export_batch_size, settings.otel_bsp_max_queue_size
    if batch > queue:
        found.append(
            problem("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", batch, f"must not be more than OTEL_BSP_MAX_QUEUE_SIZE, {queue}")
        )
    if settings.otel_exporter_otlp_client_key is not None and settings.otel_exporter_otlp_client_certificate is None:
        found.append("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: not set, though OTEL_EXPORTER_OTLP_CLIENT_KEY is")
    if settings.tls_port and settings.http_port == settings.tls_port:
        found.append(problem("HTTP_PORT", settings.http_port, "must be another one than TLS_PORT"))
    try:
        ranks = parse_api_urls(settings.koboldcpp_api_url)
    except ValueError as error:
        return [*found, problem("KOBOLDCPP_API_URL", settings.koboldcpp_api_url, str(error))]
    count = sum(len(rank) for rank in ranks)
    try:
        parse_passwords(settings.koboldcpp_password, count)
    except ValueError as error:
        found.append(problem("KOBOLDCPP_PASSWORD", settings.koboldcpp_password, str(error)))
    try:
        parse_slots(settings.koboldcpp_slots, count)
    except ValueError as error:
        found.append(problem("KOBOLDCPP_SLOTS", settings.koboldcpp_slots, str(error)))
    return found


def _warnings(values: Mapping[str, tuple[str, str]], settings: Settings) -> list[str]:
    known = {*variables(), *FILE_TWINS, *_GENERAL, ENV_FILE}
    warnings = []
    for name in sorted(values):
        if name.startswith(OWN_PREFIXES) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            what = "not used, the value has no effect" if name.startswith("OTEL_") else "unknown variable"
            warnings.append(f"{name}: {what}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if "OTEL_TRACES_SAMPLER_ARG" in values and not settings.otel_traces_sampler.endswith("traceidratio"):
        warnings.append(
            f"OTEL_TRACES_SAMPLER_ARG: of no effect with OTEL_TRACES_SAMPLER={settings.otel_traces_sampler}"
        )
    return warnings
