"""What SIGHUP reads anew: settings, tokens, certificate. What is broken stays as it was, and the log says why."""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace
from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from ai_ticket.environment import ConfigurationError, Loaded, load_again, overridden, shown
from ai_ticket.settings import variables
from ai_ticket.telemetry.logs import LEVELS
from ai_ticket.web.auth import InThread, TokenFile
from ai_ticket.web.tls import CertificateError, Profile, TlsConnections, certificate_warnings, server_context


class LiveSettings:
    """The settings, of which some can change while the service runs."""

    _log = Logger()

    def __init__(self, loaded: Loaded, put_into_force: Mapping[str, Callable[[Any], None]]):
        """@param put_into_force: for each variable that can change, what takes its new value."""
        self._loaded = loaded
        self._in_force = loaded.settings
        self._put_into_force = put_into_force

    async def reload(self, in_thread: InThread) -> None:
        """Read them again; if any can't be used, none changes."""
        try:
            new = await in_thread(lambda: load_again(self._loaded))
        except ConfigurationError as error:
            for problem in error.problems:
                self._log.error("the settings read last stay in force: {problem}", problem=problem)
            return
        changed = [
            variable
            for variable in variables().values()
            if getattr(new.settings, variable.field) != getattr(self._in_force, variable.field)
        ]
        self._warn(new, [variable.name for variable in changed if variable.name not in self._put_into_force])
        values = {
            variable.name: getattr(new.settings, variable.field)
            for variable in changed
            if variable.name in self._put_into_force
        }
        level = values.pop("LOG_LEVEL", None)
        taken = {name: value for name, value in values.items() if self._take(name, value)}
        # What changed is said while the more talkative of the two log levels is in force.
        quieter = LEVELS[new.settings.log_level] > LEVELS[self._in_force.log_level]
        if level is not None:
            taken["LOG_LEVEL"] = level
        if quieter:
            self._say(taken)
        if level is not None:
            self._take("LOG_LEVEL", level)
        if not quieter:
            self._say(taken)

    def _take(self, name: str, value: Any) -> bool:
        """Put a new value into force, if that can be done."""
        try:
            self._put_into_force[name](value)
        except ValueError as error:
            self._log.error(
                "{variable}: the value read last stays in force: {reason}", variable=name, reason=str(error)
            )
            return False
        self._in_force = replace(self._in_force, **{variables()[name].field: value})
        return True

    def _warn(self, new: Loaded, changed: list[str]) -> None:
        warnings = [warning for warning in new.warnings if warning not in self._loaded.warnings]
        warnings += overridden(new, self._put_into_force)
        warnings += [f"{name}: the new value ({new.sources[name]}) takes effect with a restart" for name in changed]
        for warning in warnings:
            self._log.warn("{warning}", warning=warning)

    def _say(self, values: Mapping[str, Any]) -> None:
        now = [f"{name} is {'not set' if value is None else shown(name, value)}" for name, value in values.items()]
        self._log.info("settings read: {changes}", changes=", ".join(now) or "nothing that can take effect has changed")


class Reloadable:
    """All that can be read anew."""

    _log = Logger()

    def __init__(
        self,
        *,
        settings: LiveSettings,
        token_file: TokenFile | None,
        tls: TlsConnections,
        certificate_file: str,
        key_file: str,
        tls_profile: Profile,
        read_certificate: Callable[[], Callable[[], None]] | None = None,
    ):
        """@param read_certificate: reads the certificate, blocking, and returns what puts it into force; by default
        it is put into force here.
        """
        self.token_file = token_file
        self._settings = settings
        self._tls = tls
        self._certificate_files = certificate_file, key_file
        self._tls_profile = tls_profile
        self._read_certificate = read_certificate or self._read_for_here
        self._one_at_a_time = DeferredLock()

    async def reload(self, in_thread: InThread) -> None:
        """Read all of it. Each stays as it was where it is broken."""
        async with self._one_at_a_time:
            await self._settings.reload(in_thread)
            if self.token_file is not None:
                await self.token_file.reload(in_thread, force=True)
            await self._reload_certificate(in_thread)

    def certificate_warnings(self, now: float) -> list[str]:
        """What is or soon will be wrong with the certificate in force. `now`: seconds since the epoch."""
        return list(certificate_warnings(self._tls.context, self._certificate_files[0], now))

    async def _reload_certificate(self, in_thread: InThread) -> None:
        try:
            put_into_force = await in_thread(self._read_certificate)
        except CertificateError as error:
            self._log.error("the certificate read last stays in force: {reason}", reason=str(error))
        else:
            put_into_force()
            self._log.info("certificate {path} read", path=self._certificate_files[0])

    def _read_for_here(self) -> Callable[[], None]:
        context = server_context(*self._certificate_files, self._tls_profile)
        return lambda: setattr(self._tls, "context", context)
